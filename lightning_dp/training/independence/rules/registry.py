"""One operation as it was called, and the register of rules that say what it does to owners.

To add a rule: write a function ``(call) -> list of states`` and register it for its operations' names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.torch_api import arguments_of, tree_flatten
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import MIXED, PUBLIC, SUM, State, aligned, compress, constant

if TYPE_CHECKING:
    from lightning_dp.training.independence.tracer import RowTracer


aten = torch.ops.aten


@dataclass(eq=False)
class Call:
    """One operation, as it was called, and what it returned."""

    tracer: RowTracer
    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: Tensors among the results.
    outputs: list[Tensor]

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
        if name in self.kwargs:
            return self.kwargs[name]
        for index, argument in enumerate(arguments_of(self.func)):
            if argument.name == name:
                if index < len(self.args):
                    return self.args[index]
                return argument.default_value if argument.has_default_value() else default
        return default

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]

    def state(self, tensor: Any) -> State:
        """The state of an operand, public ones as well."""
        found = self.tracer.state(tensor)
        return found or State(constant(PUBLIC, tensor.dim() if isinstance(tensor, Tensor) else 0))

    def owner(self, tensor: Any) -> Tensor:
        """Owners of all entries of an operand, written out."""
        return self.state(tensor).owner.expand(tensor.shape)

    def states(self) -> list[State]:
        return [s for t in self.tensors() if (s := self.tracer.state(t)) is not None]

    def mixed(self, what: str = "") -> list[State]:
        """Results that depend on several records."""
        states = self.states()
        ragged = any(s.ragged for s in states)
        why = next((s.why for s in states if s.why), "") or self.tracer.mixed(0, what or self.name).why
        return [State(constant(MIXED, o.dim()), ragged, why) for o in self.outputs]

    def result(self, owner: Tensor, output: Tensor, ragged: bool | None = None, what: str = "") -> State:
        """A state for a result, with the reason where it is mixed."""
        states = self.states()
        ragged = any(s.ragged for s in states) if ragged is None else ragged
        packed = ragged and any(s.ragged for s in states) and all(s.packed for s in states if s.ragged)
        owner = compress(aligned(owner, output.dim()))
        if packed and self._has_one_row_each(owner):  # the last state of every packed sequence
            ragged = packed = False
        why, terms = "", None
        if bool((owner == MIXED).any()):
            why = next((s.why for s in states if s.why), "") or self.tracer.mixed(0, what or self.name).why
        if bool((owner == SUM).any()):
            known = [s.terms for s in states if s.terms is not None]
            terms = torch.stack(known).sum(0) if known else None
        return State(owner, ragged, why, terms, packed, any(s.reordered for s in states))

    def _has_one_row_each(self, owner: Tensor) -> bool:
        along = owner.flatten()
        count = self.tracer.examples
        return len(owners.varying(owner)) == 1 and len(along) == count and len(along.unique()) == count


Rule = Callable[[Call], list[State]]


RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operations of these names (without a trailing underscore)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def names_in(text: str) -> list[str]:
    return text.split()


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(arguments_of(func)):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if index >= len(args) else args[index]
            found += [value] if isinstance(value, Tensor) else [v for v in value or [] if isinstance(v, Tensor)]
    return found
