"""Rules for losses that hold a gradient, such as gradient penalties: what a layer's backward pass owes its parameters.

The backward pass of a layer ``y = f(θ, a)`` computes ``J_aᵀ g`` from the gradient ``g`` at ``y``. A loss that depends
on that has there a gradient ``v`` of its own, and ``⟨v, J_aᵀ g⟩ = ⟨g, J_a v⟩``: the parameters' gradient is the layer's
own, for the output ``J_a v`` in place of ``y``. A rule is a function ``rule(module, at, direction, upstream)`` of
``a``, ``v`` and ``g``, all with the batch in the leading dimension; `tests/gradients/test_second_order.py` checks each.

Sources: Pearlmutter 1994, "Fast Exact Multiplication by the Hessian" (the identity); Gulrajani et al. 2017 (the
penalty).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.gradients.base import PerExampleGradient, scaled_rows, squared_row_norms
from lightning_dp.gradients.precision import wide
from lightning_dp.gradients.rules.layers import affine
from lightning_dp.gradients.rules.registry import rule_for

SecondOrderRule = Callable[[Any, Tensor, Tensor, Tensor], Mapping[str, PerExampleGradient]]

_RULES: dict[type[nn.Module], SecondOrderRule] = {}


def _register(*types: type[nn.Module]) -> Callable[[SecondOrderRule], SecondOrderRule]:
    def register(rule: SecondOrderRule) -> SecondOrderRule:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def second_order_rule(module: nn.Module) -> SecondOrderRule | None:
    """The rule of exactly this module's type; ``None``: there is none."""
    return _RULES.get(type(module))


def balanced(at: Tensor, direction: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` times a number for each example that makes it as long as ``a``, and ``g`` over that number.

    What a rule makes of the two is the same: it is linear in each. But the gradient of the layer's forward pass is made
    of ``a`` and of a gradient that a mean over the batch has divided by its size, as it has divided ``v``, and not
    ``g``. Were these added up as they are, the bound on rounding, a product of the lengths of both sides
    (`lightning_dp.gradients.linear.inner_product_of_grams`), would grow with the square of the size of the batch, and
    norms would be measured too long.
    """
    lengths = [squared_row_norms(tensor).sqrt() for tensor in (at, direction)]
    usable = (lengths[0] > 0) & (lengths[1] > 0) & lengths[0].isfinite() & lengths[1].isfinite()
    # Within limits, so that neither becomes too small or too large for its precision.
    factor = torch.where(usable, lengths[0] / lengths[1], 1.0).clamp(1e-6, 1e6)
    return scaled_rows(wide(direction), factor), scaled_rows(wide(upstream), 1 / factor)


@_register(
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
def bilinear(module: nn.Module, at: Tensor, direction: Tensor, upstream: Tensor) -> dict[str, PerExampleGradient]:
    """``J_a v`` is the layer without its bias, at ``v``."""
    rule = rule_for(module)
    assert rule is not None
    return {name: g for name, g in rule(module, direction, upstream).items() if name != "bias"}


def _normalised(
    module: Any, normalise: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, upstream: Tensor, kept: Any
) -> dict[str, PerExampleGradient]:
    """``y = w · x̂(a) + b``: ``J_a v`` is ``w`` times the derivative of ``x̂`` along ``v``."""
    derivative: Tensor = torch.func.jvp(normalise, (at,), (direction.to(at.dtype),))[1]
    return {name: g for name, g in affine(module, derivative, upstream, kept).items() if name != "bias"}


@_register(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, at: Tensor, direction: Tensor, upstream: Tensor) -> dict[str, PerExampleGradient]:
    """Normalises over the last dimensions; a weight per entry."""
    shape = tuple(module.normalized_shape)
    kept = tuple(range(upstream.dim() - len(shape), upstream.dim()))
    return _normalised(module, lambda a: F.layer_norm(a, shape, eps=module.eps), at, direction, upstream, kept)


@_register(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, at: Tensor, direction: Tensor, upstream: Tensor) -> dict[str, PerExampleGradient]:
    """Normalises over groups of channels; a weight per channel."""
    groups = module.num_groups
    return _normalised(module, lambda a: F.group_norm(a, groups, eps=module.eps), at, direction, upstream, (1,))


@_register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(
    module: nn.InstanceNorm2d, at: Tensor, direction: Tensor, upstream: Tensor
) -> dict[str, PerExampleGradient]:
    """Normalises over positions; a weight per channel."""
    return _normalised(module, lambda a: F.instance_norm(a, eps=module.eps), at, direction, upstream, (1,))
