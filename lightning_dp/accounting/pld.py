"""Privacy loss distributions of composed private steps: tight bounds, with rounding errors on the safe side.

The only module that reads private attributes of dp-accounting's distributions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import _create_pld_pmf_from_monotone_privacy_loss
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy.fft import irfft, next_fast_len, rfft
from scipy.stats import norm

from lightning_dp.accounting.events import Adjacency, Part

#: Width of a cell of the grid of privacy losses; and of a far cheaper grid, whose ε is within half a per cent.
FINE, COARSE = 1e-4, 2e-3


#: Cells of one step's losses: the most that cells smaller than the resolution may give, and the most in any case.
_ENOUGH_CELLS, _MOST_CELLS = 1e5, 4e5


#: The arithmetic of a composition: twice as fast, or with four more digits, for a δ that rounding would be felt in.
#: (The second is the first where the machine has no wider floats.)
FAST, EXACT = np.float64, np.longdouble


#: Mass that may be cut off the tails of a composition; it is charged to δ.
_CUT = {FAST: 1e-15, EXACT: 1e-19}


# -- privacy loss distributions ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LossDistribution:
    """A distribution that dominates the privacy loss, on a grid.

    Args:
        interval: Width of a cell.
        lower: The first loss, in cells.
        probabilities: Of the losses ``lower·interval, (lower+1)·interval, …``.
        infinity: Mass of infinite loss, with all that was cut off and a bound on the rounding error of the rest.
    """

    interval: float
    lower: int
    probabilities: np.ndarray
    infinity: float

    def composed(self, count: int, log_moments: np.ndarray, floats: type[np.floating] = FAST) -> LossDistribution:
        """The loss of ``count`` steps.

        Formal guarantee: as dp-accounting's ``self_compose``, and ``infinity`` also covers the Fourier transform's
        rounding: see `_rounding`. The tails by Chernoff's bound.

        Args:
            count: At least 1.
            log_moments: `log_moments` of this distribution.
            floats: `FAST` or `EXACT`.
        """
        if count == 1:
            return self
        orders = _moment_orders(len(self.probabilities))
        bounds = (count * log_moments + math.log(2 / _CUT[floats])) / orders
        finite = np.isfinite(bounds)
        first = max([0, *np.floor(bounds[finite & (orders < 0)]).astype(np.int64).tolist()])
        last = min([(len(self.probabilities) - 1) * count, *np.ceil(bounds[finite & (orders > 0)]).tolist()])
        size = int(last) - first + 1
        length = next_fast_len(max(size, len(self.probabilities)), real=True)
        transformed = rfft(self.probabilities.astype(floats), length) ** count
        rounding = _rounding(transformed, length, count)
        probabilities = np.roll(irfft(transformed, length), -(first % length))[:size].astype(FAST)
        infinity = _CUT[floats] - math.expm1(count * math.log1p(-self.infinity)) + rounding
        return LossDistribution(self.interval, self.lower * count + first, probabilities, infinity)

    def joined(self, other: LossDistribution, floats: type[np.floating] = FAST) -> LossDistribution:
        """The loss of both, computed in these floats."""
        size = len(self.probabilities) + len(other.probabilities) - 1
        length = next_fast_len(size, real=True)
        ours, theirs = self.probabilities.astype(floats), other.probabilities.astype(floats)
        transformed = rfft(ours, length) * rfft(theirs, length)
        rounding = _rounding(transformed, length, 2)
        probabilities = irfft(transformed, length)[:size].astype(FAST)
        first = int(np.argmax(np.cumsum(probabilities) > _CUT[floats] / 2))
        last = size - int(np.argmax(np.cumsum(probabilities[::-1]) > _CUT[floats] / 2))
        infinity = self.infinity + other.infinity + _CUT[floats] + rounding
        return LossDistribution(self.interval, self.lower + other.lower + first, probabilities[first:last], infinity)

    def delta(self, epsilon: float) -> float:
        """``E[(1 - exp(ε - loss))⁺]``, at most 1."""
        losses = (self.lower + np.arange(len(self.probabilities))) * self.interval
        above = losses > epsilon
        finite = float(self.probabilities[above] @ -np.expm1(epsilon - losses[above]))
        return min(1.0, max(finite, 0.0) + self.infinity)

    def epsilon(self, delta: float) -> float:
        """The smallest ε ≥ 0 with ``delta(ε) ≤ delta``; infinity when there is none."""
        room = delta - self.infinity
        if room <= 0:
            return math.inf
        start = max(0, 1 - self.lower)  # losses up to 0 never count
        mass = np.cumsum(self.probabilities[start:][::-1])[::-1]  # of this loss and all above
        if not len(mass) or mass[0] <= 0:
            return 0.0
        highest = (self.lower + start + int(np.count_nonzero(mass > room))) * self.interval  # above it less than room
        skip = max(0, math.floor((highest - 600) / self.interval) - self.lower - start)  # within the range of exp
        mass = mass[skip:]
        first = self.lower + start + skip
        losses = (first + np.arange(len(mass))) * self.interval
        scaled = self.probabilities[start + skip :] * np.exp(np.maximum(highest - losses, -700.0))
        scaled = np.cumsum(scaled[::-1])[::-1]
        # δ just below the k-th loss is mass - exp(ε)·scaled, with ε between the (k-1)-th and the k-th.
        at_loss = mass - scaled * np.exp(losses - highest)  # the k-th term vanishes at the k-th loss
        enough = at_loss <= room
        k = int(np.argmax(enough)) if enough.any() else len(mass) - 1
        if scaled[k] <= 0 or mass[k] <= room:
            return max(0.0, float(losses[k]) - self.interval) if k else 0.0
        return max(0.0, highest + math.log((mass[k] - room) / scaled[k]))


def _rounding(product: np.ndarray, length: int, factors: int) -> float:
    """How much δ can be off because a product of Fourier coefficients was rounded.

    Proof: with relative errors u, a product F of n coefficients is off by n·u·|F|. δ weighs the masses with numbers in
    [0, 1] that rise and then drop to 0, whose k-th coefficient is at most ``1/sin(πk/length)`` (their total variation,
    2, over ``|1 - exp(2πik/length)|``); sum over all k (Parseval).
    """
    sizes = np.abs(product)
    weights = 1 / np.sin(np.pi / length * np.arange(1, len(sizes)))
    return float(factors * np.finfo(sizes.dtype).eps * (sizes[0] + 2 / length * (sizes[1:] @ weights)))


def _moment_orders(size: int) -> np.ndarray:
    return np.concatenate([np.arange(-20, 0), np.arange(1, 21)]) / size


def log_moments(distribution: LossDistribution) -> np.ndarray:
    """Logarithms of the moment generating function of the losses in cells, at dp-accounting's orders."""
    cells = np.arange(len(distribution.probabilities))
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(distribution.probabilities, 0.0))
    moments = []
    for order in _moment_orders(len(cells)):
        terms = cells * order
        terms += logs
        largest = terms.max()
        terms -= largest
        moments.append(largest + math.log(np.exp(terms, out=terms).sum()) if math.isfinite(largest) else largest)
    return np.array(moments)


