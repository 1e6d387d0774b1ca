"""How layers are called: the forms that every later step is held to, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_dp.gradients.arrangement import ARRANGEMENTS, FLAT_SECOND, ROWS, SECOND, both
from lightning_dp.gradients.covered import covered_layers
from lightning_dp.gradients.forms import CallForms, LayerForm
from lightning_dp.gradients.rules.bags import bag_arguments
from lightning_dp.gradients.rules.composite import calls_linear
from lightning_dp.gradients.rules.registry import rule_for, takes_arguments
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import functions_unwatched, modes_disabled, tree_flatten
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.meetings import Meetings, made_for_batch
from lightning_dp.training.independence.owners import State
from lightning_dp.training.independence.subject import Understanding
from lightning_dp.training.independence.tracer import RowTracer


class LayerCalls:
    """Takes note of every call of a layer within a traced step.

    Args:
        tracer: Knows whose the layers' inputs are.
        forms: Where the forms of calls go.
        rows, records: How many the batch has.
        understanding: What is held in every step: layers whose calls with constants are followed, and what
            numbers are used by that were made for the batch.
        reduction: ``"mean"`` or ``"sum"``: how the loss depends on the number of examples.
        is_drawn: Whether the batch was drawn, of whatever size.
    """

    def __init__(
        self,
        tracer: RowTracer,
        forms: CallForms,
        rows: int,
        records: int,
        understanding: Understanding,
        reduction: str,
        is_drawn: bool,
    ) -> None:
        self._followed, self._made = understanding.followed, understanding.made
        self._reduction, self.is_drawn = reduction, is_drawn
        self._tracer, self._forms, self._rows, self._records = tracer, forms, rows, records
        #: By problem: the layers whose calls have it, and the line of the first such call.
        self.problems: dict[str, list[str]] = {}
        #: Types of layers with a problem, by name.
        self.kinds: dict[str, str] = {}
        #: Inputs of calls, and whose they were then.
        self._seen: list[tuple[str, nn.Module, Tensor, State | None, tuple[str, ...]]] = []
        self.lines: dict[str, str] = {}
        self._without_records: Collection[str] = ()

    @contextmanager
    def noted(self, module: nn.Module) -> Iterator[None]:
        """Takes note inside of calls of the module's layers, and of what is done with parameters elsewhere."""
        layers = covered_layers(module)
        meetings = Meetings(
            module,
            layers,
            self._tracer,
            self._forms,
            self._note_meeting_problem,
            self._arrangement_of,
            self._followed,
            self._reduction,
            self.is_drawn,
            self._made,
        )
        self._without_records = meetings.stand_ins.without_records
        handles = [layer.register_forward_hook(self._noted(n), with_kwargs=True) for n, layer in layers.items()]
        try:
            with meetings.forward(self._rows, is_connected=True):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_meeting_problem(
        self, parameter: str, func: str, state: State | None, shape: Sequence[int], is_ambiguous: bool
    ) -> None:
        problem = None if state is None else self._form_problem(state, shape, ARRANGEMENTS)
        if problem is None and is_ambiguous:
            problem = SEVERAL_WAYS
        if problem:
            self.problems.setdefault(problem, []).append(parameter)
            self.kinds[parameter] = f"used in {func}"
            self.lines.setdefault(problem, here())

    def _noted(self, name: str) -> Callable[..., None]:
        forms = self._forms

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            form = forms.layers.setdefault(name, LayerForm())
            form.without_records.append(name in self._without_records)
            if name in self._without_records:
                return
            if isinstance(output, Tensor) and output.requires_grad:
                with functions_unwatched(), modes_disabled():
                    output.register_hook(self._note_gradient)
            input = args[0] if args else next(iter(kwargs.values()), None)
            index = len(form.is_shared)
            if isinstance(input, PackedSequence):
                form.is_shared.append(False)
                self._note_problem(name, layer, *self._padded(input), (SECOND,))
                return
            if not isinstance(input, Tensor):
                return  # refused by the engine, which says so
            if (bags := self._bags(layer, args, kwargs)) is not None:
                form.is_shared.append(False)
                self._note_problem(name, layer, *bags, (ROWS,))
                return
            allowed = self._allowed(layer, input)
            state = self._tracer.state(input)
            public = state is None or state.is_public
            self._seen.append((name, layer, input, state, allowed))
            shared = public and input.dim() > 0 and input.shape[0] == 1 and self._rows > 1
            form.is_shared.append(shared)
            found = None
            if not calls_linear(layer):
                if state is not None and not public:
                    found = self._arrangement_of(state, input.shape, allowed)
                elif not shared and SECOND in allowed and len(input) != self._rows:
                    found = SECOND if not self.is_drawn and made_for_batch(input, self._rows) else None
            found = found or ROWS
            together = both(found, form.arrangements.get(input.dim(), found))
            form.arrangements[input.dim()] = together or found
            if together is None:
                self._add_problem(SEVERAL_WAYS, name, layer)
            if shared:
                form.constants[index] = input.detach().clone()
            if rule_for(layer) is None:
                leaves, _ = tree_flatten((args, dict(kwargs)))
                form.per_example = tuple(self._is_per_example(leaf) for leaf in leaves)
            if not public and isinstance(state, State):
                self._note_problem(name, layer, state, input.shape, allowed)

        return hook

    def _note_gradient(self, gradient: Tensor) -> None:
        """Whether the loss will depend on this gradient: the backward pass is recorded in its turn."""
        self._forms.holds_gradients |= torch.is_grad_enabled()

    def look_again(self) -> None:
        """After the step: what a call saw is what its gradient is computed from, and must not have been mixed since."""
        for name, layer, input, before, allowed in self._seen:
            state = self._tracer.state(input)
            if state is not None and not state.is_public and (before is None or state.is_mixed != before.is_mixed):
                self._note_problem(name, layer, state, input.shape, allowed)

    @staticmethod
    def _allowed(layer: nn.Module, input: Tensor) -> tuple[str, ...]:
        """Where a layer's input may have the entries of every example."""
        if calls_linear(layer):
            return (ROWS,) if getattr(layer, "batch_first", False) or input.dim() <= 2 else (SECOND,)
        rule = rule_for(layer)
        return (ROWS,) if rule is None or takes_arguments(rule) else ARRANGEMENTS

    def _note_problem(
        self, name: str, layer: nn.Module, state: State | None, shape: Sequence[int], allowed: Sequence[str]
    ) -> None:
        problem = None if state is None else self._form_problem(state, shape, allowed)
        if problem:
            self._add_problem(problem, name, layer)

    def _add_problem(self, problem: str, name: str, layer: nn.Module) -> None:
        self.problems.setdefault(problem, []).append(name)
        self.kinds[name] = type(layer).__name__
        self.lines.setdefault(problem, here())

    def _padded(self, packed: PackedSequence) -> tuple[State | None, Sequence[int]]:
        """Whose the entries of a packed sequence are once it is padded, ``(T, B, d)``, and that shape."""
        state = self._tracer.state(packed.data)
        with modes_disabled():
            if state is None or state.is_public:
                return None, packed.data.shape
            if state.is_mixed or state.is_sum:
                return state, packed.data.shape
            owner = state.owner.expand(packed.data.shape).float()
            moved, _ = pad_packed_sequence(packed._replace(data=owner.contiguous()), padding_value=owners.PUBLIC)
            # A sequence's padding is its own.
            own = moved.amax([0, *range(2, moved.dim())], keepdim=True)
            filled = torch.where(moved == owners.PUBLIC, own, moved)
        sorts = packed.sorted_indices is not None
        padded = owners.compress(filled.to(owners.DTYPE))
        state = replace(state, owner=padded, ragged=False, packed=False, reordered=state.reordered != sorts)
        return state, moved.shape

    def _bags(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[State, Sequence[int]] | None:
        """Whose the bags of an embedding are that are given by offsets, as `padded`; ``None``: they are not.

        Where entries and offsets are those that a collate function joined and counted, a bag is one record's, in every
        batch.
        """
        if not isinstance(layer, nn.EmbeddingBag):
            return None
        given = bag_arguments(layer, args, kwargs)
        if given.get("offsets") is None:
            return None
        input, offsets = (self._tracer.state(given[name]) for name in ("input", "offsets"))
        shape = (self._rows, 1)
        if input is not None and offsets is not None and input.joined == -offsets.joined > 0:
            return State(owners.rows(self._rows, 2, self._records)), shape
        return self._tracer.mixed(2, OTHER_OFFSETS), shape

    def _is_per_example(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return False
        state = self._tracer.state(leaf)
        if state is None or state.is_public:
            return len(leaf) == self._rows
        return state.owner.shape[0] > 1

    def _arrangement_of(self, state: State, shape: Sequence[int], allowed: Sequence[str] = ARRANGEMENTS) -> str | None:
        """How the examples lie in a tensor; ``None``: in no way that is allowed."""
        if state.is_mixed or state.is_sum or state.reordered:
            return None
        for arrangement in allowed:
            expected = self._rows_if(arrangement, shape)
            if expected is not None and _is(state.owner, expected):
                return arrangement
        return None

    def _rows_if(self, arrangement: str, shape: Sequence[int]) -> Tensor | None:
        """Whose entries a tensor has, if its examples lie so."""
        dims, rows = len(shape), self._rows
        if arrangement == SECOND:
            return owners.rows(rows, dims, self._records, 1) if dims > 1 and shape[1] == rows else None
        if not dims or not shape[0] or shape[0] % rows or (arrangement == ROWS and shape[0] != rows):
            return None
        if arrangement == FLAT_SECOND:
            return owners.rows(rows, dims, self._records).repeat(shape[0] // rows, *[1] * (dims - 1))
        return owners.rows(shape[0], dims, self._records)

    def _form_problem(self, state: State, shape: Sequence[int], allowed: Sequence[str]) -> str | None:
        """What is wrong with a tensor, if examples cannot be told apart by where its entries are."""
        if state.is_mixed:
            return f"what they see depends on several records: {state.why}"
        if bool((state.owner == owners.SUM).any()):
            why = f": {state.why}" if state.why else ""
            return (
                f"what they see is a sum over records{why}. Use them on every record's own numbers, before their mean "
                "is taken"
            )
        if state.reordered:
            return (
                "they see the records in an order that their lengths decide (a packed sequence sorts them): give the "
                "layer padded sequences, and take each one's state at its own length, or use engine='per_example'"
            )
        if self._arrangement_of(state, shape, allowed) is not None:
            return None
        if state.ragged:
            return (
                "they see rows that were chosen by what records hold (a mask, packed sequences): call them on all "
                "records, and take what is not wanted out of the loss (torch.where, a weight of 0)"
            )
        placed = owners.blocks(state.owner)
        if placed is not None and placed[0] < len(shape) and shape[placed[0]] == self._rows:
            return "they see the records in another order than other layers do"
        return (
            "they do not see the entries of each example where every batch has them: let the batch be the leading "
            "dimension (batch_first=True), or use engine='per_example', which is slow but takes any layer"
        )


OTHER_OFFSETS = (
    "bags by offsets that are not those which collate_fn counted (pad the bags to (B, T), with padding_idx, and leave "
    "offsets out)"
)

#: Flattened rows of (B, T) and of (T, B) cannot be told apart by their sizes.
SEVERAL_WAYS = (
    "they see the examples in several places, in tensors of as many dimensions, which sizes cannot tell apart. Let the "
    "batch be in one place for all calls (the leading dimension, without flattening), or use engine='per_example', "
    "which is slow but takes any layer"
)


def _is(owner: Tensor, expected: Tensor) -> bool:
    """Whether entries belong to whom they should, as far as they belong to anybody."""
    if owner.shape != expected.shape:
        return False
    free = (owner == owners.PUBLIC) | (owner == owners.RANDOM)
    return bool((torch.where(free, expected, owner) == expected).all())
