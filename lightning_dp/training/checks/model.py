"""Checks of the model: which layers cannot be trained privately, and what to do."""

from __future__ import annotations

from collections.abc import Collection

import lightning.pytorch as pl
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.model import OPAQUE, getattr_path, trainable, trained_layers
from lightning_dp.gradients.rules.composite import calls_linear
from lightning_dp.gradients.rules.registry import refusal_for
from lightning_dp.torch_api import has_gradient_hooks

_WAY_OUT = "or use engine='per_example', which is slow but takes any layer"


def check_model(module: pl.LightningModule, engine: str, among: Collection[int] | None = None) -> None:
    """Refuses modules whose per-example gradients are not defined, or that the engine cannot compute.

    Args:
        module, engine: The module, and the name of the engine.
        among: Identities of the parameters whose layers are looked at; ``None``: all layers are.

    Raises:
        UnsupportedModelError: With one line for every problem, and what to do.
    """
    refused: dict[tuple[str, str], list[str]] = {}
    for name, child in module.named_modules():
        reason = refusal_for(child)
        if reason and (among is None or any(id(p) in among for p in child.parameters())):
            refused.setdefault((type(child).__name__, reason), []).append(name)
    problems = [_of_layers(names, kind, reason) for (kind, reason), names in refused.items()]
    if engine == "bookkeeping":
        problems += _parametrized(module) + _tied(module)
    problems += _odd_parameters(module)
    hooked = [name for name, p in module.named_parameters() if p.requires_grad and has_gradient_hooks(p)]
    if hooked:
        problems.append(
            f"parameters {hooked} have gradient hooks (register_hook, register_post_accumulate_grad_hook, "
            "wandb.watch), which would see gradients without noise; remove them, and look at p.grad in "
            "on_after_backward, where the noise is in"
        )
    if problems:
        listed = "\n  - ".join(["This model cannot be trained privately as it is:", *problems])
        raise UnsupportedModelError(listed if len(listed) <= 2000 else f"{listed[:1990]} …")
    if not any(p.requires_grad for p in module.parameters()):
        raise UnsupportedModelError("The model has no parameter that requires a gradient: there is nothing to train.")


def _odd_parameters(module: nn.Module) -> list[str]:
    """One line for uninitialised parameters (of lazy layers), one for complex ones."""
    problems = []
    lazy = [name for name, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        problems.append(
            f"parameters {lazy[:4]} of lazy layers have no shape yet: pass a batch (of zeros) through the module "
            "once in "
            "configure_model or before the fit"
        )
    named = {name: p for name, p in module.named_parameters() if name not in lazy}
    complex_ones = [name for name, p in named.items() if p.requires_grad and p.is_complex()]
    if complex_ones:
        problems.append(
            f"parameters {complex_ones[:4]} are complex, for which no bound is proven: hold the two parts as one real "
            "parameter, and use torch.view_as_complex(parameter)"
        )
    return problems


def _of_layers(names: list[str], kind: str, reason: str) -> str:
    """One line for all layers of a type with the same problem."""
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"layer{'s' if len(names) > 1 else ''} {shown}{more} ({kind}): {reason}"


#: The most layers that a line names.
_NAMED = 4


def _parametrized(module: nn.Module) -> list[str]:
    """One line for recurrent and attention layers whose weights are parametrized: they hand them to kernels."""
    names = [
        name
        for name, layer in trained_layers(module).items()
        if is_parametrized(layer) and (calls_linear(layer) or isinstance(layer, OPAQUE))
    ]
    if not names:
        return []
    return [
        f"layers {', '.join(map(repr, names[:_NAMED]))} are recurrent or attention layers with a parametrization "
        f"(weight_norm, spectral_norm), which is not followed into them; remove it, {_WAY_OUT}"
    ]


def _tied(module: nn.Module) -> list[str]:
    """One line for every tied parameter that layers hold under different names (a weight that is also a bias)."""
    uses: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, child in trained_layers(module).items():
        for own in trainable(child):
            uses.setdefault(id(getattr_path(child, own)), []).append((name, child, own))
    problems = []
    for shared in uses.values():
        roles = {own for _, _, own in shared}
        if len(shared) > 1 and len(roles) > 1:
            layers = ", ".join(f"'{name}.{own}'" for name, _, own in shared)
            problems.append(
                f"{layers} are one parameter in different roles, which no rule covers; untie them, {_WAY_OUT}"
            )
    return problems