def composed_losses(
    parts: Sequence[Part], adjacency: Adjacency, resolution: float, rough: float, floats: type[np.floating] = FAST
) -> WorstDirection:
    """The losses of all steps together, in both directions, computed in these floats."""
    interval = _common_interval([(rate, multiplier) for rate, multiplier, _ in parts], resolution, rough)
    total: list[LossDistribution] = []
    for rate, multiplier, count in parts:
        step = _step(rate, multiplier, interval, adjacency)
        composed = [distribution.composed(count, moments, floats) for distribution, moments in step]
        if not total:
            total = composed
        else:  # a symmetric mechanism stands for both directions
            directions = max(len(total), len(composed))
            total = [total[i % len(total)].joined(composed[i % len(composed)], floats) for i in range(directions)]
    return WorstDirection(tuple(total))


@dataclass(frozen=True)
class WorstDirection:
    """The worse of the directions: a record more, a record less."""

    directions: tuple[LossDistribution, ...]

    @property
    def infinity(self) -> float:
        return max(direction.infinity for direction in self.directions)

    def epsilon(self, delta: float) -> float:
        return max(direction.epsilon(delta) for direction in self.directions)

    def delta(self, epsilon: float) -> float:
        return max(direction.delta(epsilon) for direction in self.directions)


def _common_interval(kinds: Sequence[tuple[float, float]], resolution: float, rough: float) -> float:
    """Width of a cell that resolves the losses of all kinds of steps, and needs at most `_MOST_CELLS` for their range.

    Rounding up the losses of a step to a cell wider than they are would multiply over many steps. The size of these
    losses is the total variation distance ``q (2Φ(1/2z) - 1)``; their range is that of the log-likelihood ratio over
    eleven standard deviations.
    """
    needed, span = resolution, 0.0
    for rate, multiplier in kinds:
        distance = rate * (2 * norm.cdf(0.5 / multiplier) - 1)
        needed = min(needed, distance / 4 * (2.0 if resolution > FINE else 1.0))
        if rate < 1:
            span = max(span, float(np.logaddexp(0, math.log(rate) + 11 / multiplier + 0.5 / multiplier**2)))
        else:
            span = max(span, 11 / multiplier + 0.5 / multiplier**2)
    interval = max(min(resolution, max(needed, span / _ENOUGH_CELLS)), span / _MOST_CELLS)
    # Doubled until ε, which is at most ``rough``, has at most 10⁶ cells; powers of two let `_step`'s cache be used.
    return interval * 2.0 ** max(0, math.ceil(math.log2(rough * 1e-6 / interval))) if rough > 0 else interval


