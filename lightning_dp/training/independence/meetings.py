"""Where parameters that are used outside their layers meet records: noted once, and held in every later step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_dp.gradients.arrangement import ROWS, SECOND, fits
from lightning_dp.gradients.expressions import Expression, Expressions
from lightning_dp.gradients.expressions.expression import Operands
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
from lightning_dp.gradients.forms import CallForms, Share
from lightning_dp.gradients.rules.composite import calls_linear
from lightning_dp.torch_api import base_of, tree_leaves
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
            there, and that tensor's shape.
        arrangement_of: How the examples lie in a tensor of such entries and shape; ``None``: in none that is known.
        followed: Names of layers whose calls with constants are followed, though their input has one entry.
        reduction: ``"mean"`` or ``"sum"``: how the loss depends on the number of examples.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        tracer: RowTracer,
        forms: CallForms,
        problem: Callable[[str, str, State, Sequence[int]], None],
        arrangement_of: Callable[[State, Sequence[int]], str | None],
        followed: Collection[str],
        reduction: str,
    ) -> None:
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        super().__init__(module, trained, layers, lambda name, gradient: None, lambda: False)
        self._tracer, self._noted, self._problem = tracer, forms, problem
        self._own = [*module.buffers(), *(p for p in module.parameters() if not p.requires_grad)]
        self._arrangement_of, self._followed = arrangement_of, followed
        self._reduction = reduction

    #: Whether the batch was drawn, of whatever size.
    is_drawn = False

    def kinds_of(self, func: Any, operands: Operands, others: Sequence[int]) -> tuple[str, ...]:
        self._noted.outside |= set(operands.roots)
        tensors = [operands.leaves[i] for i in others]
        kinds = tuple(self._kind(func, operands, tensor) for tensor in tensors)
        key, _ = self.next_call(func, operands)
        constants = {
            place: tensor
            for place, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True))
            if kind == CONSTANT and not isinstance(tensor, nn.Parameter)
        }
        self._noted.note_meeting(key, kinds, constants)
        for tensor, kind in zip(tensors, kinds, strict=True):
            state = self._tracer.state(tensor)
            if state is not None and not state.is_public and kind != TOTAL:
                self._problem(operands.roots[0], name_of(func), state, tensor.shape)
        return kinds

    def _kind(self, func: Any, operands: Operands, tensor: Tensor) -> str:
        """What a tensor is that parameters are used beside."""
        if isinstance(tensor, nn.Parameter) or any(t is own for t in (tensor, base_of(tensor)) for own in self._own):
            return CONSTANT
        state = self._tracer.state(tensor)
        if state is not None and not state.is_public:
            is_loss = state.is_sum and not state.is_mixed and not tensor.dim()
            if is_loss and operator_of(func) in ADDING and is_penalty(operands, func):
                return TOTAL
            return self._arrangement_of(state, tensor.shape) or ROWS
        return (
            ROWS
            if made_for_batch(tensor, self.copies.batch_size) and len(tensor) == self.copies.batch_size
            else CONSTANT
        )

    def is_spread(self, func: Any, operands: Operands, result: Any) -> bool:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            self._noted.outside |= set(operands.roots)
        if name_of(func) not in SPREADING:
            return False
        key, _ = self.next_call(func, operands)
        found = spread_by(func, operands.leaves[0], result, self.copies.batch_size)
        found = CONSTANT if self.is_drawn else found
        self._noted.note_meeting(key, (found,), {})
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
        if input.dim() and len(input) in (1, self.copies.batch_size):
            return name in self._followed
        return self.is_drawn or not made_for_batch(input, self.copies.batch_size)


def made_for_batch(tensor: Tensor, batch_size: int) -> bool:
    """Whether numbers that no record decides were made for the batch: zeros, noise with an entry for every example.

    Whole numbers that no record decides are positions, the same for all.
    """
    return tensor.is_floating_point() and (fits(tensor, ROWS, batch_size) or fits(tensor, SECOND, batch_size))
