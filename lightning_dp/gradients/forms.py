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
        arrangements: Per call: where its input has the entries of every example
            (`lightning_dp.gradients.arrangement`).
        constants: The inputs that all examples share, by the number of the call.
        per_example: Of layers that are recomputed (`rules.recompute`): which arguments have one entry per example.
        without_records: Per call, also of those that are not recorded: whether the layer is a function of constants
            there, and its parameters are followed to where they meet records (`lightning_dp.gradients.expressions`).
    """

    is_shared: list[bool] = field(default_factory=list)
    arrangements: list[str] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    per_example: tuple[bool, ...] | None = None
    without_records: list[bool] = field(default_factory=list)


class CallForms:
    """How every trained layer of a module is called; see `LayerForm`."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerForm] = {}
        #: Names of parameters that are used outside their layer's forward.
        self.outside: set[str] = set()
        #: Of functions that parameters are used in, by parameters and function: per call, what each of the other
        #: tensors is; see `lightning_dp.gradients.expressions`.
        self.meetings: dict[Key, list[tuple[str, ...]]] = {}
        #: Of functions that add a penalty on parameters to the loss: each example's share, by parameters, function and
        #: number of the call.
        self.shares: dict[Key, Share] = {}
        #: All other tensors there, by parameters, function, place and number of the call.
        self._same: dict[Key, Tensor] = {}
        #: Whether the loss depends on a gradient (``create_graph=True``).
        self.holds_gradients = False
        #: Flags on an accelerator, by message: whether a shared input differed; read once per forward pass.
        self._changed: dict[str, Tensor] = {}

    def merge(self, other: CallForms, only_new: bool = False) -> None:
        """Takes over the layers that have been examined since; ``only_new``: those that were not known."""
        self.holds_gradients |= other.holds_gradients
        self.outside |= other.outside
        _take_over(self.layers, other.layers, only_new)
        _take_over(self.meetings, other.meetings, only_new=True)
        _take_over(self.shares, other.shares, only_new)
        _take_over(self._same, other._same, only_new=True)

    def check_counts(self, meetings: Mapping[Key, int], calls: Mapping[str, int]) -> None:
        """Calls of several forms are told apart by their number: there must be as many as were examined.

        Raises:
            FormChanged: There are others.
        """
        kinds = {key: (self.meetings.get(key, []), count) for key, count in meetings.items()}
        kinds |= {(n,): (self.layers[n].arrangements, count) for n, count in calls.items() if n in self.layers}
        for key, (known, count) in kinds.items():
            if any(kind != known[0] for kind in known) and count != len(known):
                raise FormChanged(f"{key[0]} is used {count} times, in several forms, and was used {len(known)} times.")

    def beyond_rules(self) -> list[str]:
        """What a rule that sees one layer's input with one entry per example does not cover: parameters, layers."""
        layers = [n for n, f in self.layers.items() if any(f.without_records) or {*f.arrangements} - {ROWS}]
        return [*sorted(self.outside), *layers]

    def arrangement(self, name: str, index: int) -> str:
        """Where a call's input has the entries of every example."""
        form = self.layers.get(name)
        return (_nth(form.arrangements, index) or ROWS) if form is not None else ROWS

    def is_without_records(self, name: str, index: int) -> bool:
        """Whether a layer's call of this number is one of constants alone."""
        form = self.layers.get(name)
        return form is not None and bool(_nth(form.without_records, index))

    def note_meeting(self, key: Key, kinds: tuple[str, ...], constants: Mapping[int, Tensor]) -> None:
        """Takes note of a function of parameters and other tensors: what these are, and the constants among them by
        their place."""
        calls = self.meetings.setdefault(key, [])
        for place, constant in constants.items():
            self._same[(*key, place, len(calls))] = constant.detach().clone()
        calls.append(kinds)

    def meeting(self, key: Key, index: int) -> tuple[str, ...] | None:
        """What the other tensors of a function of parameters are; ``None``: it was not called so often."""
        found: tuple[str, ...] | None = _nth(self.meetings.get(key, []), index)
        return found

    def is_same(self, key: Key, index: int, constant: Tensor) -> bool:
        """Whether a tensor beside parameters is what it was, as far as both are long."""
        calls = len(self.meetings[key[:-1]])
        known = self._same.get((*key, min(index, calls - 1)))
        if known is None or known.dim() != constant.dim() or constant.requires_grad:
            return False
        common = tuple(slice(0, min(a, b)) for a, b in zip(known.shape, constant.shape, strict=True))
        return torch.equal(known.to(constant.device)[common], constant[common])

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
