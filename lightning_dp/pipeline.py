"""The private step: bound every example's contribution, add them up, add noise, charge the ledger, hand over.

Everything that is not yet private (per-example gradients, their sums) lives in objects of this module until the noise
is in. Nothing here knows about Lightning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from dp_accounting import DpEvent, NonPrivateDpEvent
from torch import Tensor, nn

from lightning_dp.accounting import Phase, PrivacyLedger
from lightning_dp.clipping import Bounding, Clipping, State
from lightning_dp.denoising import Denoiser, DenoiserState, PublicNoise
from lightning_dp.engines import Engine, PerExampleEngine, SummingEngine
from lightning_dp.gradients import PerExampleGradient
from lightning_dp.noise import Noise, block_size
from lightning_dp.randomness import Randomness

#: The key of the clipping rule's own query among the sums; no parameter has an empty name.
_QUERY = ""

#: Generators of parameters in another precision start here, beyond any number of blocks.
_SECOND_STREAM = 2**31

#: Coordinates of noise that are drawn and added at once on a CPU: they stay in its cache, and torch needs no threads.
_CHUNK = 2**15


def _wide_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _blocks(flats: Sequence[Tensor], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Cuts flat tensors, laid end to end, into blocks of ``size``: lists of a tensor's index and a part of it."""
    block: list[tuple[int, Tensor]] = []
    room = size
    for index, flat in enumerate(flats):
        while len(flat):
            part, flat = flat[:room], flat[room:]
            block.append((index, part))
            room -= len(part)
            if not room:
                yield block
                block, room = [], size
    if block:
        yield block


class PrivacyLimitReached(RuntimeError):
    """A private step was attempted that the budget does not allow."""


