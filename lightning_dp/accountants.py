"""The mathematics of ε and δ: privacy loss distributions and Rényi divergences of composed private steps.

dp-accounting computes what one step leaks; this module composes steps, states both adjacencies, and keeps rounding
errors on the safe side. Nothing here knows about ledgers or training: see `lightning_dp.accounting`.

Noise other than Gaussian has Rényi divergences only, from the moments of its likelihood ratio
(`lightning_dp.moments`), at integer orders: every accountant states the bound that follows from them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta, compute_epsilon
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import logsumexp
from scipy.stats import norm

from lightning_dp.moments import log_sampled_moment
from lightning_dp.noise import ShiftedNoiseDpEvent

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")

#: Which data sets the guarantee tells apart: one record more or less, or one record exchanged for another.
Adjacency = Literal["add_or_remove", "replace_one"]
ADJACENCIES: tuple[Adjacency, ...] = ("add_or_remove", "replace_one")

#: Beyond this, ε is stated by Rényi differential privacy (an upper bound as well): the tight computation costs memory
#: in proportion to ε, and says no more about privacy.
_MEANINGLESS_EPSILON = 1000.0

#: Rényi orders that are enough to know the size of ε.
_FEW_ORDERS = (1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128, 256)

#: dp-accounting's default orders.
_ALL_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)

#: Orders for noise other than Gaussian, and those that are enough to know the size of ε.
_INTEGER_ORDERS = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 224, 256)
_FEW_INTEGER_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)

#: Cell of the grid of privacy losses, and of one that is good to half a per cent of ε, and far cheaper.
FINE, COARSE = 1e-4, 2e-3

#: The most cells for the losses of one step, a second's work, unless `FINE` asks for more; and the most altogether.
_ENOUGH_CELLS, _MOST_CELLS = 1e5, 4e5

#: Mass that may be cut off the tails of a composition; it is charged to δ.
_CUT = 1e-15


def check_delta(delta: float) -> None:
    """Raises ValueError unless 0 < δ < 1: Gaussian noise has no finite ε at δ = 0, and δ = 1 promises nothing."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1, got {delta}.")


def _check(accountant: str, adjacency: str) -> None:
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {ACCOUNTANTS}, got {accountant!r}.")
    if adjacency not in ADJACENCIES:
        raise ValueError(f"adjacency must be one of {ADJACENCIES}, got {adjacency!r}.")


def event_epsilon(
    event: DpEvent,
    delta: float,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
    resolution: float = FINE,
) -> float:
    """An upper bound on ε at this δ of any composition of Poisson-subsampled mechanisms, by either accountant.

    Once a part of it has noise that is not Gaussian, the bound is the Rényi accountant's, whichever is asked for.

    Formal guarantee (replace_one): with noise of standard deviation z and sampling rate q, exchanging one record of
    bounded contribution is dominated by the pair ``P = (1-q) N(0, z²) + q N(1, z²)`` and
    ``Q = (1-q) N(0, z²) + q N(-1, z²)``, which composes.
    Proof: given the other sampled records, the outputs are ``(1-q) N(0) + q N(u)`` and ``(1-q) N(0) + q N(v)`` with
    ‖u‖, ‖v‖ ≤ 1; a mixture over those records is no worse (hockey-stick divergences are jointly convex). A test of size
    p under N(0) accepts N(u) with at most, and N(v) with at least, the probability of the half-line of size p under
    N(1) and N(-1) (Neyman & Pearson), both at once, so for every α the divergence
    ``sup_A q N_u(A) - α q N_v(A) - (α-1)(1-q) N_0(A)`` is largest for u = 1, v = -1. Domination composes: Zhu, Dong &
    Wang 2022, theorem 10. The pair is tighter than the subsampled Gaussian of multiplier z/2, and equal to it at q = 1.

    Args:
        event: What was released.
        delta: Strictly between 0 and 1.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.
        resolution: Largest cell of the grid of privacy losses (``"pld"``). A coarser one is cheaper, and a bound too.
    """
    check_delta(delta)
    _check(accountant, adjacency)
    if _is_non_private(event):
        return math.inf
    parts = _parts(event)
    if not parts:
        return 0.0
    if accountant == "rdp" or not has_loss_distribution(event):
        return _rdp_epsilon(parts, delta, adjacency)
    rough = _rdp_epsilon(parts, delta, adjacency, few=True)
    if rough == 0:
        return 0.0
    if rough > _MEANINGLESS_EPSILON:
        return _rdp_epsilon(parts, delta, adjacency)
    composed = _composed(parts, adjacency, resolution, rough)
    found = composed.epsilon(delta)
    # Where rounding decides, Rényi differential privacy, which has no such floor, may be the lower of two bounds.
    return found if composed.infinity < 1e-3 * delta else min(found, _rdp_epsilon(parts, delta, adjacency))


