"""Recording what each trainable layer saw and what came back: its input and the gradient at its output.

While a recorded layer's forward runs, its trainable parameters do not require grad, so autograd computes no ordinary
weight gradients; the layer's output does, so that the gradient still flows to it. Elsewhere parameters require grad as
usual. Hooks on modules live only as long as one forward pass: outside it the user's module is exactly as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from lightning_dp.errors import ACTIVATION_CHECKPOINTING, UnsupportedModelError
from lightning_dp.gradients.anchored import Anchored
from lightning_dp.gradients.arrangement import ROWS, SECOND, by_example, fits
from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.constants import Constants
from lightning_dp.gradients.expressions import Expression, Expressions
from lightning_dp.gradients.forms import CallForms
from lightning_dp.gradients.layer_call import LayerCall, no_batch, with_batch
from lightning_dp.gradients.model import getattr_path, trainable
from lightning_dp.gradients.recorded_linear import RecordedLinear
from lightning_dp.gradients.rules.composite import calls_linear, forward_with_linear
from lightning_dp.gradients.rules.registry import arguments_by_example
from lightning_dp.gradients.rules.second_order import second_order_rule
from lightning_dp.gradients.shared_outputs import note_expanded
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import base_of, functions_unwatched, version_of


class Recorder:
    """Records the calls of some layers during one forward and one backward pass.

    Args:
        module: The module.
        layers: The layers of it to record, by name.
        with_arguments: Names of the layers of which all arguments are kept.
        consume: Called with a layer's name and the call as soon as its gradient is known; the call is then forgotten.
            ``None``: calls are kept until `take`.
        followed: Names of the parameters that are followed to where they meet records (`Expressions`).
        take: Called with the name of such a parameter and its gradient at one meeting.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        with_arguments: Collection[str] = (),
        consume: Callable[[str, LayerCall], None] | None = None,
        followed: Collection[str] = (),
        take: Callable[[str, PerExampleGradient], None] = lambda name, gradient: None,
    ) -> None:
        self._layers = dict(layers)
        self.followed = set(followed)
        self.expressions = Expressions(module, self.followed, layers, take, lambda: self._listening)
        self._with_arguments = set(with_arguments)
        self._consume = consume
        self._own = {layer: [getattr_path(m, name) for name in trainable(m)] for layer, m in layers.items()}
        self._constants = Constants([])
        self._calls: dict[str, list[LayerCall]] = {}
        self._listening = self._recording = self._keeps_graph = False
        #: How layers are called, once that has been found.
        self.forms: CallForms | None = None
        self._twice: str | None = None  # a layer whose backward pass was itself differentiated (create_graph=True)
        self._followed: set[str] = set()  # layers whose backward pass is followed, for losses that depend on a gradient

    @contextmanager
    def forward(self, batch_size: int, keep_requires_grad: bool = False) -> Iterator[None]:
        """Records the forward passes inside; every layer must see ``batch_size`` examples in its leading dimension.

        Args:
            batch_size: Number of examples in the batch that is passed through the model.
            keep_requires_grad: Leave the parameters as they are, so that autograd computes its own gradients as well.
        """
        self._calls, self._twice = {}, None
        # Within its layer's forward, a parameter is a constant. Elsewhere it is not, so that a gradient that does not
        # come from a recorded call is found on the parameter afterwards.
        parameters = [p for own in self._own.values() for p in own if p.requires_grad]
        within = self._constants = Constants([] if keep_requires_grad else parameters)
        anchor = torch.zeros((), requires_grad=True)
        of_linear_maps = {name: module for name, module in self._layers.items() if calls_linear(module)}
        holds_gradients = self.forms is None or self.forms.holds_gradients
        self._followed = {n for n, m in self._layers.items() if holds_gradients and second_order_rule(m) is not None}
        handles: list[Any] = []
        self.expressions.forms = self.forms
        following = self.expressions.forward(batch_size, keep_requires_grad)
        fused = torch.backends.mha.get_fastpath_enabled()  # in eval mode it bypasses hooks
        self._recording = True
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for name, module in self._layers.items():
                if name in self._followed:
                    handles.append(module.register_forward_pre_hook(_own_input))
                if name not in self.expressions.stand_ins.layers:
                    handles += within.of_layer(module, self._own[name], exchanged=name in self._followed)
                if name in of_linear_maps:
                    module.forward = forward_with_linear(module, self._make_linear(name, module, batch_size, anchor))
                else:
                    hook = self._make_hook(name, batch_size, anchor)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
            with following:
                yield
        finally:
            self._recording = False
            torch.backends.mha.set_fastpath_enabled(fused)
            within.restore()
            for handle in handles:
                handle.remove()
            for module in of_linear_maps.values():
                vars(module).pop("forward", None)
        if self.forms is not None:
            self.forms.check_constants()
            self.forms.check_counts(self.expressions.stand_ins.calls)

    @contextmanager
    def backward(self, keeps_graph: bool = False) -> Iterator[None]:
        """Records the backward pass inside, which others may follow if it ``keeps_graph``, and none elsewhere (of an
        attack, say)."""
        if self._twice is not None:
            raise UnsupportedModelError(
                f"Layer '{self._twice}': the loss depends on a gradient (create_graph=True, a gradient penalty), which "
                "is not followed through this layer. Linear, Conv, LayerNorm, GroupNorm and InstanceNorm layers are "
                "followed; for others, use engine='per_example', which is slow but takes any loss."
            )
        self._listening, self._keeps_graph = True, keeps_graph
        try:
            yield
        except CheckpointError as error:
            raise UnsupportedModelError(ACTIVATION_CHECKPOINTING) from error
        finally:
            self._listening = False

    def count(self, layer: str) -> int:
        """How often the layer was called in this forward pass."""
        return len(self._calls.get(layer, ()))

    def take(self) -> dict[str, list[LayerCall]]:
        """The calls that contributed to the loss, by layer; the recorder forgets them."""
        calls, self._calls = self._calls, {}
        kept = {name: [call for call in calls if call.grad_output is not None] for name, calls in calls.items()}
        return {name: calls for name, calls in kept.items() if calls}

    def _record(
        self,
        name: str,
        call: LayerCall,
        output: Tensor,
        anchor: Tensor,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Keeps a call until the gradient at its output is known; returns the output to go on with.

        Args:
            arrange: Brings a tensor of the output's shape into the order that the call's input is in.
        """
        if not output.requires_grad:
            output = Anchored.apply(output, anchor)
        self._calls.setdefault(name, []).append(call)

        def keep(grad: Tensor) -> None:
            if not self._listening:
                if torch.is_grad_enabled():
                    call.upstream = grad.detach()
                    self._twice = self._twice if name in self._followed else name
                return
            if call.grad_output is not None:
                raise UnsupportedModelError(f"Layer '{name}': more than one backward pass through one forward.")
            call.grad_output = grad if arrange is None else arrange(grad)
            self._finish(name, call)

        # A linear layer over a sequence returns a view. An activation that then works in place would cut the view's
        # own hook off; the view's base keeps it.
        base, shape = base_of(output), output.shape
        if base is not None and base.grad_fn is not None and same_memory(base, output):
            base.register_hook(lambda grad: keep(grad.reshape(shape)))
        else:
            output = output.clone() if base is not None else output
            output.register_hook(keep)
        return output

    def _finish(self, name: str, call: LayerCall) -> None:
        """Hands a call over, now that its gradient is known."""
        if self._consume is not None:
            assert call.grad_output is not None
            self._consume(name, call)
            call.forget(keeps_input=self._keeps_graph)

    def _follow_backward(self, name: str, call: LayerCall, own_input: Tensor) -> None:
        """Records backward passes of a call whose result the loss depends on, as calls of their own.

        Args:
            own_input: The call's input, as a tensor that nothing else uses: its gradient is the call's alone.
        """
        at = call.input

        def of_gradient(gradient: Tensor) -> Tensor | None:
            if self._listening or not torch.is_grad_enabled() or call.upstream is None:
                return None
            if not gradient.requires_grad:  # it depends on this layer's parameters alone, which are constants here
                gradient = gradient.detach().requires_grad_(True)
            second = LayerCall(call.upstream, version_of(call.upstream), backward_at=at)
            self._calls[name].append(second)

            def keep(direction: Tensor) -> None:
                if self._listening:
                    second.grad_output = direction.detach()
                    self._finish(name, second)
                elif torch.is_grad_enabled():
                    self._twice = name  # a gradient of a gradient, within the loss

            gradient.register_hook(keep)
            return gradient

        own_input.register_hook(of_gradient)

    def _make_linear(self, name: str, module: nn.Module, batch_size: int, anchor: Tensor) -> RecordedLinear:
        def record(call: LayerCall, output: Tensor, arrange: Callable[[Tensor], Tensor]) -> Tensor:
            return self._record(name, call, output, anchor, arrange)

        def is_recording() -> bool:  # a copy of the layer may outlive the recording
            return self._recording and torch.is_grad_enabled() and self._constants.are_trained(self._own[name])

        return RecordedLinear(name, module, batch_size, record, is_recording)

    def _make_hook(self, name: str, batch_size: int, anchor: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            is_followed = name in self.expressions.stand_ins.without_records
            if is_followed or not torch.is_grad_enabled() or not self._constants.are_trained(self._own[name]):
                return None
            with functions_unwatched():
                return recorded(module, args, kwargs, output)

        def recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            rest: list[Any] | None = None
            if name in self._with_arguments and isinstance(output, tuple) and output:
                output, *rest = output
            given, named = arguments_by_example(module, args, kwargs, batch_size)
            input = given[0] if given else next(iter(named.values()), None)
            if not isinstance(input, Tensor) or not isinstance(output, Tensor):
                raise _without_tensors(name, module)
            arrangement = ROWS if self.forms is None else self.forms.arrangement(name, input)
            if arrangement != ROWS:
                return self._record_arranged(name, module, input, output, rest, anchor, arrangement, batch_size)
            input = with_batch(input, batch_size, name, module, self.forms, self.count(name))
            form = None if self.forms is None else self.forms.layers.get(name)
            always = form is not None and bool(form.is_shared) and all(form.is_shared)
            if is_one := output.shape[0] != batch_size:  # the same input for all examples: each gets its own copy
                output = output.expand(batch_size, *output.shape[1:])
            call = LayerCall(input.detach(), version_of(input))
            if name in self._with_arguments:
                call.arguments = (given, named)
            if name in self._followed and args and args[0].requires_grad:
                self._follow_backward(name, call, args[0])
            output = self._record(name, call, output, anchor)
            if always or is_one:
                note_expanded(output)
            return self._with_rest(name, output, rest)

        return hook

    def _record_arranged(
        self, name: str, module: nn.Module, input: Tensor, output: Tensor, rest: Any, anchor: Tensor,
        arrangement: str, batch_size: int,
    ) -> Any:  # fmt: skip
        """Records a call whose examples are not one entry each in front, as it was when the model was examined."""
        leading = 2 if arrangement == SECOND else 1
        if not fits(input, arrangement, batch_size) or output.shape[:leading] != input.shape[:leading]:
            raise no_batch(name, module, input, batch_size)
        seen = by_example(input.detach(), arrangement, batch_size)
        call = LayerCall(seen, version_of(input), is_split=True)
        output = self._record(name, call, output, anchor, lambda grad: by_example(grad, arrangement, batch_size))
        return self._with_rest(name, output, rest)

    def _with_rest(self, name: str, output: Tensor, rest: list[Any] | None) -> Any:
        if rest is None:
            return output
        for other in rest:
            if isinstance(other, Tensor) and other.requires_grad:
                other.register_hook(lambda grad: _refuse_second_output(name) if self._listening else None)
        return (output, *rest)


def _without_tensors(name: str, module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Layer '{name}' ({type(module).__name__}) was called without a tensor as its first argument, or returned "
        f"none, at {here()}. Call it with the batch first, or use engine='per_example', which is slow but takes any "
        "layer."
    )


def _refuse_second_output(name: str) -> None:
    raise UnsupportedModelError(
        f"Layer '{name}': the loss depends on its second output (attention weights, say), which is not recorded. Use "
        "engine='per_example'."
    )


def _own_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Gives a layer its input as a tensor that nothing else uses."""
    if not args or not isinstance(args[0], Tensor) or isinstance(args[0], Expression):
        return None
    if not args[0].requires_grad or not torch.is_grad_enabled():
        return None
    with functions_unwatched():
        return (args[0].view_as(args[0]), *args[1:])


def same_memory(base: Tensor, view: Tensor) -> bool:
    """Whether a view holds all of its base, in the same order."""
    return base.numel() == view.numel() and base.is_contiguous() and view.is_contiguous()
