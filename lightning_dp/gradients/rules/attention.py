"""Attention as the linear maps that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.gradients.base import Dense, PerExampleGradient
from lightning_dp.gradients.linear import Blocks, OuterProducts
from lightning_dp.gradients.rules.layers import sum_positions
from lightning_dp.torch_api import base_of


@dataclass(frozen=True)
class LinearMap:
    """One use of ``linear`` inside a layer: its parameters, and from and to which of their rows (``None``: all)."""

    weight: str
    weight_rows: tuple[int, int] | None
    bias: str | None
    bias_rows: tuple[int, int] | None


def calls_linear(module: nn.Module) -> bool:
    """Whether the layer is recorded as the linear maps that it is made of: attention, also with dropout.

    Attention with ``add_bias_kv`` also uses parameters in other ways, and is recomputed instead (`recompute`).
    """
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(module)
        and module.bias_k is None
    )


def forward_with_linear(module: nn.Module, linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """The attention layer's own ``forward``, with another function in the place of ``torch.nn.functional.linear``.

    PyTorch's code is kept, masks, dropout and all: its functions are taken with other globals.
    """
    functional = {**vars(F), "linear": linear, "has_torch_function": lambda tensors: False}
    for name in ("_in_projection", "_in_projection_packed", "multi_head_attention_forward"):
        functional[name] = _with_globals(getattr(F, name), functional)
    forward = nn.MultiheadAttention.forward
    return MethodType(_with_globals(forward, {**forward.__globals__, "F": SimpleNamespace(**functional)}), module)


def _with_globals(function: Any, names: dict[str, Any]) -> FunctionType:
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


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