class PrivateStep:
    """Turns the gradients of a logical batch into one noisy gradient, and writes it into the ledger.

    A step is `begin`, then `accumulate` after the backward pass of every micro-batch, then `release`.

    Formal guarantee: with multiplier z and sampling rate q, a step is the Poisson-subsampled mechanism of the noise (a
    Gaussian mechanism of noise multiplier z, unless the noise is another) with respect to adding or removing a record,
    and the ledger holds that event, and ``charge`` has returned, before any parameter's ``grad`` is set.
    Proof: `accumulate` adds to the sums one term per example, of joint norm at most the clipping rule's sensitivity S,
    and within its magnitudes, that depends on that example alone; the noise has scale z·S on every coordinate of every
    trainable parameter; the divisor q·N is public. The denoiser sees what has been released, and public numbers.
    Source: Abadi et al. 2016, Algorithm 1.

    Args:
        engine: Supplies the per-example gradients, or their bounded sum.
        clipping, noise: The mechanism; the rule is bound to the engine's module.
        ledger: Charged for every release.
        randomness: Where the noise comes from.
        reduce: Adds up the tensors over all processes, in place.
        charge: Makes the event of a step durable before anything of the step is used; the most steps, this one
            included, that are allowed is its second argument.
        denoiser: What is done to the noisy gradient.
        rank, world_size: Of the processes that add up. The noise is added once in all: its blocks are shared out among
            them, and drawn from the streams that a single process would draw them from.
    """

    def __init__(
        self,
        engine: Engine,
        clipping: Bounding,
        noise: Noise,
        ledger: PrivacyLedger,
        randomness: Randomness,
        reduce: Callable[[Sequence[Tensor]], None],
        charge: Callable[[DpEvent, int | None], None] = lambda event, at_most: None,
        denoiser: Denoiser | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.engine = engine
        self.clipping = clipping
        self.noise = noise
        self.ledger = ledger
        self.denoiser = denoiser
        #: What the denoiser remembers: public.
        self.denoiser_state: DenoiserState = {}
        #: Squared norm of the noisy gradient of the last step, before it was denoised: public.
        self.noisy_square = 0.0
        #: Examples whose gradient was not finite, so far. Not private.
        self.nonfinite_examples = 0
        #: Norms ``(B, G)`` before clipping of the examples of the current step, and their weights, one tensor per
        #: micro-batch, when `keep_norms` is set. Not private.
        self.norms: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.keep_norms = False
        #: What the clipping rule has chosen so far: public.
        self.clipping_state: State = clipping.initial_state()
        #: Names of parameters that are clipped together.
        self.groups = clipping.groups(list(engine.parameters))
        self._rank, self._world_size = rank, world_size
        self._randomness = randomness
        self._reduce = reduce
        self._charge = charge
        self._sums: dict[str, Tensor] = {}
        self._event: DpEvent = NonPrivateDpEvent()
        self._multiplier, self._divisor = 0.0, 1.0
        self._allowed: int | None = None

    def begin(
        self,
        multiplier: float,
        sampling_rate: float,
        expected_batch_size: float,
        limit: Callable[[DpEvent], int] | None = None,
    ) -> None:
        """Starts a step, and forgets whatever an interrupted one left behind.

        The sums start out as noise, so that the bounded gradients are added to it and no sum without noise ever exists,
        unless the engine forms it (a `SummingEngine`): to that the noise is added, in place.

        Args:
            multiplier: Noise multiplier z.
            sampling_rate: q, with which the batch was drawn.
            expected_batch_size: q·N, the public divisor.
            limit: How many steps the ledger may hold if the next is this event.

        Raises:
            PrivacyLimitReached: The ledger is at its limit.
        """
        self._event = self.event(multiplier, sampling_rate)
        self.norms, self.weights = [], []
        self._sums = {}
        if isinstance(self.engine, SummingEngine):
            self.engine.reset()
            self.engine.keep_norms = self.keep_norms
        self._multiplier, self._divisor = multiplier, expected_batch_size
        self._allowed = None if limit is None else limit(self._event) - len(self.ledger)
        if self._allowed is not None and self._allowed <= 0:
            raise PrivacyLimitReached(
                f"The privacy budget allows no step after the {len(self.ledger)} that were taken. Nothing was released."
            )

    def accumulate(self, scale: float) -> None:
        """Adds the bounded gradients of one micro-batch, whose backward pass has just run.

        Args:
            scale: What the gradients must be multiplied with to be those of single examples' losses: the number of
                examples that a mean-reduced loss was divided by.
        """
        if isinstance(self.engine, SummingEngine):
            self._note_bounds(self.engine, scale)
        elif isinstance(self.engine, PerExampleEngine):
            self._add_clipped(self.engine, scale)

    def _note_bounds(self, engine: SummingEngine, scale: float) -> None:
        """What is worth knowing of a micro-batch whose bounded sum the engine keeps."""
        self.nonfinite_examples += engine.nonfinite()
        if engine.norms is not None and engine.factors is not None:
            self.norms.append(engine.norms * scale)
            self.weights.append(engine.factors)

    def _add_clipped(self, engine: PerExampleEngine, scale: float) -> None:
        assert isinstance(self.clipping, Clipping)
        gradients = engine.gradients()
        if not gradients:
            return
        norms = self._norms(gradients) * scale
        bad = ~norms.isfinite().all(1)
        if bad.any():
            self.nonfinite_examples += int(bad.sum())
            gradients = {name: g.without(bad) for name, g in gradients.items()}
            norms = norms.masked_fill(bad[:, None], 0)
        weights = self.clipping.weights(norms, self.groups, self.clipping_state)
        if self.keep_norms:
            self.norms.append(norms)
            self.weights.append(weights)
        query = self.clipping.query(norms, self.clipping_state)
        if bad.any():
            query = None if query is None else query.masked_fill(bad, 0)
        sums = self._totals()
        if query is not None:
            sums[_QUERY] += query.sum() / self._divisor
        weights = weights * (scale / self._divisor)
        for group, column in zip(self.groups, weights.unbind(1), strict=True):
            for name in group:
                if name in gradients:
                    gradients.pop(name).add_weighted_sum_(sums[name], column)

    def _norms(self, gradients: dict[str, PerExampleGradient]) -> Tensor:
        """Norms ``(B, G)`` of every example's gradient with respect to every group."""
        squares = {name: g.squared_norms() for name, g in gradients.items()}
        nothing = torch.zeros_like(next(iter(squares.values())))
        groups = [[squares[name] for name in group if name in squares] for group in self.groups]
        return torch.stack([torch.stack(parts).sum(0) if parts else nothing for parts in groups], 1).sqrt_()

    def _totals(self) -> dict[str, Tensor]:
        """Noise plus the sums so far, over q·N: one tensor per trainable parameter, in float32 or wider."""
        if self._sums:
            return self._sums
        parameters, scales, step = self.engine.parameters, self.noise_scales(), len(self.ledger)
        for device, dtype in {(p.device, _wide_dtype(p)) for p in parameters.values()}:
            members = {n: p for n, p in parameters.items() if (p.device, _wide_dtype(p)) == (device, dtype)}
            flat = torch.empty(sum(p.numel() for p in members.values()), device=device, dtype=dtype)
            first = 0 if dtype == torch.float32 else _SECOND_STREAM  # parameters of mixed precision share no generator
            generator = self._noise_generators(step, device, first)
            parts = dict(zip(members, flat.split([p.numel() for p in members.values()]), strict=True))
            if len({scales[name] for name in members}) == 1:
                self._fill_own_blocks_(flat, scales[next(iter(members))], generator)
            else:
                self._fill_own_blocks_(flat, 1.0, generator)
                torch._foreach_mul_(list(parts.values()), [scales[name] for name in parts])
            self._sums |= {name: part.view_as(members[name]) for name, part in parts.items()}
        device = next(iter(parameters.values())).device
        answer = torch.empty(1, device=device)
        query_std = self.clipping.query_std(self._multiplier, self._divisor) / self._divisor
        self._fill_own_blocks_(answer, query_std, lambda block: self._randomness.torch("query", step, device, block))
        self._sums[_QUERY] = answer
        return self._sums

    def _is_own(self, block: int) -> bool:
        """Whether this process draws the noise of a block of coordinates."""
        return block % self._world_size == self._rank

    def _fill_own_blocks_(self, out: Tensor, scale: float, generators: Callable[[int], torch.Generator]) -> None:
        """Noise on this process's blocks of a flat tensor, and zeros on the others."""
        for number, block in enumerate(out.split(block_size(out.device, len(out)))):
            if self._is_own(number):
                self.noise.fill_(block, scale, lambda _, number=number: generators(number))  # type: ignore[misc]
            else:
                block.zero_()

    def _with_noise(self) -> dict[str, Tensor]:
        """The noisy sums over q·N, of whichever kind of engine."""
        if not isinstance(self.engine, SummingEngine):
            return self._totals()
        sums, factor = self.engine.take()
        parameters, scales, step = self.engine.parameters, self.noise_scales(), len(self.ledger)
        sums |= {n: torch.zeros_like(p, dtype=_wide_dtype(p)) for n, p in parameters.items() if n not in sums}
        for device, dtype in {(total.device, total.dtype) for total in sums.values()}:
            members = [n for n in parameters if (sums[n].device, sums[n].dtype) == (device, dtype)]
            first = 0 if dtype == torch.float32 else _SECOND_STREAM
            self._add_noise_(
                [sums[name].view(-1) for name in members],
                [scales[name] for name in members],
                factor / self._divisor,
                self._noise_generators(step, device, first),
            )
        return sums

    def _add_noise_(
        self,
        sums: Sequence[Tensor],
        scales: Sequence[float],
        factor: float,
        generators: Callable[[int], torch.Generator],
    ) -> None:
        """``factor · sum + scale · noise`` for flat tensors, in place, with little of the noise in memory at a time."""
        device = sums[0].device
        chunk = _CHUNK if device.type == "cpu" else max(map(len, sums))
        noise = sums[0].new_empty(chunk)
        for number, block in enumerate(_blocks(sums, block_size(device, sum(map(len, sums))))):
            if not self._is_own(number):
                for _, part in block:
                    part.mul_(factor)
                continue
            own = generators(number)
            for index, part in block:
                for piece in part.split(chunk):
                    drawn = noise[: len(piece)]
                    self.noise.fill_(drawn, scales[index], lambda _, own=own: own)  # type: ignore[misc]
                    torch.add(drawn, piece, alpha=factor, out=piece)

    def _noise_generators(self, step: int, device: torch.device, first: int) -> Callable[[int], torch.Generator]:
        return lambda block: self._randomness.torch("noise", step, device, first + block)

    def noise_scales(self) -> dict[str, float]:
        """The scale of the noise on every parameter's sum over q·N.

        Formal guarantee: all sums and the rule's query are together one mechanism of the step's multiplier z. Proof:
        with ``σ_g = z_Δ S_g / √s_g`` for groups of sensitivity ``S_g`` and shares that add up to 1,
        ``Σ_g S_g²/σ_g² = z_Δ⁻²``, and ``z_Δ⁻² = z⁻² - (2σ_b)⁻²`` leaves room for the query, of sensitivity 1/2 and
        noise ``σ_b``.
        """
        multiplier = self._multiplier
        query_std = self.clipping.query_std(multiplier, self._divisor)
        if query_std:
            multiplier = (multiplier**-2 - (2 * query_std) ** -2) ** -0.5
        sensitivities = self.clipping.group_sensitivities(self.groups, self.clipping_state)
        shares = self.clipping.shares(self.groups, {name: p.numel() for name, p in self.engine.parameters.items()})
        return {
            name: multiplier * sensitivity / (math.sqrt(share) * self._divisor)
            for group, sensitivity, share in zip(self.groups, sensitivities, shares, strict=True)
            for name in group
        }

    def release(self, others: Iterable[nn.Parameter] = ()) -> None:
        """Charges the ledger and sets every parameter's ``grad`` to the noisy mean gradient.

        Args:
            others: Parameters that the optimizer could apply a gradient to, besides the engine's.

        Raises:
            RuntimeError: One of ``others`` has a gradient, which did not come through here; nothing was released.
        """
        parameters = self.engine.parameters
        bounded = {id(p) for p in parameters.values()}
        if any(p.grad is not None for p in others if id(p) not in bounded):
            self._sums = {}
            if isinstance(self.engine, SummingEngine):
                self.engine.reset()
            raise RuntimeError(
                "A parameter that private training does not bound has a gradient: layers were exchanged, unfrozen or "
                "added to the optimizer while a step was under way. Do that between steps (on_train_epoch_start)."
            )
        sums, self._sums = self._with_noise(), {}
        # In this order: no process gets the sum before the first one, which keeps the journal, has charged it.
        self._charge(self._event, self._allowed)
        self.ledger.record(self._event)
        self._reduce(list(sums.values()))
        self._denoise({name: sums[name] for name in parameters})
        if self.clipping_state:
            self.clipping_state = self.clipping.next_state(sums[_QUERY].item(), self.clipping_state)
        for name, parameter in parameters.items():
            # Whatever was there before did not come through here: it is replaced, not added to.
            parameter.grad = sums[name].to(parameter.dtype)

    def _denoise(self, gradients: dict[str, Tensor]) -> None:
        """Lets the denoiser change the noisy gradients, in place. Nothing else of the step is within its reach."""
        if self.denoiser is None:
            return
        self.noisy_square = float(torch.stack(torch._foreach_norm(list(gradients.values()))).double().square().sum())
        step, like = len(self.ledger) - 1, next(iter(gradients.values()))
        blocks = itertools.count()

        def fresh(count: int) -> Tensor:
            drawn = torch.empty(count, device=like.device, dtype=like.dtype)
            self.noise.fill_(drawn, 1.0, lambda _: self._randomness.torch("denoising", step, like.device, next(blocks)))
            return drawn

        public = PublicNoise(self.noise_scales(), self.noise.std(), fresh)
        self.denoiser_state = self.denoiser.denoise(gradients, public, self.denoiser_state)

    def mechanism(self, multiplier: float) -> DpEvent:
        """What one `release` costs, were every record in the batch."""
        return self.noise.event(multiplier, self.clipping.magnitudes())

    def event(self, multiplier: float, sampling_rate: float) -> DpEvent:
        """What one `release` costs."""
        return Phase(1, sampling_rate, multiplier, self.mechanism).event()
