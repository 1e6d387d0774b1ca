"""Clipping rules: from per-example gradient norms to per-example weights, each with the sensitivity it guarantees.

A rule is configuration only. What changes while training (the norm of `AdaptiveClipping`) is a dictionary of public
numbers that the private step owns and passes in; it may be saved and shown.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from dp_accounting import NeighboringRelation
from torch import Tensor, nn

from lightning_dp.accounting.events import Magnitudes
from lightning_dp.gradients.engine import Engine
from lightning_dp.gradients.engines import make_engine

#: Names of parameters whose joint gradient is clipped together.
Group = tuple[str, ...]


#: Public numbers that a rule has chosen while training.
State = Mapping[str, float]


NO_STATE: State = {}


class Bounding(ABC):
    """How the contribution of one record to a step is bounded, and by how much one record can then move each sum.

    A rule that weighs per-example gradients is a `Clipping`. `BackpropClipping` clips layer inputs and upstream
    gradients instead, and `GradientEncoding` every coordinate of a gradient.
    """

    #: Whether the sums keep their bound when the model computes in less than float32.
    allows_low_precision: ClassVar[bool] = True

    def for_module(self, module: nn.Module) -> Bounding:
        """The rule for this module: itself, unless its bounds depend on the module's layers.

        Raises:
            UnsupportedModelError: There is no bound for one of the layers; the message names it.
        """
        return self

    def attach(self, module: nn.Module) -> None:
        """Makes the module compute, also outside training, the function that this rule trains."""
        return

    def make_engine(self, name: str, module: nn.Module) -> Engine:
        """The engine that supplies what this rule bounds, by the name that the user chose."""
        return make_engine(name, module)

    def groups(self, parameters: Sequence[str]) -> list[Group]:
        """The groups whose sums are bounded separately; all parameters together, unless a rule says otherwise."""
        return [tuple(parameters)]

    def initial_state(self) -> State:
        """The state before the first step."""
        return NO_STATE

    @abstractmethod
    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        """The most that adding or removing one record moves each group's bounded sum, in Euclidean norm."""

    def magnitudes(self) -> Magnitudes | None:
        """Limits on the coordinates of one record's contribution, over the sensitivity; ``None``: only its norm is
        limited."""
        return None

    def shares(self, groups: Sequence[Group], sizes: Mapping[str, int]) -> list[float]:
        """Every group's share ``s_g`` of the step's privacy, ``Σ_g s_g = 1``: equal ones, unless a rule says otherwise.

        The noise on group g has standard deviation ``z · S_g / √s_g``.

        Args:
            groups: As from `groups`.
            sizes: Number of coordinates of every parameter.
        """
        return [1 / len(groups)] * len(groups)

    def sensitivity(
        self,
        neighboring_relation: NeighboringRelation,
        groups: Sequence[Group] = ((),),
        state: State | None = None,
    ) -> float:
        """The most that all bounded sums jointly move between neighbouring batches.

        Proof: every term of the sums has a norm of at most its group's sensitivity and depends on its own record alone.
        Adding or removing a record adds or removes one term; replacing one does both (triangle inequality).

        Args:
            neighboring_relation: Adding or removing a record, or replacing one.
            groups: As from `groups`.
            state: As from `next_state`; ``None``: that before the first step.

        Raises:
            ValueError: The neighbouring relation is another.
        """
        state = self.initial_state() if state is None else state
        bound = math.hypot(*self.group_sensitivities(groups, state))
        if neighboring_relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
            return bound
        if neighboring_relation is NeighboringRelation.REPLACE_ONE:
            return 2 * bound
        raise ValueError(f"Unknown neighboring relation: {neighboring_relation}.")

    def query_std(self, multiplier: float, expected_batch_size: float) -> float:
        """Standard deviation of the noise on the rule's own query (see `Clipping.query`); 0.0 when it asks nothing."""
        return 0.0

    def next_state(self, answer: float, state: State) -> State:
        """The state after a step, from the noisy sum of the query over q·N."""
        return state


