"""Clipping rules: from per-example gradient norms to per-example weights, each with the sensitivity it guarantees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from dp_accounting import NeighboringRelation
from torch import Tensor


class Clipping(ABC):
    """Weights ``w_i`` such that one record changes ``Σ_i w_i g_i`` by at most `sensitivity`."""

    @abstractmethod
    def weights(self, norms: Tensor) -> Tensor:
        """Weights ``(B,)`` for per-example gradients with these Euclidean norms ``(B,)``, all finite."""

    @abstractmethod
    def sensitivity(self, neighboring_relation: NeighboringRelation) -> float:
        """The most that the bounded sum moves, in Euclidean norm, between neighbouring batches."""


def _bounded_records_sensitivity(bound: float, neighboring_relation: NeighboringRelation) -> float:
    """Sensitivity of a sum whose every term has norm at most ``bound`` and depends on its own record alone.

    Proof: adding or removing a record adds or removes one term; replacing one does both (triangle inequality).
    """
    if neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
        return bound
    if neighboring_relation is NeighboringRelation.REPLACE_ONE:
        return 2 * bound
    raise ValueError(f"Unknown neighboring relation: {neighboring_relation}.")


@dataclass(frozen=True)
class FlatClipping(Clipping):
    """Scales every example's gradient, over all trainable parameters jointly, to a norm of at most ``max_norm``.

    Formal guarantee: ``‖w_i g_i‖ ≤ max_norm``, so that one record moves the sum by at most ``max_norm``
    (add-or-remove), or ``2 · max_norm`` (replace-one).
    Proof: ``w_i = min(1, max_norm / ‖g_i‖)``, a function of record i alone.
    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.

    Args:
        max_norm: Clipping norm C, in units of the gradient's Euclidean norm.
    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < float("inf"):
            raise ValueError(f"FlatClipping: max_norm must be positive and finite, got {self.max_norm}.")

    def weights(self, norms: Tensor) -> Tensor:
        return torch.where(norms > self.max_norm, self.max_norm / norms, torch.ones_like(norms))

    def sensitivity(self, neighboring_relation: NeighboringRelation) -> float:
        return _bounded_records_sensitivity(self.max_norm, neighboring_relation)
