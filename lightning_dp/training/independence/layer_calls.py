"""How layers are called: the forms that every later step is held to, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.gradients.forms import CallForms, LayerForm
from lightning_dp.gradients.model import OPAQUE, trained_layers
from lightning_dp.gradients.rules.registry import rule_for
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import modes_disabled, tree_flatten, tree_unflatten
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import State
from lightning_dp.training.independence.tracer import RowTracer


class LayerCalls:
    """Takes note of every call of a layer within a traced step.

    Args:
        tracer: Knows whose the layers' inputs are.
        forms: Where the forms of calls go.
        rows, records: Of the batch.
    """

    def __init__(self, tracer: RowTracer, forms: CallForms, rows: int, records: int) -> None:
        self._tracer, self._forms, self._rows, self._records = tracer, forms, rows, records
        #: Layers of whose calls this is wrong, and the line of the first.
        self.problems: dict[str, list[str]] = {}
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
            input = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(input, Tensor):
                return  # refused by the engine, which says so
            index = len(form.is_shared)
            dim = 0 if not isinstance(layer, OPAQUE) or getattr(layer, "batch_first", False) or input.dim() < 3 else 1
            state = self._tracer.state(input)
            public = state is None or state.is_public
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
                problem = self._form_problem(state, input.shape, dim)
                if problem:
                    self.problems.setdefault(problem, []).append(f"'{name}' ({type(layer).__name__})")
                    self.lines.setdefault(problem, here())

        return hook

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
        if state.is_sum:
            return f"what they see is a sum over records: {state.why}"
        owner = state.owner
        if state.reordered:
            return (
                "they see the records in an order that their lengths decide (a packed sequence sorts them): give the "
                "layer padded sequences, and take each one's state at its own length, or use engine='per_example'"
            )
        expected = owners.rows(self._rows, len(shape), self._records, dim) if len(shape) > dim else None
        if expected is not None and owner.dim() == expected.dim() and shape[dim] == self._rows:
            filled = torch.where(owner < 0, expected, owner) if owner.shape == expected.shape else owner
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
