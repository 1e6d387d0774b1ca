"""Per-example gradients of linear maps, embeddings and their sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_dp.gradients.base import (
    PerExampleGradient,
    cancelling,
    scaled_rows,
    side_by_side,
    squared_row_norms,
    without_rows,
)
from lightning_dp.gradients.precision import wide

#: Elements of half-precision tensors that are converted to float32 at once.
_MAX_WIDENED_ELEMENTS = 2**22


#: Rows of a Gram matrix that are computed at once: large enough for a matrix product to be efficient.
_GRAM_BLOCK = 32


class OuterProducts(PerExampleGradient):
    """Gradients that are sums of outer products, ``Σ_t left[i, t] right[i, t]ᵀ``: every linear map.

    Args:
        left: Upstream gradients, ``(B, T, p)``.
        right: Inputs, ``(B, T, d)``.
    """

    __slots__ = ("left", "right")

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    def _squared_norms(self) -> Tensor:
        """Three exact ways; shapes decide.

        ``T = 1``: ``‖l rᵀ‖² = ‖l‖² ‖r‖²``. Else ``‖LᵀR‖_F² = Σ_ts (LLᵀ)_ts (RRᵀ)_ts`` when ``2T² ≤ p·d``, or the
        gradients themselves.
        """
        _, steps, p = self.left.shape
        d = self.right.shape[2]
        if steps == 1:
            return squared_row_norms(self.left) * squared_row_norms(self.right)
        if 2 * steps * steps <= p * d:
            return torch.cat([part._squared_norms_by_gram() for part in self._parts()])
        return torch.cat([part._squared_norms_directly() for part in self._parts()])

    def _squared_norms_directly(self) -> Tensor:
        size = squared_row_norms(self.left) * squared_row_norms(self.right)
        return squared_row_norms(self.materialise()) + cancelling(size, self.left.shape[1])

    def _parts(self) -> list[OuterProducts]:
        """All of it, or, in a precision that has to be widened, a few examples at a time: the copies stay small."""
        if wide(self.left) is self.left and wide(self.right) is self.right:
            return [self]
        rows = max(1, _MAX_WIDENED_ELEMENTS // (self.left[0].numel() + self.right[0].numel()))
        return [OuterProducts(*pair) for pair in zip(self.left.split(rows), self.right.split(rows), strict=True)]

    def _squared_norms_by_gram(self) -> Tensor:
        """Half of the two symmetric matrices is enough: every block of rows meets the columns up to its own, and what
        lies left of its diagonal block counts twice. Rounding is covered as in `inner_product_of_grams`."""
        left, right = wide(self.left), wide(self.right)
        steps, terms = left.shape[1], left.shape[1] + left.shape[2] + right.shape[2]
        block = max(_GRAM_BLOCK, -(-steps // 8))
        norms = size_left = size_right = left.new_zeros(len(left))
        for start in range(0, steps, block):
            stop = min(start + block, steps)
            gram_left = torch.bmm(left[:, start:stop], left[:, :stop].transpose(1, 2))
            gram_right = torch.bmm(right[:, start:stop], right[:, :stop].transpose(1, 2))
            size_left = size_left + gram_left[:, :, start:].diagonal(dim1=1, dim2=2).sum(1)
            size_right = size_right + gram_right[:, :, start:].diagonal(dim1=1, dim2=2).sum(1)
            products = gram_left.mul_(gram_right)
            norms = norms + products[:, :, start:].sum((1, 2)) + 2 * products[:, :, :start].sum((1, 2))
        roundoff = torch.finfo(left.dtype).eps * math.sqrt(terms)
        return norms.clamp_(min=0).add_(size_left * size_right, alpha=roundoff)

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        parts = self._parts()
        for part, share in zip(parts, weights.to(total.dtype).split(len(parts[0].left)), strict=True):
            # In the precision of the norms: rounding the weighted terms would let them exceed their bound.
            left, right = part.left.flatten(0, 1).to(total.dtype), part.right.flatten(0, 1).to(total.dtype)
            share = share.repeat_interleave(part.left.shape[1])[:, None]
            if left.shape[1] <= right.shape[1]:
                left = left * share
            else:
                right = right * share
            total.view(left.shape[1], right.shape[1]).addmm_(left.T, right)

    def materialise(self) -> Tensor:
        return torch.bmm(wide(self.left).transpose(1, 2), wide(self.right))

    def write_(self, out: Tensor, scale: float) -> None:
        if self.left.shape[1] > 1:
            super().write_(out, scale)
            return
        left, right = wide(self.left)[:, 0] * scale, wide(self.right)[:, 0]
        torch.mul(left[:, :, None], right[:, None], out=out.unflatten(1, (left.shape[1], right.shape[1])))

    def part(self, start: int, stop: int) -> OuterProducts:
        return OuterProducts(self.left[start:stop], self.right[start:stop])

    def without(self, examples: Tensor) -> OuterProducts:
        return OuterProducts(without_rows(self.left, examples), without_rows(self.right, examples))

    def over_copies(self, copies: int) -> OuterProducts:
        """The copies' positions become positions of their example."""
        return OuterProducts(side_by_side(self.left, copies), side_by_side(self.right, copies))


