"""The two passes of backpropagation clipping: hooks that clip, and the bounded sum that autograd forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.engine import SummingEngine, set_aside
from lightning_dp.gradients.layer_call import with_batch
from lightning_dp.gradients.model import getattr_path, trainable
from lightning_dp.gradients.precision import is_asynchronous, rounds_products
from lightning_dp.gradients.recorder import same_memory
from lightning_dp.gradients.shared_outputs import note_expanded
from lightning_dp.mechanism.backprop.clipped_output import (
    LARGEST_NORM,
    ClippedOutput,
    LayerUse,
    all_usable,
    around_the_bounds,
    calls_changed,
    check_call,
    clipped_argument,
    expanded_input,
    hidden_from_modes,
    is_what_autograd_keeps,
    refuse_global_hooks,
    scaled_output,
    weighted_rows,
)
from lightning_dp.mechanism.backprop.input_clip import InputClip, first_argument, per_example, with_first_argument
from lightning_dp.mechanism.backprop.layer_bounds import norms_of
from lightning_dp.mechanism.backprop.limits import Limit, components_of_ties
from lightning_dp.mechanism.clipping import scale_down
from lightning_dp.torch_api import base_of, scale_


class ClippedBackward(SummingEngine):
    """Forward and backward passes whose gradients, as autograd adds them up, are bounded per example.

    While a bounded layer runs, stand-ins take the place of its parameters: leaves of this forward pass's own graph, in
    whose gradients the sums add up. So no other use of the parameters reaches the sums, user code does not see the
    stand-ins, and a gradient that arrives at a parameter itself was not clipped, and stops the training.

    Args:
        module: The model.
        limits: The `Limit` of every layer with trainable parameters, by the layer's name.
    """

    def __init__(self, module: nn.Module, limits: Mapping[str, Limit]) -> None:
        super().__init__(module)
        self.limits = limits
        self._layers = {name: module.get_submodule(name) for name in limits}
        self._own = {name: {own: getattr_path(m, own) for own in trainable(m)} for name, m in self._layers.items()}
        self._stand_ins: dict[nn.Parameter, Tensor] = {}
        self._components = components_of_ties(self._own)
        self._sums: dict[str, Tensor] = {}
        self._unit = self._scale = 1.0
        self._calls: Counter[int] = Counter()
        self._usual_calls: Counter[int] | None = None
        self._open: dict[str, LayerUse | None] = {}
        self._bad: Tensor | None = None
        #: Inputs of this forward pass, as autograd keeps them, that are not cleared of non-finite values yet.
        self._unchecked: list[Tensor] = []
        self._measured: list[tuple[Tensor, Tensor]] = []
        self._batch_size = 0
        self._listening = False
        self._rounding = 0.0

    def reset(self) -> None:
        self._sums, self._unit = {}, 1.0

    def take(self) -> tuple[dict[str, Tensor], float]:
        sums, unit = {name: total.contiguous() for name, total in self._sums.items()}, self._unit
        self.reset()
        return sums, unit

    def nonfinite(self) -> int:
        return 0 if self._bad is None else int(self._bad.sum())

    @contextmanager
    def forward(self, batch_size: int) -> Iterator[None]:
        self._calls, self._bad, self._batch_size, self._measured = Counter(), None, batch_size, []
        self._calls_of: Counter[str] = Counter()
        device = next(iter(self.parameters.values())).device
        rounding = _ROUNDING_CPU if device.type == "cpu" else _ROUNDING_GPU
        self._rounding = rounding if rounds_products(device) else 0.0
        self._unchecked = []
        handles = []
        clips = [h for m in self._layers.values() for h in m._forward_pre_hooks.values() if isinstance(h, InputClip)]
        try:
            for clip in clips:
                clip.active = False
            for name, module in self._layers.items():
                handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                # Before all other hooks: it must see the layer's own output, not what another hook made of that.
                handles.append(module.register_forward_hook(self._after(name), with_kwargs=True, prepend=True))
            for parameter in self.parameters.values():
                self._stand_ins[parameter] = parameter.detach().requires_grad_()
            refuse_global_hooks()
            yield
        finally:
            for name in self._layers:
                self._put_back(name)
            for handle in handles:
                handle.remove()
            for clip in clips:
                clip.active = True
        if self.forms is not None:
            self.forms.check_constants()
        self._check_calls()

    def _check_calls(self) -> None:
        if self._usual_calls is None:
            self._usual_calls = self._calls
        for component in self._components.values():
            if self._calls[component] != self._usual_calls[component]:
                names = [name for name, c in self._components.items() if c == component]
                raise calls_changed(names, self._calls[component], self._usual_calls[component])

    def _clear_unusable_inputs(self) -> None:
        """Sets the inputs of examples that are left out to zero: times a weight of zero, infinity would give NaN.

        On an accelerator, whether there are such examples is read here, once for all layers: a host-device sync. The
        inputs that autograd keeps are changed in place (`is_what_autograd_keeps`): all else that depends on them are
        the same examples' gradients, which have weight zero.
        """
        inputs, self._unchecked = self._unchecked, []
        if inputs and self._bad is not None and bool(self._bad.any()):
            for input in inputs:
                input.masked_fill_(per_example(self._bad, input), 0)

    @contextmanager
    def backward(self, scale: float = 1.0) -> Iterator[None]:
        self._clear_unusable_inputs()
        if self._sums and scale != self._unit:  # a smaller last micro-batch: its mean is over fewer examples
            scale_(list(self._sums.values()), self._unit / scale)
        self._unit = self._scale = scale
        summands = {name: self._stand_ins[p] for name, p in self.parameters.items()}
        for name, stand_in in summands.items():
            stand_in.grad = self._sums.get(name)
        self._listening = True
        if self.on_complete is not None:
            for name, stand_in in summands.items():
                stand_in.register_post_accumulate_grad_hook(lambda summand, name=name: self._complete(name, summand))
        try:
            with set_aside(self.parameters.values()):
                yield
                unbounded = [name for name, p in self.parameters.items() if p.grad is not None]
        except CheckpointError as error:
            raise around_the_bounds(list(self.parameters)) from error
        finally:
            self._listening = False
        if unbounded:
            raise around_the_bounds(unbounded)
        self._sums = {name: s.grad for name, s in summands.items() if s.grad is not None}
        self._stand_ins = {}
        self._note_measured()

    def _complete(self, name: str, summand: Tensor) -> None:
        """Passes a parameter's sum to `on_complete`: autograd has added up the gradients of all its uses."""
        total, summand.grad = summand.grad, None
        if self.on_complete is not None and total is not None:
            self.on_complete(name, total, self._unit)

    def _note_measured(self) -> None:
        self.norms = self.factors = None
        if self.keep_norms and self._measured:
            norms, factors = zip(*self._measured, strict=True)
            self.norms, self.factors = torch.stack(norms, 1), torch.stack(factors, 1)

    def _before(self, name: str) -> Any:
        """Measures the input, and puts stand-ins in the place of the layer's parameters."""
        limit = self.limits[name]

        def measured(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            input = clipped_argument(name, module, args, kwargs)
            recorded = torch.is_grad_enabled()
            if recorded:
                index = self._calls_of[name]
                with_batch(input, self._batch_size, name, module, self.forms, index)
            factors: Tensor | None = None
            if input.is_floating_point():
                bound, seen = limit.bound, input.detach()
                norms = bound.input_norms(module, seen) if bound.clips_input else norms_of(seen)
                if recorded and is_asynchronous(norms):
                    bad = ~(norms <= LARGEST_NORM)
                    self._leave_out(bad)
                    norms = norms.masked_fill(bad, 0)
                    if bound.clips_input and is_what_autograd_keeps(module, input, self._batch_size):
                        self._unchecked.append(input.data)  # .data: autograd does not count its in-place changes
                    else:
                        input = input.masked_fill(per_example(bad, input), 0)
                elif not all_usable(norms):
                    bad = ~(norms <= LARGEST_NORM)
                    if recorded:
                        self._leave_out(bad)
                    input = input.masked_fill(per_example(bad, input), 0)
                    norms = norms.masked_fill(bad, 0)
                if limit.input_norm is not None:
                    factors = scale_down(norms, limit.input_norm)
            if recorded:
                for own, parameter in self._own[name].items():
                    module._parameters[own] = self._stand_ins[parameter]  # type: ignore[assignment]
            self._open[name] = LayerUse(self, name, self._components[name], factors, input)
            return with_first_argument(args, kwargs, input)

        return hidden_from_modes(measured)

    def _after(self, name: str) -> Any:
        """Scales the output, and sees to it that the gradient that comes back is bounded."""
        limit = self.limits[name]

        def scaled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            use = self._open.pop(name, None)
            bias = getattr(module, "bias", None)
            self._put_back(name)
            use = check_call(name, module, first_argument(args, kwargs), use, output)
            if not torch.is_grad_enabled():
                output = scaled_output(limit.bound, output, bias, use.factors, in_place=False)
            else:
                if not limit.bound.clips_input:
                    assert use.seen is not None
                    use.input = expanded_input(use.seen.detach(), self._batch_size)
                use.seen = None  # the layer keeps of it what it needs
                self._calls[use.component] += 1
                self._calls_of[name] += 1
                is_shared = len(output) != self._batch_size
                if is_shared:
                    # An input that all examples share (position numbers): every example gets its own copy.
                    output = output.expand(self._batch_size, *output.shape[1:])
                # A linear layer over a sequence returns a view; what is changed in place is then the view's base.
                shape, base = output.shape, base_of(output)
                in_place = not output.is_leaf and (base is None or same_memory(base, output))
                whole = output if base is None or not in_place else base
                scaled_bias = bias if use.factors is not None else None
                output = ClippedOutput.apply(whole, scaled_bias, use, shape, in_place).view(shape)
                if is_shared:
                    note_expanded(output)
            return output

        return hidden_from_modes(scaled)

    def _put_back(self, name: str) -> None:
        """Puts the layer's parameters back where their stand-ins were."""
        self._layers[name]._parameters.update(self._own[name])

    def _leave_out(self, examples: Tensor) -> None:
        examples = examples.expand(self._batch_size)
        self._bad = examples if self._bad is None else self._bad | examples

    def _limit(self, use: LayerUse) -> float:
        """C_up for this call, in units of the gradients at hand."""
        limit = self.limits[use.name].upstream_norm / (self._calls[use.component] * self._scale)
        return limit * (1 - self._rounding)

    def clip_upstream(self, use: LayerUse, grad: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
        """Returns the clipped upstream gradient and a correction for the bias."""
        bound, module = self.limits[use.name].bound, self._layers[use.name]
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"Layer '{use.name}': the loss depends on a gradient (create_graph=True), and the gradient of that is "
                "not bounded. Use FlatClipping with engine='per_example'."
            )
        if not self._listening:  # a backward pass of the step's own (an attack, say): its stand-ins' gradients are lost
            return grad if use.factors is None else grad * per_example(use.factors, grad), None
        if use.done:
            raise UnsupportedModelError(f"Layer '{use.name}': more than one backward pass through one forward.")
        use.done = True
        norms, summed = bound.measure(module, use.input if use.input is not None else grad, grad)
        factors = scale_down(norms, self._limit(use))
        if is_asynchronous(norms) or not all_usable(norms):
            self._leave_out(~(norms <= LARGEST_NORM))
        if self._bad is not None:
            factors = factors.masked_fill(self._bad, 0)
            summed = None if summed is None else summed.masked_fill(self._bad[:, None], 0)
        if self.keep_norms:
            self._measured.append((norms, factors))
        use.input = None
        if use.factors is None:
            return weighted_rows(grad, factors, self._bad), None
        rest = ((1 - use.factors) * factors) @ summed if with_bias and summed is not None else None
        weights = factors * use.factors
        # Numbers that are stored with fewer digits would round upwards: such an example is left out.
        weights = weights.where(weights > _SMALLEST, 0.0)
        return weighted_rows(grad, weights, self._bad), rest


#: What is taken off the bound of the upstream gradient where factors of float32 are rounded. On GPUs (TF32) they are
#: off by u = 2^-11, the product of inputs and upstream gradients by 2u, and either norm, a root of sums of squares, by
#: u/2. On CPUs (bfloat16), u = 2^-8.
_ROUNDING_GPU, _ROUNDING_CPU = 2**-8, 2**-5


#: Weights below that are taken as zero.
_SMALLEST = 1e-34
