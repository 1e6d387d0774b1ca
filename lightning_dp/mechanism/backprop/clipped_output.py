"""Clips the gradient at a layer's output, and looks after what autograd keeps of its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.mechanism.backprop.input_clip import first_argument, per_example
from lightning_dp.mechanism.backprop.layer_bounds import LayerBound
from lightning_dp.mechanism.backprop.limits import Limit
from lightning_dp.torch_api import functions_unwatched, has_global_hooks, version_of

#: Examples with larger norms are left out, like those that are not finite: soon after, squares overflow float32, and
#: normalisation layers return NaN.
LARGEST_NORM = 1e15


class UpstreamClipping(Protocol):
    """What clips the gradients that come back to outputs: the engine."""

    limits: Mapping[str, Limit]

    def clip_upstream(self, use: LayerUse, grad: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The clipped upstream gradient, and a correction for the bias."""


class LayerUse:
    """One call of one layer."""

    __slots__ = ("component", "done", "engine", "factors", "input", "name", "seen", "version")

    def __init__(
        self, engine: UpstreamClipping, name: str, component: int, factors: Tensor | None, seen: Tensor
    ) -> None:
        self.engine, self.name, self.component, self.factors = engine, name, component, factors
        self.seen: Tensor | None = seen
        self.version = version_of(seen)
        self.input: Tensor | None = None
        self.done = False


class ClippedOutput(torch.autograd.Function):
    """``c · y + (1 - c) · b`` for the output ``y = W x + b`` of a layer: that of the clipped input, without a copy of
    the input. Backwards, it bounds every example's gradient before the layer's own gradients are formed from it; the
    factor c counts as a constant."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, bias: Tensor | None, use: LayerUse, shape: torch.Size, in_place: bool
    ) -> Tensor:
        ctx.use, ctx.shape = use, shape
        bound = use.engine.limits[use.name].bound
        if not in_place:
            return scaled_output(bound, output, bias, use.factors, in_place)
        ctx.mark_dirty(output)
        scaled_output(bound, output.view(shape), bias, use.factors, in_place)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, rest = ctx.use.engine.clip_upstream(ctx.use, grads[0].reshape(ctx.shape), ctx.needs_input_grad[1])
        return grad.view(grads[0].shape), rest, None, None, None


def scaled_output(
    bound: LayerBound, output: Tensor, bias: Tensor | None, factors: Tensor | None, in_place: bool
) -> Tensor:
    """The output for an input scaled by ``factors``, from that for the input as it was."""
    if factors is None:
        return output if in_place else output.clone()
    scale = per_example(factors, output)
    output = output.mul_(scale) if in_place else output * scale
    if bias is not None:
        shape = [1] * output.dim()
        shape[bound.bias_dimension] = -1
        output.addcmul_(1 - scale, bias.view(shape))
    return output


def is_what_autograd_keeps(module: nn.Module, input: Tensor, batch_size: int) -> bool:
    """Whether autograd keeps this very memory for the backward pass of a linear map, one row per example, and nothing
    outlives the forward pass in it, so that rows may be set to zero in place.

    False for batches and buffers (which have no ``grad_fn``), and where the layer pads or copies its input itself.
    """
    if input.grad_fn is None or len(input) != batch_size or 0 in input.stride():
        return False
    if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(getattr(module, "padding", 0), str):
        return False
    return input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))


def expanded_input(input: Tensor, batch_size: int) -> Tensor:
    """The input with one row per example: one that all examples share is expanded."""
    return input if input.shape[0] == batch_size else input.expand(batch_size, *input.shape[1:])


def all_usable(norms: Tensor) -> bool:
    """Whether no example has to be left out; a host-device sync on accelerators."""
    return bool(norms.amax() <= LARGEST_NORM)


def is_unchanged(input: Any, seen: Tensor | None, version: int) -> bool:
    """Whether a layer saw the input that its pre-hook returned. Compares memory, not identity: with full backward
    hooks, PyTorch passes an alias."""
    if not isinstance(input, Tensor) or seen is None or version_of(input) != version:
        return False
    return input.data_ptr() == seen.data_ptr() and input.shape == seen.shape and input.stride() == seen.stride()


def around_the_bounds(names: list[str]) -> UnsupportedModelError:
    """The error about gradients that no layer has clipped."""
    return UnsupportedModelError(
        f"Parameters {names}: a gradient came to them around their layers' bounds. A forward pass outside "
        "training_step that the loss depends on does that, and so does activation checkpointing, which runs layers "
        "again within the backward pass. Call the layers in training_step, use max_physical_batch_size to save memory, "
        "or use FlatClipping."
    )


def refuse_global_hooks() -> None:
    """Refuses hooks on all modules, whose place among a layer's own is not known."""
    if has_global_hooks():
        raise UnsupportedModelError(
            "Hooks on all modules (register_module_forward_hook) could change what a layer sees or returns after it "
            "was bounded. Remove them during training, or register them on single modules."
        )


def hidden_from_modes(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, hidden from ``TorchFunctionMode``s: those that examine the user's step must not see its work."""

    def hidden(*args: Any) -> Any:
        with functions_unwatched():
            return hook(*args)

    return hidden


def clipped_argument(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer's call.

    Raises:
        UnsupportedModelError: The first argument is no tensor, or there are more arguments.
    """
    input = first_argument(args, dict(kwargs))
    if not isinstance(input, Tensor):
        raise UnsupportedModelError(
            f"Layer '{name}' ({type(module).__name__}) was called without a tensor as its first argument. Use "
            "FlatClipping with engine='per_example'."
        )
    if sum(value is not None for value in (*args, *kwargs.values())) > 1:
        raise UnsupportedModelError(
            f"Layer '{name}' ({type(module).__name__}) was called with more than its input (offsets, weights "
            "per sample), for which no bound is proven. Use FlatClipping."
        )
    return input


def check_call(name: str, module: nn.Module, input: Any, use: LayerUse | None, output: Tensor) -> LayerUse:
    """What is known of a call once the layer has run.

    Raises:
        UnsupportedModelError: The input was changed after it was clipped, or the output is in low precision.
    """
    if use is None or not is_unchanged(input, use.seen, use.version):
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
    return use


def weighted_rows(grad: Tensor, weights: Tensor, left_out: Tensor | None) -> Tensor:
    """Every example's gradient times its weight, and exact zeros for those that are left out."""
    weighted = grad * per_example(weights, grad)
    return weighted if left_out is None else weighted.masked_fill_(per_example(left_out, grad), 0)


def calls_changed(names: list[str], calls: int, usual: int) -> UnsupportedModelError:
    """The error about layers that are called more, or less, often than in the first forward pass."""
    return UnsupportedModelError(
        f"Layer {', '.join(map(repr, names))}: called {calls} times in this forward pass and {usual} times in the "
        "first. BackpropClipping divides the bound by the number of calls, which must not depend on the data: pad all "
        "sequences to one length, or use FlatClipping."
    )
