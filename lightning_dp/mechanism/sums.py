"""Sums of bounded contributions, in buckets: adding noise to them, and adding them up over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.mechanism.noise import Noise, block_size
from lightning_dp.mechanism.randomness import NoiseGenerator, Randomness

#: The key of the clipping rule's own query among the sums; no parameter has an empty name.
QUERY = ""

#: Coordinates of noise that are drawn and added at once on a CPU: they stay in its cache, and torch needs no threads.
_CHUNK = 2**15

#: Bytes of sums that are added up over the processes at once.
BUCKET = 2**25


@dataclass(frozen=True)
class Wire:
    """The processes that add up their sums; by default there is one.

    Attributes:
        rank, world_size: Of this process, and how many there are. The noise is added once in all: its blocks are shared
            out among the processes, and drawn from the streams that a single process would draw them from.
        add_up: Starts to add up a tensor over all processes, in place, and returns a function that waits for the total.
            ``None``: there is one process.
    """

    rank: int = 0
    world_size: int = 1
    add_up: Callable[[Tensor], Callable[[], None]] | None = None


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
    """Parameters whose sums get their noise, and are added up over processes, at once."""

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


class NoisySums:
    """One sum per trainable parameter, and that of the clipping rule's query; `collect` gives them with noise.

    Formal guarantee: what `collect` returns, and what is sent to other processes in sum, has on every coordinate
    independent noise of the scale that `begin` was given, once in all. Proof: every bucket gets its noise in
    `_add_noise`, which nothing is sent or returned before; each block of coordinates is drawn by one process, from a
    stream that belongs to the step, the bucket and the block.

    Args:
        parameters: The trainable parameters, by name.
        noise: The distribution.
        randomness: Where it is drawn from.
        wire: The processes that add up.
    """

    def __init__(self, parameters: Mapping[str, Tensor], noise: Noise, randomness: Randomness, wire: Wire) -> None:
        self.parameters = parameters
        self._noise, self._randomness, self._wire = noise, randomness, wire
        self._buckets = make_buckets(parameters, BUCKET)
        self._bucket_of = {name: index for index, bucket in enumerate(self._buckets) for name in bucket.names}
        self._scales: dict[str, float] = {}
        self._number, self._divisor, self._first_block = 0, 1.0, 0
        self._query_std: float | None = None
        self._before_sending: Callable[[], None] = lambda: None
        self.forget()

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(iter(self.parameters.values())).device

    def forget(self) -> None:
        """Drops everything of the current step."""
        #: Sums by parameter, without noise until their bucket is finished; and the factor that sums without noise are
        #: still to be multiplied with.
        self._sums: dict[str, Tensor] = {}
        self._factor = 1.0
        self._query: Tensor | None = None
        #: Parameters whose sum is final.
        self._complete: set[str] = set()
        #: Parameters that bucket i still waits for.
        self._incomplete = [len(bucket.names) for bucket in self._buckets]
        #: Number of buckets that have their noise and were sent, in order.
        self._finished = 0
        self._waits: list[Callable[[], None]] = []
        self._is_broken = False

    def begin(
        self,
        number: int,
        scales: dict[str, float],
        divisor: float,
        query_std: float | None,
        before_sending: Callable[[], None],
        first_block: int = 0,
    ) -> None:
        """Starts a step.

        Args:
            number: Of the step: it decides the streams of the noise.
            scales: Of the noise on every parameter's sum over ``divisor``.
            divisor: q·N, which sums are divided by.
            query_std: Standard deviation of the noise on the clipping rule's query, a sum as well; ``None``: the rule
                has none.
            before_sending: Called before a sum leaves this process.
            first_block: The number of the first block of noise among those of the step's number.
        """
        self.forget()
        self._first_block = first_block
        self._number, self._scales, self._divisor = number, scales, divisor
        self._query_std, self._before_sending = query_std, before_sending

    # -- contributions come in -------------------------------------------------------------------------------------

    def totals(self) -> dict[str, Tensor]:
        """The sums so far, to be added to in place: one tensor per parameter, in float32 or wider, at first zero."""
        if not self._sums:
            for bucket in self._buckets:
                flat = torch.zeros(sum(bucket.sizes), device=bucket.device, dtype=bucket.dtype)
                parts = zip(bucket.names, flat.split(bucket.sizes), strict=True)
                self._sums |= {name: part.view_as(self.parameters[name]) for name, part in parts}
        return self._sums

    def add_to_query(self, answer: Tensor) -> None:
        """Adds a micro-batch's answer to the clipping rule's query."""
        self._query = answer if self._query is None else self._query + answer

    def take(self, name: str, total: Tensor, factor: float) -> None:
        """Takes the bounded sum of a parameter from an engine that forms it, and a factor to multiply it with.

        Raises:
            RuntimeError: The parameter's sum was marked as final before.
        """
        if name in self._complete:
            raise RuntimeError(
                f"The sum of parameter '{name}' came in two parts: several backward passes reached its layer's "
                "uses, where several processes need one. Add the losses up, and run one backward pass."
            )
        self._sums[name], self._factor = total, factor

    def complete(self, names: Iterable[str]) -> None:
        """Marks the sums of these parameters as final: buckets of final sums get their noise, and are sent."""
        for name in names:
            self._complete.add(name)
            self._incomplete[self._bucket_of[name]] -= 1
        self._finish_buckets()

    @contextmanager
    def must_complete(self) -> Iterator[None]:
        """Marks the sums as broken if the body raises, also when the user's code swallows the exception."""
        self._is_broken = True
        yield
        self._is_broken = False

    @property
    def is_broken(self) -> bool:
        """Whether a body of `must_complete` was left by an exception."""
        return self._is_broken

    # -- noisy sums go out -----------------------------------------------------------------------------------------

    def collect(self) -> dict[str, Tensor]:
        """The noisy sums of all processes over q·N, and the noisy answer to the query (`QUERY`), where there is one."""
        self._incomplete = [0] * len(self._buckets)
        self._finish_buckets()
        if self._query_std is not None:
            answer = self._noisy_query(self._query_std / self._divisor)
            if self._wire.add_up is not None:
                self._before_sending()
                self._waits.append(self._wire.add_up(answer))
            self._sums[QUERY] = answer
        for wait in self._waits:
            wait()
        return self._sums

    def _finish_buckets(self) -> None:
        """Adds noise to buckets whose sums are all final, and sends them; in all processes in the same order."""
        while self._finished < len(self._buckets) and not self._incomplete[self._finished]:
            flat = self._add_noise(self._buckets[self._finished])
            if self._wire.add_up is not None and flat is not None:
                self._before_sending()
                self._waits.append(self._wire.add_up(flat))
            self._finished += 1

    def _add_noise(self, bucket: Bucket) -> Tensor | None:
        """Adds noise to the sums of a bucket, in place, and divides them by q·N.

        Returns:
            The sums in one piece, where they have to be sent: nothing is copied otherwise.
        """
        flats = [self._sum_of(name, bucket.dtype) for name in bucket.names]
        whole = None
        if self._wire.add_up is not None:
            whole = torch.cat(flats)
            flats = list(whole.split(bucket.sizes))
        scales = [self._scales[name] for name in bucket.names]
        self._add_noise_(flats, scales, self._generators(bucket), bucket.first_block)
        self._sums |= {name: f.view_as(self.parameters[name]) for name, f in zip(bucket.names, flats, strict=True)}
        return whole

    def _sum_of(self, name: str, dtype: torch.dtype) -> Tensor:
        total = self._sums.get(name)
        if total is None:  # no loss of this process depended on the parameter
            parameter = self.parameters[name]
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
                    self._noise.fill_(drawn, scales[index], lambda _, own=own: own)  # type: ignore[misc]
                    torch.add(drawn, piece, alpha=factor, out=piece)

    def _noisy_query(self, std: float) -> Tensor:
        """This process's share of the answer to the rule's query, with its share of the noise, over q·N."""
        device, number, first = self.device, self._number, self._first_block
        answer = torch.zeros(1, device=device)
        if self._is_own(0):
            self._noise.fill_(answer, std, lambda block: self._randomness.torch("query", number, device, first + block))
        return answer if self._query is None else answer + self._query / self._divisor

    def _is_own(self, block: int) -> bool:
        """Whether this process draws the noise of a block of coordinates."""
        return block % self._wire.world_size == self._wire.rank

    def _generators(self, bucket: Bucket) -> Callable[[int], NoiseGenerator]:
        """The generators of all blocks, by their number among those of all buckets."""
        first = self._first_block
        return lambda block: self._randomness.torch("noise", self._number, bucket.device, first + block)
