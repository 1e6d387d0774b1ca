"""The private step: bound every example's contribution, add them up, add noise, charge the ledger, hand over.

Everything that is not yet private (per-example gradients, their sums) lives in objects of this module until the noise
is in. Nothing here knows about Lightning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from dp_accounting import DpEvent, NonPrivateDpEvent
from torch import Tensor, nn

from lightning_dp.accounting.events import Phase
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import PrivacyLimitReached
from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.engine import Engine, PerExampleEngine, SummingEngine
from lightning_dp.gradients.precision import full_precision, is_asynchronous
from lightning_dp.mechanism.clipping import Bounding, Clipping, State
from lightning_dp.mechanism.denoising import Denoiser, DenoiserState, PublicNoise
from lightning_dp.mechanism.noise import Noise, block_size
from lightning_dp.mechanism.randomness import NoiseGenerator, Randomness

#: The key of the clipping rule's own query among the sums; no parameter has an empty name.
_QUERY = ""


#: Coordinates of noise that are drawn and added at once on a CPU: they stay in its cache, and torch needs no threads.
_CHUNK = 2**15


#: Bytes of sums that are added up over the processes at once.
BUCKET = 2**25


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


@dataclass(frozen=True)
class Bucket:
    """Parameters whose sums lie in memory together: they get their noise, and are added up over processes, at once."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    #: The number of its first block of noise among those of all buckets.
    first_block: int


