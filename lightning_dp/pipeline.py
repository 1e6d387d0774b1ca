"""The private step: bound every example's contribution, add them up, add noise, charge the ledger, hand over.

Everything that is not yet private (per-example gradients, their sums) lives in objects of this module until the noise
is in. Nothing here knows about Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from dp_accounting import DpEvent, NeighboringRelation, NonPrivateDpEvent, PoissonSampledDpEvent
from torch import Tensor

from lightning_dp.accounting import PrivacyLedger
from lightning_dp.clipping import Clipping
from lightning_dp.engines import Engine
from lightning_dp.gradients import PerExampleGradient
from lightning_dp.noise import Noise
from lightning_dp.randomness import Randomness


class PrivacyLimitReached(RuntimeError):
    """A private step was attempted that the budget does not allow."""


class PrivateStep:
    """Turns the gradients of a logical batch into one noisy gradient, and writes it into the ledger.

    Formal guarantee: with multiplier z and sampling rate q, `release` is a Poisson-subsampled Gaussian mechanism of
    noise multiplier z with respect to adding or removing a record, and the ledger holds that event before any
    parameter's ``grad`` is set.
    Proof: `accumulate` adds to the sums one term per example, of joint norm at most the clipping rule's sensitivity S,
    that depends on that example alone; the noise has standard deviation z·S on every coordinate of every trainable
    parameter; the divisor q·N is public.
    Source: Abadi et al. 2016, Algorithm 1.

    Args:
        engine: Supplies the per-example gradients.
        clipping, noise: The mechanism.
        ledger: Charged for every release.
        randomness: Where the noise comes from.
        reduce: Adds up the tensors over all processes, in place.
    """

    def __init__(
        self,
        engine: Engine,
        clipping: Clipping,
        noise: Noise,
        ledger: PrivacyLedger,
        randomness: Randomness,
        reduce: Callable[[Sequence[Tensor]], None],
    ) -> None:
        self.engine = engine
        self.clipping = clipping
        self.noise = noise
        self.ledger = ledger
        #: The number of ledger entries at which `release` refuses to go on; ``None``: no limit.
        self.limit: int | None = None
        #: Examples whose gradient was not finite, so far. Not private.
        self.nonfinite_examples = 0
        #: Norms before clipping of the examples of the current step, when `keep_norms` is set. Not private.
        self.norms: list[Tensor] = []
        self.keep_norms = False
        self._randomness = randomness
        self._reduce = reduce
        self._sums: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Forgets whatever an interrupted step left behind."""
        self._sums = {}
        self.norms = []

    def accumulate(self, scale: float) -> None:
        """Adds the bounded gradients of one micro-batch, whose backward pass has just run.

        Args:
            scale: What the gradients must be multiplied with to be those of single examples' losses: the number of
                examples that a mean-reduced loss was divided by.
        """
        gradients = self.engine.gradients()
        if not gradients:
            return
        norms = torch.stack([g.squared_norms() for g in gradients.values()]).sum(0).sqrt_() * scale
        bad = ~norms.isfinite()
        if bad.any():
            self.nonfinite_examples += int(bad.sum())
            gradients = {name: g.zero_(bad) for name, g in gradients.items()}
            norms = norms.masked_fill(bad, 0)
        if self.keep_norms:
            self.norms.append(norms)
        weights = self.clipping.weights(norms) * scale
        for name in list(gradients):
            self._add(name, gradients.pop(name), weights)

    def _add(self, name: str, gradient: PerExampleGradient, weights: Tensor) -> None:
        total = gradient.weighted_sum(weights)
        if name in self._sums:
            self._sums[name] += total
        else:
            self._sums[name] = total if total.dtype == torch.float64 else total.float()

    def release(self, multiplier: float, sampling_rate: float, expected_batch_size: float) -> None:
        """Adds the noise, charges the ledger and adds the noisy mean gradient to every parameter's ``grad``.

        Args:
            multiplier: Noise multiplier z.
            sampling_rate: q, with which the batch was drawn.
            expected_batch_size: q·N, the public divisor.

        Raises:
            PrivacyLimitReached: The ledger is at its limit; nothing was released.
        """
        if self.limit is not None and len(self.ledger) >= self.limit:
            self.begin()
            raise PrivacyLimitReached(
                f"The privacy budget allows {self.limit} steps and they have been taken. Nothing was released."
            )
        parameters = self.engine.parameters
        sums = [self._sums.get(name) for name in parameters]
        totals = [
            torch.zeros(p.shape, device=p.device, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
            if total is None
            else total
            for total, p in zip(sums, parameters.values(), strict=True)
        ]
        self._sums = {}
        self._reduce(totals)
        sensitivity = self.clipping.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE)
        device = next(iter(parameters.values())).device
        generator = self._randomness.torch("noise", len(self.ledger), device)
        self.noise.add_(totals, sensitivity, multiplier, generator)
        torch._foreach_div_(totals, expected_batch_size)
        self.ledger.record(self.event(multiplier, sampling_rate))
        for parameter, total in zip(parameters.values(), totals, strict=True):
            noisy = total.to(parameter.dtype)
            parameter.grad = noisy if parameter.grad is None else parameter.grad + noisy

    def event(self, multiplier: float, sampling_rate: float) -> DpEvent:
        """What one `release` costs."""
        event = self.noise.event(multiplier)
        return event if isinstance(event, NonPrivateDpEvent) else PoissonSampledDpEvent(sampling_rate, event)