class Clipping(Bounding):
    """Weights ``w_ig`` for example i and group g of parameters, such that one record changes ``Σ_i w_ig g_ig`` by at
    most the group's sensitivity."""

    #: Whether a group's weights depend on its own norms alone. Then an example whose gradient is not finite is left out
    #: of that group alone, and among several processes a group is bounded, and its sum sent, as soon as its gradients
    #: are known, within the backward pass.
    separable: ClassVar[bool] = False

    @abstractmethod
    def weights(self, norms: Tensor, groups: Sequence[Group], state: State = NO_STATE) -> Tensor:
        """Weights ``(B, G)`` for gradients with these Euclidean norms ``(B, G)``, all finite."""

    def weights_of_group(self, norms: Tensor, sensitivity: float) -> Tensor:
        """Weights ``(B,)`` for one group's norms ``(B,)``, of a separable rule; the same as `weights` gives."""
        raise NotImplementedError(f"{type(self).__name__} weighs groups together.")

    def query(self, norms: Tensor, state: State) -> Tensor | None:
        """A statistic ``(B,)`` to be summed over the batch, every term between -1/2 and 1/2; ``None``: nothing."""
        return None


def check_positive(rule: str, **values: float) -> None:
    """Raises TypeError or ValueError unless every value is a positive, finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{rule}: {name} must be a number, got {value!r}.")
        if not 0 < value < math.inf:
            raise ValueError(f"{rule}: {name} must be positive and finite, got {value}.")


def scale_down(norms: Tensor, max_norms: Tensor | float) -> Tensor:
    """``min(1, max_norm / norm)``."""
    return torch.where(norms > max_norms, max_norms / norms, 1.0)


@dataclass(frozen=True)
class FlatClipping(Clipping):
    """Scales every example's gradient, over all trainable parameters jointly, to a norm of at most ``max_norm``.

    Formal guarantee: ``‖w_i g_i‖ ≤ max_norm``, so that one record moves the sum by at most ``max_norm``
    (add-or-remove), or ``2 · max_norm`` (replace-one).
    Proof: ``w_i = min(1, max_norm / ‖g_i‖)``, a function of record i alone.
    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.

    Args:
        max_norm: Clipping norm C, in units of the gradient's Euclidean norm.
    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check_positive("FlatClipping", max_norm=self.max_norm)

    def weights(self, norms: Tensor, groups: Sequence[Group], state: State = NO_STATE) -> Tensor:
        return scale_down(norms, self.max_norm)

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        return [self.max_norm]


@dataclass(frozen=True)
class PerLayerClipping(Clipping):
    """Clips every layer's gradient by itself, to its own norm.

    Formal guarantee: ``‖w_il g_il‖ ≤ C_l`` for every layer l; jointly ``√(Σ_l C_l²)``, which is ``max_norm`` when that
    is given. Noise is split equally over the L layers, ``σ_l = z · C_l · √L``: one mechanism of multiplier z.
    Proof: ``w_il = min(1, C_l / ‖g_il‖)``; and ``(Σ_l C_l² / σ_l²)^(-1/2) = z``.
    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", section 3.

    Args:
        max_norm: The joint norm C, of which each of L layers gets ``C / √L``.
        max_norms: Instead, the norm of every layer by its name (``{"net.0": 0.1, …}``).

    Raises:
        ValueError: Both are given, or neither, or a norm is not positive and finite.
    """

    separable: ClassVar[bool] = True

    max_norm: float | None = None
    max_norms: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if (self.max_norm is None) == (self.max_norms is None):
            raise ValueError("PerLayerClipping: give either max_norm, for all layers jointly, or max_norms, by layer.")
        if self.max_norm is not None:
            check_positive("PerLayerClipping", max_norm=self.max_norm)
        check_positive("PerLayerClipping", **(self.max_norms or {}))

    def groups(self, parameters: Sequence[str]) -> list[Group]:
        layers: dict[str, list[str]] = {}
        for name in parameters:
            layers.setdefault(_layer(name), []).append(name)
        if self.max_norms is not None and set(self.max_norms) != set(layers):
            unknown, missing = set(self.max_norms) - set(layers), set(layers) - set(self.max_norms)
            raise ValueError(
                f"PerLayerClipping: max_norms must name every trainable layer; missing {sorted(missing)}, unknown "
                f"{sorted(unknown)}."
            )
        return [tuple(names) for names in layers.values()]

    def weights(self, norms: Tensor, groups: Sequence[Group], state: State = NO_STATE) -> Tensor:
        bounds = self.group_sensitivities(groups)
        if len(set(bounds)) == 1:  # a number need not be sent to the device
            return scale_down(norms, bounds[0])
        return scale_down(norms, norms.new_tensor(bounds))

    def weights_of_group(self, norms: Tensor, sensitivity: float) -> Tensor:
        return scale_down(norms, sensitivity)

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        if self.max_norms is not None:
            return [self.max_norms[_layer(group[0])] for group in groups]
        assert self.max_norm is not None
        return [self.max_norm / math.sqrt(len(groups))] * len(groups)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


