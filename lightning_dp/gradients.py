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

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is already that wide."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def is_asynchronous(tensor: Tensor) -> bool:
    """Whether to look at a number of it makes the program wait for a device, which then runs out of work."""
    return tensor.device.type != "cpu"


def rounds_products(device: torch.device) -> bool:
    """Whether products of float32 may be formed from factors of fewer digits (TF32, bfloat16) on this device."""
    if _SWITCHES:
        return any(switch.fp32_precision not in ("none", "ieee") for switch in _SWITCHES[device.type != "cpu"])
    rounds = torch.get_float32_matmul_precision() != "highest"
    return rounds or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)


#: What decides about that, on CPUs and elsewhere: in torch before 2.9 these switches do not exist.
_SWITCHES: list[list[Any]] = []
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    backends: Any = torch.backends
    _SWITCHES = [
        [backends.mkldnn.matmul, backends.mkldnn.conv],
        [backends.cuda.matmul, backends.cudnn.conv],
    ]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 are formed in float32, whatever is allowed for the model.

    A norm and the sum that it bounds must agree, also for gradients whose terms cancel: formed from factors of ten
    binary digits, what a record adds could be many times its norm.
    """
    if not rounds_products(device):
        yield
        return
    switches = _SWITCHES[device.type != "cpu"] if _SWITCHES else []
    kept = [switch.fp32_precision for switch in switches]
    matmul, convolution = (None, None) if switches else _old_switches()
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        if not switches:
            _set_old_switches("highest", False)
        yield
    finally:
        for switch, precision in zip(switches, kept, strict=True):
            switch.fp32_precision = precision
        if matmul is not None:
            _set_old_switches(matmul, bool(convolution))


def _old_switches() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def _set_old_switches(matmul: str, convolution: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolution


def _squares(tensor: Tensor) -> Tensor:
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

        May exchange what is held for something smaller that the weighted sum can be formed from.
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


#: Kernel elements per output channel up to which unfolding the input beats a grouped convolution on a CPU. On a GPU it
#: always does (measured: up to twelve times; never less than half as fast).
_FEW_INPUTS = 32

#: Multiplications that take as long as to bring one number from memory, on a CPU and on a GPU.
_MEMORY_CPU, _MEMORY_GPU = 8, 64

#: Numbers that a GPU unfolds at once. It does not depend on the size of the batch, which is another one in every step:
#: libraries choose a kernel for every new shape, which takes longer than to run it.
_UNFOLDED = 2**26

#: How many times the memory of what they are made of, materialised gradients may take for a moment. On a small network,
#: 4 took 1.5 times the ordinary memory instead of 1.2, and no measurably shorter time.
_MATERIALISED = 1

#: Numbers of a lower precision that are widened to float32 at once.
_WIDENED = 2**22

#: Numbers of an example's copies that are brought side by side at once.
_COPIED = 2**24

#: Numbers of gradients that a linear map is applied to at once, on a CPU.
_MAPPED = 2**24

#: Rows of a Gram matrix that are computed at once: large enough for a matrix product to be efficient.
_GRAM_BLOCK = 32


def _masked(tensor: Tensor, examples: Tensor) -> Tensor:
    return tensor.masked_fill(examples.view(-1, *[1] * (tensor.dim() - 1)), 0)


def _scaled(tensor: Tensor, weights: Tensor) -> Tensor:
    """Every example's part times its weight."""
    return tensor * weights.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))


