"""Checks of Trainer, mechanism and optimizers."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.gradients.engine import Engine
from lightning_dp.mechanism.clipping import Bounding


def check_trainer(trainer: Any) -> None:
    """Refuses Trainer settings under which a Lightning batch would not be one private step, or float16 overflows."""
    module = trainer.lightning_module
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise PrivacyConfigurationError(
            "training_step(dataloader_iter) fetches batches by itself, so steps cannot be matched to samples. Take a "
            "batch instead: training_step(self, batch, batch_idx)."
        )
    if trainer.overfit_batches:
        raise PrivacyConfigurationError(
            "overfit_batches repeats the same batches, which are not Poisson samples. To train on few records, pass a "
            "torch.utils.data.Subset of them; for a quick trial, use fast_dev_run or limit_train_batches."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise PrivacyConfigurationError(
            f"The precision plugin {type(trainer.precision_plugin).__name__} scales the loss and skips steps depending "
            "on the data, which the accountant cannot see. Use precision='16-mixed', where a constant scales it, "
            "'bf16-mixed' or '32-true'."
        )
    if trainer.precision == "16-mixed" and not module.automatic_optimization:
        raise PrivacyConfigurationError(
            "precision='16-mixed' with manual optimization: losses that no record reaches would have no scale. Use "
            "'bf16-mixed' or '32-true'."
        )
    if trainer.precision == "16-true":
        raise PrivacyConfigurationError(
            "precision='16-true' overflows in per-example norms and noise. Use '16-mixed', 'bf16-mixed' or '32-true'."
        )


def check_precision(trainer: pl.Trainer, clipping: Bounding) -> None:
    """Refuses precisions in which a rule's sums are rounded by more than its bound."""
    if not clipping.allows_low_precision and str(trainer.precision) not in ("32-true", "64-true"):
        raise PrivacyConfigurationError(
            f"precision='{trainer.precision}' with {type(clipping).__name__}: autograd adds up the batch in low "
            "precision, and rounds the sum by more than one record may move it. Use precision='32-true', or a rule "
            "that adds up in float32 (FlatClipping)."
        )


def check_no_accumulation(trainer: pl.Trainer) -> None:
    """Refuses accumulation that changes within a fit: the batch size decides the sampling rate, and so ε."""
    if trainer.accumulate_grad_batches != 1:
        raise PrivacyConfigurationError(
            f"accumulate_grad_batches became {trainer.accumulate_grad_batches} within the fit "
            "(GradientAccumulationScheduler): the size of the logical batch decides the sampling rate, and so ε. Give "
            "Trainer(accumulate_grad_batches=…) one number."
        )


def check_optimizers(trainer: pl.Trainer, engine: Engine) -> None:
    """Refuses several optimizers, LBFGS, and an optimizer whose parameters are not exactly the engine's."""
    optimizers = trainer.strategy.optimizers
    if len(optimizers) != 1:
        raise PrivacyConfigurationError(
            f"configure_optimizers returned {len(optimizers)} optimizers; one private step feeds exactly one. For "
            "several (GANs), set self.automatic_optimization = False, and step them in training_step."
        )
    [optimizer] = optimizers
    if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
        raise PrivacyConfigurationError(
            "LBFGS evaluates the gradient several times per step on one batch, each a further release. Use a "
            "first-order optimizer (SGD, Adam, …)."
        )
    optimized = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    bounded = {id(p): name for name, p in engine.parameters.items()}
    foreign = [tuple(p.shape) for key, p in optimized.items() if key not in bounded]
    if foreign:
        raise PrivacyConfigurationError(
            f"The optimizer holds parameters that are not (or no longer) the module's, of shapes {foreign}: they would "
            "be trained without privacy or not at all. Create the optimizer in configure_optimizers from "
            "self.parameters(), after all layers exist (adapters injected later, or layers made anew in "
            "configure_model, are other objects)."
        )
    missing = [name for key, name in bounded.items() if key not in optimized]
    if missing:
        raise PrivacyConfigurationError(
            f"Trainable parameters that the optimizer does not hold: {missing}. They would take a share of the "
            "clipping norm for nothing. Give them to the optimizer, or freeze them with requires_grad_(False)."
        )


#: Above it, ε says little; above it, noise drowns a gradient of few records; below it, a batch is hardly one.
_LARGE_EPSILON, _LARGE_NOISE, _SMALL_BATCH = 20.0, 1.0, 2.0


def warn_about_strength(epsilon: float, multiplier: float, expected_batch_size: float) -> None:
    """Warns of a target that protects little, and of noise that no gradient will show through.

    Args:
        epsilon: The target; infinite ones are left alone.
        multiplier: Noise over sensitivity.
        expected_batch_size: q·N.
    """
    if _LARGE_EPSILON < epsilon < math.inf:
        rank_zero_warn(
            f"ε = {epsilon:g} promises little: what an attacker believes of a record may change by a factor of "
            f"e^{epsilon:g}. Usual targets are 1 to 10."
        )
    if multiplier / expected_batch_size > _LARGE_NOISE:
        rank_zero_warn(
            f"The noise on every coordinate of the mean gradient ({multiplier:.3g} · C / {expected_batch_size:g}) is "
            "larger than the norm C that a record is clipped to: the model will hardly learn. Give the loader a larger "
            "batch size (it costs time, and little ε), train fewer steps, or allow a larger ε."
        )
    elif expected_batch_size < _SMALL_BATCH:
        rank_zero_warn(
            f"The expected batch size is {expected_batch_size:g}: each step adds the noise of a whole step to the "
            "gradient of hardly one record. Batches of hundreds of records cost time, and little ε."
        )


def warn_about_delta(delta: float, num_records: int) -> None:
    """Warns of δ ≥ 1/N, which allows a mechanism that publishes one record at random."""
    if delta >= 1 / num_records:
        rank_zero_warn(
            f"delta={delta:g} is not below 1/N = {1 / num_records:.3g} for the {num_records} records of the train set: "
            "at such a δ, publishing a whole record chosen at random would count as private. Choose a smaller one."
        )
