"""Noise distributions: how a bounded sum is randomised, and the event that the accountant charges for it.

A new one is a class here, with a sampler and the moments of its likelihood ratio, and an entry in `NOISES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent
from torch import Tensor

from lightning_dp.accounting.events import Magnitudes, ShiftedNoiseDpEvent
from lightning_dp.accounting.moments import Density, GaussianDensity, LaplaceDensity, StudentTDensity

#: Coordinates that are drawn from one generator on the CPU. Making a generator takes 0.15 ms, as long as drawing 40 000
#: numbers. Several threads could draw blocks with the same result; in Python threads that was measured to be no faster,
#: because OpenMP's idle workers spin after a matrix product.
BLOCK = 2**20


#: The same on other devices: enough to occupy all of one, and half of what processes add up at once.
DEVICE_BLOCK = 2**22


Generators = Callable[[int], torch.Generator | np.random.Generator]


#: Gaussian numbers that are added up to one, when the generator is secure.
_SUMMANDS = 4


#: Secure numbers that are drawn at once.
_SECURE_CHUNK = 2**16


def block_size(device: torch.device) -> int:
    """How many coordinates are drawn from one generator."""
    return BLOCK if device.type == "cpu" else DEVICE_BLOCK


class Noise(ABC):
    """Additive noise, independent on every coordinate, calibrated to the sensitivity of what it is added to."""

    @property
    @abstractmethod
    def multiplier(self) -> float | None:
        """Ratio of the noise's scale to the sensitivity; ``None`` until something (a budget) has chosen it."""

    @abstractmethod
    def fill_(self, out: Tensor, scale: float, generators: Generators) -> None:
        """Overwrites a flat tensor with independent noise.

        Args:
            out: Contiguous, one-dimensional.
            scale: ``multiplier · sensitivity``, in units of ``out``.
            generators: The random generator of every block of `block_size` coordinates, by the block's number.
        """

    @abstractmethod
    def std(self) -> float:
        """Standard deviation at scale 1; infinity when there is none."""

    @abstractmethod
    def density(self) -> Density:
        """The distribution on one coordinate, at scale 1."""

    @abstractmethod
    def event(self, multiplier: float, magnitudes: Magnitudes | None = None) -> DpEvent:
        """The privacy event of one such addition, without subsampling.

        Args:
            multiplier: Scale of the noise over the sensitivity.
            magnitudes: What is known of a record's contribution besides its norm.

        Raises:
            ValueError: The noise cannot be accounted for from the norm alone, and no more is known.
        """


class CoordinatewiseNoise(Noise):
    """Noise whose cost depends on how a record's contribution is spread over the coordinates, not on its norm alone."""

    scale: float | None

    @property
    def multiplier(self) -> float | None:
        return self.scale

    def event(self, multiplier: float, magnitudes: Magnitudes | None = None) -> DpEvent:
        if not multiplier:
            return NonPrivateDpEvent()
        if magnitudes is None:
            raise ValueError(
                f"{type(self).__name__}: what this noise hides depends on the size of every coordinate, and a bound on "
                "the norm says nothing about those. Use clipping=GradientEncoding(…), or GaussianNoise."
            )
        return ShiftedNoiseDpEvent(self.density(), float(multiplier), magnitudes)


def _blocks(out: Tensor, generators: Generators) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Blocks with their generators, which are torch's: `Mechanism` allows secure ones with `GaussianNoise` only."""
    for number, block in enumerate(out.split(block_size(out.device))):
        generator = generators(number)
        assert isinstance(generator, torch.Generator)
        yield block, generator


def hardened_gaussian_(out: Tensor, scale: float, generator: np.random.Generator) -> None:
    """Overwrites a flat tensor with Gaussian noise, every number of which is a sum of four, over two.

    What is claimed: a number of double precision that a library computes from a Gaussian sampler has few preimages, and
    its low bits tell some results from others (Mironov 2012); of a sum of four draws, the preimages can no longer be
    searched (Holohan & Braghin 2021, "Secure Random Sampling in Differential Privacy"). The distribution is
    exactly the same. What is not: the noise is rounded to the tensor's precision and added in floating point, so that
    the release is not a discrete mechanism with an exact ε (Haney et al. 2022); nothing is claimed about timing.
    """
    for chunk in out.split(_SECURE_CHUNK):
        drawn = generator.standard_normal((_SUMMANDS, len(chunk))).sum(0)
        chunk.copy_(torch.from_numpy(drawn * (scale / math.sqrt(_SUMMANDS))))


