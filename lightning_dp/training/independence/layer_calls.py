"""How layers are called: the forms that every later step is held to, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_dp.gradients.forms import CallForms, LayerForm
from lightning_dp.gradients.model import trained_layers
from lightning_dp.gradients.rules.composite import calls_linear
from lightning_dp.gradients.rules.registry import rule_for
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import functions_unwatched, modes_disabled, tree_flatten, tree_unflatten
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import State
from lightning_dp.training.independence.tracer import RowTracer


class LayerCalls:
    """Takes note of every call of a layer within a traced step.

    Args:
        tracer: Knows whose the layers' inputs are.
        forms: Where the forms of calls go.
        rows, records: How many the batch has.
    """

    def __init__(self, tracer: RowTracer, forms: CallForms, rows: int, records: int) -> None:
        self._tracer, self._forms, self._rows, self._records = tracer, forms, rows, records
        #: By problem: the layers whose calls have it, and the line of the first such call.
        self.problems: dict[str, list[str]] = {}
        #: Types of layers with a problem, by name.
        self.kinds: dict[str, str] = {}
        #: Inputs of calls, and whose they were then.
        self._seen: list[tuple[str, nn.Module, Tensor, State | None, int]] = []
        self.lines: dict[str, str] = {}

    def hooks(self, module: nn.Module) -> list[Any]:
        return [
            layer.register_forward_hook(self._noted(name), with_kwargs=True)
            for name, layer in trained_layers(module).items()
        ]

    def _noted(self, name: str) -> Callable[..., None]:
        forms = self._forms

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            form = forms.layers.setdefault(name, LayerForm())
            if isinstance(output, Tensor) and output.requires_grad:
                with functions_unwatched(), modes_disabled():
                    output.register_hook(self._note_gradient)
            input = args[0] if args else next(iter(kwargs.values()), None)
            index = len(form.is_shared)
            if isinstance(input, PackedSequence):
                form.is_shared.append(False)
                self._note_problem(name, layer, *self._padded(input), dim=1)
                return
            if not isinstance(input, Tensor):
                return  # refused by the engine, which says so
            time_first = calls_linear(layer) and not getattr(layer, "batch_first", False) and input.dim() > 2
            dim = 1 if time_first else 0
            state = self._tracer.state(input)
            public = state is None or state.is_public
            self._seen.append((name, layer, input, state, dim))
            shared = public and input.dim() > 0 and input.shape[0] == 1 and self._rows > 1
            form.is_shared.append(shared)
            if shared:
                form.constants[index] = input.detach().clone()
            if rule_for(layer) is None:
                leaves, _ = tree_flatten((args, dict(kwargs)))
                form.per_example = tuple(self._is_per_example(leaf) for leaf in leaves)
                if isinstance(output, Tensor) and not output.dim():
                    form.reduction = self._reduction_of(layer, args, kwargs, form.per_example, output)
            if not public and isinstance(state, State):
                self._note_problem(name, layer, state, input.shape, dim)

        return hook

    def _note_gradient(self, gradient: Tensor) -> None:
        """Whether the loss will depend on this gradient: the backward pass is recorded in its turn."""
        self._forms.holds_gradients |= torch.is_grad_enabled()

    def look_again(self) -> None:
        """After the step: what a call saw is what its gradient is computed from, and must not have been mixed since."""
        for name, layer, input, before, dim in self._seen:
            state = self._tracer.state(input)
            if state is not None and not state.is_public and (before is None or state.is_mixed != before.is_mixed):
                self._note_problem(name, layer, state, input.shape, dim)

    def _note_problem(self, name: str, layer: nn.Module, state: State | None, shape: Sequence[int], dim: int) -> None:
        problem = None if state is None else self._form_problem(state, shape, dim)
        if problem:
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

    def _reduction_of(
        self, layer: nn.Module, args: Any, kwargs: Any, per_example: Sequence[bool], output: Tensor
    ) -> str | None:
        """Whether a layer's one number is the mean or the sum of those of single examples."""
        leaves, structure = tree_flatten((args, dict(kwargs)))
        alone = []
        with modes_disabled(), torch.no_grad():
            for row in range(self._rows):
                taken = [leaf[row : row + 1] if own else leaf for leaf, own in zip(leaves, per_example, strict=True)]
                own_args, own_kwargs = tree_unflatten(taken, structure)
                try:
                    alone.append(type(layer).forward(layer, *own_args, **own_kwargs))
                except Exception:  # a layer that takes no single example
                    return None
            for name, found in (("mean", torch.stack(alone).mean()), ("sum", torch.stack(alone).sum())):
                if torch.isclose(found, output, rtol=1e-4, atol=1e-6):
                    return name
        return None

    def _is_per_example(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return False
        state = self._tracer.state(leaf)
        if state is None or state.is_public:
            return len(leaf) == self._rows
        return state.owner.shape[0] > 1

    def _form_problem(self, state: State, shape: Sequence[int], dim: int) -> str | None:
        """What is wrong with a layer's input, if examples cannot be told apart by its entries along a dimension."""
        if state.is_mixed:
            return f"what they see depends on several records: {state.why}"
        if bool((state.owner == owners.SUM).any()):
            return f"what they see is a sum over records: {state.why}"
        owner = state.owner
        if state.reordered:
            return (
                "they see the records in an order that their lengths decide (a packed sequence sorts them): give the "
                "layer padded sequences, and take each one's state at its own length, or use engine='per_example'"
            )
        expected = owners.rows(self._rows, len(shape), self._records, dim) if len(shape) > dim else None
        if expected is not None and owner.dim() == expected.dim() and shape[dim] == self._rows:
            filled = (
                torch.where((owner == owners.PUBLIC) | (owner == owners.RANDOM), expected, owner)
                if owner.shape == expected.shape
                else owner
            )
            if filled.shape == expected.shape and bool((filled == expected).all()):
                return None
        if state.ragged:
            return (
                "they see rows that were chosen by what records hold (a mask, packed sequences): call them on all "
                "records, and take what is not wanted out of the loss (torch.where, a weight of 0)"
            )
        placed = owners.blocks(owner)
        if placed is not None and placed[0] == dim and shape[dim] == self._rows:
            return "they see the records in another order than other layers do"
        return (
            "they do not see one entry per example in their leading dimension, which must be the batch. Put the batch "
            "first (batch_first=True; no flattening of batch and time into one dimension), or use "
            "engine='per_example', which is slow but takes any layer"
        )
