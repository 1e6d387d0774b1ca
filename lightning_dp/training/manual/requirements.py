"""What manual optimization needs of mechanism, options and optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism.clipping import Clipping
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.noise import GaussianNoise
from lightning_dp.torch_api import has_gradient_hooks
from lightning_dp.training.manual.rehearsal import parameters_of
from lightning_dp.training.options import PrivacyOptions


def check_configuration(mechanism: Mechanism, options: PrivacyOptions, processes: int) -> None:
    """Refuses what manual optimization does not go together with.

    Raises:
        PrivacyConfigurationError: With what to use instead.
    """
    problem = ""
    if processes > 1:
        problem = "several processes: train on one device"
    elif not options.self_check:
        problem = "self_check=False: which optimizers meet records is found by the self-check"
    elif options.engine != "bookkeeping":
        problem = f"engine='{options.engine}', which calls training_step once per record: use 'bookkeeping'"
    elif mechanism.augmentation_multiplicity > 1:
        problem = "augmentation_multiplicity: augment each record once"
    elif options.max_physical_batch_size is not None:
        problem = "max_physical_batch_size: training_step takes its steps on the whole batch; make that smaller"
    elif options.loss_reduction != "mean":
        problem = "loss_reduction='sum': pass manual_backward the mean over the batch"
    elif mechanism.denoiser is not None:
        problem = f"{type(mechanism.denoiser).__name__}, which follows one gradient from step to step"
    elif mechanism.clipping.initial_state() or not isinstance(mechanism.clipping, Clipping):
        problem = f"{type(mechanism.clipping).__name__}: use FlatClipping, PerLayerClipping or AutomaticClipping"
    elif not isinstance(mechanism.noise, GaussianNoise):
        problem = f"{type(mechanism.noise).__name__}: use GaussianNoise, of which releases share one event"
    if problem:
        raise PrivacyConfigurationError(
            f"Manual optimization (automatic_optimization=False) does not go together with {problem}."
        )


def check_optimizers(module: pl.LightningModule, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
    """Refuses parameters that several optimizers hold, or none, and optimizers that need several gradients."""
    held: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
            raise PrivacyConfigurationError(
                "LBFGS evaluates the gradient several times per step on one batch, each a further release. Use a "
                "first-order optimizer (SGD, Adam, …)."
            )
        for parameter in parameters_of(optimizer):
            if held.setdefault(id(parameter), number) != number:
                raise PrivacyConfigurationError(
                    f"Optimizers {held[id(parameter)]} and {number} hold the same parameter. Give every parameter "
                    "to one optimizer."
                )
    if (backward := type(module).backward) is not pl.LightningModule.backward:
        raise PrivacyConfigurationError(
            f"{backward.__qualname__}: with manual optimization, a backward of the module's own would see gradients "
            "without noise. Leave it out."
        )
    hooked = [n for n, p in module.named_parameters() if has_gradient_hooks(p)]
    if hooked:
        raise PrivacyConfigurationError(
            f"Parameters {hooked[:4]} have gradient hooks, which would see gradients without noise: remove them, and "
            "look at p.grad in on_before_optimizer_step, where the noise is in."
        )
    if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in schedulers):
        raise PrivacyConfigurationError(
            "ReduceLROnPlateau with manual optimization: which metric training_step gives it is not known, and one of "
            "the train set has no noise. Use a schedule by steps or epochs."
        )
    own = {id(p): name for name, p in module.named_parameters()}
    if foreign := [key for key in held if key not in own]:
        raise PrivacyConfigurationError(
            f"The optimizers hold {len(foreign)} parameters that are not (or no longer) the module's. Create them "
            "in configure_optimizers, from self.parameters() or those of its layers."
        )
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise PrivacyConfigurationError(
            f"Trainable parameters that no optimizer holds: {missing[:4]}. Give them to one, or freeze them with "
            "requires_grad_(False)."
        )
