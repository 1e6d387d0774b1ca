"""Rényi differential privacy of composed private steps, with both adjacencies.

Noise other than Gaussian has Rényi divergences only, from the moments of its likelihood ratio
(`lightning_dp.accounting.moments`), at integer orders: every accountant states the bound that follows from them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta, compute_epsilon
from scipy.special import logsumexp

from lightning_dp.accounting.events import Adjacency, Mechanism, Part, ShiftedNoiseDpEvent
from lightning_dp.accounting.moments import log_sampled_moment

#: Rényi orders that are enough to know the size of ε; of a large ε, which is best at orders below 2 (they take long).
_SMALL_ORDERS = (1.25, 1.5)
_FEW_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128, 256)


#: dp-accounting's default orders.
_ALL_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)


#: Orders for noise other than Gaussian, and those that are enough to know the size of ε.
_INTEGER_ORDERS = (*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 224, 256)


_FEW_INTEGER_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)


# -- Rényi differential privacy ----------------------------------------------------------------------------------------


def rdp_epsilon(parts: Sequence[Part], delta: float, adjacency: Adjacency, few: bool = False) -> float:
    """An upper bound on ε at this δ; ``few`` orders give its size at once."""
    if not few:
        return _epsilon(*_rdp(parts, adjacency), delta)[0]
    found, order = _epsilon(*_rdp(parts, adjacency, _FEW_ORDERS, _FEW_INTEGER_ORDERS), delta)
    if order > 2 or not _all_gaussian(parts):
        return found
    return min(found, _epsilon(*_rdp(parts, adjacency, _SMALL_ORDERS), delta)[0])


def _epsilon(orders: list[float], divergences: list[float], delta: float) -> tuple[float, float]:
    """The least bound on ε, and the order that gives it."""
    if not orders:
        return math.inf, 0.0
    epsilon, order = compute_epsilon(orders, divergences, delta)
    return float(epsilon), float(order)


def rdp_delta(parts: Sequence[Part], epsilon: float, adjacency: Adjacency) -> float:
    """An upper bound on δ at this ε."""
    usable, divergence = _rdp(parts, adjacency)
    return min(1.0, float(compute_delta(usable, divergence, epsilon)[0])) if usable else 1.0


def _all_gaussian(parts: Sequence[Part]) -> bool:
    return all(isinstance(mechanism, float) for _, mechanism, _ in parts)


def _rdp(
    parts: Sequence[Part],
    adjacency: Adjacency,
    of_gaussian: tuple[float, ...] = _ALL_ORDERS,
    of_others: tuple[float, ...] = _INTEGER_ORDERS,
) -> tuple[list[float], list[float]]:
    """The orders at which the divergence is a usable number, and the divergences."""
    orders = of_gaussian if _all_gaussian(parts) else of_others
    with np.errstate(over="ignore", invalid="ignore"):
        total = sum(count * _step_rdp(rate, mechanism, adjacency, orders) for rate, mechanism, count in parts)
    # A divergence is never negative. dp-accounting takes one that rounding made so for ε = 0: such orders are left out.
    usable = [(order, value) for order, value in zip(orders, np.asarray(total), strict=True) if 0 <= value < math.inf]
    return [order for order, _ in usable], [float(value) for _, value in usable]


@lru_cache(maxsize=256)
def _step_rdp(rate: float, mechanism: Mechanism, adjacency: Adjacency, orders: tuple[float, ...]) -> np.ndarray:
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
