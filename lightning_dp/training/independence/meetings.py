"""Where parameters that are used outside their layers meet records: noted once, and held in every later step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_dp.gradients.arrangement import ROWS, SECOND, both, fits
from lightning_dp.gradients.expressions import Expression, Expressions
from lightning_dp.gradients.expressions.expression import Operands
from lightning_dp.gradients.expressions.following import beside_key
from lightning_dp.gradients.expressions.functions import (
    ADDING,
    CONSTANT,
    SPREADING,
    TOTAL,
    name_of,
    operator_of,
    spread_by,
)
from lightning_dp.gradients.expressions.penalty import is_penalty
from lightning_dp.gradients.forms import Beside, CallForms, Share
from lightning_dp.gradients.rules.composite import calls_linear
from lightning_dp.torch_api import tree_leaves
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import State
from lightning_dp.training.independence.tracer import RowTracer


class Meetings(Expressions):
    """Takes note of what is done with parameters, and changes nothing.

    Args:
        module: The module.
        layers: Its layers that have rules, by name.
        tracer: Knows whose tensors are.
        forms: Where it is noted.
        problem: Called with a parameter's name, a function, whose the entries of another tensor are that it meets
            there, that tensor's shape, and whether examples lie in several ways in tensors of as many dimensions.
        arrangement_of: How the examples lie in a tensor of such entries and shape; ``None``: in none that is known.
        followed: Names of layers whose calls with constants are followed, though their input has one entry.
        reduction: ``"mean"`` or ``"sum"``: how the loss depends on the number of examples.
        is_drawn: Whether the batch was drawn, of whatever size.
        made: What numbers are used by that were made for the batch, a row for every example; added to.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        tracer: RowTracer,
        forms: CallForms,
        problem: Callable[[str, str, State | None, Sequence[int], bool], None],
        arrangement_of: Callable[[State, Sequence[int]], str | None],
        followed: Collection[str],
        reduction: str,
        is_drawn: bool,
        made: set[Any],
    ) -> None:
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        super().__init__(module, trained, layers, lambda name, gradient: None, lambda: False)
        self._tracer, self._noted, self._problem = tracer, forms, problem
        self._arrangement_of, self._followed = arrangement_of, followed
        self._reduction, self.is_drawn, self._made = reduction, is_drawn, made

    def kinds_of(self, func: Any, operands: Operands, others: Sequence[int]) -> tuple[str, ...]:
        self._noted.outside |= set(operands.roots)
        self.next_call(func, operands)
        kinds = []
        for place, i in enumerate(others):
            tensor = operands.leaves[i]
            state = self._tracer.state(tensor)
            kind = self._kind(func, operands, tensor, state)
            kinds.append(kind)
            known = self._noted.beside.setdefault(beside_key(func, operands, len(others), place), Beside())
            if kind == TOTAL:
                known.is_total = True
            elif kind != CONSTANT:
                together = both(kind, known.arrangements.get(tensor.dim(), kind))
                known.arrangements[tensor.dim()] = together or kind
                self._problem(operands.roots[0], name_of(func), state, tensor.shape, together is None)
            elif not isinstance(tensor, nn.Parameter):
                known.note_constant(tensor)
        return tuple(kinds)

    def _kind(self, func: Any, operands: Operands, tensor: Tensor, state: State | None) -> str:
        """What a tensor is that parameters are used beside.

        What no record decides is a constant, whatever its size; but numbers that are drawn anew in every step are each
        example's, if there are as many.
        """
        if isinstance(tensor, nn.Parameter) or state is None:
            return CONSTANT
        if state.is_public:
            is_random = bool((state.owner == owners.RANDOM).any())
            user = operands.roots, name_of(func)
            return ROWS if is_random and self._is_made_for_batch(user, tensor) else CONSTANT
        is_loss = state.is_sum and not state.is_mixed and not tensor.dim()
        if is_loss and operator_of(func) in ADDING and is_penalty(operands, func):
            return TOTAL
        return self._arrangement_of(state, tensor.shape) or ROWS

    def _is_made_for_batch(self, user: Any, tensor: Tensor) -> bool:
        """Whether numbers that no record decides were made for the batch: codes, noise, with a row for every example.

        Args:
            user: The layer, or the parameters and the function, that they are used by. On a drawn batch, whose size may
                be theirs by chance, only one of which that is known already.
        """
        if not fits(tensor, ROWS, self.copies.batch_size):
            return False
        if not self.is_drawn:
            self._made.add(user)
        return user in self._made

    def is_spread(self, func: Any, operands: Operands, result: Any) -> bool:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            self._noted.outside |= set(operands.roots)
        if name_of(func) not in SPREADING:
            return False
        found = spread_by(func, operands.leaves[0], result, self.copies.batch_size)
        found = CONSTANT if self.is_drawn else found  # of one size alone, it could be chance
        self._noted.spreads.setdefault((operands.roots, name_of(func)), set()).add(found)
        return found != CONSTANT

    def spread(self, func: Any, first: Expression, result: Tensor) -> Tensor:
        return result

    def meet(self, func: Any, operands: Operands) -> Any:
        return operands.call(func)

    def add_penalty(self, func: Any, operands: Operands) -> Tensor:
        key = (operands.roots, name_of(func))
        share = self._noted.shares[(*key, self._calls[key])] = Share(self._reduction)

        def note(slope: Tensor) -> None:
            share.factor = slope.item()

        result: Tensor = operands.call(func)
        result.register_hook(note)
        return result

    def is_without_records(self, name: str, index: int, input: Any) -> bool:
        if super().is_without_records(name, index, input):
            return True
        if not isinstance(input, Tensor):
            return False
        state = self._tracer.state(input)
        if not (state is None or state.is_public) or calls_linear(self.stand_ins.layers[name]):
            return False
        if (input.dim() and len(input) == 1) or self._is_made_for_batch(name, input):
            return name in self._followed
        return self.is_drawn or not made_for_batch(input, self.copies.batch_size)


def made_for_batch(tensor: Tensor, batch_size: int) -> bool:
    """Whether numbers that no record decides were made for the batch: zeros, noise with an entry for every example.

    Whole numbers that no record decides are positions, the same for all.
    """
    return tensor.is_floating_point() and (fits(tensor, ROWS, batch_size) or fits(tensor, SECOND, batch_size))
