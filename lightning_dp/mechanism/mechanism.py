"""The configuration of a private step, in one frozen value: clipping, noise, denoiser, augmentations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from dp_accounting import DpEvent
from torch import nn

from lightning_dp.accounting.events import Phase
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.gradients.engine import Engine, SummingEngine
from lightning_dp.mechanism.clipping import Bounding, FlatClipping
from lightning_dp.mechanism.denoising import Denoiser
from lightning_dp.mechanism.noise import NOISES, GaussianNoise, Noise


@dataclass(frozen=True)
class Mechanism:
    """All of a private step except the model: what is released, and what it costs.

    Strategy, self-check, audit and card read from this one value, so that they cannot disagree; what cannot change the
    release (engine, physical batch size) stands elsewhere. The batches are Poisson samples: with sampling rate q, a
    step costs ``event(z, q)``.

    Args:
        clipping: How contributions are bounded.
        noise: The noise.
        denoiser: What is done to the noisy gradient before the optimizer sees it; ``None``: nothing.
        augmentation_multiplicity: K, the number of augmentations of a record whose mean loss's gradient is bounded.
        secure_rng: Whether sampling and noise come from a cryptographic generator.
        public_weights: Whether the weights of a ``WeightedRandomSampler`` may be used: they do not depend on the data.

    Raises:
        TypeError, ValueError: An argument is of another kind, or two do not go together.

    Example::

        >>> from lightning_dp import FlatClipping, GaussianNoise
        >>> Mechanism(FlatClipping(1.0), GaussianNoise(1.1)).event(1.1, sampling_rate=0.01)
        PoissonSampledDpEvent(sampling_probability=0.01, event=GaussianDpEvent(noise_multiplier=1.1))
    """

    clipping: Bounding = FlatClipping(1.0)
    noise: Noise = GaussianNoise()
    denoiser: Denoiser | None = None
    augmentation_multiplicity: int = 1
    secure_rng: bool = False
    public_weights: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.clipping, Bounding):
            raise TypeError(f"clipping must be a clipping rule such as FlatClipping(1.0), got {self.clipping!r}.")
        if not isinstance(self.noise, Noise):
            raise TypeError(f"noise must be a noise such as GaussianNoise(1.0), got {self.noise!r}.")
        if self.denoiser is not None and not isinstance(self.denoiser, Denoiser):
            raise TypeError(f"denoiser must be one such as LowPassDenoiser(), or None, got {self.denoiser!r}.")
        multiplicity = self.augmentation_multiplicity
        if isinstance(multiplicity, bool) or not isinstance(multiplicity, int) or multiplicity < 1:
            raise ValueError(f"augmentation_multiplicity must be a whole number, at least 1, got {multiplicity!r}.")
        if not isinstance(self.secure_rng, bool):
            raise TypeError(f"secure_rng must be True or False, got {self.secure_rng!r}.")
        if not isinstance(self.public_weights, bool):
            raise TypeError(f"public_weights must be True or False, got {self.public_weights!r}.")
        if self.secure_rng and not isinstance(self.noise, GaussianNoise):
            raise ValueError(
                f"secure_rng=True hardens Gaussian noise, and nothing is known of {type(self.noise).__name__}. Use "
                "GaussianNoise, or leave secure_rng out."
            )

    def for_module(self, module: nn.Module) -> Mechanism:
        """The same mechanism with its clipping rule made for this module (see `Bounding.for_module`).

        Raises:
            UnsupportedModelError: The rule has no bound for one of the layers.
            PrivacyConfigurationError: The noise cannot be accounted for with this rule, or the denoiser does not know
                this noise.
        """
        bound = replace(self, clipping=self.clipping.for_module(module))
        bound._check()
        return bound

    def _check(self) -> None:
        noise, name = self.noise, type(self.noise).__name__
        if type(noise) not in NOISES.values():
            raise PrivacyConfigurationError(
                f"{name} has no entry in lightning_dp.mechanism.noise.NOISES, so that no ledger can store what it "
                "costs."
            )
        try:
            self.unsampled_event(1.0)
        except ValueError as error:
            raise PrivacyConfigurationError(f"{type(self.clipping).__name__} with {error}") from error
        if self.denoiser is not None:
            try:
                self.denoiser.check(noise)
            except ValueError as error:
                raise PrivacyConfigurationError(str(error)) from error
        if not np.isfinite(noise.density().log_moments(1.0, 2)).all():
            raise PrivacyConfigurationError(
                f"{name}: the ratio of its density and the same density shifted has no finite moment of order 2, so "
                "that no Rényi divergence bounds what it reveals. Use GaussianNoise, LaplaceNoise or StudentTNoise."
            )

    def make_engine(self, name: str, module: nn.Module) -> Engine:
        """The engine of this name for a module, which adds up a record's augmentations before they are bounded.

        Raises:
            PrivacyConfigurationError: The rule forms its sum within the backward pass, where augmentations would count
                as records of their own.
        """
        engine = self.clipping.make_engine(name, module)
        if self.augmentation_multiplicity > 1 and isinstance(engine, SummingEngine):
            raise PrivacyConfigurationError(
                f"augmentation_multiplicity={self.augmentation_multiplicity}: {type(self.clipping).__name__} forms its "
                "sum within the backward pass, where every augmentation would count as a record of its own. Use a rule "
                "that bounds per-example gradients, such as FlatClipping, or augmentation_multiplicity=1."
            )
        engine.copies = self.augmentation_multiplicity
        return engine

    def unsampled_event(self, multiplier: float) -> DpEvent:
        """The event of a step that every record takes part in: without sampling."""
        return self.noise.event(multiplier, self.clipping.magnitudes())

    def event(self, multiplier: float, sampling_rate: float) -> DpEvent:
        """The event of one step with Poisson sampling at this rate."""
        return Phase(1, sampling_rate, multiplier, self.unsampled_event).event()

    def describe(self) -> dict[str, Any]:
        """The stages in plain data: their classes and public parameters."""
        return {
            "clipping": describe(self.clipping),
            "noise": describe(self.noise),
            "denoiser": None if self.denoiser is None else describe(self.denoiser),
        }


def describe(stage: object) -> dict[str, Any]:
    """A stage of the mechanism, or a part of one, in plain data: its class and its public parameters."""

    def plain(value: Any) -> Any:
        if isinstance(value, int | float | str | list | tuple | Mapping | None):
            return value
        return describe(value)

    parameters = {f.name: plain(getattr(stage, f.name)) for f in fields(stage)} if is_dataclass(stage) else {}
    return {"class": type(stage).__name__, **parameters}
