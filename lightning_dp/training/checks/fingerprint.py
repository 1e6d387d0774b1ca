"""What the checks have looked at: when any of it changes, they must look again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_dp.training.checks.model import has_hooks, is_batch_norm


def fingerprint_of(module: nn.Module, optimized: Iterable[nn.Parameter]) -> tuple[Any, ...]:
    """Modules, forwards, hooks, parameters and what of them is trained; identities, not values.

    Args:
        module: The module in training.
        optimized: The parameters of its optimizers.
    """
    found: list[Any] = [id(p) for p in optimized]
    for child in module.modules():
        own = vars(child)
        found += (id(child), type(child), own.get("forward"), child.training if is_batch_norm(child) else 0)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            found += map(id, own[name].values())
        for name, p in own["_parameters"].items():
            if p is not None:
                found += (name, id(p), p.requires_grad, has_hooks(p))
    return tuple(found)
