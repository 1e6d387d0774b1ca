"""Which parameters a layer's rule covers, and which are followed by themselves."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_dp.gradients.model import OPAQUE, getattr_path, trainable, trained_layers
from lightning_dp.gradients.rules.composite import calls_linear
from lightning_dp.gradients.rules.registry import rule_for


def is_covered(layer: nn.Module) -> bool:
    """Whether a rule covers all parameters of a layer, as it holds them; or it is run once more (`OPAQUE`)."""
    if isinstance(layer, OPAQUE) or calls_linear(layer):
        return True
    if is_parametrized(layer) or rule_for(layer) is None:
        return False
    return all(name in ("weight", "bias") for name in trainable(layer))  # weight_norm, pruning have others


def covered_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that use trainable parameters and are covered, by name."""
    return {name: layer for name, layer in trained_layers(module).items() if is_covered(layer)}


def uncovered(module: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the trainable parameters that another module than these layers uses."""
    ours = {id(getattr_path(layer, own)) for layer in layers.values() for own in trainable(layer)}
    theirs = {
        id(getattr_path(layer, own))
        for layer in trained_layers(module).values()
        if not any(layer is other for other in layers.values())
        for own in trainable(layer)
    }
    return {name for name, p in module.named_parameters() if p.requires_grad and (id(p) in theirs or id(p) not in ours)}
