"""A fingerprint of what the checks depend on: when it changes, they must run again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_dp.torch_api import CALL_HOOKS, has_gradient_hooks, is_batch_norm


def fingerprint_of(module: nn.Module, optimized: Iterable[nn.Parameter]) -> tuple[Any, ...]:
    """Identities, not values, of modules, forwards, hooks and parameters, and which of these are trained.

    Args:
        module: The module in training.
        optimized: The parameters of its optimizers.
    """
    found: list[Any] = [id(p) for p in optimized]
    for child in module.modules():
        own = vars(child)
        found += (id(child), type(child), own.get("forward"), child.training if is_batch_norm(child) else 0)
        for name in CALL_HOOKS:
            found += map(id, own[name].values())
        for name, p in own["_parameters"].items():
            if p is not None:
                found += (name, id(p), p.requires_grad, has_gradient_hooks(p))
    return tuple(found)
