"""Noise distributions: how a bounded sum is randomised, and the event that the accountant charges for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent
from torch import Tensor

#: Coordinates that are drawn from one generator on the CPU. Making a generator takes 0.15 ms, as long as drawing 40 000
#: numbers. Several threads could draw blocks with the same result; in Python threads that was measured to be no faster,
#: because OpenMP's idle workers spin after a matrix product.
BLOCK = 2**20


def block_size(device: torch.device, coordinates: int) -> int:
    """How many coordinates are drawn from one generator."""
    return min(BLOCK, max(coordinates, 1)) if device.type == "cpu" else max(coordinates, 1)


class Noise(ABC):
    """Additive noise, calibrated to the sensitivity of what it is added to."""

    #: Ratio of the noise's scale to the sensitivity; ``None`` until something (a budget) has chosen it.
    multiplier: float | None

    @abstractmethod
    def fill_(self, out: Tensor, scale: float, generators: Callable[[int], torch.Generator]) -> None:
        """Overwrites a flat tensor with independent noise.

        Args:
            out: Contiguous, one-dimensional.
            scale: ``multiplier · sensitivity``, in units of ``out``.
            generators: The random generator of every block of `BLOCK` coordinates, by the block's number.
        """

    @abstractmethod
    def event(self, multiplier: float) -> DpEvent:
        """The privacy event of one such addition, without subsampling."""


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """``N(0, (multiplier · sensitivity)²)`` on every coordinate: the Gaussian mechanism.

    Formal guarantee: the release is a Gaussian mechanism of noise multiplier ``multiplier``, whatever the number of
    coordinates. Proof: the density depends on the sum only through its Euclidean distance, which the sensitivity
    bounds. Source: Dwork & Roth 2014, appendix A; Abadi et al. 2016.

    Args:
        multiplier: Standard deviation of the noise over the sensitivity. ``None``: chosen by `PrivacyBudget`.
            0.0 adds no noise at all: ε is infinite.
    """

    multiplier: float | None = None

    def __post_init__(self) -> None:
        if self.multiplier is not None and not 0 <= self.multiplier < math.inf:
            raise ValueError(f"GaussianNoise: multiplier must be non-negative and finite, got {self.multiplier}.")

    def fill_(self, out: Tensor, scale: float, generators: Callable[[int], torch.Generator]) -> None:
        if scale == 0:
            out.zero_()
            return
        for number, block in enumerate(out.split(block_size(out.device, len(out)))):
            block.normal_(0.0, scale, generator=generators(number))

    def event(self, multiplier: float) -> DpEvent:
        return GaussianDpEvent(multiplier) if multiplier else NonPrivateDpEvent()