def inner_product_of_grams(left: Tensor, right: Tensor, terms: int) -> Tensor:
    """``Σ_ts left_ts right_ts`` per example, for Gram matrices ``(B, T, T)`` of the two factors of a gradient.

    Formal guarantee: the result is not below ``‖Σ_t l_t r_tᵀ‖²`` by more than a relative rounding error, although the
    sum can cancel. Proof: ``Σ_ts |⟨l_t, l_s⟩| |⟨r_t, r_s⟩| ≤ (Σ_t ‖l_t‖‖r_t‖)² ≤ ‖L‖_F² ‖R‖_F²`` (Cauchy-Schwarz,
    twice), so the rounding error is at most ``c·u·‖L‖²‖R‖²`` with unit roundoff ``u`` and ``c`` about the square root
    of the number of ``terms`` of the inner products (Higham & Mary 2019); that much is added.
    """
    size = left.diagonal(dim1=1, dim2=2).sum(1) * right.diagonal(dim1=1, dim2=2).sum(1)
    norms = torch.linalg.vecdot(left.flatten(1), right.flatten(1))
    return norms.clamp_(min=0).add_(size, alpha=torch.finfo(left.dtype).eps * math.sqrt(terms))


class Rows(PerExampleGradient):
    """Gradients that touch some rows of a table, ``Σ_t onehot(index[i, t]) values[i, t]ᵀ``: embeddings.

    Args:
        index: Row numbers, ``(B, T)``.
        values: What is added to those rows, ``(B, T, d)``.
        rows: Number of rows of the table.
    """

    __slots__ = ("_known_lengths", "index", "rows", "values")
    _known_lengths: Tensor

    def __init__(self, index: Tensor, values: Tensor, rows: int) -> None:
        self.index, self.values, self.rows = index, values, rows

    def _squared_norms(self) -> Tensor:
        """``‖Σ_r‖²`` per touched row: sort the positions by row, add up each run, square.

        Formal guarantee: that of `cancelling`; were all rounding in one direction, √n/300 of the clipping norm. Proof:
        the sum of a run of n vectors is a product with n ones, so the product of its factors' summed squares is
        ``n · Σ_t ‖v_t‖²``, in n terms.
        """
        batch, steps = self.index.shape
        values = wide(self.values)
        if steps == 1:
            return squared_row_norms(values)
        runs = self._runs()
        sums = values.new_zeros(batch * steps, values.shape[2])
        sums.index_add_(0, runs.flatten(), values.flatten(0, 1))
        lengths = self._lengths(runs)
        sizes = (lengths.square() * torch.linalg.vector_norm(values, dim=2).square()).sum(1)
        return squared_row_norms(sums.view(batch, -1)).add_(cancelling(sizes, 1))

    def _runs(self) -> Tensor:
        """A number ``(B, T)`` for every position, the same for those of one example that touch the same row."""
        batch, steps = self.index.shape
        index, order = self.index.sort(dim=1)
        starts = torch.ones_like(index, dtype=torch.bool)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        runs = starts.cumsum(1) - 1
        runs += torch.arange(batch, device=runs.device)[:, None] * steps
        return torch.empty_like(runs).scatter_(1, order, runs)

    def _lengths(self, runs: Tensor | None = None) -> Tensor:
        """How many positions touch the row that each one does, ``(B, T)``, computed once."""
        try:
            return self._known_lengths
        except AttributeError:
            runs = self._runs() if runs is None else runs
            flat = runs.flatten()
            ones = torch.ones(len(flat), device=flat.device)
            self._known_lengths = torch.zeros_like(ones).index_add_(0, flat, ones)[flat].view_as(runs)
            return self._known_lengths

    def size_of_runs(self) -> Tensor:
        """``Σ_t n_t ‖v_t‖²`` per example, with the number n_t of positions that touch the same row: what
        ``Σ_r (Σ_{t in r} ‖v_t‖)²`` is at most (Cauchy-Schwarz)."""
        squares = torch.linalg.vector_norm(wide(self.values), dim=2).square()
        return (self._lengths() * squares).sum(1)

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        values = scaled_rows(self.values.to(total.dtype), weights)
        total.index_add_(0, self.index.flatten(), values.flatten(0, 1))

    def materialise(self) -> Tensor:
        values = wide(self.values)
        tables = values.new_zeros(len(values), self.rows, values.shape[2])
        return tables.scatter_add_(1, self.index[..., None].expand_as(values), values)

    def part(self, start: int, stop: int) -> Rows:
        return Rows(self.index[start:stop], self.values[start:stop], self.rows)

    def without(self, examples: Tensor) -> Rows:
        return Rows(self.index, without_rows(self.values, examples), self.rows)

    def over_copies(self, copies: int) -> Rows:
        return Rows(side_by_side(self.index, copies), side_by_side(self.values, copies), self.rows)


