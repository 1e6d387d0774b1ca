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
from lightning_dp.gradients.model import getattr_path, trainable
from lightning_dp.gradients.precision import is_asynchronous, rounds_products
from lightning_dp.gradients.recorder import same_memory, unwatched, with_batch
from lightning_dp.gradients.shared_outputs import note_expanded
from lightning_dp.mechanism.backprop.layer_bounds import LayerBound, norms_of
from lightning_dp.mechanism.backprop.limits import Limit, components_of_ties
from lightning_dp.mechanism.clipping import scale_down

# -- the forward and backward passes -----------------------------------------------------------------------------------


class InputClip:
    """A forward pre-hook that scales every example's input down to a norm: what a trained layer keeps doing."""

    def __init__(self, bound: LayerBound, max_norm: float) -> None:
        self.bound, self.max_norm = bound, max_norm
        #: Off while a private step clips by itself.
        self.active = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        input = first_argument(args, kwargs)
        norms = self.bound.input_norms(module, input.detach())  # a constant of the backward pass, as in training
        factors = scale_down(norms, self.max_norm).to(input.dtype)
        return with_first_argument(args, kwargs, input * _per_example(factors, input))


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The layer's input, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first_argument(args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[Any, dict[str, Any]]:
    """The arguments with another input."""
    if args:
        return (value, *args[1:]), kwargs
    return args, {name: value if i == 0 else other for i, (name, other) in enumerate(kwargs.items())}


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    """One number per example, to be broadcast over a tensor of examples."""
    return values.view(-1, *[1] * (like.dim() - 1))


class _Use:
    """One call of one layer."""

    __slots__ = ("component", "done", "engine", "factors", "input", "name", "seen", "version")

    def __init__(
        self, engine: ClippedBackward, name: str, component: int, factors: Tensor | None, seen: Tensor
    ) -> None:
        self.engine, self.name, self.component, self.factors = engine, name, component, factors
        self.seen: Tensor | None = seen
        self.version = seen._version
        self.input: Tensor | None = None
        self.done = False


