"""The private step: bound every example's contribution, add them up, add noise, charge the ledger, hand over.

Everything that is not yet private (per-example gradients, their sums) lives in `lightning_dp.mechanism.contributions`
and `lightning_dp.mechanism.sums` until the noise is in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from dp_accounting import DpEvent, NonPrivateDpEvent
from torch import Tensor, nn

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import PrivacyLimitReached
from lightning_dp.gradients.engine import Engine
from lightning_dp.mechanism.clipping import State
from lightning_dp.mechanism.contributions import contributions_of
from lightning_dp.mechanism.denoising import DenoiserState, PublicNoise
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.sums import QUERY, NoisySums, Wire
from lightning_dp.torch_api import euclidean_norms


@dataclass(frozen=True)
class Part:
    """One of several releases that are made from one sample, and charged together, by whoever makes them.

    Formal guarantee: ``count`` releases of Gaussian noise with multiplier ``z √count`` each, from one sample, cost what
    one release of multiplier z costs. Proof: each is a Gaussian mechanism of the sample, chosen with what the others
    have released; their composition is dominated by one of multiplier ``(count · (z √count)⁻²)^(-1/2) = z``, and so is
    the Poisson-subsampled composition by the Poisson-subsampled mechanism.
    Source: Dong et al. 2022, corollary 2 (composition of Gaussian mechanisms); Zhu et al. 2022, theorem 11 (sampling).

    Attributes:
        number: Of the step that was charged for all of them.
        index: Of this one, from 0 on.
        count: How many there are at most.
    """

    number: int
    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= _MOST_PARTS:
            raise ValueError(f"Release {self.index} of {self.count} from one sample: at most {_MOST_PARTS}.")


#: Releases from one sample, and blocks of noise (`block_size` coordinates each) of any one of them.
_MOST_PARTS, _BLOCKS = 1024, 1 << 20


class PrivateStep:
    """Turns the gradients of a logical batch into one noisy gradient, and writes it into the ledger.

    A step is `begin`, then every micro-batch's backward pass within `backward`, then `release`. Made by
    `PrivateStep.of`, or by the strategy.

    Formal guarantee: with multiplier z and sampling rate q, a step is the Poisson-subsampled mechanism of the noise (a
    Gaussian mechanism of noise multiplier z, unless the noise is another) with respect to adding or removing a record,
    and the ledger holds that event, and ``charge`` has returned, before any parameter's ``grad`` is set.
    Proof: `backward` adds to the sums one term per example, of joint norm at most the clipping rule's sensitivity S,
    and within its magnitudes, that depends on that example alone (`Contributions`); the noise on every coordinate of
    every trainable parameter (`NoisySums`) has the scale that makes all sums and the rule's query one mechanism of
    multiplier z (`noise_scales`); the divisor q·N is public. The denoiser sees what has been
    released, and public numbers. With several processes, no process gets a total before the first one, which keeps the
    journal, has charged it: it charges before it adds its own part to the first total.
    Source: Abadi et al. 2016, Algorithm 1.

    Args:
        mechanism: What decides ε, for the engine's module.
        engine: Supplies the per-example gradients, or their bounded sum.
        ledger: Charged for every release.
        randomness: Where the noise comes from.
        wire: The processes that add up. A bucket of sums is sent as soon as all of its sums are final: within the
            last backward pass for `BackpropClipping`, and for separable rules with ``bookkeeping``; else after it.
        charge: Makes a step's event durable before anything of the step is used; called with the event and the number
            of steps, this one included, that the budget still allows (``None``: no limit).
    """

    def __init__(
        self,
        mechanism: Mechanism,
        engine: Engine,
        ledger: PrivacyLedger,
        randomness: Randomness,
        wire: Wire = Wire(),
        charge: Callable[[DpEvent, int | None], None] = lambda event, at_most: None,
    ) -> None:
        self.mechanism, self.engine, self.ledger = mechanism, engine, ledger
        self.clipping = mechanism.clipping
        self.sums = NoisySums(engine.parameters, mechanism.noise, randomness, wire)
        self.contributions = contributions_of(engine, mechanism.clipping, self.sums)
        #: Names of parameters that are clipped together.
        self.groups = self.contributions.groups
        #: What the clipping rule has chosen so far, and what the denoiser remembers: public.
        self.clipping_state: State = mechanism.clipping.initial_state()
        self.denoiser_state: DenoiserState = {}
        #: Squared norm of the noisy gradient of the last step before denoising; 0.0 without a denoiser. Public.
        self.noisy_square = 0.0
        self._randomness, self._wire, self._charge = randomness, wire, charge
        self._event: DpEvent = NonPrivateDpEvent()
        self._number = self._first_block = 0
        self._scales: dict[str, float] = {}
        self._allowed: int | None = None
        #: Between `begin` and `release`.
        self._is_under_way = self._is_charged = False

    @property
    def nonfinite_examples(self) -> int:
        """Examples whose gradient was not finite, so far. Not private."""
        return self.contributions.nonfinite_examples

    @classmethod
    def of(
        cls,
        mechanism: Mechanism,
        module: nn.Module,
        engine: str = "bookkeeping",
        ledger: PrivacyLedger | None = None,
        randomness: Randomness | None = None,
        **processes: Any,
    ) -> PrivateStep:
        """The private step of a mechanism for a module, with an engine of this name and, by default, a new ledger."""
        bound = mechanism.for_module(module)
        made = bound.make_engine(engine, module)
        return cls(bound, made, PrivacyLedger() if ledger is None else ledger, randomness or Randomness(), **processes)

    def follow(self, before: PrivateStep) -> None:
        """Takes over the state of the step object before, after layers were frozen or unfrozen within a fit."""
        self.clipping_state, self.denoiser_state = before.clipping_state, before.denoiser_state
        self.contributions.nonfinite_examples = before.nonfinite_examples
        self.contributions.keep_norms = before.contributions.keep_norms

    def begin(
        self,
        multiplier: float,
        sampling_rate: float,
        expected_batch_size: float,
        limit: Callable[[DpEvent], int] | None = None,
        part: Part | None = None,
    ) -> None:
        """Starts a step, and forgets whatever an interrupted one left behind.

        Args:
            multiplier: Noise multiplier z.
            sampling_rate: q, with which the batch was drawn.
            expected_batch_size: q·N, the public divisor.
            limit: How many steps the ledger may hold if the next is this event.
            part: This is one of several releases from one sample, which were charged as one step of this multiplier:
                it gets its share, and charges nothing.

        Raises:
            PrivacyLimitReached: The ledger is at its limit.
        """
        self._is_under_way = self._is_charged = False
        self.sums.forget()
        self._event = self.mechanism.event(multiplier, sampling_rate)
        self._number = len(self.ledger) if part is None else part.number
        self._first_block = 0 if part is None else part.index * _BLOCKS
        self._is_charged = part is not None
        multiplier *= 1.0 if part is None else math.sqrt(part.count)
        self._allowed = None if limit is None else limit(self._event) - self._number
        if self._allowed is not None and self._allowed <= 0:
            raise PrivacyLimitReached(
                f"The privacy budget allows no step after the {self.ledger.steps} that were taken. Nothing was "
                "released."
            )
        self._scales = self.noise_scales(multiplier, expected_batch_size)
        has_query = bool(self.clipping_state)
        query_std = self.clipping.query_std(multiplier, expected_batch_size) if has_query else None
        self.sums.begin(
            self._number, self._scales, expected_batch_size, query_std, self._spend, first_block=self._first_block
        )
        self.contributions.begin(self.clipping_state)
        self._is_under_way = True

    def backward(self, scale: float = 1.0, last: bool = False) -> AbstractContextManager[None]:
        """Surrounds the backward pass of a micro-batch, and adds its bounded gradients to the sums.

        Args:
            scale: What the gradients must be multiplied with to be those of single examples' losses: the number of
                examples that a mean-reduced loss was divided by.
            last: Whether no other micro-batch follows: sums may then travel while the backward pass goes on.

        Raises:
            RuntimeError: No step has begun.
        """
        self._refuse_unless_under_way()
        return self.contributions.backward(scale, last and self._wire.add_up is not None)

    def release(self, others: Iterable[nn.Parameter] = ()) -> None:
        """Charges the ledger and sets every parameter's ``grad`` to the noisy mean gradient.

        Args:
            others: Parameters that the optimizer could apply a gradient to, besides the engine's.

        Raises:
            RuntimeError: No step has begun, or it was released before; one of ``others`` has a gradient, which did not
                come through here; or an error within a backward pass was ignored. No gradient was set.
        """
        self._refuse_unless_under_way()
        self._is_under_way = False  # a second release would have the same noise, and not be charged
        self._refuse_what_came_past(others)
        self.contributions.hand_over()
        sums = self.sums.collect()
        self._spend()
        self._denoise({name: sums[name] for name in self.engine.parameters})
        if self.clipping_state:
            self.clipping_state = self.clipping.next_state(sums[QUERY].item(), self.clipping_state)
        for name, parameter in self.engine.parameters.items():
            # Whatever was there before did not come through here: it is replaced, not added to.
            parameter.grad = sums[name].to(parameter.dtype)
        self.sums.forget()

    def _refuse_unless_under_way(self) -> None:
        if not self._is_under_way:
            raise RuntimeError(
                "No private step is under way: each is begun by the strategy, once a batch, and released once. Nothing "
                "was released. (LightningModule hooks must not call strategy.backward.)"
            )

    def _refuse_what_came_past(self, others: Iterable[nn.Parameter]) -> None:
        if self.sums.is_broken:
            self.sums.forget()
            raise RuntimeError(
                "An error within the backward pass was ignored (by a LightningModule.backward that catches it, say), "
                "after which the sums may lack noise. No gradient was set. Let the error end the training."
            )
        bounded = {id(p) for p in self.engine.parameters.values()}
        if any(p.grad is not None for p in others if id(p) not in bounded):
            self.sums.forget()
            raise RuntimeError(
                "A parameter that private training does not bound has a gradient: layers were exchanged, unfrozen or "
                "added to the optimizer while a step was under way. Do that between steps (on_train_epoch_start)."
            )

    def _spend(self) -> None:
        """Charges the step, once, before anybody sees anything of it."""
        if not self._is_charged:
            self._charge(self._event, self._allowed)
            self.ledger.record(self._event)
            self._is_charged = True

    def _denoise(self, gradients: dict[str, Tensor]) -> None:
        """Lets the denoiser change the noisy gradients, in place. Nothing else of the step is within its reach."""
        denoiser, noise = self.mechanism.denoiser, self.mechanism.noise
        if denoiser is None:
            return
        self.noisy_square = float(torch.stack(euclidean_norms(list(gradients.values()))).double().square().sum())
        step, like = self._number, next(iter(gradients.values()))
        blocks = itertools.count(self._first_block)

        def fresh(count: int) -> Tensor:
            drawn = torch.empty(count, device=like.device, dtype=like.dtype)
            noise.fill_(drawn, 1.0, lambda _: self._randomness.torch("denoising", step, like.device, next(blocks)))
            return drawn

        public = PublicNoise(dict(self._scales), noise.std(), fresh)
        self.denoiser_state = denoiser.denoise(gradients, public, self.denoiser_state)

    def noise_scales(self, multiplier: float, expected_batch_size: float) -> dict[str, float]:
        """The scale of the noise on every parameter's sum over q·N.

        Formal guarantee: all sums and the rule's query are together one mechanism of the step's multiplier z. Proof:
        with ``σ_g = z_Δ S_g / √s_g`` for groups of sensitivity ``S_g`` and shares that add up to 1,
        ``Σ_g S_g²/σ_g² = z_Δ⁻²``, and ``z_Δ⁻² = z⁻² - (2σ_b)⁻²`` leaves room for the query, of sensitivity 1/2 and
        noise ``σ_b``.
        """
        query_std = self.clipping.query_std(multiplier, expected_batch_size)
        if query_std:
            multiplier = (multiplier**-2 - (2 * query_std) ** -2) ** -0.5
        sensitivities = self.clipping.group_sensitivities(self.groups, self.clipping_state)
        shares = self.clipping.shares(self.groups, {name: p.numel() for name, p in self.engine.parameters.items()})
        return {
            name: multiplier * sensitivity / (math.sqrt(share) * expected_batch_size)
            for group, sensitivity, share in zip(self.groups, sensitivities, shares, strict=True)
            for name in group
        }

    @property
    def scales(self) -> dict[str, float]:
        """The scale of the noise on every parameter's sum over q·N, in the current step."""
        return self._scales