class Blocks(PerExampleGradient):
    """Gradients of blocks of a parameter's rows that do not overlap: attention's projections in one matrix.

    Args:
        parts: By the block's first row and the one after its last, the gradients of the block.
        shape: Shape of the parameter.
    """

    __slots__ = ("parts", "shape")

    def __init__(self, parts: Mapping[tuple[int, int], PerExampleGradient], shape: Sequence[int]) -> None:
        self.parts, self.shape = dict(parts), tuple(shape)

    def _squared_norms(self) -> Tensor:
        return torch.stack([part.squared_norms() for part in self.parts.values()]).sum(0)

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        for (start, stop), part in self.parts.items():
            part.add_weighted_sum_(total[start:stop], weights)

    def materialise(self) -> Tensor:
        parts = {rows: part.materialise() for rows, part in self.parts.items()}
        first = next(iter(parts.values()))
        whole = first.new_zeros(len(first), *self.shape)
        for (start, stop), part in parts.items():
            whole[:, start:stop] = part
        return whole

    def part(self, start: int, stop: int) -> Blocks:
        return Blocks({rows: part.part(start, stop) for rows, part in self.parts.items()}, self.shape)

    def without(self, examples: Tensor) -> Blocks:
        return Blocks({rows: part.without(examples) for rows, part in self.parts.items()}, self.shape)

    def over_copies(self, copies: int) -> Blocks:
        return Blocks({rows: part.over_copies(copies) for rows, part in self.parts.items()}, self.shape)


class RowsAndOuterProducts(PerExampleGradient):
    """A table that is both looked up and multiplied with (an embedding tied to an output head), cross term included:
    ``⟨onehot(x_t) v_tᵀ, l_s r_sᵀ⟩ = l_s[x_t] ⟨v_t, r_s⟩``."""

    __slots__ = ("products", "rows")

    def __init__(self, rows: Rows, products: OuterProducts) -> None:
        self.rows, self.products = rows, products

    def _squared_norms(self) -> Tensor:
        """The two norms and twice the inner product, whose rounding is covered as in `inner_product_of_grams`.

        Proof for the inner product: with ``M_x`` the sum of ``‖v_t‖`` over the positions of row x,
        ``Σ_ts ‖v_t‖ |l_s[x_t]| ‖r_s‖ ≤ Σ_x M_x ‖L[:, x]‖ ‖R‖ ≤ (Σ_x M_x²)^½ ‖L‖ ‖R‖`` (Cauchy-Schwarz, twice).
        """
        values, left, right = wide(self.rows.values), wide(self.products.left), wide(self.products.right)
        looked_up = left.gather(2, self.rows.index[:, None, :].expand(-1, left.shape[1], -1))  # (B, S, T): l_s[x_t]
        cross = (looked_up * torch.bmm(right, values.transpose(1, 2))).flatten(1).sum(1)
        norms = self.rows.squared_norms() + self.products.squared_norms() + 2 * cross
        size = self.rows.size_of_runs() + squared_row_norms(left) * squared_row_norms(right)
        terms = left.shape[1] + left.shape[2] + right.shape[2]
        return norms.clamp(min=0) + torch.finfo(left.dtype).eps * math.sqrt(terms) * size

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        self.rows.add_weighted_sum_(total, weights)
        self.products.add_weighted_sum_(total, weights)

    def materialise(self) -> Tensor:
        return self.rows.materialise() + self.products.materialise()

    def part(self, start: int, stop: int) -> RowsAndOuterProducts:
        return RowsAndOuterProducts(self.rows.part(start, stop), self.products.part(start, stop))

    def without(self, examples: Tensor) -> RowsAndOuterProducts:
        return RowsAndOuterProducts(self.rows.without(examples), self.products.without(examples))

    def over_copies(self, copies: int) -> RowsAndOuterProducts:
        return RowsAndOuterProducts(self.rows.over_copies(copies), self.products.over_copies(copies))