class _ClippedOutput(torch.autograd.Function):
    """``c · y + (1 - c) · b`` for the output ``y = W x + b`` of a layer: that of the clipped input, without a copy of
    the input. Backwards, it bounds every example's gradient before the layer's own gradients are formed from it; the
    factor c counts as a constant."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, bias: Tensor | None, use: _Use, shape: torch.Size, in_place: bool) -> Tensor:
        ctx.use, ctx.shape = use, shape
        bound = use.engine.limits[use.name].bound
        if not in_place:
            return scaled_output(bound, output, bias, use.factors, in_place)
        ctx.mark_dirty(output)
        scaled_output(bound, output.view(shape), bias, use.factors, in_place)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, rest = ctx.use.engine.bounded(ctx.use, grads[0].reshape(ctx.shape), ctx.needs_input_grad[1])
        return grad.view(grads[0].shape), rest, None, None, None


def scaled_output(
    bound: LayerBound, output: Tensor, bias: Tensor | None, factors: Tensor | None, in_place: bool
) -> Tensor:
    """The output for an input scaled by ``factors``, from that for the input as it was."""
    if factors is None:
        return output if in_place else output.clone()
    scale = _per_example(factors, output)
    output = output.mul_(scale) if in_place else output * scale
    if bias is not None:
        shape = [1] * output.dim()
        shape[bound.bias_dimension] = -1
        output.addcmul_(1 - scale, bias.view(shape))
    return output


class ClippedBackward(SummingEngine):
    """Forward and backward passes whose gradients, as autograd adds them up, are bounded per example.

    While a bounded layer runs, stand-ins take the place of its parameters: leaves of this forward pass's own graph, in
    whose gradients the sums add up. So nothing else that uses the parameters reaches the sums, nobody sees them, and a
    gradient that arrives at a parameter itself came around the bounds, and stops the training.

    Args:
        module: The model.
        limits: The bound of every layer with trainable parameters, by its name.
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
        self._open: dict[str, _Use | None] = {}
        self._bad: Tensor | None = None
        #: Inputs of this forward pass that nobody has looked at, as autograd keeps them.
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
                # In front of all others: what it returns is scaled as the layer's own output is.
                handles.append(module.register_forward_hook(self._after(name), with_kwargs=True, prepend=True))
            for parameter in self.parameters.values():
                self._stand_ins[parameter] = parameter.detach().requires_grad_()
            _refuse_global_hooks()
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
                raise UnsupportedModelError(
                    f"Layer {', '.join(map(repr, names))}: called {self._calls[component]} times in this forward pass "
                    f"and {self._usual_calls[component]} times in the first. BackpropClipping divides the bound by "
                    "the number of calls, which must not depend on the data: pad all sequences to one length, or use "
                    "FlatClipping."
                )

    def _clear_unusable_inputs(self) -> None:
        """Zeros where examples that are left out have something that is not finite, which times zero would not be zero.

        On a device, whether there are any is not looked at before, once for all layers. Autograd keeps their inputs
        already, and they are changed in place (`_is_what_autograd_keeps`): what else depends on them are the same
        examples' own gradients, which count for nothing.
        """
        inputs, self._unchecked = self._unchecked, []
        if inputs and self._bad is not None and bool(self._bad.any()):
            for input in inputs:
                input.masked_fill_(_per_example(self._bad, input), 0)

    @contextmanager
    def backward(self, scale: float = 1.0) -> Iterator[None]:
        self._clear_unusable_inputs()
        if self._sums and scale != self._unit:  # a smaller last micro-batch: its mean is over fewer examples
            torch._foreach_mul_(list(self._sums.values()), self._unit / scale)
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
            raise _around_the_bounds(list(self.parameters)) from error
        finally:
            self._listening = False
        if unbounded:
            raise _around_the_bounds(unbounded)
        self._sums = {name: s.grad for name, s in summands.items() if s.grad is not None}
        self._stand_ins = {}
        self._note_measured()

    def _complete(self, name: str, summand: Tensor) -> None:
        """Hands a sum over: autograd has added up all that the parameter's uses owe to it."""
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

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with unwatched():
                return measured(module, args, kwargs)

        def measured(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            input = first_argument(args, kwargs)
            if not isinstance(input, Tensor):
                raise UnsupportedModelError(
                    f"Layer '{name}' ({type(module).__name__}) was called without a tensor as its first argument."
                )
            if sum(value is not None for value in (*args, *kwargs.values())) > 1:
                raise UnsupportedModelError(
                    f"Layer '{name}' ({type(module).__name__}) was called with more than its input (offsets, weights "
                    "per sample), for which no bound is proven. Use FlatClipping."
                )
            recorded = torch.is_grad_enabled()
            if recorded:
                index = self._calls_of[name]
                with_batch(input, self._batch_size, name, module, self.forms, index)
            factors: Tensor | None = None
            if input.is_floating_point():
                bound, seen = limit.bound, input.detach()
                norms = bound.input_norms(module, seen) if bound.clips_input else norms_of(seen)
                if recorded and is_asynchronous(norms):
                    bad = ~(norms <= _LARGEST)
                    self._leave_out(bad)
                    norms = norms.masked_fill(bad, 0)
                    if bound.clips_input and _is_what_autograd_keeps(module, input, self._batch_size):
                        self._unchecked.append(input.data)  # whose changes autograd does not count
                    else:
                        input = input.masked_fill(_per_example(bad, input), 0)
                elif not _all_usable(norms):
                    bad = ~(norms <= _LARGEST)
                    if recorded:
                        self._leave_out(bad)
                    input = input.masked_fill(_per_example(bad, input), 0)
                    norms = norms.masked_fill(bad, 0)
                if limit.input_norm is not None:
                    factors = scale_down(norms, limit.input_norm)
            if recorded:
                for own, parameter in self._own[name].items():
                    module._parameters[own] = self._stand_ins[parameter]  # type: ignore[assignment]
            self._open[name] = _Use(self, name, self._components[name], factors, input)
            return with_first_argument(args, kwargs, input)

        return hook

    def _after(self, name: str) -> Any:
        """Scales the output, and sees to it that the gradient that comes back is bounded."""
        limit = self.limits[name]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            with unwatched():
                return scaled(module, args, kwargs, output)

        def scaled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            use = self._open.pop(name, None)
            bias = getattr(module, "bias", None)
            self._put_back(name)
            if use is None or not _is_unchanged(first_argument(args, kwargs), use.seen, use.version):
                raise UnsupportedModelError(
                    f"Layer '{name}' ({type(module).__name__}): a forward pre-hook changed its input after it was "
                    "clipped. Register it before the training step, or change the input in a module of its own."
                )
            if output.dtype not in (torch.float32, torch.float64):
                raise UnsupportedModelError(
                    f"Layer '{name}' ({type(module).__name__}) computes in {output.dtype}, in which autograd's sum "
                    "over the batch is rounded by more than its bound. Use precision='32-true' with BackpropClipping, "
                    "or FlatClipping."
                )
            if not torch.is_grad_enabled():
                output = scaled_output(limit.bound, output, bias, use.factors, in_place=False)
            else:
                if not limit.bound.clips_input:
                    assert use.seen is not None
                    use.input = _expanded(use.seen.detach(), self._batch_size)
                use.seen = None  # the layer keeps of it what it needs
                self._calls[use.component] += 1
                self._calls_of[name] += 1
                is_shared = len(output) != self._batch_size
                if is_shared:
                    # An input that all examples share (position numbers): every example gets its own copy.
                    output = output.expand(self._batch_size, *output.shape[1:])
                # A linear layer over a sequence returns a view; what is changed in place is then the view's base.
                shape, base = output.shape, output._base
                in_place = not output.is_leaf and (base is None or same_memory(base, output))
                whole = output if base is None or not in_place else base
                scaled_bias = bias if use.factors is not None else None
                output = _ClippedOutput.apply(whole, scaled_bias, use, shape, in_place).view(shape)
                if is_shared:
                    note_expanded(output)
            return output

        return hook

    def _put_back(self, name: str) -> None:
        """Puts the layer's parameters back where their stand-ins were."""
        module = self._layers[name]
        for own, parameter in self._own[name].items():
            module._parameters[own] = parameter

    def _leave_out(self, examples: Tensor) -> None:
        examples = examples.expand(self._batch_size)
        self._bad = examples if self._bad is None else self._bad | examples

    def _limit(self, use: _Use) -> float:
        """C_up for this call, in units of the gradients at hand."""
        limit = self.limits[use.name].upstream_norm / (self._calls[use.component] * self._scale)
        return limit * (1 - self._rounding)

    def bounded(self, use: _Use, grad: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient at the layer's own output, and what the bias is owed besides."""
        bound, module = self.limits[use.name].bound, self._layers[use.name]
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"Layer '{use.name}': the loss depends on a gradient (create_graph=True), and the gradient of that is "
                "not bounded. Use FlatClipping with engine='per_example'."
            )
        if not self._listening:  # a backward pass of the step's own (an attack, say): its stand-ins' gradients are lost
            return grad if use.factors is None else grad * _per_example(use.factors, grad), None
        if use.done:
            raise UnsupportedModelError(f"Layer '{use.name}': more than one backward pass through one forward.")
        use.done = True
        norms, summed = bound.measure(module, use.input if use.input is not None else grad, grad)
        factors = scale_down(norms, self._limit(use))
        if is_asynchronous(norms) or not _all_usable(norms):
            self._leave_out(~(norms <= _LARGEST))
        if self._bad is not None:
            factors = factors.masked_fill(self._bad, 0)
            summed = None if summed is None else summed.masked_fill(self._bad[:, None], 0)
        if self.keep_norms:
            self._measured.append((norms, factors))
        use.input = None
        if use.factors is None:
            return self._weighted(grad, factors), None
        rest = ((1 - use.factors) * factors) @ summed if with_bias and summed is not None else None
        weights = factors * use.factors
        # Numbers that are stored with fewer digits would round upwards: such an example is left out.
        weights = weights.where(weights > _SMALLEST, 0.0)
        return self._weighted(grad, weights), rest

    def _weighted(self, grad: Tensor, weights: Tensor) -> Tensor:
        """Every example's gradient times its weight, and exact zeros for those that are left out."""
        weighted = grad * _per_example(weights, grad)
        return weighted if self._bad is None else weighted.masked_fill_(_per_example(self._bad, grad), 0)


def _is_what_autograd_keeps(module: nn.Module, input: Tensor, batch_size: int) -> bool:
    """Whether the backward pass of a linear map will read this very memory, which holds results of this forward pass
    alone, an example's in a row of its own.

    Not of batches and buffers (which nothing was computed for), nor where a layer pads or copies its input by itself.
    """
    if input.grad_fn is None or len(input) != batch_size or 0 in input.stride():
        return False
    if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(getattr(module, "padding", 0), str):
        return False
    return input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))


