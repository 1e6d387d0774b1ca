"""Per-example gradients of one parameter, held in the form that makes their norms and weighted sums cheap.

A layer rule (`lightning_dp.layers`) turns what was recorded of a layer into these objects; the pipeline asks them for
two things only: the squared norm of every example's gradient, and a sum of the gradients weighted per example. Nothing
here knows about clipping, noise or layers.

Notation: ``B`` examples, ``T`` positions that share the parameter (time steps, pixels), parameter shape ``(p, d)``.
Norms are accumulated in float32 or wider, whatever the precision of training.

Sources: Goodfellow 2015 (norms of outer products); Rochette et al. 2019 (convolutions); Bu et al. 2023, "Differentially
Private Optimization on Large Model at Small Cost" (ghost norms, book-keeping); Li et al. 2022 (embeddings).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is already that wide."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _squares(tensor: Tensor) -> Tensor:
    """Sum of squares over all but the first dimension, in float32 or wider: ``(B, ...) -> (B,)``."""
    flat = tensor.reshape(len(tensor), -1)
    dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(flat, dim=1, dtype=dtype).square_()


class PerExampleGradient(ABC):
    """``B`` gradients of one parameter, one per example, not necessarily in memory."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """Squared Euclidean norm of every example's gradient, shape ``(B,)``; never below the true value by more than
        the rounding of one multiplication."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``Σ_i weights[i] · gradient_i`` in the parameter's shape, for ``weights`` of shape ``(B,)``."""

    @abstractmethod
    def materialise(self) -> Tensor:
        """All gradients, ``(B, *parameter.shape)``."""

    @abstractmethod
    def zero_(self, examples: Tensor) -> PerExampleGradient:
        """The same gradients with those of ``examples`` (a boolean mask, ``(B,)``) replaced by exact zeros."""


def _masked(tensor: Tensor, examples: Tensor) -> Tensor:
    return tensor.masked_fill(examples.view(-1, *[1] * (tensor.dim() - 1)), 0)


@dataclass(frozen=True, slots=True)
class Dense(PerExampleGradient):
    """Gradients that are in memory: ``values`` of shape ``(B, *parameter.shape)``."""

    values: Tensor

    def squared_norms(self) -> Tensor:
        return _squares(self.values)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        values = wide(self.values)
        return (weights.to(values.dtype) @ values.reshape(len(values), -1)).view(values.shape[1:])

    def materialise(self) -> Tensor:
        return wide(self.values)

    def zero_(self, examples: Tensor) -> Dense:
        return Dense(_masked(self.values, examples))