def _cancelling(size: Tensor, terms: int) -> Tensor:
    """What is added to the squared norm of a sum of terms that can cancel, where the weighted sum is formed anew.

    Formal guarantee: rounding of the weighted sum, at most about ``u √terms`` times the root of ``size`` (unit roundoff
    u; Higham & Mary 2019), stays below 1/300 of the clipping norm however the terms cancel. Proof: the norm is then at
    least ``300 u √(terms · size)``, and the weight at most the clipping norm over it. A gradient of a thousand
    independent terms is measured too long by two parts in ten thousand; by more in proportion to their number, and to
    how far ``size`` is above what it bounds (the taps of a kernel).

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
        return _squares(self.values)

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        values = self.values.reshape(len(weights), -1).to(total.dtype)
        total.view(-1).addmv_(values.T, weights.to(total.dtype))

    def materialise(self) -> Tensor:
        return wide(self.values)

    def part(self, start: int, stop: int) -> Dense:
        return Dense(self.values[start:stop])

    def without(self, examples: Tensor) -> Dense:
        return Dense(_masked(self.values, examples))

    def over_copies(self, copies: int) -> Dense:
        return Dense(wide(self.values).unflatten(0, (-1, copies)).sum(1))


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
            return _squares(self.left) * _squares(self.right)
        if 2 * steps * steps <= p * d:
            return torch.cat([part._squared_norms_by_gram() for part in self._parts()])
        return torch.cat([part._squared_norms_directly() for part in self._parts()])

    def _squared_norms_directly(self) -> Tensor:
        size = _squares(self.left) * _squares(self.right)
        return _squares(self.materialise()) + _cancelling(size, self.left.shape[1])

    def _parts(self) -> list[OuterProducts]:
        """All of it, or, in a precision that has to be widened, a few examples at a time: the copies stay small."""
        if wide(self.left) is self.left and wide(self.right) is self.right:
            return [self]
        rows = max(1, _WIDENED // (self.left[0].numel() + self.right[0].numel()))
        return [OuterProducts(*pair) for pair in zip(self.left.split(rows), self.right.split(rows), strict=True)]

    def _squared_norms_by_gram(self) -> Tensor:
        """Half of the two symmetric matrices is enough: every block of rows meets the columns up to its own, and what
        lies left of its diagonal block counts twice. Rounding is covered as in `_inner_product_of_grams`."""
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
        return OuterProducts(_masked(self.left, examples), _masked(self.right, examples))

    def over_copies(self, copies: int) -> OuterProducts:
        """The copies' positions become positions of their example."""
        return OuterProducts(_side_by_side(self.left, copies), _side_by_side(self.right, copies))


def _side_by_side(tensor: Tensor, copies: int) -> Tensor:
    """``(B · copies, T, ...) -> (B, copies · T, ...)``."""
    return tensor.reshape(-1, copies * tensor.shape[1], *tensor.shape[2:])


def _inner_product_of_grams(left: Tensor, right: Tensor, terms: int) -> Tensor:
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

    __slots__ = ("index", "rows", "values")

    def __init__(self, index: Tensor, values: Tensor, rows: int) -> None:
        self.index, self.values, self.rows = index, values, rows

    def _squared_norms(self) -> Tensor:
        """``‖Σ_r‖²`` per touched row: sort the positions by row, add up each run, square.

        The rounding of the sums of a run is covered as in `_inner_product_of_grams`.
        """
        batch, steps = self.index.shape
        values = wide(self.values)
        if steps == 1:
            return _squares(values)
        index, order = self.index.sort(dim=1)
        starts = torch.ones_like(index, dtype=torch.bool)
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
        runs = starts.cumsum(1) - 1
        runs += torch.arange(batch, device=runs.device)[:, None] * steps
        target = torch.empty_like(runs).scatter_(1, order, runs)  # the run that every position belongs to
        sums = values.new_zeros(batch * steps, values.shape[2])
        sums.index_add_(0, target.flatten(), values.flatten(0, 1))
        return _squares(sums.view(batch, -1)).add_(_squares(values), alpha=torch.finfo(values.dtype).eps)

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        values = _scaled(self.values.to(total.dtype), weights)
        total.index_add_(0, self.index.flatten(), values.flatten(0, 1))

    def materialise(self) -> Tensor:
        values = wide(self.values)
        tables = values.new_zeros(len(values), self.rows, values.shape[2])
        return tables.scatter_add_(1, self.index[..., None].expand_as(values), values)

    def part(self, start: int, stop: int) -> Rows:
        return Rows(self.index[start:stop], self.values[start:stop], self.rows)

    def without(self, examples: Tensor) -> Rows:
        return Rows(self.index, _masked(self.values, examples), self.rows)

    def over_copies(self, copies: int) -> Rows:
        return Rows(_side_by_side(self.index, copies), _side_by_side(self.values, copies), self.rows)


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
        """The two norms and twice the inner product, whose rounding is covered as in `_inner_product_of_grams`."""
        values, left, right = wide(self.rows.values), wide(self.products.left), wide(self.products.right)
        looked_up = left.gather(2, self.rows.index[:, None, :].expand(-1, left.shape[1], -1))  # (B, S, T): l_s[x_t]
        cross = (looked_up * torch.bmm(right, values.transpose(1, 2))).flatten(1).sum(1)
        norms = self.rows.squared_norms() + self.products.squared_norms() + 2 * cross
        size = _squares(values) + _squares(left) * _squares(right)
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


