"""The form of a layer's calls: found once, before the first step, and held in every step after it.

Once a model is examined, whether an input has one entry per example or is shared by all is not read from its shape:
another batch could change that. Sequence lengths, and how often a recurrent cell is called, may differ between batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.errors import FormChanged
from lightning_dp.gradients.arrangement import ROWS


def form_changed_in(error: BaseException) -> FormChanged | None:
    """The `FormChanged` that an error is, or came of: in an autograd function, PyTorch makes a SystemError of it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, FormChanged):
        found = found.__cause__ or found.__context__
    return found


Key = tuple[Any, ...]


@dataclass
class Share:
    """How much of a penalty on parameters is in every example's loss.

    Attributes:
        reduction: Whether the loss is the ``"mean"`` or the ``"sum"`` over examples.
        factor: The loss's derivative by the penalty, as it was when the model was examined.
    """

    reduction: str
    factor: float = math.nan


def _nth(kinds: Sequence[Any], index: int) -> Any:
    """What a call of this number is: as in the examined pass, where all were the same also of further ones."""
    if index < len(kinds):
        return kinds[index]
    return kinds[0] if kinds and all(kind == kinds[0] for kind in kinds) else None


def _take_over(ours: dict[Any, Any], others: Mapping[Any, Any], only_new: bool) -> None:
    ours.update({key: form for key, form in others.items() if not only_new or key not in ours})


@dataclass(eq=False)
class LayerForm:
    """How one layer is called.

    Attributes:
        is_shared: Per call of the pass that was examined: whether its input is the same for all examples (position
            numbers, with a leading dimension of 1) rather than one entry per example.
        arrangements: Where its input has the entries of every example, by the input's number of dimensions
            (`lightning_dp.gradients.arrangement`).
        constants: The inputs that all examples share, by the number of the call.
        per_example: Of layers that are recomputed (`rules.recompute`): which arguments have one entry per example.
        without_records: Per call, also of those that are not recorded: whether the layer is a function of constants
            there, and its parameters are followed to where they meet records (`lightning_dp.gradients.expressions`).
    """

    is_shared: list[bool] = field(default_factory=list)
    arrangements: dict[int, str] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    per_example: tuple[bool, ...] | None = None
    without_records: list[bool] = field(default_factory=list)


