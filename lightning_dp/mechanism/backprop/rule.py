"""Backpropagation clipping: a layer's gradient is bounded by bounding the two things that it is made of.

The weight gradient of a linear map is ``EᵀA``, with the layer's input ``A`` and the gradient ``E`` at its output. When
both are scaled down per example, the gradient that autograd adds up by itself has a bounded sensitivity: there are no
per-example gradients. (What a step costs, measured: docs/speed.md.)

The method is that of Stevens et al. 2022, "Backpropagation Clipping for Deep Learning with Differential Privacy",
whose second version was withdrawn for an error in its code; what differs here is in ``docs/backprop_clipping.md``.
The bounds per layer type are in `layer_bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from torch import nn

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.model import getattr_path, trainable, trained_layers
from lightning_dp.gradients.rules.registry import registered_for
from lightning_dp.mechanism.backprop.clipped_backward import ClippedBackward
from lightning_dp.mechanism.backprop.input_clip import InputClip
from lightning_dp.mechanism.backprop.layer_bounds import (
    BOUNDS_BY_NAME,
    CONVOLUTION_BOUNDS,
    ConvolutionBound,
    LayerBound,
    bounds_by_type,
    is_trained,
)
from lightning_dp.mechanism.backprop.limits import Limit
from lightning_dp.mechanism.clipping import NO_STATE, Bounding, Group, State, check_positive
from lightning_dp.torch_api import remove_forward_pre_hooks

_ALLOCATIONS = ("equal", "proportional")


# -- the rule ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackpropClipping(Bounding):
    """Clips every trainable layer's input in the forward pass and the gradient at its output in the backward pass.

    Both per example, over all its positions jointly. A layer that is called K times in a forward pass, or shares its
    parameters, clips each upstream gradient to ``upstream_norm / K``; K must not depend on the data. The clipped input
    is part of the function that is trained: the module keeps clipping after the fit. Weights that are loaded into
    another module need `attach` there (a Trainer with this rule does it by itself).

    Formal guarantee: one record moves the sum of parameter g by at most ``S_g`` (see `layer_bounds`), and the
    noise on all parameters together is one mechanism of multiplier z, whatever the `allocation`.
    Proof: autograd's gradient of the summed losses is ``Σ_i Σ_k E_ikᵀ A_ik``; each of the K terms of a record is within
    ``S_g / K``, and depends on no other record. ``Σ_g S_g² / σ_g² = z⁻²`` as the shares add up to 1.
    Source: Stevens et al. 2022 for the method, withdrawn for its accounting; the bounds are proven here.

    Args:
        input_norm: ``C_in``, the norm of every linear or convolutional layer's input per example; a number, or one per
            layer by its name.
        upstream_norm: ``C_up``, the norm of the gradient of an example's loss at every trainable layer's output; a
            number, or one per layer by its name.
        convolution: Which norms of a convolution are clipped (see `ConvolutionLayerBound`): ``"window_sum"``, the
            largest window of the input, and the gradient with its absolute values summed over the positions;
            ``"unfolded"``, all windows of the input jointly; ``"raw"`` input; or ``"raw_sum"``. Which is the tightest
            depends on the network.
        allocation: How the noise is divided over the P parameters. ``"equal"``: ``σ_g = z · S_g · √P``.
            ``"proportional"``: shares proportional to ``S_g · √d_g``, for ``d_g`` coordinates, which makes the expected
            square of all noise together smallest (by Lagrange's multipliers on ``Σ_g d_g σ_g²``).

    Raises:
        ValueError: A norm is not positive and finite, or an option is unknown.
    """

    input_norm: float | Mapping[str, float]
    upstream_norm: float | Mapping[str, float]
    convolution: ConvolutionBound = "window_sum"
    allocation: Literal["equal", "proportional"] = "equal"

    #: In less than float32 autograd's own sum is rounded, by up to the size of the whole batch's.
    allows_low_precision: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("input_norm", "upstream_norm"):
            value = getattr(self, name)
            check_positive("BackpropClipping", **(value if isinstance(value, Mapping) else {name: value}))
        for name, known in (("convolution", CONVOLUTION_BOUNDS), ("allocation", _ALLOCATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"BackpropClipping: {name} must be one of {known}, got {getattr(self, name)!r}.")

    def for_module(self, module: nn.Module) -> ModuleBackpropClipping:
        layers, problems = trained_layers(module), []
        registry = bounds_by_type(self.convolution)
        bounds: dict[str, LayerBound] = {}
        for name, layer in layers.items():
            found = registered_for(layer, registry, BOUNDS_BY_NAME) if "forward" not in vars(layer) else None
            unknown = set(trainable(layer)) - set(found.sensitivities(layer, 1.0, 1.0)) if found else set()
            reason = found.refusal(layer) if found else None
            if found is None or unknown:
                reason = "no bound of its gradient by its input and upstream gradient is proven"
                reason += f" for its parameters {sorted(unknown)}" if unknown else ""
            if reason:
                problems.append(f"layer '{name}' ({type(layer).__name__}): {reason}")
            elif found is not None:
                bounds[name] = found
        if problems:
            listed = "\n  - ".join(problems)
            raise UnsupportedModelError(
                f"BackpropClipping cannot bound this model:\n  - {listed}\nUse FlatClipping or PerLayerClipping, which "
                "bound the gradients of any layer, or freeze these layers (requires_grad_(False))."
            )
        clipped = [name for name in layers if bounds[name].clips_input and is_trained(layers[name], "weight")]
        input_norms = _by_layer("input_norm", self.input_norm, clipped, layers)
        upstream_norms = _by_layer("upstream_norm", self.upstream_norm, list(layers), layers)
        limits = {name: Limit(bounds[name], input_norms.get(name), upstream_norms[name]) for name in layers}
        return ModuleBackpropClipping(
            **{f.name: getattr(self, f.name) for f in fields(BackpropClipping)},
            limits=limits,
            sensitivities=_sensitivities(module, limits),
        )

    def attach(self, module: nn.Module) -> None:
        """Makes the module clip its layers' inputs from now on, as it did in training.

        For weights that were trained with this rule, after they were loaded into another module. The layers that were
        trained must require gradients. Clipping that is there already is replaced.

        Args:
            module: The module, with the layer names that were trained.
        """
        for name, limit in self.for_module(module).limits.items():
            layer = module.get_submodule(name)
            remove_forward_pre_hooks(layer, InputClip)
            if limit.input_norm is not None:
                layer.register_forward_pre_hook(InputClip(limit.bound, limit.input_norm), with_kwargs=True)

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        raise ValueError(
            "The sensitivity depends on the model's layers: BackpropClipping(…).for_module(module) knows it."
        )


@dataclass(frozen=True)
class ModuleBackpropClipping(BackpropClipping):
    """`BackpropClipping` for one module, whose sensitivities are known. Made by `BackpropClipping.for_module`."""

    limits: Mapping[str, Limit] = field(default_factory=dict)
    sensitivities: Mapping[str, float] = field(default_factory=dict)

    def make_engine(self, name: str, module: nn.Module) -> ClippedBackward:
        if name != "bookkeeping":
            raise ValueError(
                f"engine={name!r} computes the gradients of single examples, which BackpropClipping does without: "
                "leave engine out."
            )
        return ClippedBackward(module, self.limits)

    def groups(self, parameters: Sequence[str]) -> list[Group]:
        return [(name,) for name in parameters]

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        return [self.sensitivities[name] for (name,) in groups]

    def shares(self, groups: Sequence[Group], sizes: Mapping[str, int]) -> list[float]:
        if self.allocation == "equal":
            return super().shares(groups, sizes)
        shares = [self.sensitivities[name] * math.sqrt(sizes[name]) for (name,) in groups]
        return [share / sum(shares) for share in shares]


def _by_layer(
    what: str, norm: float | Mapping[str, float], names: Sequence[str], layers: Mapping[str, nn.Module]
) -> dict[str, float]:
    if not isinstance(norm, Mapping):
        return dict.fromkeys(names, norm)
    missing, unknown = set(names) - set(norm), set(norm) - set(layers)
    if missing or unknown:
        raise ValueError(
            f"BackpropClipping: {what} must name every layer that it clips; missing {sorted(missing)}, unknown "
            f"{sorted(unknown)}."
        )
    return {name: norm[name] for name in names}


def _sensitivities(module: nn.Module, limits: Mapping[str, Limit]) -> dict[str, float]:
    """By parameter name. A parameter that several layers share has the largest of their bounds: each of its K uses is
    within its layer's ``S / K``."""
    names = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, float] = {}
    for layer, limit in limits.items():
        child = module.get_submodule(layer)
        bounds = limit.bound.sensitivities(child, limit.input_norm or math.nan, limit.upstream_norm)
        for own, bound in bounds.items():
            name = names[id(getattr_path(child, own))]
            found[name] = max(found.get(name, 0.0), bound)
    return found