def _check_scale(noise: str, name: str, scale: float | None) -> None:
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"{noise}: {name} must be non-negative and finite, got {scale}.")


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """``N(0, (multiplier · sensitivity)²)`` on every coordinate: the Gaussian mechanism.

    Formal guarantee: the release is a Gaussian mechanism of noise multiplier ``multiplier``, whatever the number of
    coordinates. Proof: the density depends on the sum only through its Euclidean distance, which the sensitivity
    bounds. Source: Dwork & Roth 2014, appendix A; Abadi et al. 2016.

    Args:
        multiplier: Standard deviation of the noise over the sensitivity. ``None``: chosen by `PrivacyBudget`.
            0.0 adds no noise at all: ε is infinite.

    Raises:
        ValueError: The multiplier is negative or not finite.
    """

    multiplier: float | None = None

    def __post_init__(self) -> None:
        _check_scale("GaussianNoise", "multiplier", self.multiplier)

    def fill_(self, out: Tensor, scale: float, generators: Generators) -> None:
        if scale == 0:
            out.zero_()
            return
        for number, block in enumerate(out.split(block_size(out.device))):
            generator = generators(number)
            if isinstance(generator, torch.Generator):
                block.normal_(0.0, scale, generator=generator)
            else:
                hardened_gaussian_(block, scale, generator)

    def std(self) -> float:
        return 1.0

    def density(self) -> Density:
        return GaussianDensity()

    def event(self, multiplier: float, magnitudes: Magnitudes | None = None) -> DpEvent:
        return GaussianDpEvent(multiplier) if multiplier else NonPrivateDpEvent()


@dataclass(frozen=True)
class LaplaceNoise(CoordinatewiseNoise):
    """Laplace noise, ``f(x) ∝ exp(-|x| / b)`` with ``b = scale · sensitivity``, on every coordinate.

    Formal guarantee: see `ShiftedNoiseDpEvent`; for a rule that bounds every coordinate (`GradientEncoding`).

    Args:
        scale: b over the sensitivity (a Euclidean norm). ``None``: chosen by `PrivacyBudget`. 0.0 adds no noise.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        _check_scale("LaplaceNoise", "scale", self.scale)

    def fill_(self, out: Tensor, scale: float, generators: Generators) -> None:
        """A difference of two independent exponential variates."""
        if scale == 0:
            out.zero_()
            return
        for block, generator in _blocks(out, generators):
            other = torch.empty_like(block).exponential_(generator=generator)
            block.exponential_(generator=generator).sub_(other).mul_(scale)

    def std(self) -> float:
        return math.sqrt(2)

    def density(self) -> Density:
        return LaplaceDensity()


@dataclass(frozen=True)
class StudentTNoise(CoordinatewiseNoise):
    """Student's t, ``f(x) ∝ (1 + (x/s)²/df)^(-(df+1)/2)`` with ``s = scale · sensitivity``, on every coordinate.

    Formal guarantee: see `ShiftedNoiseDpEvent`; for a rule that bounds every coordinate (`GradientEncoding`).
    Source: Nasr, Shokri & Houmansadr 2020, "Improving Deep Learning with Differential Privacy using Gradient Encoding
    and Denoising", section 3; they use 9 degrees of freedom.

    Args:
        df: Degrees of freedom, from 1 to 10 000. At 2 or fewer the noise has no standard deviation.
        scale: s over the sensitivity (a Euclidean norm). ``None``: chosen by `PrivacyBudget`. 0.0 adds no noise.
    """

    df: float = 9.0
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.df <= 1e4:
            raise ValueError(
                f"StudentTNoise: df must lie between 1 (below, noise overflows single precision) and 10 000 (beyond, "
                f"it is GaussianNoise), got {self.df}."
            )
        _check_scale("StudentTNoise", "scale", self.scale)

    def fill_(self, out: Tensor, scale: float, generators: Generators) -> None:
        """``√(df · (exp(2E/df) - 1)) · cos(2πU)`` with E exponential and U uniform: Bailey 1994, "Polar generation of
        random variates with the t-distribution", with ``E = -log`` of his uniform variate."""
        if scale == 0:
            out.zero_()
            return
        for block, generator in _blocks(out, generators):
            radius = torch.empty_like(block).exponential_(self.df / 2, generator=generator)
            radius.expm1_().mul_(self.df).sqrt_().mul_(scale)
            block.uniform_(0.0, 2 * math.pi, generator=generator).cos_().mul_(radius)

    def std(self) -> float:
        return math.sqrt(self.df / (self.df - 2)) if self.df > 2 else math.inf

    def density(self) -> Density:
        return StudentTDensity(self.df)


def with_multiplier(noise: Noise, multiplier: float) -> Noise:
    """The same distribution with another ratio of scale to sensitivity."""
    name = "multiplier" if isinstance(noise, GaussianNoise) else "scale"
    return replace(noise, **{name: multiplier})  # type: ignore[type-var]


#: All kinds, by name.
NOISES: dict[str, type[Noise]] = {
    "gaussian": GaussianNoise,
    "laplace": LaplaceNoise,
    "student_t": StudentTNoise,
}
