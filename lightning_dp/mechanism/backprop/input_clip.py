"""The hook that clips a layer's input outside training steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_dp.mechanism.backprop.layer_bounds import LayerBound
from lightning_dp.mechanism.clipping import scale_down


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
        return with_first_argument(args, kwargs, input * per_example(factors, input))


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The layer's input, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first_argument(args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[Any, dict[str, Any]]:
    """The arguments with another input."""
    if args:
        return (value, *args[1:]), kwargs
    return args, {name: value if i == 0 else other for i, (name, other) in enumerate(kwargs.items())}


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """One number per example, to be broadcast over a tensor of examples."""
    return values.view(-1, *[1] * (like.dim() - 1))
