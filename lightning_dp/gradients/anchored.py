"""Tensors that depend on no trained parameter, made part of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Anchored(torch.autograd.Function):
    """Makes a tensor depend on another, in place and without a copy.

    Turning it into a leaf instead would forbid the in-place activation that often follows.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None