class GaussianLosses(GaussianPrivacyLoss):
    """dp-accounting's privacy loss of the subsampled Gaussian mechanism, with δ of many ε at once: there, each ε is a
    call of its own, which is nearly all of the time that ε takes."""

    def get_delta_for_epsilon(self, epsilon: Any) -> Any:
        """δ of each ε; as dp-accounting's method of this name, for arrays."""
        if not isinstance(epsilon, np.ndarray):
            return super().get_delta_for_epsilon(epsilon)
        rate, deltas, inside = self.sampling_prob, np.zeros(epsilon.shape), np.ones(epsilon.shape, dtype=bool)
        if rate < 1 and self.adjacency_type == AdjacencyType.ADD:
            inside = epsilon < -math.log1p(-rate)
        elif rate < 1 and self.adjacency_type == AdjacencyType.REMOVE:
            inside = epsilon > math.log1p(-rate)
            deltas[~inside] = -np.expm1(epsilon[~inside])
        cutoffs = self._cutoffs(epsilon[inside])
        lower = epsilon[inside] + self.mu_lower_log_cdf(cutoffs)
        deltas[inside] = self.mu_upper_cdf(cutoffs) - np.exp(lower)
        return np.clip(deltas, 0, 1)

    def _cutoffs(self, losses: np.ndarray) -> np.ndarray:
        """Where the mechanism's loss has these values: dp-accounting's ``inverse_privacy_loss``."""
        rate, sensitivity, variance = self.sampling_prob, self.sensitivity, self._standard_deviation**2
        if self.adjacency_type == AdjacencyType.REPLACE:
            if rate == 1:
                return np.asarray(-losses * variance / sensitivity / 2)
            size = np.abs(losses) / 2
            with np.errstate(divide="ignore"):
                log_sinh = size + np.log(-np.expm1(-2 * size)) - math.log(2)
            log_alpha = 0.5 * sensitivity**2 / variance + math.log1p(-rate) - math.log(rate)
            asinh = -np.sign(losses) * _asinh_of_exp(log_sinh + log_alpha)
            return np.asarray(variance / sensitivity * (asinh - losses / 2))
        sign = 1.0 if self.adjacency_type == AdjacencyType.REMOVE else -1.0
        unsampled = losses if rate == 1 else sign * _log_unsampled(sign * losses, rate)
        return np.asarray(-sign * sensitivity / 2 - unsampled * variance / sensitivity)


def _log_unsampled(losses: np.ndarray, rate: float) -> np.ndarray:
    """``log(1 + (exp(loss) - 1) / q)``; minus infinity at ``log(1 - q)``, the least loss there is."""
    small = np.minimum(losses, 30.0)
    least = math.log1p(-rate)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log1p(np.expm1(small) / rate)
        ratio = np.where(np.isclose(losses, least, rtol=1e-9, atol=0.0) | np.isnan(ratio), -np.inf, ratio)
    large = losses - math.log(rate) + np.log1p(-(1 - rate) * np.exp(-np.maximum(losses, 30.0)))
    return np.where(losses > 30, large, ratio)


def _asinh_of_exp(logs: np.ndarray) -> np.ndarray:
    """``arcsinh(exp(t))`` without overflow."""
    positive = np.maximum(logs, 0.0)
    return np.where(
        logs > 0, positive + np.log1p(np.sqrt(1 + np.exp(-2 * positive))), np.arcsinh(np.exp(np.minimum(logs, 0.0)))
    )


@lru_cache(maxsize=16)
def _step(
    rate: float, multiplier: float, interval: float, adjacency: Adjacency
) -> list[tuple[LossDistribution, np.ndarray]]:
    """The privacy losses of one step, pessimistic, with their moments: most of the cost of ε, the same every step."""
    directions = [AdjacencyType.REMOVE, AdjacencyType.ADD] if rate < 1 else [AdjacencyType.REMOVE]
    if adjacency == "replace_one":
        directions = [AdjacencyType.REPLACE]
    steps = []
    for direction in directions:
        loss = GaussianLosses(multiplier, sampling_prob=rate, adjacency_type=direction)
        # There is no public way from a loss to the probabilities.
        dense: Any = _create_pld_pmf_from_monotone_privacy_loss(
            loss, value_discretization_interval=interval, use_connect_dots=True
        ).to_dense_pmf()
        distribution = LossDistribution(
            interval, int(dense._lower_loss), np.asarray(dense._probs, dtype=float), float(dense._infinity_mass)
        )
        steps.append((distribution, log_moments(distribution)))
    return steps
