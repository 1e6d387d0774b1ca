"""Per-example gradients of convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.gradients.base import (
    Dense,
    PerExampleGradient,
    cancelling,
    scaled_rows,
    squared_row_norms,
    without_rows,
)
from lightning_dp.gradients.linear import inner_product_of_grams
from lightning_dp.gradients.precision import is_asynchronous, wide

#: Kernel elements per output channel up to which unfolding the input beats a grouped convolution on a CPU. On a GPU it
#: is always used (measured: up to twelve times as fast, never less than half as fast).
_FEW_INPUTS = 32


#: Numbers that a GPU unfolds at once, whatever the batch size, which differs in every step: for every new shape,
#: libraries choose a GPU kernel anew, which takes longer than running it.
MAX_UNFOLDED_ELEMENTS = 2**26


#: Multiplications that take as long as to bring one number from memory, on a CPU and on a GPU.
_MEMORY_CPU, _MEMORY_GPU = 8, 64


#: How many times the memory of what they are made of, materialised gradients may take for a moment. On a small network,
#: 4 took 1.5 times the ordinary memory instead of 1.2, and no measurably shorter time.
_MATERIALISED = 1


#: Numbers of an example's copies that are brought side by side at once.
_MAX_COPIED_ELEMENTS = 2**24


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
            rows = max(1, (MAX_UNFOLDED_ELEMENTS if is_asynchronous(self.input) else held) // of_one)
            starts = range(0, batch, rows)
            return torch.cat([self._part(start, start + rows)._squared_norms_by_gram() for start in starts])
        if batch * size > held:  # not worth keeping; and some examples at a time when it is much more than what is held
            rows = max(1, _MATERIALISED * held // size)
            if is_asynchronous(self.input):
                rows = self._unfolded_at_once()
            starts = range(0, batch, rows)
            norms = torch.cat([squared_row_norms(self._part(start, start + rows).materialise()) for start in starts])
            return norms + cancelling(squared_row_norms(self.grad) * squared_row_norms(self.input) * taps, positions)
        self.values = self.materialise()
        self.grad = self.input = self.values.new_empty(0)
        return squared_row_norms(self.values)

    def _squared_norms_over_copies(self) -> Tensor:
        """The gradients are kept if they take no more memory than the rows; else some examples at a time."""
        if len(self.grad) // self.copies * math.prod(self.shape) > self.grad.numel() + self.input.numel():
            norms = torch.cat([part._squared_norms() for part in self._as_deeper_convolutions()])
            grad, input = (squared_row_norms(t).unflatten(0, (-1, self.copies)).sum(1) for t in (self.grad, self.input))
            positions = math.prod(self.grad.shape[2:]) * self.copies
            return norms + cancelling(grad * input * math.prod(self.shape[2:]), positions)
        self.values = self.materialise()
        self.grad = self.input = self.values.new_empty(0)
        return squared_row_norms(self.values)

    def _as_deeper_convolutions(self) -> Iterator[Convolution]:
        """Some examples at a time, their copies side by side along a new first axis, on which the kernel has size 1."""
        rows = max(1, _MAX_COPIED_ELEMENTS // ((self.grad[0].numel() + self.input[0].numel()) * self.copies))
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
        return max(1, MAX_UNFOLDED_ELEMENTS // (unfolded + math.prod(self.shape)))

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
        norms = inner_product_of_grams(unfolded.view_as(gram_errors), gram_errors, terms)
        return norms.view(batch, groups).sum(1)

    def add_weighted_sum_(self, total: Tensor, weights: Tensor) -> None:
        if self.values is not None:
            total.view(-1).addmv_(self.values.flatten(1).T, weights.to(total.dtype))
            return
        weights = weights.repeat_interleave(self.copies) if self.copies > 1 else weights
        grad = scaled_rows(self.grad.to(total.dtype), weights)
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
            return Dense(without_rows(self.values, examples))
        rows = examples.repeat_interleave(self.copies) if self.copies > 1 else examples
        return self._of_rows(without_rows(self.grad, rows), without_rows(self.input, rows), self.copies)

    def over_copies(self, copies: int) -> PerExampleGradient:
        """Nothing is summed yet: the weighted sum needs the rows only, and norms see an example's copies at once."""
        if self.copies > 1 or self.values is not None or self.grad.dim() > 4:  # torch has no 4-D convolution
            return Dense(self.materialise()).over_copies(copies)
        return self._of_rows(self.grad, self.input, copies)