#: Examples with larger norms than that are left out like those that are not finite: squares of single precision end
#: soon after, and what normalises such numbers makes NaN of them.
_LARGEST = 1e15


#: What is taken off the bound of the upstream gradient where factors of float32 are rounded. On GPUs (TF32) they are
#: off by u = 2^-11, the product of inputs and upstream gradients by 2u, and either norm, a root of sums of squares, by
#: u/2. On CPUs (bfloat16), u = 2^-8.
_ROUNDING_GPU, _ROUNDING_CPU = 2**-8, 2**-5


#: Weights below that are taken as zero.
_SMALLEST = 1e-34


def _expanded(input: Tensor, batch_size: int) -> Tensor:
    """An input that was found to be of the batch, or shared by all its examples."""
    return input if input.shape[0] == batch_size else input.expand(batch_size, *input.shape[1:])


def _all_usable(norms: Tensor) -> bool:
    """Whether there is nothing to leave out: one number to wait for."""
    return bool(norms.amax() <= _LARGEST)


def _is_unchanged(input: Any, seen: Tensor | None, version: int) -> bool:
    """Whether a layer saw what its hook returned; PyTorch itself wraps it when there are full backward hooks."""
    if not isinstance(input, Tensor) or seen is None or input._version != version:
        return False
    return input.data_ptr() == seen.data_ptr() and input.shape == seen.shape and input.stride() == seen.stride()


def _around_the_bounds(names: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Parameters {names}: a gradient came to them around their layers' bounds. A forward pass outside "
        "training_step that the loss depends on does that, and so does activation checkpointing, which runs layers "
        "again within the backward pass. Call the layers in training_step, use max_physical_batch_size to save memory, "
        "or use FlatClipping."
    )


def _refuse_global_hooks() -> None:
    hooks = nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise UnsupportedModelError(
            "Hooks on all modules (register_module_forward_hook) could change what a layer sees or returns after it "
            "was bounded. Remove them during training, or register them on single modules."
        )
