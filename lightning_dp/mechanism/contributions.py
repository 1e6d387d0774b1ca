"""Bounds the contributions of a micro-batch's examples, and adds them to the sums.

There is one class per kind of engine: one that supplies per-example gradients, which a clipping rule weighs, and one
that bounds within the backward pass and supplies the sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.engine import Engine, PerExampleEngine, SummingEngine
from lightning_dp.gradients.precision import full_precision, is_asynchronous
from lightning_dp.mechanism.clipping import Bounding, Clipping, Group, State
from lightning_dp.mechanism.sums import NoisySums


class Contributions(ABC):
    """Adds one bounded term per example to the sums.

    Formal guarantee: an example's terms have a joint norm of at most the rule's sensitivity in every group, and depend
    on that example alone. Proof: see the rule (`lightning_dp.mechanism.clipping`), which is asked once per example and
    group; a gradient that is not finite adds nothing.

    Args:
        clipping: The rule, for the engine's module.
        sums: Where the terms go.
    """

    def __init__(self, clipping: Bounding, sums: NoisySums) -> None:
        self.clipping, self.sums = clipping, sums
        #: Names of parameters that are clipped together.
        self.groups: list[Group] = clipping.groups(list(sums.parameters))
        #: Examples whose gradient was not finite, so far. Not private.
        self.nonfinite_examples = 0
        #: Norms ``(B, G)`` before clipping of the examples of the current step, and their weights, one tensor per
        #: micro-batch, when `keep_norms` is set. Not private.
        self.norms: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.keep_norms = False
        #: Mask ``(B,)`` of rows that are no records and add nothing; ``None``: there are none.
        self.padding: Tensor | None = None
        self._state: State = {}

    def begin(self, state: State) -> None:
        """Starts a step with what the rule has chosen so far, and forgets what an interrupted one left behind."""
        self.norms, self.weights, self._state = [], [], state

    @abstractmethod
    def backward(self, scale: float, last: bool) -> AbstractContextManager[None]:
        """Surrounds the backward pass of a micro-batch.

        Args:
            scale: What the gradients must be multiplied with to be those of single examples' losses.
            last: Whether no other micro-batch follows, and other processes wait: sums are sent within the pass then,
                each as soon as it is final.
        """

    @abstractmethod
    def hand_over(self) -> None:
        """After the last backward pass: moves what the engine still holds into the sums."""


def contributions_of(engine: Engine, clipping: Bounding, sums: NoisySums) -> Contributions:
    """The kind of `Contributions` that this engine needs."""
    if isinstance(engine, SummingEngine):
        return BoundedSums(engine, clipping, sums)
    assert isinstance(engine, PerExampleEngine) and isinstance(clipping, Clipping)
    return WeightedGradients(engine, clipping, sums)


class BoundedSums(Contributions):
    """Contributions of a `SummingEngine`, which bounds within the backward pass."""

    def __init__(self, engine: SummingEngine, clipping: Bounding, sums: NoisySums) -> None:
        super().__init__(clipping, sums)
        self._engine = engine

    def begin(self, state: State) -> None:
        super().begin(state)
        self._engine.reset()
        self._engine.keep_norms = self.keep_norms

    @contextmanager
    def backward(self, scale: float, last: bool) -> Iterator[None]:
        self._engine.on_complete = self._take if last else None
        with self._engine.backward(scale):
            yield
        self.nonfinite_examples += self._engine.nonfinite()
        if self._engine.norms is not None and self._engine.factors is not None:
            self.norms.append(self._engine.norms * scale)
            self.weights.append(self._engine.factors)

    def _take(self, name: str, total: Tensor, factor: float) -> None:
        with self.sums.must_complete():
            self.sums.take(name, total, factor)
            self.sums.complete([name])

    def hand_over(self) -> None:
        sums, factor = self._engine.take()
        for name, total in sums.items():
            self.sums.take(name, total, factor)


class WeightedGradients(Contributions):
    """Contributions of a `PerExampleEngine`, whose gradients a clipping rule weighs."""

    clipping: Clipping

    def __init__(self, engine: PerExampleEngine, clipping: Clipping, sums: NoisySums) -> None:
        super().__init__(clipping, sums)
        self._engine = engine
        self._group_of = {name: index for index, group in enumerate(self.groups) for name in group}
        self._sensitivities: list[float] = []
        self._begin_micro_batch(1.0, False)

    def begin(self, state: State) -> None:
        super().begin(state)
        self._sensitivities = self.clipping.group_sensitivities(self.groups, state)
        self._begin_micro_batch(1.0, False)

    def _begin_micro_batch(self, scale: float, last: bool) -> None:
        self._scale, self._is_last = scale, last
        #: Gradients of groups, by index, that are not complete yet (separable rules only).
        self._waiting: dict[int, dict[str, PerExampleGradient]] = {}
        #: Groups whose clipped gradients are in the sums.
        self._bounded: set[int] = set()
        #: Norms and weights ``(B, G)``, where they are kept.
        self._measured: tuple[Tensor, Tensor] | None = None
        #: Mask ``(B,)`` of examples with a gradient that is not finite; ``None``: there are none.
        self._bad: Tensor | None = None

    @contextmanager
    def backward(self, scale: float, last: bool) -> Iterator[None]:
        self._begin_micro_batch(scale, last)
        self._engine.on_complete = self._take if last and self.clipping.separable else None
        with self._engine.backward(scale):
            yield
        gradients = self._engine.gradients()
        for waiting in self._waiting.values():
            gradients |= waiting
        if gradients:
            with full_precision(self.sums.device):
                self.add_clipped(gradients, sorted({self._group_of[name] for name in gradients}))
        if self._bad is not None:
            self.nonfinite_examples += int(self._bad.sum())
        if self._measured is not None:
            norms, weights = self._measured
            self.norms.append(norms)
            self.weights.append(weights)

    def hand_over(self) -> None:
        self.sums.totals()

    def _take(self, name: str, gradient: PerExampleGradient) -> None:
        """Bounds a group within the backward pass, once all of its gradients are known."""
        group = self._group_of[name]
        waiting = self._waiting.setdefault(group, {})
        waiting[name] = gradient
        if len(waiting) == len(self.groups[group]):
            with self.sums.must_complete(), full_precision(self.sums.device):
                self._add_group(self._waiting.pop(group), group)
                self.sums.complete(self.groups[group])

    def _add_group(self, gradients: dict[str, PerExampleGradient], group: int) -> None:
        """Adds the clipped gradients of one group of a separable rule, without waiting for a device."""
        self._bound_once([group])
        norms = torch.stack([g.squared_norms() for g in gradients.values()]).sum(0).sqrt_() * self._scale
        bad = ~norms.isfinite()
        if is_asynchronous(bad) or bad.any():  # a mask costs less than a host-device sync
            self._bad = bad if self._bad is None else self._bad | bad
            gradients = {name: g.without(bad) for name, g in gradients.items()}
            norms = norms.masked_fill(bad, 0)
        weights = self.clipping.weights_of_group(norms, self._sensitivities[group])
        if self.keep_norms:
            self._keep(norms[:, None], weights[:, None], [group])
        self._add_weighted(gradients, weights)

    def add_clipped(self, gradients: dict[str, PerExampleGradient], groups: Sequence[int]) -> None:
        """Adds the clipped gradients of these groups."""
        self._bound_once(groups)
        norms = self._norms(gradients, groups) * self._scale
        bad = ~norms.isfinite()
        if not self.clipping.separable:
            bad = bad.any(1, keepdim=True).expand_as(bad)
        is_bad = bool(bad.any())
        if is_bad:
            self._bad = bad.any(1) if self._bad is None else self._bad | bad.any(1)
            gradients = {name: g.without(bad[:, self._group_of[name]]) for name, g in gradients.items()}
            norms = norms.masked_fill(bad, 0)
        weights = self.clipping.weights(norms, self.groups, self._state)
        if self.padding is not None:
            weights = weights.masked_fill(self.padding[:, None], 0)
        if self.keep_norms:
            self._keep(norms[:, groups], weights[:, groups], groups)
        query = self.clipping.query(norms, self._state)
        if query is not None:
            left_out = bad.any(1) if self.padding is None else bad.any(1) | self.padding
            is_any = is_bad or self.padding is not None
            self.sums.add_to_query((query.masked_fill(left_out, 0) if is_any else query).sum())
        for index in groups:
            own = {name: gradients.pop(name) for name in self.groups[index] if name in gradients}
            self._add_weighted(own, weights[:, index])

    def _bound_once(self, groups: Sequence[int]) -> None:
        if not self._bounded.isdisjoint(groups):
            raise RuntimeError("A gradient came in two parts, each of which would be clipped by itself.")
        self._bounded.update(groups)

    def _norms(self, gradients: dict[str, PerExampleGradient], groups: Sequence[int]) -> Tensor:
        """Norms ``(B, G)`` of every example's gradient with respect to these groups, and zeros for the others."""
        squares = {name: g.squared_norms() for name, g in gradients.items()}
        like = max(squares.values(), key=lambda square: square.dtype.itemsize)
        norms = like.new_zeros(len(like), len(self.groups))
        for index in groups:
            if own := [squares[name] for name in self.groups[index] if name in squares]:
                norms[:, index] = torch.stack(own).sum(0)
        return norms.sqrt_()

    def _keep(self, norms: Tensor, weights: Tensor, groups: Sequence[int]) -> None:
        """Takes note of norms and weights, one column per group."""
        if self._measured is None:
            shape = len(norms), len(self.groups)
            self._measured = norms.new_zeros(shape), weights.new_ones(shape)
        for kept, new in zip(self._measured, (norms, weights), strict=True):
            for index, column in zip(groups, new.unbind(1), strict=True):
                kept[:, index] = column

    def _add_weighted(self, gradients: dict[str, PerExampleGradient], weights: Tensor) -> None:
        sums, weights = self.sums.totals(), weights * self._scale
        for name in list(gradients):
            gradients.pop(name).add_weighted_sum_(sums[name], weights)
