"""The arguments of private training, spelled out once."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dp.gradients.engines import ENGINES
from lightning_dp.mechanism.clipping import Bounding, FlatClipping
from lightning_dp.mechanism.denoising import Denoiser
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.noise import GaussianNoise, Noise


@dataclass(frozen=True)
class PrivacyOptions:
    """Options that cannot change ε; see `privacy_options` for what each of them does.

    Raises:
        ValueError, TypeError: An option has a value out of its range, or of another type.
    """

    max_physical_batch_size: int | None = None
    engine: str = "bookkeeping"
    loss_reduction: str = "mean"
    self_check: bool = True
    seed: int | None = None
    journal: bool = True
    per_record_means: bool = True
    repair: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {ENGINES}, got {self.engine!r}.")
        if self.loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {self.loss_reduction!r}.")
        for name in ("self_check", "journal", "per_record_means", "repair"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        for name, least in (("max_physical_batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be a whole number or None, got {value!r}.")
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, or None, got {value}.")


def check_names(where: str, options: Mapping[str, Any]) -> None:
    """Refuses names that are no argument of `privacy_options`.

    Raises:
        TypeError: There is no such option; the message names the nearest one.
    """
    known = list(inspect.signature(privacy_options).parameters)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise TypeError(f"{where} has no option {name!r}: {hint}")


def _made(kind: Callable[[float], Any], value: Any) -> Any:
    """What a number stands for; anything else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return kind(value) if is_number else value


def privacy_options(
    clipping: Bounding | float = FlatClipping(1.0),
    noise: Noise | float = GaussianNoise(),
    denoiser: Denoiser | None = None,
    max_physical_batch_size: int | None = None,
    engine: str = "bookkeeping",
    loss_reduction: str = "mean",
    self_check: bool = True,
    seed: int | None = None,
    journal: bool = True,
    secure_rng: bool = False,
    augmentation_multiplicity: int = 1,
    per_record_means: bool = True,
    repair: bool = False,
    public_weights: bool = False,
) -> tuple[Mechanism, PrivacyOptions]:
    """Checks the arguments of private training, and parts them into what decides ε and what cannot change it.

    Args:
        clipping: How contributions are bounded. A number is the norm of a `FlatClipping`.
        noise: The noise. Without a multiplier, `PrivacyBudget` chooses one. A number is the multiplier of a
            `GaussianNoise`.
        denoiser: What is done to the noisy gradient before the optimizer sees it; ``None``: nothing.
        max_physical_batch_size: The most examples that are loaded and pass through the model at once, every
            augmentation counted; the result does not depend on it. A larger sample comes in parts, each collated and
            transferred by itself; ``on_train_batch_start`` and ``on_train_batch_end`` see the first. ``None``: the
            whole logical batch; with ``accumulate_grad_batches``, the loader's batch size.
        engine: ``"bookkeeping"``, fast, for layers that have a rule; ``"per_example"``, slow, for any.
        loss_reduction: Whether the loss that ``training_step`` returns is a ``"mean"`` or a ``"sum"`` over examples.
        self_check: Whether the training step is examined before the first private step: whether examples influence one
            another, and whether the engine sees every gradient.
        seed: Makes sampling and noise reproducible, for tests and debugging. **The guarantee then holds only while the
            seed is secret.** `seed_everything` has no influence on either. Steps that a crash has lost are charged and
            not repeated: the resumed run draws what follows them.
        journal: Whether every step is written to ``privacy_journal.jsonl``, beside the logs, before its result is used,
            so that steps that a crash loses are charged when training is resumed.
        secure_rng: Whether sampling and noise come from a cryptographic generator, and Gaussian noise is hardened
            against attacks on its floating-point numbers (see `hardened_gaussian_` in
            `lightning_dp.mechanism.noise` for what that claims). Slower; needs ``pip install 'lightning-dp[secure]'``.
        augmentation_multiplicity: How many times, K, every record of a batch is loaded, to be augmented anew each time
            by the data set or by ``on_after_batch_transfer``. What is bounded is the gradient of the record's mean loss
            over the K: sensitivity, noise and ε are those of ``K = 1``. The batch that ``training_step`` sees has K
            rows per record, one after another: collation, transfer hooks and ``take_examples`` must keep their order,
            which the self-check looks at. Source: De et al. 2022, section 3.2, "Unlocking High-Accuracy Differentially
            Private Image Classification through Scale".
        per_record_means: Whether a cross-entropy that is a mean over the batch's targets, weighted by class or without
            those that are ignored, is understood as the mean over records of each record's own mean. Without, such
            losses are refused: what they divide by depends on the other records.
        repair: Whether layers that mix the records of a batch are exchanged before training: GroupNorm for BatchNorm,
            see `lightning_dp.repair`.
        public_weights: A declaration: the weights of the loader's ``WeightedRandomSampler`` say nothing about the
            records, because they do not come from them (class counts of the train set do; those of a census do not).
            Then record i joins each batch with a probability in proportion to its weight, and ε is that of the
            likeliest record. Without the declaration, such a sampler is refused.

    Returns:
        The mechanism (clipping, noise, denoiser, multiplicity, generator), and the other options.

    Raises:
        TypeError, ValueError: An argument has another type, is out of its range, or does not go together with another.
    """
    if secure_rng and seed is not None:
        raise ValueError("secure_rng=True draws its own secret: leave seed out.")
    mechanism = Mechanism(
        _made(FlatClipping, clipping),
        _made(GaussianNoise, noise),
        denoiser,
        augmentation_multiplicity,
        secure_rng,
        public_weights,
    )
    options = PrivacyOptions(
        max_physical_batch_size, engine, loss_reduction, self_check, seed, journal, per_record_means, repair
    )
    if max_physical_batch_size is not None and max_physical_batch_size < augmentation_multiplicity:
        raise ValueError(
            f"max_physical_batch_size={max_physical_batch_size} is less than augmentation_multiplicity="
            f"{augmentation_multiplicity}: all augmentations of a record pass through the model together."
        )
    return mechanism, options
