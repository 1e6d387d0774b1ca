"""Per-example gradients of one parameter, held in the form that makes their norms and weighted sums cheap.

A layer rule (`lightning_dp.gradients.rules`) turns a recorded layer call into these objects. Clipping asks them for two
things: the squared norm of every example's gradient, and a sum of the gradients weighted per example. Gradient encoding
has them materialised. Nothing here knows about clipping, noise or layers.

Notation: ``B`` examples, ``T`` positions that share the parameter (time steps, pixels), parameter shape ``(p, d)``.
Norms are accumulated in float32 or wider, whatever the precision of training.

Sources: Goodfellow 2015 (norms of outer products); Rochette et al. 2019 (convolutions); Bu et al. 2023, "Differentially
Private Optimization on Large Model at Small Cost" (ghost norms, book-keeping); Li et al. 2022 (embeddings).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_dp.gradients.precision import wide


def squared_row_norms(tensor: Tensor) -> Tensor:
    """Sum of squares over all but the first dimension, in float32 or wider: ``(B, ...) -> (B,)``."""
    flat = tensor.reshape(len(tensor), -1)
    dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(flat, dim=1, dtype=dtype).square_()


class PerExampleGradient(ABC):
    """``B`` gradients of one parameter, one per example, not necessarily in memory."""

    __slots__ = ("_norms",)
    _norms: Tensor

    def squared_norms(self) -> Tensor:
        """Squared Euclidean norm of every example's gradient, shape ``(B,)``, computed once.

        May replace the tensors held by smaller ones from which the weighted sum can still be formed.
        """
        try:
            return self._norms
        except AttributeError:
            self._norms = self._squared_norms()
            return self._norms

    @abstractmethod
    def _squared_norms(self) -> Tensor:
        """Computes the squared norms."""

    @abstractmethod
    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        """Adds ``Σ_i weights[i] · gradient_i`` to ``total``, a contiguous tensor of the parameter's shape, in float32
        or wider; ``weights`` is ``(B,)``."""

    @abstractmethod
    def materialise(self) -> Tensor:
        """All gradients, ``(B, *parameter.shape)``, in float32 or wider."""

    def write_(self, out: Tensor, scale: float) -> None:
        """Writes the gradients times ``scale`` into a tensor ``(B, *)`` with one row per example."""
        torch.mul(self.materialise().flatten(1), scale, out=out)

    @abstractmethod
    def part(self, start: int, stop: int) -> PerExampleGradient:
        """The gradients of the examples from ``start`` to before ``stop``."""

    @abstractmethod
    def without(self, examples: Tensor) -> PerExampleGradient:
        """The same gradients with those of ``examples`` (a boolean mask, ``(B,)``) replaced by exact zeros."""

    @abstractmethod
    def over_copies(self, copies: int) -> PerExampleGradient:
        """The gradients of ``B / copies`` examples, each the sum over ``copies`` consecutive rows."""


def without_rows(tensor: Tensor, examples: Tensor) -> Tensor:
    """The tensor with some examples' rows set to zero."""
    return tensor.masked_fill(examples.view(-1, *[1] * (tensor.dim() - 1)), 0)


def scaled_rows(tensor: Tensor, weights: Tensor) -> Tensor:
    """Every example's part times its weight."""
    return tensor * weights.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))


def cancelling(size: Tensor, terms: int) -> Tensor:
    """What is added to the squared norm of a sum of terms that can cancel, where the weighted sum is formed anew.

    Formal guarantee: rounding of the weighted sum, at most about ``u √terms`` times the root of ``size`` (unit roundoff
    u; Higham & Mary 2019), stays below 1/300 of the clipping norm however the terms cancel. Proof: the norm is then at
    least ``300 u √(terms · size)``, and the weight at most the clipping norm over it. A gradient of a thousand
    independent terms is measured too long by two parts in ten thousand; by more in proportion to the square of their
    number, and to how far ``size`` is above what it bounds (the taps of a kernel).

    Args:
        size: Product of the summed squares of the two factors of every term, per example.
        terms: Number of terms.
    """
    return size * (300 * torch.finfo(size.dtype).eps / 2) ** 2 * terms


class Dense(PerExampleGradient):
    """Gradients that are in memory.

    Args:
        values: ``(B, *parameter.shape)``.
    """

    __slots__ = ("values",)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def _squared_norms(self) -> Tensor:
        return squared_row_norms(self.values)

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        values = self.values.reshape(len(weights), -1).to(total.dtype)
        total.view(-1).addmv_(values.T, weights.to(total.dtype))

    def materialise(self) -> Tensor:
        return wide(self.values)

    def part(self, start: int, stop: int) -> Dense:
        return Dense(self.values[start:stop])

    def without(self, examples: Tensor) -> Dense:
        return Dense(without_rows(self.values, examples))

    def over_copies(self, copies: int) -> Dense:
        return Dense(wide(self.values).unflatten(0, (-1, copies)).sum(1))


def joined_rows(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenates along the positions ``(B, T, ...)``: norms are then those of the sum over all calls."""
    return torch.cat(list(tensors), 1)


def side_by_side(tensor: Tensor, copies: int) -> Tensor:
    """``(B · copies, T, ...) -> (B, copies · T, ...)``."""
    return tensor.reshape(-1, copies * tensor.shape[1], *tensor.shape[2:])