def make_buckets(parameters: Mapping[str, Tensor], size: int) -> list[Bucket]:
    """Every parameter once, the last first, as a backward pass reaches them; a bucket is full at ``size`` bytes."""
    buckets: list[Bucket] = []
    first_block = 0
    kinds = dict.fromkeys((_wide_dtype(p), p.device) for p in parameters.values())
    for dtype, device in kinds:
        names: list[str] = []
        members = [n for n, p in reversed(list(parameters.items())) if (_wide_dtype(p), p.device) == (dtype, device)]
        for name in members:
            names.append(name)
            sizes = tuple(parameters[n].numel() for n in names)
            if sum(sizes) * dtype.itemsize >= size or name == members[-1]:
                buckets.append(Bucket(tuple(names), sizes, dtype, device, first_block))
                first_block += -(-sum(sizes) // block_size(device))
                names = []
    return buckets


class PrivateStep:
    """Turns the gradients of a logical batch into one noisy gradient, and writes it into the ledger.

    A step is `begin`, then every micro-batch's backward pass within `backward`, then `release`.

    Formal guarantee: with multiplier z and sampling rate q, a step is the Poisson-subsampled mechanism of the noise (a
    Gaussian mechanism of noise multiplier z, unless the noise is another) with respect to adding or removing a record,
    and the ledger holds that event, and ``charge`` has returned, before any parameter's ``grad`` is set.
    Proof: `backward` adds to the sums one term per example, of joint norm at most the clipping rule's sensitivity S,
    and within its magnitudes, that depends on that example alone; the noise has scale z·S on every coordinate of every
    trainable parameter; the divisor q·N is public. The denoiser sees what has been released, and public numbers.
    With several processes, no process gets a total before the first one, which keeps the journal, has charged it: it
    charges before it adds its own part to the first total.
    Source: Abadi et al. 2016, Algorithm 1.

    Args:
        engine: Supplies the per-example gradients, or their bounded sum.
        clipping, noise: The mechanism; the rule is bound to the engine's module.
        ledger: Charged for every release.
        randomness: Where the noise comes from.
        add_up: Starts to add up a tensor over all processes, in place, and returns a function that waits for the total.
            ``None``: there is one process.
        charge: Makes the event of a step durable before anything of the step is used; the most steps, this one
            included, that are allowed is its second argument.
        denoiser: What is done to the noisy gradient.
        rank, world_size: Of the processes that add up. The noise is added once in all: its blocks are shared out among
            them, and drawn from the streams that a single process would draw them from. A bucket of sums travels as
            soon as it is complete; within the last backward pass where the engine or the rule can tell.
    """

    def __init__(
        self,
        engine: Engine,
        clipping: Bounding,
        noise: Noise,
        ledger: PrivacyLedger,
        randomness: Randomness,
        add_up: Callable[[Tensor], Callable[[], None]] | None = None,
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
        self._add_up = add_up
        self._charge = charge
        self._buckets = make_buckets(engine.parameters, BUCKET)
        self._bucket_of = {name: index for index, bucket in enumerate(self._buckets) for name in bucket.names}
        self._group_of = {name: index for index, group in enumerate(self.groups) for name in group}
        self._event: DpEvent = NonPrivateDpEvent()
        self._multiplier, self._divisor, self._scale = 0.0, 1.0, 1.0
        self._number = 0
        self._noise_scales: dict[str, float] = {}
        self._sensitivities: list[float] = []
        self._allowed: int | None = None
        self._forget()

    def _forget(self) -> None:
        """Nothing of a step is left."""
        self.norms, self.weights = [], []
        #: Sums over q·N by parameter, with this process's share of the noise, and those of whole buckets. Those of a
        #: `SummingEngine` are yet to be multiplied with a factor, and to get their noise.
        self._sums: dict[str, Tensor] = {}
        self._factor = 1.0
        self._flats: list[Tensor] = []
        #: Names of which the last backward pass has nothing more to say, how many others every bucket waits for, and
        #: how many buckets are on their way.
        self._complete: set[str] = set()
        self._incomplete = [len(bucket.names) for bucket in self._buckets]
        self._finished = 0
        self._waits: list[Callable[[], None]] = []
        self._is_last = self._is_charged = self._is_broken = False
        #: Of a micro-batch: what a separable rule waits for, by group; the groups that are bounded; norms and weights;
        #: who was left out.
        self._waiting: dict[int, dict[str, PerExampleGradient]] = {}
        self._bounded: set[int] = set()
        self._measured: tuple[Tensor, Tensor] | None = None
        self._bad: Tensor | None = None
        if isinstance(self.engine, SummingEngine):
            self.engine.reset()

    def begin(
        self,
        multiplier: float,
        sampling_rate: float,
        expected_batch_size: float,
        limit: Callable[[DpEvent], int] | None = None,
    ) -> None:
        """Starts a step, and forgets whatever an interrupted one left behind.

        The sums start out as noise (in a process of several, as its share of it), to which the bounded gradients are
        added; where the engine forms the sum (a `SummingEngine`), the noise is added to that, in place.

        Args:
            multiplier: Noise multiplier z.
            sampling_rate: q, with which the batch was drawn.
            expected_batch_size: q·N, the public divisor.
            limit: How many steps the ledger may hold if the next is this event.

        Raises:
            PrivacyLimitReached: The ledger is at its limit.
        """
        self._event = self.event(multiplier, sampling_rate)
        self._forget()
        self._number = len(self.ledger)
        if isinstance(self.engine, SummingEngine):
            self.engine.keep_norms = self.keep_norms
        self._multiplier, self._divisor = multiplier, expected_batch_size
        self._noise_scales = self.noise_scales()
        self._sensitivities = self.clipping.group_sensitivities(self.groups, self.clipping_state)
        self._allowed = None if limit is None else limit(self._event) - self._number
        if self._allowed is not None and self._allowed <= 0:
            raise PrivacyLimitReached(
                f"The privacy budget allows no step after the {self.ledger.steps} that were taken. Nothing was "
                "released."
            )

    @contextmanager
    def backward(self, scale: float = 1.0, last: bool = False) -> Iterator[None]:
        """Surrounds the backward pass of a micro-batch, and adds its bounded gradients to the sums.

        Args:
            scale: What the gradients must be multiplied with to be those of single examples' losses: the number of
                examples that a mean-reduced loss was divided by.
            last: Whether no other micro-batch follows: sums may then travel while the backward pass goes on.
        """
        self._scale, self._is_last = scale, last and self._add_up is not None
        self._bad, self._measured, self._bounded = None, None, set()
        if isinstance(self.engine, SummingEngine):
            self.engine.on_complete = self._take_sum if self._is_last else None
            with self.engine.backward(scale):
                yield
            self._note_bounds(self.engine, scale)
        elif isinstance(self.engine, PerExampleEngine):
            separable = isinstance(self.clipping, Clipping) and self.clipping.separable
            self.engine.on_complete = self._take_gradient if separable and self._is_last else None
            with self.engine.backward(scale):
                yield
            self._add_rest(self.engine)

    def _note_bounds(self, engine: SummingEngine, scale: float) -> None:
        """What is worth knowing of a micro-batch whose bounded sum the engine keeps."""
        self.nonfinite_examples += engine.nonfinite()
        if engine.norms is not None and engine.factors is not None:
            self.norms.append(engine.norms * scale)
            self.weights.append(engine.factors)

    def _take_gradient(self, name: str, gradient: PerExampleGradient) -> None:
        """Bounds a group within the backward pass, once all of its gradients are known."""
        group = self._group_of[name]
        waiting = self._waiting.setdefault(group, {})
        waiting[name] = gradient
        if len(waiting) == len(self.groups[group]):
            with self._whole(), full_precision(self._device()):
                self._add_group(self._waiting.pop(group), group)
                self._note_complete(self.groups[group])

    def _add_group(self, gradients: dict[str, PerExampleGradient], group: int) -> None:
        """Adds the clipped gradients of one group of a separable rule, without waiting for a device."""
        assert isinstance(self.clipping, Clipping)
        self._bound_once([group])
        norms = torch.stack([g.squared_norms() for g in gradients.values()]).sum(0).sqrt_() * self._scale
        bad = ~norms.isfinite()
        if is_asynchronous(bad) or bad.any():  # there, to leave out nobody is cheaper than to look
            self._bad = bad if self._bad is None else self._bad | bad
            gradients = {name: g.without(bad) for name, g in gradients.items()}
            norms = norms.masked_fill(bad, 0)
        weights = self.clipping.weights_of_group(norms, self._sensitivities[group])
        if self.keep_norms:
            self._keep(norms[:, None], weights[:, None], [group])
        self._add_weighted(gradients, weights)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What must happen altogether. It happens within a backward pass, where the user's code may ignore an error."""
        self._is_broken = True
        yield
        self._is_broken = False

    def _bound_once(self, groups: Sequence[int]) -> None:
        if not self._bounded.isdisjoint(groups):
            raise RuntimeError("A gradient came in two parts, each of which would be clipped by itself.")
        self._bounded.update(groups)

    def _keep(self, norms: Tensor, weights: Tensor, groups: Sequence[int]) -> None:
        """Takes note of norms and weights, one column per group."""
        if self._measured is None:
            shape = len(norms), len(self.groups)
            self._measured = norms.new_zeros(shape), weights.new_ones(shape)
        for kept, new in zip(self._measured, (norms, weights), strict=True):
            for index, column in zip(groups, new.unbind(1), strict=True):
                kept[:, index] = column

    def _add_weighted(self, gradients: dict[str, PerExampleGradient], weights: Tensor) -> None:
        sums, weights = self._totals(), weights * (self._scale / self._divisor)
        for name in list(gradients):
            gradients.pop(name).add_weighted_sum_(sums[name], weights)

    def _add_rest(self, engine: PerExampleEngine) -> None:
        """Bounds what the backward pass has left, and takes note of who was left out."""
        gradients = engine.gradients()
        for waiting in self._waiting.values():
            gradients |= waiting
        self._waiting = {}
        if gradients:
            with full_precision(self._device()):
                self._add_clipped(gradients, sorted({self._group_of[name] for name in gradients}))
        if self._bad is not None:
            self.nonfinite_examples += int(self._bad.sum())
        if self._measured is not None:
            norms, weights = self._measured
            self.norms.append(norms)
            self.weights.append(weights)

    def _add_clipped(self, gradients: dict[str, PerExampleGradient], groups: Sequence[int]) -> None:
        """Adds the clipped gradients of these groups."""
        assert isinstance(self.clipping, Clipping)
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
        weights = self.clipping.weights(norms, self.groups, self.clipping_state)
        if self.keep_norms:
            self._keep(norms[:, groups], weights[:, groups], groups)
        query = self.clipping.query(norms, self.clipping_state)
        if query is not None:
            query = query.masked_fill(bad.any(1), 0) if is_bad else query
            self._totals()[_QUERY] += query.sum() / self._divisor
        for index in groups:
            own = {name: gradients.pop(name) for name in self.groups[index] if name in gradients}
            self._add_weighted(own, weights[:, index])

    def _norms(self, gradients: dict[str, PerExampleGradient], groups: Sequence[int]) -> Tensor:
        """Norms ``(B, G)`` of every example's gradient with respect to these groups, and zeros for the others."""
        squares = {name: g.squared_norms() for name, g in gradients.items()}
        like = max(squares.values(), key=lambda square: square.dtype.itemsize)
        norms = like.new_zeros(len(like), len(self.groups))
        for index in groups:
            if own := [squares[name] for name in self.groups[index] if name in squares]:
                norms[:, index] = torch.stack(own).sum(0)
        return norms.sqrt_()

    def _totals(self) -> dict[str, Tensor]:
        """Noise plus the sums so far, over q·N: one tensor per trainable parameter, in float32 or wider.

        Of the noise, this process's share.
        """
        if self._sums:
            return self._sums
        parameters, scales = self.engine.parameters, self._noise_scales
        for bucket in self._buckets:
            flat = torch.empty(sum(bucket.sizes), device=bucket.device, dtype=bucket.dtype)
            generators = self._noise_generators(bucket)
            parts = dict(zip(bucket.names, flat.split(bucket.sizes), strict=True))
            if len({scales[name] for name in bucket.names}) == 1:
                self._fill_own_blocks_(flat, scales[bucket.names[0]], generators, bucket.first_block)
            else:
                self._fill_own_blocks_(flat, 1.0, generators, bucket.first_block)
                torch._foreach_mul_(list(parts.values()), [scales[name] for name in parts])
            self._flats.append(flat)
            self._sums |= {name: part.view_as(parameters[name]) for name, part in parts.items()}
        self._sums[_QUERY] = self._query_noise()
        return self._sums

    def _device(self) -> torch.device:
        return next(iter(self.engine.parameters.values())).device

    def _query_noise(self) -> Tensor:
        """This process's share of the noise on the rule's query, over q·N."""
        device = self._device()
        answer = torch.empty(1, device=device)
        std = self.clipping.query_std(self._multiplier, self._divisor) / self._divisor
        self._fill_own_blocks_(answer, std, lambda block: self._randomness.torch("query", self._number, device, block))
        return answer

    def _is_own(self, block: int) -> bool:
        """Whether this process draws the noise of a block of coordinates."""
        return block % self._world_size == self._rank

    def _fill_own_blocks_(
        self, out: Tensor, scale: float, generators: Callable[[int], NoiseGenerator], first: int = 0
    ) -> None:
        """Noise on this process's blocks of a flat tensor, and zeros on the others."""
        for number, block in enumerate(out.split(block_size(out.device)), first):
            if self._is_own(number):
                self.noise.fill_(block, scale, lambda _, number=number: generators(number))  # type: ignore[misc]
            else:
                block.zero_()

    def _take_sum(self, name: str, total: Tensor, factor: float) -> None:
        """Takes a parameter's bounded sum from the engine, within the last backward pass."""
        with self._whole():
            if name in self._complete:
                raise RuntimeError(
                    f"The sum of parameter '{name}' came in two parts: several backward passes reached its layer's "
                    "uses, where several processes need one. Add the losses up, and run one backward pass."
                )
            self._sums[name], self._factor = total, factor
            self._note_complete([name])

    def _note_complete(self, names: Iterable[str]) -> None:
        """Nothing more will come to these sums, if this is the last backward pass."""
        if self._is_last:
            for name in names:
                self._complete.add(name)
                self._incomplete[self._bucket_of[name]] -= 1
            self._finish_buckets()

    def _finish_buckets(self) -> None:
        """Sends off the buckets that are complete. All processes send them in the same order."""
        while self._finished < len(self._buckets) and not self._incomplete[self._finished]:
            index, bucket = self._finished, self._buckets[self._finished]
            if isinstance(self.engine, SummingEngine):
                flat = self._add_noise(bucket)
            else:
                self._totals()
                flat = self._flats[index]
            if self._add_up is not None and flat is not None:
                self._spend()
                self._waits.append(self._add_up(flat))
            self._finished += 1

    def _noisy_sums(self) -> dict[str, Tensor]:
        """The noisy sums of all processes over q·N, of whichever kind of engine."""
        if isinstance(self.engine, SummingEngine):
            sums, factor = self.engine.take()
            for name, total in sums.items():
                self._take_sum(name, total, factor)
        self._incomplete = [0] * len(self._buckets)
        self._finish_buckets()
        if self._add_up is not None and self.clipping_state:
            self._waits.append(self._add_up(self._sums[_QUERY]))
        for wait in self._waits:
            wait()
        return self._sums

    def _add_noise(self, bucket: Bucket) -> Tensor | None:
        """Adds noise to the sums of a bucket, in place, and divides them by q·N.

        Returns:
            The sums in one piece, where they have to be sent: nothing is copied otherwise.
        """
        flats = [self._sum_of(name, bucket.dtype) for name in bucket.names]
        whole = None
        if self._add_up is not None:
            whole = torch.cat(flats)
            flats = list(whole.split(bucket.sizes))
        scales = [self._noise_scales[name] for name in bucket.names]
        self._add_noise_(flats, scales, self._noise_generators(bucket), bucket.first_block)
        parameters = self.engine.parameters
        self._sums |= {name: f.view_as(parameters[name]) for name, f in zip(bucket.names, flats, strict=True)}
        return whole

    def _sum_of(self, name: str, dtype: torch.dtype) -> Tensor:
        total = self._sums.get(name)
        if total is None:  # no loss of this process depended on the parameter
            parameter = self.engine.parameters[name]
            return torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
        return total.contiguous().to(dtype).view(-1)

    def _add_noise_(
        self,
        sums: Sequence[Tensor],
        scales: Sequence[float],
        generators: Callable[[int], NoiseGenerator],
        first: int,
    ) -> None:
        """``factor · sum / q·N + scale · noise`` for flat tensors, in place, with little noise in memory at a time."""
        device, factor = sums[0].device, self._factor / self._divisor
        chunk = _CHUNK if device.type == "cpu" else block_size(device)
        noise = sums[0].new_empty(min(chunk, sum(map(len, sums))))
        for number, block in enumerate(_blocks(sums, block_size(device)), first):
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

    def _noise_generators(self, bucket: Bucket) -> Callable[[int], NoiseGenerator]:
        """The generators of all blocks, by their number among those of all buckets."""
        return lambda block: self._randomness.torch("noise", self._number, bucket.device, block)

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
            RuntimeError: One of ``others`` has a gradient, which did not come through here, or an error within a
                backward pass was ignored; no gradient was set.
        """
        if self._is_broken:
            self._forget()
            raise RuntimeError(
                "An error within the backward pass was ignored (by a LightningModule.backward that catches it, say), "
                "after which the sums may lack noise. No gradient was set. Let the error end the training."
            )
        parameters = self.engine.parameters
        bounded = {id(p) for p in parameters.values()}
        if any(p.grad is not None for p in others if id(p) not in bounded):
            self._forget()
            raise RuntimeError(
                "A parameter that private training does not bound has a gradient: layers were exchanged, unfrozen or "
                "added to the optimizer while a step was under way. Do that between steps (on_train_epoch_start)."
            )
        sums = self._noisy_sums()
        self._spend()
        self._denoise({name: sums[name] for name in parameters})
        if self.clipping_state:
            self.clipping_state = self.clipping.next_state(sums[_QUERY].item(), self.clipping_state)
        for name, parameter in parameters.items():
            # Whatever was there before did not come through here: it is replaced, not added to.
            parameter.grad = sums[name].to(parameter.dtype)
        self._sums, self._flats, self._waits = {}, [], []

    def _spend(self) -> None:
        """Charges the step, once, before anybody sees anything of it."""
        if not self._is_charged:
            self._charge(self._event, self._allowed)
            self.ledger.record(self._event)
            self._is_charged = True

    def _denoise(self, gradients: dict[str, Tensor]) -> None:
        """Lets the denoiser change the noisy gradients, in place. Nothing else of the step is within its reach."""
        if self.denoiser is None:
            return
        self.noisy_square = float(torch.stack(torch._foreach_norm(list(gradients.values()))).double().square().sum())
        step, like = self._number, next(iter(gradients.values()))
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
