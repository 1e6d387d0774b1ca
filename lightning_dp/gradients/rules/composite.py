"""Layers that are recorded as the linear maps that they are made of.

While such a layer is recorded, its ``forward`` is the same function of the same parameters, written with calls of a
given ``linear`` in the place of `torch.nn.functional.linear`. To add one, register a function that makes this forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_dp.gradients.base import Dense, PerExampleGradient
from lightning_dp.gradients.linear import Blocks, OuterProducts
from lightning_dp.gradients.rules.layers import sum_positions
from lightning_dp.torch_api import base_of


class Linear(Protocol):
    """`torch.nn.functional.linear`, recorded. Inputs are ``(T, B, d)``, or ``(T · B, d)``."""

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def over_time(
        self, steps: int, like: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The same map at so many time steps, one after another, of inputs ``(B, d)``."""


#: From a layer and a ``linear`` to the layer's forward.
Composite = Callable[[Any, Linear], Callable[..., Any]]

_COMPOSITES: dict[type[nn.Module], tuple[Composite, Callable[[Any], bool]]] = {}


@dataclass(frozen=True)
class LinearMap:
    """One use of ``linear`` inside a layer: its parameters, and from and to which of their rows (``None``: all)."""

    weight: str
    weight_rows: tuple[int, int] | None
    bias: str | None
    bias_rows: tuple[int, int] | None


def register_composite(
    *types: type[nn.Module], when: Callable[[Any], bool] = lambda module: True
) -> Callable[[Composite], Composite]:
    """Registers how to make the forward of these module types, in configurations for which ``when`` holds."""

    def register(composite: Composite) -> Composite:
        _COMPOSITES.update(dict.fromkeys(types, (composite, when)))
        return composite

    return register


def _composite_of(module: nn.Module) -> Composite | None:
    if "forward" in vars(module):
        return None
    for cls in type(module).__mro__:
        if cls in _COMPOSITES:
            composite, when = _COMPOSITES[cls]
            # A subclass with a forward of its own may compute something else.
            return composite if type(module).forward is cls.forward and when(module) else None
    return None


def calls_linear(module: nn.Module) -> bool:
    """Whether the layer is recorded as the linear maps that it is made of."""
    return _composite_of(module) is not None


def forward_with_linear(module: nn.Module, linear: Linear) -> Callable[..., Any]:
    """The layer's forward, with another function in the place of `torch.nn.functional.linear`."""
    composite = _composite_of(module)
    assert composite is not None
    return composite(module, linear)


def linear_map(module: nn.Module, weight: Tensor, bias: Tensor | None) -> LinearMap:
    """Which parameters of the module, or parts of them, these tensors are."""
    return LinearMap(*_rows_of(module, weight), *((None, None) if bias is None else _rows_of(module, bias)))


def _rows_of(module: nn.Module, tensor: Tensor) -> tuple[str, tuple[int, int] | None]:
    for name, parameter in module.named_parameters():
        if tensor is parameter:
            return name, None
        if base_of(tensor) is parameter:
            start = (tensor.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            return name, (start, start + len(tensor))
    raise RuntimeError(f"{type(module).__name__} applied a linear map that is none of its parameters.")


def of_linear_map(
    module: nn.Module, used: LinearMap, input: Tensor, grad_output: Tensor
) -> dict[str, PerExampleGradient]:
    """The gradients of one use of ``linear``: ``input`` is ``(B, T, d)``, ``grad_output`` ``(B, T, p)``."""
    gradients: dict[str, PerExampleGradient] = {}
    weight, bias = module.get_parameter(used.weight), module.get_parameter(used.bias) if used.bias else None
    if weight.requires_grad:
        gradient: PerExampleGradient = OuterProducts(grad_output, input)
        gradients[used.weight] = Blocks({used.weight_rows: gradient}, weight.shape) if used.weight_rows else gradient
    if used.bias and bias is not None and bias.requires_grad:
        gradient = Dense(sum_positions(grad_output))
        gradients[used.bias] = Blocks({used.bias_rows: gradient}, bias.shape) if used.bias_rows else gradient
    return gradients