class Convolution(PerExampleGradient):
    """Gradients of a convolution's kernel.

    Args:
        grad: Upstream gradients, ``(B, C_out, *space)``.
        input: Inputs, ``(B, C_in, *space)``, with any padding other than symmetric zeros already applied.
        shape: Kernel shape, ``(C_out, C_in / groups, *kernel)``.
        stride, padding, dilation: One integer per spatial dimension.
        groups: As in `torch.nn.Conv2d`.
        copies: Rows that make up an example: there are ``B / copies`` gradients, sums over that many rows.
    """

    __slots__ = ("copies", "dilation", "grad", "groups", "input", "padding", "shape", "stride", "values")

    def __init__(
        self,
        grad: Tensor,
        input: Tensor,
        shape: Sequence[int],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        copies: int = 1,
    ) -> None:
        self.grad, self.input, self.shape = grad, input, tuple(shape)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.copies = copies
        self.values: Tensor | None = None

    def _squared_norms(self) -> Tensor:
        """By Gram matrices of the pixels, or from the gradients themselves; the cheaper, by count of multiplications.

        When the gradients take no more memory than what they are made of, they are kept instead of it.
        """
        if self.copies > 1:
            return self._squared_norms_over_copies()
        batch = len(self.grad)
        positions, pixels = math.prod(self.grad.shape[2:]), self._padded_pixels()
        size, taps = math.prod(self.shape), math.prod(self.shape[2:])
        gram = pixels**2 * self.input.shape[1] + positions**2 * self.grad.shape[1]
        direct = positions * size
        if not is_asynchronous(self.input):
            gram += _MEMORY_CPU * taps * self.groups * positions**2
        else:
            gram += _MEMORY_GPU * 3 * taps * self.groups * positions**2
            direct += _MEMORY_GPU * (self.input.shape[1] * taps * positions + size)
        held = self.grad.numel() + self.input.numel()
        if gram < direct:
            of_one = (pixels**2 + 2 * positions**2) * self.groups
            rows = max(1, (_UNFOLDED if is_asynchronous(self.input) else held) // of_one)
            starts = range(0, batch, rows)
            return torch.cat([self._part(start, start + rows)._squared_norms_by_gram() for start in starts])
        if batch * size > held:  # not worth keeping; and some examples at a time when it is much more than what is held
            rows = max(1, _MATERIALISED * held // size)
            if is_asynchronous(self.input):
                rows = self._unfolded_at_once()
            starts = range(0, batch, rows)
            norms = torch.cat([_squares(self._part(start, start + rows).materialise()) for start in starts])
            return norms + _cancelling(_squares(self.grad) * _squares(self.input) * taps, positions)
        self.values = self.materialise()
        self.grad = self.input = self.values.new_empty(0)
        return _squares(self.values)

    def _squared_norms_over_copies(self) -> Tensor:
        """The gradients are kept if they take no more memory than the rows; else some examples at a time."""
        if len(self.grad) // self.copies * math.prod(self.shape) > self.grad.numel() + self.input.numel():
            norms = torch.cat([part._squared_norms() for part in self._as_deeper_convolutions()])
            grad, input = (_squares(t).unflatten(0, (-1, self.copies)).sum(1) for t in (self.grad, self.input))
            positions = math.prod(self.grad.shape[2:]) * self.copies
            return norms + _cancelling(grad * input * math.prod(self.shape[2:]), positions)
        self.values = self.materialise()
        self.grad = self.input = self.values.new_empty(0)
        return _squares(self.values)

    def _as_deeper_convolutions(self) -> Iterator[Convolution]:
        """Some examples at a time, their copies side by side along a new first axis, on which the kernel has size 1."""
        rows = max(1, _COPIED // ((self.grad[0].numel() + self.input[0].numel()) * self.copies))
        for start in range(0, len(self.grad) // self.copies, rows):
            part = self._part(start, start + rows)
            grad, input = (t.unflatten(0, (-1, self.copies)).transpose(1, 2) for t in (part.grad, part.input))
            shape = (*self.shape[:2], 1, *self.shape[2:])
            yield Convolution(
                grad, input, shape, (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups
            )

    def _unfolded_at_once(self) -> int:
        """How many examples a GPU unfolds at once."""
        unfolded = self.input.shape[1] * math.prod(self.shape[2:]) * math.prod(self.grad.shape[2:])
        return max(1, _UNFOLDED // (unfolded + math.prod(self.shape)))

    def _padded_pixels(self) -> int:
        return math.prod(n + 2 * pad for n, pad in zip(self.input.shape[2:], self.padding, strict=True))

    def _padded(self) -> Tensor:
        input = wide(self.input)
        if not any(self.padding):
            return input
        return F.pad(input, [pad for pad in reversed(self.padding) for _ in (0, 1)])

    def _squared_norms_by_gram(self) -> Tensor:
        """``(AAᵀ)_ts`` of the unfolded input is a sum of shifted Gram matrices of its pixels: no unfolding.

        With pixel Gram ``P_uv = ⟨x_u, x_v⟩`` and kernel offsets k: ``(AAᵀ)_ts = Σ_k P_{t·stride + k, s·stride + k}``.
        """
        input, grad = self._padded(), wide(self.grad)
        batch, groups = len(grad), self.groups
        pixels = input.reshape(batch * groups, -1, math.prod(input.shape[2:]))
        errors = grad.reshape(batch * groups, -1, math.prod(grad.shape[2:]))
        spaces = (*input.shape[2:], *input.shape[2:])
        gram = torch.bmm(pixels.transpose(1, 2), pixels).view(batch * groups, *spaces)
        gram_errors = torch.bmm(errors.transpose(1, 2), errors)
        extents = [step * (n - 1) + 1 for step, n in zip(self.stride, grad.shape[2:], strict=True)]
        unfolded: Tensor | None = None
        for offset in itertools.product(*map(range, self.shape[2:])):
            starts = [o * dilation for o, dilation in zip(offset, self.dilation, strict=True)]
            window = tuple(
                slice(start, start + extent, step)
                for start, extent, step in zip(starts, extents, self.stride, strict=True)
            )
            shifted = gram[(slice(None), *window, *window)]
            unfolded = shifted.clone() if unfolded is None else unfolded.add_(shifted)
        assert unfolded is not None
        terms = sum(self.shape) + grad.shape[1]
        norms = _inner_product_of_grams(unfolded.view_as(gram_errors), gram_errors, terms)
        return norms.view(batch, groups).sum(1)

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        if self.values is not None:
            total.view(-1).addmv_(self.values.flatten(1).T, weights.to(total.dtype))
            return
        weights = weights.repeat_interleave(self.copies) if self.copies > 1 else weights
        grad = _scaled(self.grad.to(total.dtype), weights)
        total += self._kernel_gradient(grad, self.input.to(total.dtype), self.shape, self.groups)

    def _kernel_gradient(self, grad: Tensor, input: Tensor, shape: Sequence[int], groups: int) -> Tensor:
        like = grad.new_empty(1).expand(*shape)  # only the shape of the kernel is read
        return torch.ops.aten.convolution_backward(
            grad, input, like, None, self.stride, self.padding, self.dilation, False, [0], groups, [False, True, False]
        )[1]

    def materialise(self) -> Tensor:
        if self.values is not None:
            return self.values
        if self.copies > 1:
            whole = torch.cat([part.materialise() for part in self._as_deeper_convolutions()])
            return whole.view(-1, *self.shape)
        if is_asynchronous(self.input):
            rows = self._unfolded_at_once()
            parts = [self._part(start, start + rows) for start in range(0, len(self.grad), rows)]
            return torch.cat([part._by_unfolding() for part in parts]) if parts[1:] else self._by_unfolding()
        if self.groups == 1 and math.prod(self.shape[1:]) <= _FEW_INPUTS:
            return self._by_unfolding()
        return self._by_grouped_convolution().view(len(self.grad), *self.shape)

    def _by_unfolding(self) -> Tensor:
        """One matrix product per example, with the unfolded input: small when there are few input channels."""
        input, grad = self._padded(), wide(self.grad)
        taps = self.shape[2:]
        strides = input.stride()[2:]
        windows = input.as_strided(
            (*input.shape[:2], *taps, *grad.shape[2:]),
            (
                *input.stride()[:2],
                *(s * dilation for s, dilation in zip(strides, self.dilation, strict=True)),
                *(s * step for s, step in zip(strides, self.stride, strict=True)),
            ),
        )
        batch = len(input) * self.groups
        unfolded = windows.reshape(batch, math.prod(self.shape[1:]), math.prod(grad.shape[2:]))
        errors = grad.reshape(batch, -1, math.prod(grad.shape[2:]))
        return torch.bmm(errors, unfolded.transpose(1, 2)).view(-1, *self.shape)

    def _by_grouped_convolution(self) -> Tensor:
        """One convolution with ``B · groups`` groups: every example becomes its own group (Rochette et al. 2019)."""
        grad, input = wide(self.grad), wide(self.input)
        batch = len(grad)
        return self._kernel_gradient(
            grad.reshape(1, -1, *grad.shape[2:]),
            input.reshape(1, -1, *input.shape[2:]),
            (batch * self.shape[0], *self.shape[1:]),
            batch * self.groups,
        )

    def part(self, start: int, stop: int) -> PerExampleGradient:
        return Dense(self.values[start:stop]) if self.values is not None else self._part(start, stop)

    def _part(self, start: int, stop: int) -> Convolution:
        rows = slice(start * self.copies, stop * self.copies)
        return self._of_rows(self.grad[rows], self.input[rows], self.copies)

    def _of_rows(self, grad: Tensor, input: Tensor, copies: int) -> Convolution:
        return Convolution(grad, input, self.shape, self.stride, self.padding, self.dilation, self.groups, copies)

    def without(self, examples: Tensor) -> PerExampleGradient:
        if self.values is not None:
            return Dense(_masked(self.values, examples))
        rows = examples.repeat_interleave(self.copies) if self.copies > 1 else examples
        return self._of_rows(_masked(self.grad, rows), _masked(self.input, rows), self.copies)

    def over_copies(self, copies: int) -> PerExampleGradient:
        """Nothing is summed yet: the weighted sum needs the rows only, and norms see an example's copies at once."""
        if self.copies > 1 or self.values is not None or self.grad.dim() > 4:  # torch has no deeper one than these
            return Dense(self.materialise()).over_copies(copies)
        return self._of_rows(self.grad, self.input, copies)


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
        rows = max(1, (_UNFOLDED if is_asynchronous(self.like) else _MAPPED) // self.like.numel())
        parts = [self.part(start, min(start + rows, self.count)) for start in range(0, self.count, rows)]
        return torch.cat([part._squared_norms_directly() for part in parts])

    def _squared_norms_directly(self) -> Tensor:
        """What the map takes away is in the weighted sum until the map is applied to it: rounding must be covered."""
        before = self.inner.materialise().view(-1, *self.like.shape)
        return _squares(self.map(before)) + _cancelling(_squares(before) * self.gain**2, self.like[0].numel())

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
        OuterProducts(_joined(g.left for g in products), _joined(g.right for g in products)) if products else None
    )
    all_rows = Rows(_joined(g.index for g in rows), _joined(g.values for g in rows), rows[0].rows) if rows else None
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


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenated along the positions: then norms are those of the sum over all of them."""
    return torch.cat(list(tensors), 1)
