"""Per-example gradients of parameters that several layer calls share, or that are reparametrised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_dp.gradients.base import Dense, PerExampleGradient, cancelling, joined_rows, squared_row_norms
from lightning_dp.gradients.convolution import MAX_UNFOLDED_ELEMENTS
from lightning_dp.gradients.linear import Blocks, OuterProducts, Rows, RowsAndOuterProducts
from lightning_dp.gradients.precision import is_asynchronous

#: Numbers of gradients that a linear map is applied to at once, on a CPU.
_MAX_MAPPED_ELEMENTS = 2**24


class Mapped(PerExampleGradient):
    """Gradients that a linear map, the same for all examples, has been applied to: of a reparametrised weight.

    Args:
        inner: The gradients before, of a parameter of the same shape.
        map: The map, for a batch of gradients: ``(B, *shape) -> (B, *shape)``.
        gain: By how much the map lengthens a gradient, at most.
        like: A tensor of the parameter's shape, on its device.
        count: B.
    """

    __slots__ = ("count", "gain", "inner", "like", "map")

    def __init__(
        self, inner: PerExampleGradient, map: Callable[[Tensor], Tensor], gain: float, like: Tensor, count: int
    ) -> None:
        self.inner, self.map, self.gain, self.like, self.count = inner, map, gain, like, count

    def _squared_norms(self) -> Tensor:
        rows = max(
            1, (MAX_UNFOLDED_ELEMENTS if is_asynchronous(self.like) else _MAX_MAPPED_ELEMENTS) // self.like.numel()
        )
        parts = [self.part(start, min(start + rows, self.count)) for start in range(0, self.count, rows)]
        return torch.cat([part._squared_norms_directly() for part in parts])

    def _squared_norms_directly(self) -> Tensor:
        """Covers rounding (`cancelling`): the weighted sum is formed before the map, and the part that the map removes
        can be large."""
        before = self.inner.materialise().view(-1, *self.like.shape)
        return squared_row_norms(self.map(before)) + cancelling(
            squared_row_norms(before) * self.gain**2, self.like[0].numel()
        )

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        inner = torch.zeros_like(total)
        self.inner.add_weighted_sum_(inner, weights)
        total += self.map(inner[None])[0]

    def materialise(self) -> Tensor:
        return self.map(self.inner.materialise().view(-1, *self.like.shape))

    def part(self, start: int, stop: int) -> Mapped:
        return Mapped(self.inner.part(start, stop), self.map, self.gain, self.like, stop - start)

    def without(self, examples: Tensor) -> Mapped:
        return Mapped(self.inner.without(examples), self.map, self.gain, self.like, self.count)

    def over_copies(self, copies: int) -> Mapped:
        return Mapped(self.inner.over_copies(copies), self.map, self.gain, self.like, self.count // copies)


def add(gradients: Sequence[PerExampleGradient]) -> PerExampleGradient:
    """The gradient of a parameter that was used several times: the sum over its uses, cross terms included."""
    if len(gradients) == 1:
        return gradients[0]
    if all(isinstance(g, Blocks) for g in gradients):
        return _add_blocks(gradients)  # type: ignore[arg-type]
    products = [g for g in gradients if isinstance(g, OuterProducts)]
    rows = [g for g in gradients if isinstance(g, Rows)]
    others = [g for g in gradients if not isinstance(g, OuterProducts | Rows)]
    if others:
        total = others[0].materialise().clone()
        for gradient in (*others[1:], *products, *rows):
            total += gradient.materialise().view_as(total)
        return Dense(total)
    all_products = (
        OuterProducts(joined_rows(g.left for g in products), joined_rows(g.right for g in products))
        if products
        else None
    )
    all_rows = (
        Rows(joined_rows(g.index for g in rows), joined_rows(g.values for g in rows), rows[0].rows) if rows else None
    )
    if all_products is not None and all_rows is not None:
        return RowsAndOuterProducts(all_rows, all_products)
    return all_products or all_rows  # type: ignore[return-value]


def _add_blocks(gradients: Sequence[Blocks]) -> PerExampleGradient:
    """Block by block, unless blocks overlap without being the same."""
    parts: dict[tuple[int, int], list[PerExampleGradient]] = {}
    for gradient in gradients:
        for rows, part in gradient.parts.items():
            parts.setdefault(rows, []).append(part)
    ordered = sorted(parts)
    if any(after[0] < before[1] for before, after in itertools.pairwise(ordered)):
        return add([Dense(gradient.materialise()) for gradient in gradients])
    return Blocks({rows: add(parts[rows]) for rows in ordered}, gradients[0].shape)