@dataclass(frozen=True)
class AutomaticClipping(Clipping):
    """Normalises every example's gradient instead of clipping it: no norm to tune (AUTO-S).

    Formal guarantee: ``‖w_i g_i‖ < 1``, so that one record moves the sum by at most 1.
    Proof: ``w_i = 1 / (‖g_i‖ + γ)``.
    Source: Bu et al. 2023, "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger".

    Args:
        gamma: γ, in units of the gradient's norm: gradients much shorter than γ keep their relative sizes.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_positive("AutomaticClipping", gamma=self.gamma)

    def weights(self, norms: Tensor, groups: Sequence[Group], state: State = NO_STATE) -> Tensor:
        return 1 / (norms + self.gamma)

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        return [1.0]


@dataclass(frozen=True)
class AdaptiveClipping(Clipping):
    """Flat clipping whose norm follows a quantile of the gradient norms, found with differential privacy.

    Every step also counts, with noise, how many norms are at most the clipping norm C, and multiplies C by
    ``exp(-learning_rate · (fraction - target_quantile))``. C stays the same within a logical batch.

    Formal guarantee: gradient sum (sensitivity C, noise ``z_Δ C``) and count (sensitivity 1/2, noise ``σ_b``) are
    together one mechanism of multiplier z. Proof: ``z⁻² = z_Δ⁻² + (2σ_b)⁻²``; the counted bits are centred, ``b - ½``,
    so that one record moves their sum by 1/2.
    Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", section 2 and theorem 1.

    Args:
        initial_norm: C before the first step.
        target_quantile: The fraction of gradients that should stay below C.
        learning_rate: η of the geometric update.
        count_std: Standard deviation σ_b of the noise on the count, in examples. ``None``: a twentieth of the
            expected batch size (the paper's), or the noise multiplier where that is more.
    """

    initial_norm: float = 1.0
    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_std: float | None = None

    def __post_init__(self) -> None:
        check_positive("AdaptiveClipping", initial_norm=self.initial_norm, learning_rate=self.learning_rate)
        if self.count_std is not None:
            check_positive("AdaptiveClipping", count_std=self.count_std)
        if not 0 < self.target_quantile < 1:
            raise ValueError(f"AdaptiveClipping: target_quantile must lie in (0, 1), got {self.target_quantile}.")

    def initial_state(self) -> State:
        return {"max_norm": self.initial_norm}

    def weights(self, norms: Tensor, groups: Sequence[Group], state: State = NO_STATE) -> Tensor:
        return scale_down(norms, state["max_norm"])

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        return [state["max_norm"]]

    def query_std(self, multiplier: float, expected_batch_size: float) -> float:
        if multiplier == 0:
            return 0.0
        std = max(expected_batch_size / 20, multiplier) if self.count_std is None else self.count_std
        if 2 * std <= multiplier:
            raise ValueError(
                f"AdaptiveClipping: count_std={std:g} leaves no noise for the gradient at noise multiplier "
                f"{multiplier:g}; it must be more than half of that."
            )
        return std

    def query(self, norms: Tensor, state: State) -> Tensor:
        return (norms[:, 0] <= state["max_norm"]).to(norms.dtype) - 0.5

    def next_state(self, answer: float, state: State) -> State:
        fraction = answer + 0.5
        return {"max_norm": state["max_norm"] * math.exp(-self.learning_rate * (fraction - self.target_quantile))}
