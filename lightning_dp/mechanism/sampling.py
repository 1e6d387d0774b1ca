"""Poisson sampling: every record joins every batch independently, with the same probability or its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom
from torch.utils.data import Sampler

from lightning_dp.mechanism.randomness import Randomness


def draw_poisson_sample(num_records: int, sampling_rate: float, generator: np.random.Generator) -> np.ndarray:
    """Indices of one Poisson sample, in no particular order.

    Formal guarantee: every record is included independently with probability ``sampling_rate``.
    Proof: the size of such a sample is binomial, and given its size it is a uniform subset.
    Cost: O(size) time and memory, whatever ``num_records``.
    """
    size = int(generator.binomial(num_records, sampling_rate))
    return generator.choice(num_records, size=size, replace=False, shuffle=False)


def inclusion_probabilities(weights: np.ndarray, expected_size: float) -> np.ndarray:
    """Probabilities in proportion to weights, none above 1, that add up to the expected size of a sample: ``(N,)``.

    Args:
        weights: ``(N,)``, finite and not negative, in any unit.
        expected_size: What they add up to, at most the number of positive weights; more is cut to that.

    Raises:
        ValueError: A weight is negative or not finite, or all are 0.

    Example::

        >>> inclusion_probabilities(np.array([1.0, 1.0, 2.0, 12.0]), 2.0)
        array([0.25, 0.25, 0.5 , 1.  ])
    """
    weights = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError("The weights of records must be finite and not negative, and some of them positive.")
    weights = weights / weights.max()
    certain = np.zeros(len(weights), dtype=bool)
    while True:  # each round makes more of them certain, or ends
        rest = weights[~certain].sum()
        left = expected_size - certain.sum()
        scale = left / rest if rest > 0 else 0.0
        more = ~certain & (weights * scale >= 1)
        if not more.any():
            return np.where(certain, 1.0, np.minimum(weights * scale, 1.0))
        certain |= more


def size_bound(num_records: int, sampling_rate: float, tail: float = 1e-24) -> int:
    """The least size that a Poisson sample exceeds with probability at most ``tail``: a public number.

    It holds for records with probabilities of their own whose mean is q as well: above its mean, their number exceeds a
    size no more often than a binomial of the same mean (Hoeffding 1956, theorem 5).

    Args:
        num_records: N.
        sampling_rate: q.
        tail: The probability.

    Example::

        >>> size_bound(1000, 1.0), size_bound(60_000, 256 / 60_000)
        (1000, 435)
    """
    size = binom(num_records, sampling_rate)
    low, high = int(num_records * sampling_rate), num_records
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size.sf(middle) <= tail else (middle + 1, high)
    return low


@dataclass(frozen=True)
class Draw:
    """One rank's share of one Poisson sample.

    Attributes:
        records: The records of this rank's share.
        total: The size of the whole sample, over all ranks.
    """

    records: list[int]
    total: int

    @property
    def size(self) -> int:
        """The size of this rank's share."""
        return len(self.records)

    def parts(self, most: int | None, num_shards: int) -> list[slice]:
        """This rank's share in parts; of every rank the same number, so that some may be empty.

        Args:
            most: The most records of a part; ``None``: any number.
            num_shards: Number of ranks.
        """
        largest = -(-self.total // num_shards)
        count = -(-largest // (most or largest)) if largest else 0
        return [slice(self.size * part // count, self.size * (part + 1) // count) for part in range(count)]


class PoissonBatchSampler(Sampler[list[int]]):
    """Yields Poisson samples; of every one, each of ``num_shards`` ranks takes its own share.

    Formal guarantee: where every record has a probability of its own, a step costs no more than with that of the
    largest. Proof: a record that joins with probability ``q' ≤ q`` is one that joins with q and is then dropped with
    probability ``1 − q'/q``, independently of all else. So what it adds to the output is a mixture, of weights q'/q and
    ``1 − q'/q``, of what it adds with q and of nothing; hockey-stick divergences are jointly convex, and nothing moves
    nothing. The probabilities are public, as N is: another data set has the same ones.

    Args:
        num_records: N, the number of records of the data set.
        sampling_rate: q, the probability with which each record joins each batch, or the largest of theirs.
        randomness: The secret source; all ranks of a group must share it.
        first_step: Called when an epoch starts, returns the number of the private step that the first batch is for.
        shard, num_shards: This rank takes every ``num_shards``-th index of the sample, from ``shard`` on.
        steps: Samples per epoch, a public number. ``None``: ``⌈1/q⌉``.
        copies: How often each index is repeated, one after another: the data set augments a record anew every time.
        keeps: ``(N,)``: the probability with which each record that was drawn is kept; record i joins each batch with
            probability ``q · keeps[i]``, independently. ``None``: all are kept.
        filled_to: The size of every batch, where it is to be public: samples are filled up by indices that are drawn
            already (or 0), and larger ones are cut. ``None``: batches are as large as their samples.
        at_once: Asked when an epoch starts: the most records that are yielded at once; a sample of more comes in parts
            (`Draw.parts`, without those that are empty). ``None``: samples are yielded whole.

    Raises:
        ValueError: The sampling rate is not in (0, 1].
    """

    def __init__(
        self,
        num_records: int,
        sampling_rate: float,
        randomness: Randomness,
        first_step: Callable[[], int],
        shard: int = 0,
        num_shards: int = 1,
        copies: int = 1,
        steps: int | None = None,
        filled_to: int | None = None,
        keeps: np.ndarray | None = None,
        at_once: Callable[[], int | None] = lambda: None,
    ) -> None:
        if not 0 < sampling_rate <= 1:
            raise ValueError(f"sampling_rate must lie in (0, 1], got {sampling_rate}.")
        self.num_records = num_records
        self.sampling_rate = sampling_rate
        self.shard, self.num_shards, self.copies, self.filled_to = shard, num_shards, copies, filled_to
        self.keeps = keeps
        # 1/q is b/N in floating point: without the tolerance, N = 49 b would have 50 batches.
        self._steps = math.ceil(1 / sampling_rate - 1e-6) if steps is None else steps
        #: The draws that no batch was taken for yet, in order.
        self.draws: deque[Draw] = deque()
        self._randomness = randomness
        self._first_step, self._at_once = first_step, at_once
        #: What ``at_once`` said when the current epoch started.
        self.most: int | None = None

    @property
    def expected_size(self) -> float:
        """The expected number of records of a sample: a public number."""
        return self.sampling_rate * (self.num_records if self.keeps is None else float(self.keeps.sum()))

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        draws = self.draws = deque()
        first = self._first_step()
        most = self.most = self._at_once()
        for step in range(first, first + len(self)):
            generator = self._randomness.numpy("sampling", step)
            sample = draw_poisson_sample(self.num_records, self.sampling_rate, generator)
            if self.keeps is not None:
                sample = sample[generator.random(len(sample)) < self.keeps[sample]]
            share = sample[self.shard :: self.num_shards].tolist()[: self.filled_to]
            draw = Draw(share, len(sample))
            draws.append(draw)
            if most is not None:
                for part in self.yielded(draw, most):
                    yield [index for index in share[part] for _ in range(self.copies)]
                continue
            if self.filled_to is not None:
                fill = share or [0]
                share = share + [fill[i % len(fill)] for i in range(self.filled_to - len(share))]
            yield share if self.copies == 1 else [index for index in share for _ in range(self.copies)]

    def yielded(self, draw: Draw, most: int) -> list[slice]:
        """The parts that a draw is yielded in: those that are not empty, or an empty one."""
        return [part for part in draw.parts(most, self.num_shards) if part.start < part.stop] or [slice(0, 0)]