@dataclass(frozen=True, slots=True)
class OuterProducts(PerExampleGradient):
    """Gradients that are sums of outer products, ``Σ_t left[i, t] right[i, t]ᵀ``: every linear map.

    Args:
        left: Upstream gradients, ``(B, T, p)``.
        right: Inputs, ``(B, T, d)``.
        shape: The parameter's shape, ``p · d`` elements in the order ``(p, d)``.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    def squared_norms(self) -> Tensor:
        """Three exact ways; shapes decide.

        ``T = 1``: ``‖l rᵀ‖² = ‖l‖² ‖r‖²``. Else ``‖LᵀR‖_F² = Σ_ts (LLᵀ)_ts (RRᵀ)_ts`` when ``2T² ≤ p·d``, or the
        gradients themselves, a block of examples at a time.
        """
        _, steps, p = self.left.shape
        d = self.right.shape[2]
        if steps == 1:
            return _squares(self.left) * _squares(self.right)
        if 2 * steps * steps <= p * d:
            return self._squared_norms_by_gram()
        return _squares(self.materialise())

    def _squared_norms_by_gram(self) -> Tensor:
        """The Gram form can cancel: it sums terms of size up to ``‖L‖²‖R‖²`` whatever is left of them.

        Formal guarantee: the result is not below the true squared norm by more than a relative rounding error.
        Proof: ``Σ_ts |⟨l_t, l_s⟩| |⟨r_t, r_s⟩| ≤ (Σ_t ‖l_t‖‖r_t‖)² ≤ ‖L‖_F² ‖R‖_F²`` (Cauchy-Schwarz, twice), so the
        rounding error of the sum is at most ``c·u·‖L‖²‖R‖²`` with unit roundoff ``u``; inner products accumulate like
        ``√n·u`` (Higham & Mary 2019), and that bound is added.
        Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
        """
        left, right = wide(self.left), wide(self.right)
        gram_left = torch.bmm(left, left.transpose(1, 2))
        gram_right = torch.bmm(right, right.transpose(1, 2))
        size = gram_left.diagonal(dim1=1, dim2=2).sum(1) * gram_right.diagonal(dim1=1, dim2=2).sum(1)
        norms = (gram_left.flatten(1) * gram_right.flatten(1)).sum(1)
        terms = left.shape[1] + left.shape[2] + right.shape[2]
        roundoff = torch.finfo(left.dtype).eps * math.sqrt(terms)
        return norms.clamp_(min=0) + roundoff * size

    def weighted_sum(self, weights: Tensor) -> Tensor:
        left = self.left * weights.to(self.left.dtype)[:, None, None]
        return (left.flatten(0, 1).T @ self.right.flatten(0, 1).to(left.dtype)).view(self.shape)

    def materialise(self) -> Tensor:
        left, right = wide(self.left), wide(self.right)
        return torch.bmm(left.transpose(1, 2), right).view(-1, *self.shape)

    def zero_(self, examples: Tensor) -> OuterProducts:
        return OuterProducts(_masked(self.left, examples), _masked(self.right, examples), self.shape)


@dataclass(frozen=True, slots=True)
class Rows(PerExampleGradient):
    """Gradients that touch some rows of a table, ``Σ_t onehot(index[i, t]) values[i, t]ᵀ``: embeddings.

    Args:
        index: Row numbers, ``(B, T)``.
        values: What is added to those rows, ``(B, T, d)``.
        shape: The table's shape, ``(rows, d)``.
    """

    index: Tensor
    values: Tensor
    shape: torch.Size

    def squared_norms(self) -> Tensor:
        """``‖Σ_r‖²`` per touched row: sort the positions by row, add up each run, square."""
        batch, steps = self.index.shape
        values = wide(self.values)
        if steps == 1:
            return _squares(values)
        index, order = self.index.sort(dim=1)
        starts = torch.ones_like(index, dtype=torch.bool)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        runs = starts.cumsum(1) - 1
        runs += torch.arange(batch, device=runs.device)[:, None] * steps
        ordered = values.gather(1, order[..., None].expand_as(values))
        sums = values.new_zeros(batch * steps, values.shape[2]).index_add_(0, runs.flatten(), ordered.flatten(0, 1))
        return _squares(sums.view(batch, steps, -1))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        values = wide(self.values) * weights[:, None, None]
        table = values.new_zeros(self.shape)
        return table.index_add_(0, self.index.flatten(), values.flatten(0, 1).to(table.dtype))

    def materialise(self) -> Tensor:
        batch = len(self.index)
        values = wide(self.values)
        tables = values.new_zeros(batch, *self.shape)
        return tables.scatter_add_(1, self.index[..., None].expand_as(values), values)

    def zero_(self, examples: Tensor) -> Rows:
        return Rows(self.index, _masked(self.values, examples), self.shape)


@dataclass(frozen=True, slots=True)
class RowsAndOuterProducts(PerExampleGradient):
    """A table that is both looked up and multiplied with (an embedding tied to an output head), cross term included:
    ``⟨onehot(x_t) v_tᵀ, l_s r_sᵀ⟩ = l_s[x_t] ⟨v_t, r_s⟩``."""

    rows: Rows
    products: OuterProducts

    def squared_norms(self) -> Tensor:
        """The two norms and twice the inner product; the inner product's rounding is added, as for the Gram form."""
        values, left, right = wide(self.rows.values), wide(self.products.left), wide(self.products.right)
        looked_up = left.gather(2, self.rows.index[:, None, :].expand(-1, left.shape[1], -1))  # (B, S, T): l_s[x_t]
        cross = (looked_up * torch.bmm(right, values.transpose(1, 2))).flatten(1).sum(1)
        norms = self.rows.squared_norms() + self.products.squared_norms() + 2 * cross
        size = _squares(values) + _squares(left) * _squares(right)
        terms = left.shape[1] + left.shape[2] + right.shape[2]
        return norms.clamp(min=0) + torch.finfo(left.dtype).eps * math.sqrt(terms) * size

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.rows.weighted_sum(weights) + self.products.weighted_sum(weights)

    def materialise(self) -> Tensor:
        return self.rows.materialise() + self.products.materialise()

    def zero_(self, examples: Tensor) -> RowsAndOuterProducts:
        return RowsAndOuterProducts(self.rows.zero_(examples), self.products.zero_(examples))


