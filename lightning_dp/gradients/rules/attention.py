"""Attention as the linear maps that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import nn

from lightning_dp.gradients.rules.composite import Linear, register_composite


def _uses_linear_only(module: nn.MultiheadAttention) -> bool:
    """Attention with ``add_bias_kv`` also uses parameters in other ways, and is recomputed instead (`recompute`)."""
    return module.bias_k is None


@register_composite(nn.MultiheadAttention, when=_uses_linear_only)
def attention(module: nn.MultiheadAttention, linear: Linear) -> Callable[..., Any]:
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
