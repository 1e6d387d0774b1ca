"""Every example's own copy of an expression, and the gradients that come back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.anchored import Anchored
from lightning_dp.gradients.base import Dense, PerExampleGradient
from lightning_dp.gradients.expressions.expression import Expression


class Copies:
    """Makes the copies of one forward pass.

    Args:
        batch_size: Number of examples.
        is_connected: Whether autograd computes its own gradients of the parameters as well.
        roots: What stands for the parameters in this pass, by name.
        hand_over: Called with a parameter's name and its gradient at one meeting.
        is_listening: Whether a backward pass is to be taken note of.
        is_followed_twice: Whether the loss depends on a gradient.
    """

    def __init__(
        self,
        batch_size: int,
        is_connected: bool,
        roots: Mapping[str, Tensor],
        hand_over: Callable[[str, PerExampleGradient], None],
        is_listening: Callable[[], bool],
        is_followed_twice: bool,
    ) -> None:
        self.batch_size, self.is_connected, self.roots = batch_size, is_connected, roots
        self.hand_over, self.is_listening, self.is_followed_twice = hand_over, is_listening, is_followed_twice
        self._expected: dict[str, int] = {}
        self._anchor = torch.zeros((), requires_grad=True)

    def expected(self, parameter: str) -> int:
        """How many gradients of a parameter the backward pass will give, at most."""
        return self._expected.get(parameter, 0)

    def expect(self, names: Sequence[str]) -> None:
        """Takes note that a gradient of each of these parameters is to come."""
        for name in names:
            self._expected[name] = self._expected.get(name, 0) + 1

    def of(self, expression: Expression, by_row: bool = False) -> Tensor:
        """One copy per example, ``(B, *shape)``, made once; its gradient is handed over in the backward pass.

        Args:
            expression: What is copied.
            by_row: It has rows of every example itself, ``(B · k, …)``: these are the copies.
        """
        if by_row not in expression.copies:
            value = expression.as_subclass(Tensor)
            own = value.view_as(value) if self.is_connected else value.detach().clone()
            copies = own if by_row else own.unsqueeze(0).expand(self.batch_size, *value.shape)
            copies = copies if self.is_connected else self.in_graph(copies)
            self.expect(expression.roots)
            copies.register_hook(self._comes_back(value, expression, by_row))
            expression.copies[by_row] = copies
        return expression.copies[by_row]

    def in_graph(self, tensor: Tensor) -> Tensor:
        """Makes a tensor that depends on nothing that is trained part of the graph, in place."""
        anchored: Tensor = Anchored.apply(tensor, self._anchor)
        return anchored

    def _comes_back(self, value: Tensor, expression: Expression, by_row: bool) -> Callable[[Tensor], None]:
        roots, is_root = expression.roots, expression.root is not None and not expression.is_transposed
        used = False

        def come_back(gradient: Tensor) -> None:
            nonlocal used
            if not self.is_listening():
                return
            if used:
                raise UnsupportedModelError(f"Parameter {roots[0]!r}: more than one backward pass through one forward.")
            used = True
            if is_root and not by_row:
                self.hand_over(roots[0], Dense(gradient.detach()))
                return
            sources = [self.roots[name] for name in roots]
            rows = len(gradient) // self.batch_size if by_row else None
            for name, found in zip(roots, _carried_back(value, sources, gradient.detach(), rows), strict=True):
                if found is not None:
                    self.hand_over(name, Dense(found))

        return come_back


def _carried_back(
    value: Tensor, sources: Sequence[Tensor], gradients: Tensor, rows: int | None
) -> Sequence[Tensor | None]:
    """Every example's gradient of the sources, given that of what was computed from them.

    Args:
        value: Computed from the sources alone.
        sources: Parameters.
        gradients: ``(B, *value.shape)``; with ``rows``, ``value.shape``.
        rows: How many rows of the value are each example's, one after another; ``None``: all of it is every example's.
    """
    if rows is None:
        return torch.autograd.grad(
            value, sources, gradients, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
    examples = len(gradients) // rows
    parts: list[Sequence[Tensor | None]] = []
    at_once = max(1, _AT_ONCE // max(1, gradients.numel()))
    for start in range(0, examples, at_once):
        some = range(start, min(start + at_once, examples))
        alone = gradients.new_zeros(len(some), *gradients.shape)
        for place, example in enumerate(some):
            alone[place, example * rows : (example + 1) * rows] = gradients[example * rows : (example + 1) * rows]
        parts.append(
            torch.autograd.grad(value, sources, alone, is_grads_batched=True, retain_graph=True, allow_unused=True)
        )
    return [None if found[0] is None else torch.cat(found) for found in zip(*parts, strict=True)]


#: Numbers in gradients of single examples that are carried back at once.
_AT_ONCE = 2**22