@dataclass(eq=False)
class Beside:
    """What is used beside parameters, in one place of a function's arguments.

    Told apart by what it is, never by the number of the call: how often code runs may change.

    Attributes:
        arrangements: Where tensors have the entries of every example, by their number of dimensions.
        constants: Tensors that are the same for all examples, in every step.
        is_total: Whether the loss of the batch was there.
    """

    arrangements: dict[int, str] = field(default_factory=dict)
    constants: list[Tensor] = field(default_factory=list)
    is_total: bool = False

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the constants, as far as both are long."""
        return not tensor.requires_grad and any(_is_same(known, tensor) for known in self.constants)

    def note_constant(self, tensor: Tensor) -> None:
        """Takes note of a constant, unless one that is as long is known."""
        longer = [k for k in self.constants if k.dim() == tensor.dim()]
        longer = [k for k in longer if all(a >= b for a, b in zip(k.shape, tensor.shape, strict=True))]
        if not any(_is_same(known, tensor) for known in longer):
            self.constants.append(tensor.detach().clone())


def _is_same(known: Tensor, tensor: Tensor) -> bool:
    if known.dim() != tensor.dim():
        return False
    common = tuple(slice(0, min(a, b)) for a, b in zip(known.shape, tensor.shape, strict=True))
    return torch.equal(known.to(tensor.device)[common], tensor.detach()[common])


class CallForms:
    """How every trained layer of a module is called; see `LayerForm`."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerForm] = {}
        #: Names of parameters that are used outside their layer's forward.
        self.outside: set[str] = set()
        #: What parameters are used beside, by parameters, function, number of other tensors, and place among them.
        self.beside: dict[Key, Beside] = {}
        #: How functions of parameters alone spread what these give over the batch, by parameters and function.
        self.spreads: dict[Key, set[str]] = {}
        #: Of functions that add a penalty on parameters to the loss: each example's share, by parameters, function and
        #: number of the call.
        self.shares: dict[Key, Share] = {}
        #: Whether the loss depends on a gradient (``create_graph=True``).
        self.holds_gradients = False
        #: Flags on an accelerator, by message: whether a shared input differed; read once per forward pass.
        self._changed: dict[str, Tensor] = {}

    def merge(self, other: CallForms, only_new: bool = False) -> None:
        """Takes over the layers that have been examined since; ``only_new``: those that were not known."""
        self.holds_gradients |= other.holds_gradients
        self.outside |= other.outside
        _take_over(self.layers, other.layers, only_new)
        _take_over(self.beside, other.beside, only_new)
        _take_over(self.spreads, other.spreads, only_new)
        _take_over(self.shares, other.shares, only_new)

    def check_counts(self, calls: Mapping[str, int]) -> None:
        """Calls of a layer with constants and with records are told apart by their number: as many as were examined.

        Args:
            calls: How often layers were called.

        Raises:
            FormChanged: More often, or less.
        """
        for name, count in calls.items():
            known = self.layers[name].without_records if name in self.layers else []
            if any(known) and not all(known) and count != len(known):
                raise FormChanged(
                    f"Layer '{name}' is called {count} times, with constants and with records, and was called "
                    f"{len(known)} times when the model was examined."
                )

    def beyond_rules(self) -> list[str]:
        """What a rule that sees one layer's input with one entry per example does not cover: parameters, layers."""
        layers = [n for n, f in self.layers.items() if any(f.without_records) or {*f.arrangements.values()} - {ROWS}]
        return [*sorted(self.outside), *layers]

    def arrangement(self, name: str, input: Tensor) -> str:
        """Where a layer's input has the entries of every example."""
        form = self.layers.get(name)
        return ROWS if form is None else form.arrangements.get(input.dim(), ROWS)

    def is_without_records(self, name: str, index: int) -> bool:
        """Whether a layer's call of this number is one of constants alone."""
        form = self.layers.get(name)
        return form is not None and bool(_nth(form.without_records, index))

    def is_shared(self, name: str, module: nn.Module, index: int, input: Tensor, batch_size: int) -> bool:
        """Whether a call's input is shared by all examples, if it has the form that was found.

        Raises:
            FormChanged: It has another.
        """
        form = self.layers.get(name)
        kind = type(module).__name__
        if form is None:
            raise FormChanged(f"Layer '{name}' ({kind}) was not called when the model was examined, and is now.")
        kinds = form.is_shared
        if all(k == kinds[0] for k in kinds):
            shared = kinds[0]
        elif index < len(kinds):
            shared = kinds[index]
        else:
            raise FormChanged(f"Layer '{name}' ({kind}) is called more often than when the model was examined.")
        if shared and input.dim() and input.shape[0] == batch_size:
            return False  # one copy per example, as a layer before it has given it; or there is only one example
        expected = 1 if shared else batch_size
        if not input.dim() or input.shape[0] != expected:
            saw = "an input that all examples share (leading dimension 1)" if shared else "one entry per example"
            raise FormChanged(
                f"Layer '{name}' ({kind}) was called with {saw} when the model was examined, and now with shape "
                f"{tuple(input.shape)} for {batch_size} examples."
            )
        if shared:
            self._check_constant(name, kind, form, min(index, len(kinds) - 1), input)
        return shared

    def _check_constant(self, name: str, kind: str, form: LayerForm, index: int, input: Tensor) -> None:
        """An input that is shared must be the same in every step, as far as both are long."""
        problem = (
            f"Layer '{name}' ({kind}) saw an input with leading dimension 1 that all examples shared when the model "
            "was examined, and now another: it may be one record's."
        )
        if input.requires_grad:
            raise FormChanged(problem)
        known = form.constants.get(index)
        if known is None or known.dim() != input.dim():
            raise FormChanged(problem)
        common = tuple(slice(0, min(a, b)) for a, b in zip(known.shape, input.shape, strict=True))
        known = known.to(input.device)
        differs = (known[common] != input.detach()[common]).any()
        if input.device.type == "cpu":
            if bool(differs):
                raise FormChanged(problem)
        else:
            before = self._changed.get(problem)
            self._changed[problem] = differs if before is None else before | differs
        if all(a >= b for a, b in zip(input.shape, known.shape, strict=True)):
            form.constants[index] = input.detach().clone()

    def check_constants(self) -> None:
        """Reads, after a forward pass, the flags whose reading within it would have been a host-device sync each.

        Raises:
            FormChanged: A shared input was another one.
        """
        changed, self._changed = self._changed, {}
        if changed and bool(torch.stack(list(changed.values())).any()):
            raise FormChanged(next(problem for problem, flag in changed.items() if bool(flag)))
