"""Noise distributions: how a bounded sum is randomised, and the event that the accountant charges for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent
from torch import Tensor


class Noise(ABC):
    """Additive noise, calibrated to the sensitivity of what it is added to."""

    #: Ratio of the noise's scale to the sensitivity; ``None`` until something (a budget) has chosen it.
    multiplier: float | None

    @abstractmethod
    def add_(self, sums: Sequence[Tensor], sensitivity: float, multiplier: float, generator: torch.Generator) -> None:
        """Adds independent noise to every coordinate of the tensors, in place."""

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

    def add_(self, sums: Sequence[Tensor], sensitivity: float, multiplier: float, generator: torch.Generator) -> None:
        if multiplier == 0:
            return
        std = multiplier * sensitivity
        for total in sums:
            total.add_(torch.randn(total.shape, generator=generator, dtype=total.dtype, device=total.device), alpha=std)

    def event(self, multiplier: float) -> DpEvent:
        return GaussianDpEvent(multiplier) if multiplier else NonPrivateDpEvent()
