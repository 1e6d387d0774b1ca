"""The form of a layer's calls: found once, before the first step, and held in every step after it.

Once a model is examined, whether an input has one entry per example or is shared by all is not read from its shape:
another batch could change that. Sequence lengths, and how often a recurrent cell is called, may differ between batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_dp.errors import FormChanged


def form_changed_in(error: BaseException) -> FormChanged | None:
    """The `FormChanged` that an error is, or came of: in an autograd function, PyTorch makes a SystemError of it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, FormChanged):
        found = found.__cause__ or found.__context__
    return found


@dataclass(eq=False)
class LayerForm:
    """How one layer is called.

    Attributes:
        is_shared: Per call of the pass that was examined: whether its input is the same for all examples (position
            numbers, with a leading dimension of 1) rather than one entry per example.
        constants: The inputs that all examples share, by the number of the call.
        per_example: Of layers that are recomputed (`rules.recompute`): which arguments have one entry per example.
        reduction: Of a layer that returns one number for the whole batch (a loss that holds parameters): whether that
            is the ``"mean"`` or the ``"sum"`` over examples; ``None``: it returns one entry per example.
    """

    is_shared: list[bool] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    per_example: tuple[bool, ...] | None = None
    reduction: str | None = None


class CallForms:
    """How every trained layer of a module is called; see `LayerForm`."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerForm] = {}
        #: Whether the loss depends on a gradient (``create_graph=True``).
        self.holds_gradients = False
        #: Flags on an accelerator, by message: whether a shared input differed; read once per forward pass.
        self._changed: dict[str, Tensor] = {}

    def merge(self, other: CallForms, only_new: bool = False) -> None:
        """Takes over the layers that have been examined since; ``only_new``: those that were not known."""
        self.holds_gradients |= other.holds_gradients
        for name, form in other.layers.items():
            if not only_new or name not in self.layers:
                self.layers[name] = form

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
