"""Follows parameters through a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.errors import FormChanged, UnsupportedModelError
from lightning_dp.gradients.arrangement import ARRANGEMENTS, FLAT, ROWS, SECOND, fits
from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.expressions.copies import Copies
from lightning_dp.gradients.expressions.expression import WAY_OUT, Expression, Operands, describe, expression_of
from lightning_dp.gradients.expressions.functions import (
    CONSTANT,
    LIKE,
    SPREADING,
    TOTAL,
    TRANSPOSING,
    can_spread,
    is_of_parameter,
    name_of,
    sets_data,
    writes,
)
from lightning_dp.gradients.expressions.meeting import meet
from lightning_dp.gradients.expressions.penalty import add_penalty
from lightning_dp.gradients.expressions.stand_ins import StandIns
from lightning_dp.gradients.forms import Beside, CallForms, Key
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import (
    custom_functions_passed_to,
    functions_unwatched,
    subclasses_unwatched,
    tree_flatten,
    tree_map,
)


class Expressions:
    """Follows some parameters of a module through a forward pass.

    Args:
        module: The module.
        names: Names of the parameters.
        layers: The layers that have rules, by name: within their calls, a parameter is left to the rule, unless the
            call is one of constants alone.
        consume: Called, within a backward pass, with a parameter's name and its gradient at one meeting.
        is_listening: Whether a backward pass is to be taken note of.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Collection[str],
        layers: Mapping[str, nn.Module],
        consume: Callable[[str, PerExampleGradient], None],
        is_listening: Callable[[], bool],
    ) -> None:
        self.stand_ins = StandIns(module, names, layers, self.is_without_records)
        self._consume, self._is_listening = consume, is_listening
        self.forms: CallForms | None = None
        self._expressions: dict[str, Expression] = {}
        self._calls: dict[Key, int] = {}
        self._is_active = False
        self.copies = self._new_copies(0, False)

    def _new_copies(self, batch_size: int, is_connected: bool) -> Copies:
        parameters = {name: p for name, p in self.stand_ins.parameters.items() if p.requires_grad}
        roots = {n: p if is_connected else p.detach().requires_grad_(True) for n, p in parameters.items()}
        twice = self.forms is not None and self.forms.holds_gradients
        return Copies(batch_size, is_connected, roots, self._hand_over, self._is_listening, twice)

    @contextmanager
    def forward(self, batch_size: int, is_connected: bool = False) -> Iterator[None]:
        """Follows the parameters inside.

        Args:
            batch_size: Number of examples.
            is_connected: Let autograd compute its own gradients of the parameters as well.
        """
        self._calls, self._is_active = {}, True
        with functions_unwatched():
            self.copies = self._new_copies(batch_size, is_connected)
            roots = self.copies.roots
            self._expressions = {name: expression_of(root, self, (name,), name) for name, root in roots.items()}
            within = {name: p if is_connected else p.detach() for name, p in self.stand_ins.parameters.items()}
        for expression in self._expressions.values():
            expression._is_param = True
        try:
            with self.stand_ins.in_place(self._expressions, within):
                if not self._expressions:
                    yield
                    return
                with custom_functions_passed_to(self._apply_custom, Expression):
                    yield
        finally:
            self._is_active = False

    def is_without_records(self, name: str, index: int, input: Any) -> bool:
        """Whether a call of a layer that has a rule is one of constants alone."""
        return self.forms is not None and self.forms.is_without_records(name, index)

    def missed(self) -> list[str]:
        """Names of the parameters to which a gradient came past all meetings, in this backward pass."""
        if self.copies.is_connected:
            return []
        return [name for name, root in self.copies.roots.items() if root.grad is not None]

    def _hand_over(self, name: str, gradient: PerExampleGradient) -> None:
        """Hands a gradient over, unless user code has frozen the parameter for a while (``toggle_optimizer``)."""
        if self.stand_ins.parameters[name].requires_grad:
            self._consume(name, gradient)

    # -- what functions return -------------------------------------------------------------------------------------

    def _apply_custom(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with subclasses_unwatched():
            leaves, structure = tree_flatten((args, {}))
            return self.apply(func, leaves, structure)

    def apply(self, func: Any, leaves: list[Any], structure: Any) -> Any:
        """What a function returns of arguments of which one at least is an expression."""
        first = leaves[0]
        if isinstance(first, Expression) and first is self._expressions.get(first.roots[0]) and is_of_parameter(func):
            if sets_data(func):  # the numbers that the rest of this pass computes with
                Operands(leaves, structure, ()).call(func)
            return Operands([self.stand_ins.parameters[first.roots[0]], *leaves[1:]], structure, ()).call(func)
        roots = tuple(dict.fromkeys(name for e in leaves if isinstance(e, Expression) for name in e.roots))
        operands = Operands(leaves, structure, roots)
        if not (self._is_active and torch.is_grad_enabled()):
            return operands.call(func)
        others = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not isinstance(leaf, Expression)]
        if others and name_of(func) not in LIKE and not self.stand_ins.parametrizing:
            self._place(func, operands, others)
        if operands.is_total:
            return self.add_penalty(func, operands)
        if operands.rows:
            return self.meet(func, operands)
        result = operands.call(func)
        if writes(func) and isinstance(first, Tensor) and first.requires_grad:
            self._written_to(func, first, operands)
            return result
        if not self.stand_ins.parametrizing and self.is_spread(func, operands, result):
            return self.spread(func, leaves[0], result)
        return self._kept(func, operands, result)

    def _place(self, func: Any, operands: Operands, others: Sequence[int]) -> None:
        """Finds where the examples are in the operands."""
        kinds = self.kinds_of(func, operands, others)
        operands.is_total = TOTAL in kinds
        operands.rows = [i for i, kind in zip(others, kinds, strict=True) if kind in ARRANGEMENTS]
        found = {kind for kind in kinds if kind in ARRANGEMENTS}
        if len(found) > 1:
            raise operands.not_by_example(func, "its arguments have the examples in different places")
        operands.arrangement = found.pop() if found else ROWS

    def kinds_of(self, func: Any, operands: Operands, others: Sequence[int]) -> tuple[str, ...]:
        """What each of the plain tensors is: an arrangement of examples, `CONSTANT` or `TOTAL`.

        Raises:
            FormChanged: Something else than when the model was examined; or a constant is another.
            UnsupportedModelError: Without an examination, a tensor that cannot be told.
        """
        leaves, size = operands.leaves, self.copies.batch_size
        if self.forms is None:
            return tuple(self._kind_by_shape(func, operands, leaves[i]) for i in others)
        self.next_call(func, operands)
        kinds = []
        for place, i in enumerate(others):
            known = self.forms.beside.get(beside_key(func, operands, len(others), place))
            kind = None if known is None else _kind_of(known, leaves[i], size)
            if kind is None:
                raise FormChanged(_changed(func, operands))
            kinds.append(kind)
        return tuple(kinds)

    def _kind_by_shape(self, func: Any, operands: Operands, tensor: Tensor) -> str:
        if fits(tensor, ROWS, self.copies.batch_size) and not isinstance(tensor, nn.Parameter):
            return ROWS
        if tensor.requires_grad:
            raise operands.not_by_example(func, f"it is used beside a tensor of shape {tuple(tensor.shape)}")
        return CONSTANT

    def next_call(self, func: Any, operands: Operands) -> tuple[Key, int]:
        """What a penalty's share is known by, and the number of the call among those that are known by the same."""
        key = (operands.roots, name_of(func))
        self._calls[key] = self._calls.get(key, -1) + 1
        return key, self._calls[key]

    def meet(self, func: Any, operands: Operands) -> Any:
        """What a function returns of expressions and records."""
        return meet(func, operands, self.copies)

    def add_penalty(self, func: Any, operands: Operands) -> Tensor:
        """What a function returns that adds expressions to the loss."""
        key = (operands.roots, name_of(func))
        share = None if self.forms is None else self.forms.shares.get((*key, self._calls[key]))
        if share is None:
            raise FormChanged(_changed(func, operands))
        return add_penalty(func, operands, self.copies, share)

    # -- what comes of parameters alone ----------------------------------------------------------------------------

    def is_spread(self, func: Any, operands: Operands, result: Any) -> bool:
        """Whether a function of parameters alone spreads what they give over the batch."""
        if name_of(func) not in SPREADING:
            return False
        return self._spread_of(func, operands.leaves[0], operands.roots, result) != CONSTANT

    def _spread_of(self, func: Any, first: Any, roots: tuple[str, ...], result: Any) -> str:
        size = self.copies.batch_size
        if self.forms is None:
            return ROWS if can_spread(func, ROWS, first, result, size) else CONSTANT
        known = self.forms.spreads.get((roots, name_of(func)), set())
        if len(known) != 1:  # what is constant is followed on, with all its rows
            return CONSTANT
        [kind] = known
        if kind != CONSTANT and not can_spread(func, kind, first, result, size):
            raise FormChanged(f"Parameter {roots[0]!r} is used in {name_of(func)} at {here()} {ANOTHER_WAY}")
        return kind

    def spread(self, func: Any, first: Expression, result: Tensor) -> Tensor:
        """Every example's own copy, in the place of one that a function has spread over the batch."""
        kind = self._spread_of(func, first, first.roots, result)
        if kind == FLAT:
            return self.copies.of(first).flatten(0, 1)
        place = 1 if kind == SECOND else 0
        one = expression_of(result.narrow(place, 0, 1), self, first.roots)
        copies = self.copies.of(one).squeeze(place + 1)
        return copies.transpose(0, 1) if kind == SECOND else copies

    def _kept(self, func: Any, operands: Operands, result: Any) -> Any:
        """What a function returns of parameters and constants alone, as expressions."""
        first = operands.leaves[0]
        is_transposed = name_of(func) in TRANSPOSING and isinstance(first, Expression) and first.dim() == 2

        def kept(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, Expression) or not value.requires_grad:
                return value
            if not is_transposed:
                return expression_of(value, self, operands.roots)
            return expression_of(value, self, operands.roots, first.root, not first.is_transposed)

        return tree_map(kept, result)

    def _written_to(self, func: Any, tensor: Tensor, operands: Operands) -> None:
        """A constant, or an expression, that parameters were written into (``out[:, rows] = weight``)."""
        if isinstance(tensor, Expression) and tensor.copies:
            raise UnsupportedModelError(
                f"{operands.used_in(func)}, which changes in place what has met records already. Use an operation that "
                f"returns a new tensor, {WAY_OUT}."
            )
        describe(tensor, self, operands.roots)


def beside_key(func: Any, operands: Operands, others: int, place: int) -> Key:
    """What is known of tensors beside parameters is known by this: parameters, function, and the place among others."""
    return operands.roots, name_of(func), others, place


def _kind_of(known: Beside, tensor: Tensor, batch_size: int) -> str | None:
    """What a tensor is: told by what it is, and not by the number of the call; ``None``: it was not there before."""
    if isinstance(tensor, nn.Parameter) or known.is_constant(tensor):
        return CONSTANT
    if not tensor.dim():
        return TOTAL if known.is_total else None
    arrangement = known.arrangements.get(tensor.dim())
    return arrangement if arrangement is not None and fits(tensor, arrangement, batch_size) else None


def _changed(func: Any, operands: Operands) -> str:
    return f"{operands.used_in(func)} {ANOTHER_WAY}"


ANOTHER_WAY = f"in another way than when the model was examined. Use it in one way, {WAY_OUT}."