def event_delta(
    event: DpEvent, epsilon: float, accountant: Accountant = "pld", adjacency: Adjacency = "add_or_remove"
) -> float:
    """An upper bound on δ at this ε, as `event_epsilon` is on ε at a given δ. 1.0 when a step had no noise.

    Raises:
        ValueError: ε is negative or not a number.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}.")
    _check(accountant, adjacency)
    parts = [] if _is_non_private(event) else _parts(event)
    if math.isinf(epsilon):
        return 0.0
    if not parts:
        return 1.0 if _is_non_private(event) else 0.0
    by_rdp = _rdp_delta(parts, epsilon, adjacency)
    if not has_loss_distribution(event):
        return by_rdp
    rough = max(_rdp_epsilon(parts, 1e-9, adjacency, few=True), min(epsilon, _MEANINGLESS_EPSILON))
    if accountant == "rdp" or rough > _MEANINGLESS_EPSILON:
        return by_rdp
    composed = _composed(parts, adjacency, FINE, rough)
    found = composed.delta(epsilon)
    return found if composed.infinity < 1e-3 * found else min(found, by_rdp)


def rough_epsilon(event: DpEvent, delta: float, adjacency: Adjacency = "add_or_remove") -> float:
    """An upper bound on ε in about a millisecond."""
    if _is_non_private(event):
        return math.inf
    parts = _parts(event)
    return _rdp_epsilon(parts, delta, adjacency, few=True) if parts else 0.0


# -- events ------------------------------------------------------------------------------------------------------------

#: A noise multiplier, or noise that is not Gaussian.
_Mechanism = float | ShiftedNoiseDpEvent

#: Sampling rate, mechanism, number of steps.
_Part = tuple[float, _Mechanism, int]


def _parts(event: DpEvent) -> list[_Part]:
    """The kinds of steps in an event.

    All Gaussian ones that are not subsampled are one: squared inverse multipliers add up (Dong, Roth & Su 2022).
    """
    counts: dict[tuple[float, _Mechanism], int] = {}
    precision = 0.0
    for rate, mechanism, count in _flat(event, 1):
        if rate == 1 and isinstance(mechanism, float):
            # 1/z² overflows for the tiniest z: nothing is hidden then, and the caller sees an infinite divergence.
            precision += count / mechanism / mechanism
        elif count:
            counts[rate, mechanism] = counts.get((rate, mechanism), 0) + count
    parts: list[_Part] = [(rate, mechanism, count) for (rate, mechanism), count in counts.items()]
    return [*parts, (1.0, precision**-0.5 if precision < math.inf else 1e-154, 1)] if precision else parts


def _flat(event: DpEvent, times: int) -> Iterator[_Part]:
    match event:
        case ComposedDpEvent():
            for part in event.events:
                yield from _flat(part, times)
        case SelfComposedDpEvent():
            yield from _flat(event.event, times * event.count)
        case GaussianDpEvent():
            yield 1.0, float(event.noise_multiplier), times
        case ShiftedNoiseDpEvent():
            yield 1.0, event, times
        case PoissonSampledDpEvent() if isinstance(event.event, GaussianDpEvent | ShiftedNoiseDpEvent):
            [(_, mechanism, _)] = _flat(event.event, 1)
            yield event.sampling_probability, mechanism, times
        case _:
            raise TypeError(f"No accountant for a {type(event).__name__}.")


def _is_non_private(event: DpEvent) -> bool:
    if isinstance(event, ComposedDpEvent):
        return any(_is_non_private(part) for part in event.events)
    if isinstance(event, SelfComposedDpEvent):
        return event.count > 0 and _is_non_private(event.event)
    if isinstance(event, PoissonSampledDpEvent):
        return _is_non_private(event.event)
    return isinstance(event, NonPrivateDpEvent)


def has_loss_distribution(event: DpEvent) -> bool:
    """Whether privacy loss distributions are known: of Gaussian noise they are, of other noise moments only."""
    if isinstance(event, ComposedDpEvent):
        return all(has_loss_distribution(part) for part in event.events)
    if isinstance(event, SelfComposedDpEvent | PoissonSampledDpEvent):
        return has_loss_distribution(event.event)
    return not isinstance(event, ShiftedNoiseDpEvent)


# -- Rényi differential privacy ----------------------------------------------------------------------------------------


def _rdp_epsilon(parts: Sequence[_Part], delta: float, adjacency: Adjacency, few: bool = False) -> float:
    usable, divergence = _rdp(parts, adjacency, few)
    return float(compute_epsilon(usable, divergence, delta)[0]) if usable else math.inf


def _rdp_delta(parts: Sequence[_Part], epsilon: float, adjacency: Adjacency) -> float:
    usable, divergence = _rdp(parts, adjacency)
    return min(1.0, float(compute_delta(usable, divergence, epsilon)[0])) if usable else 1.0


def _rdp(parts: Sequence[_Part], adjacency: Adjacency, few: bool = False) -> tuple[list[float], list[float]]:
    """The orders at which the divergence is a usable number, and the divergences."""
    gaussian = all(isinstance(mechanism, float) for _, mechanism, _ in parts)
    many_few = (_ALL_ORDERS, _FEW_ORDERS) if gaussian else (_INTEGER_ORDERS, _FEW_INTEGER_ORDERS)
    orders = many_few[few]
    with np.errstate(over="ignore", invalid="ignore"):
        total = sum(count * _step_rdp(rate, mechanism, adjacency, orders) for rate, mechanism, count in parts)
    # A divergence is never negative. dp-accounting takes one that rounding made so for ε = 0: such orders are left out.
    usable = [(order, value) for order, value in zip(orders, np.asarray(total), strict=True) if 0 <= value < math.inf]
    return [order for order, _ in usable], [float(value) for _, value in usable]


@lru_cache(maxsize=256)
def _step_rdp(rate: float, mechanism: _Mechanism, adjacency: Adjacency, orders: tuple[float, ...]) -> np.ndarray:
    """Rényi divergences of one step at all orders; infinity where they are not known."""
    if isinstance(mechanism, ShiftedNoiseDpEvent):
        return _shifted_divergences(rate, mechanism, adjacency, orders)
    multiplier = mechanism
    if adjacency == "replace_one":
        return np.array([_replacement_divergence(rate, multiplier, order) for order in orders])
    gaussian = np.array(orders) / 2 / multiplier / multiplier if multiplier > 1e-150 else np.full(len(orders), math.inf)
    if rate == 1:
        return gaussian
    if multiplier < 1e-3:  # beyond dp-accounting's arithmetic; sampling helps no divergence there
        return gaussian
    with _quiet(), np.errstate(all="ignore"):
        accountant = RdpAccountant(orders).compose(PoissonSampledDpEvent(rate, GaussianDpEvent(multiplier)))
    # There is no public way to the divergences. NaN is "not known", and fails the comparison with zero.
    return np.asarray(accountant._rdp, dtype=float)


def _shifted_divergences(
    rate: float, event: ShiftedNoiseDpEvent, adjacency: Adjacency, orders: tuple[float, ...]
) -> np.ndarray:
    """Rényi divergences of one step with noise that is not Gaussian, at integer orders; infinity at others.

    Formal guarantee: adding or removing one record changes the output by no more than this.
    Proof: given the other sampled records, the outputs are ``P = (1-q) F + q F_v`` and ``F``, a density and the same
    shifted by v, and ``E_F[(P/F)^α]`` is the binomial sum of `log_sampled_moment` with the moments of v, each at most
    those of the event (`ShiftedNoiseDpEvent.log_moments`); a mixture over the other records is no worse (joint
    convexity). The divergence of F from P is no larger than that of P from F: the reflection ``x → v - x`` exchanges F
    and F_v (Mironov, Talwar & Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", theorem 5).

    Replacing a record is removing one and adding another:
    ``D_α(P‖Q) ≤ (α-½)/(α-1) · D_2α(P‖F) + D_(2α-1)(F‖Q)`` (Mironov 2017, proposition 11).
    """
    exchange = adjacency == "replace_one"
    wanted = [int(order) for order in orders if order == int(order) and order >= 2]
    log_moments = event.log_moments(max(wanted))

    def divergence(order: int) -> float:
        if order >= len(log_moments):
            return math.inf
        return log_sampled_moment(rate, log_moments, order) / (order - 1)

    found = np.full(len(orders), math.inf)
    for i, order in enumerate(orders):
        if order not in wanted:
            continue
        if exchange:
            found[i] = (order - 0.5) / (order - 1) * divergence(int(2 * order)) + divergence(int(2 * order - 1))
        else:
            found[i] = divergence(int(order))
    return found


def _replacement_divergence(rate: float, multiplier: float, order: float) -> float:
    """Rényi divergence of the dominating pair of `event_epsilon` for replacing one record.

    Proof: domination for all hockey-stick divergences is domination for all f-divergences. The trapezoidal rule
    converges geometrically for an integrand that is analytic in a strip; this one is, to the zeros of the mixtures at
    distance πz² from the real line. Where the grid would be large, the bound without sampling, ``2α/z²``
    (quasi-convexity; the distance of the means is 2), is used.
    """
    unsampled = 2 * order / multiplier / multiplier if multiplier > 1e-150 else math.inf
    if rate == 1 or multiplier < 0.2:
        return unsampled
    step = min(0.125, 0.5 * multiplier)
    reach = (2 * order + 1) / multiplier + 14
    x = np.arange(-reach, reach + step, step)  # in units of the noise
    shift = 1 / multiplier
    stay, move = math.log1p(-rate), math.log(rate)
    log_p = np.logaddexp(stay, move + shift * x - shift**2 / 2)
    log_q = np.logaddexp(stay, move - shift * x - shift**2 / 2)
    log_integral = (
        logsumexp(order * log_p + (1 - order) * log_q - x**2 / 2) + math.log(step) - math.log(2 * math.pi) / 2
    )
    return min(max(0.0, float(log_integral)) / (order - 1), unsampled)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without dp-accounting's warnings about Rényi orders that it leaves out, which only makes ε larger."""
    logger = logging.getLogger("absl")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


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

    def composed(self, count: int, log_moments: np.ndarray) -> LossDistribution:
        """The loss of ``count`` steps.

        Formal guarantee: as dp-accounting's ``self_compose``, and ``infinity`` also covers the Fourier transform's
        rounding: see `_rounding`. The tails by Chernoff's bound.

        Args:
            count: At least 1.
            log_moments: `log_moments` of this distribution.
        """
        if count == 1:
            return self
        orders = _moment_orders(len(self.probabilities))
        bounds = (count * log_moments + math.log(2 / _CUT)) / orders
        finite = np.isfinite(bounds)
        first = max([0, *np.floor(bounds[finite & (orders < 0)]).astype(np.int64).tolist()])
        last = min([(len(self.probabilities) - 1) * count, *np.ceil(bounds[finite & (orders > 0)]).tolist()])
        size = int(last) - first + 1
        length = next_fast_len(max(size, len(self.probabilities)), real=True)
        transformed = rfft(self.probabilities, length) ** count
        rounding = _rounding(transformed, length, count)
        probabilities = np.roll(irfft(transformed, length), -(first % length))[:size]
        infinity = _CUT - math.expm1(count * math.log1p(-self.infinity)) + rounding
        return LossDistribution(self.interval, self.lower * count + first, probabilities, infinity)

    def joined(self, other: LossDistribution) -> LossDistribution:
        """The loss of both."""
        size = len(self.probabilities) + len(other.probabilities) - 1
        length = next_fast_len(size, real=True)
        transformed = rfft(self.probabilities, length) * rfft(other.probabilities, length)
        rounding = _rounding(transformed, length, 2)
        probabilities = irfft(transformed, length)[:size]
        first = int(np.argmax(np.cumsum(probabilities) > _CUT / 2))
        last = size - int(np.argmax(np.cumsum(probabilities[::-1]) > _CUT / 2))
        infinity = self.infinity + other.infinity + _CUT + rounding
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
    return float(factors * np.finfo(float).eps * (sizes[0] + 2 / length * (sizes[1:] @ weights)))


def _moment_orders(size: int) -> np.ndarray:
    return np.concatenate([np.arange(-20, 0), np.arange(1, 21)]) / size


def log_moments(distribution: LossDistribution) -> np.ndarray:
    """Logarithms of the moment generating function of the losses in cells, at dp-accounting's orders."""
    cells = np.arange(len(distribution.probabilities))
    orders = _moment_orders(len(cells))
    return np.array([logsumexp(cells * order, b=distribution.probabilities) for order in orders])


def _composed(parts: Sequence[_Part], adjacency: Adjacency, resolution: float, rough: float) -> _Worst:
    interval = _common_interval([(rate, multiplier) for rate, multiplier, _ in parts], resolution, rough)
    total: list[LossDistribution] = []
    for rate, multiplier, count in parts:
        step = _step(rate, multiplier, interval, adjacency)
        composed = [distribution.composed(count, moments) for distribution, moments in step]
        if not total:
            total = composed
        else:  # a symmetric mechanism stands for both directions
            directions = max(len(total), len(composed))
            total = [total[i % len(total)].joined(composed[i % len(composed)]) for i in range(directions)]
    return _Worst(tuple(total))


@dataclass(frozen=True)
class _Worst:
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
    """A cell that resolves the losses of all kinds of steps, and is wide enough for the whole range of losses.

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
    # A grid that reaches beyond a large ε is coarser, still pessimistic; by powers of two, so that steps are reused.
    return interval * 2.0 ** max(0, math.ceil(math.log2(rough * 1e-6 / interval))) if rough > 0 else interval


@lru_cache(maxsize=16)
def _step(
    rate: float, multiplier: float, interval: float, adjacency: Adjacency
) -> list[tuple[LossDistribution, np.ndarray]]:
    """The privacy losses of one step, pessimistic, with their moments: most of the cost of ε, the same every step."""
    relation = {
        "add_or_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace_one": NeighboringRelation.REPLACE_ONE,
    }[adjacency]
    loss: Any = from_gaussian_mechanism(
        multiplier, value_discretization_interval=interval, sampling_prob=rate, neighboring_relation=relation
    )
    # There is no public way to the probabilities.
    directions = [loss._pmf_remove] if loss._symmetric else [loss._pmf_remove, loss._pmf_add]
    steps = []
    for direction in directions:
        dense = direction.to_dense_pmf()
        distribution = LossDistribution(
            interval, int(dense._lower_loss), np.asarray(dense._probs, dtype=float), float(dense._infinity_mass)
        )
        steps.append((distribution, log_moments(distribution)))
    return steps