@dataclass(frozen=True, slots=True)
class Convolution(PerExampleGradient):
    """Gradients of a convolution's kernel.

    Args:
        grad: Upstream gradients, ``(B, C_out, *space)``.
        input: Inputs with any padding other than symmetric zeros already applied, ``(B, C_in, *space)``.
        shape: Kernel shape, ``(C_out, C_in / groups, *kernel)``.
        stride, padding, dilation: One integer per spatial dimension.
        groups: As in `torch.nn.Conv2d`.
    """

    grad: Tensor
    input: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def _kernel_gradient(self, grad: Tensor, input: Tensor, shape: Sequence[int], groups: int) -> Tensor:
        like = grad.new_empty(1).expand(*shape)  # only the shape of the kernel is read
        return torch.ops.aten.convolution_backward(
            grad, input, like, None, self.stride, self.padding, self.dilation, False, [0], groups, [False, True, False]
        )[1]

    def squared_norms(self) -> Tensor:
        return _squares(self.materialise())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        grad = self.grad * weights.to(self.grad.dtype).view(-1, *[1] * (self.grad.dim() - 1))
        return self._kernel_gradient(grad, self.input.to(grad.dtype), self.shape, self.groups)

    def materialise(self) -> Tensor:
        """One convolution with ``B · groups`` groups: every example becomes its own group (Rochette et al. 2019)."""
        grad, input = wide(self.grad), wide(self.input)
        batch = len(grad)
        gradients = self._kernel_gradient(
            grad.reshape(1, -1, *grad.shape[2:]),
            input.reshape(1, -1, *input.shape[2:]),
            (batch * self.shape[0], *self.shape[1:]),
            batch * self.groups,
        )
        return gradients.view(batch, *self.shape)

    def zero_(self, examples: Tensor) -> Convolution:
        grad, input = _masked(self.grad, examples), _masked(self.input, examples)
        return Convolution(grad, input, self.shape, self.stride, self.padding, self.dilation, self.groups)


def add(gradients: Sequence[PerExampleGradient]) -> PerExampleGradient:
    """The gradient of a parameter that was used several times: the sum over its uses, cross terms included."""
    if len(gradients) == 1:
        return gradients[0]
    merged: list[PerExampleGradient] = []
    products = [g for g in gradients if isinstance(g, OuterProducts)]
    rows = [g for g in gradients if isinstance(g, Rows)]
    others = [g for g in gradients if not isinstance(g, OuterProducts | Rows)]
    if products:
        left, right = torch.cat([g.left for g in products], 1), torch.cat([g.right for g in products], 1)
        merged.append(OuterProducts(left, right, products[0].shape))
    if rows:
        index, values = torch.cat([g.index for g in rows], 1), torch.cat([g.values for g in rows], 1)
        merged.append(Rows(index, values, rows[0].shape))
    if not others:
        if len(merged) == 1:
            return merged[0]
        [outer, table] = merged
        assert isinstance(outer, OuterProducts) and isinstance(table, Rows)
        return RowsAndOuterProducts(table, outer)
    return Dense(torch.stack([g.materialise() for g in (*merged, *others)]).sum(0))
