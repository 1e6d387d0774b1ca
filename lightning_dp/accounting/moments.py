"""Moments of the likelihood ratio of noise that is shifted: what non-Gaussian noise costs.

Notation: f is the density of the noise on one coordinate, in units of its scale, symmetric and falling away from 0;
``M_k(v) = E_{x~f}[(f(x - v) / f(x))^k]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import gammaln, logsumexp

#: Relative accuracy of ``log M_k``.
ACCURACY = 1e-10


#: Nodes of the first and of the last attempt at an integral.
_FEWEST, _MOST = 256, 2**14


#: Below this exponent, ``M_k - 1`` is summed, so that it keeps its digits when it is small; above, logarithms are.
_SMALL = 30.0


#: ``log_ratio(x, v)``: ``log f(x - v) - log f(x)`` for nodes ``(N,)``.
LogRatio = Callable[[np.ndarray, float], np.ndarray]


def quadrature(
    log_density: Callable[[np.ndarray], np.ndarray], log_ratio: LogRatio, reach: float, shift: float, highest: int
) -> np.ndarray:
    """``log M_k(shift)`` for k = 0 … ``highest``, ``(highest + 1,)``, to a relative accuracy of `ACCURACY`.

    ``M_k - 1 = ∫ f · (r^k - 1 - k(r - 1))`` with the ratio ``r``, because ``∫ f·(r - 1) = 0``: every term is
    non-negative (Bernoulli), so that nothing cancels. The line is mapped by ``x = v/2 + sinh(t)``, after which the
    trapezoidal rule converges geometrically; nodes are doubled until two results agree (Trefethen & Weideman 2014).

    Args:
        log_density: ``log f``.
        log_ratio: ``log f(x - v) - log f(x)``, without cancellation.
        reach: Beyond it, in ``t``, the integrands vanish.
        shift: v, in units of the scale.
        highest: The largest order k.

    Returns:
        Infinity at orders where the moment was found infinite, or not to converge: no statement is made there.
    """
    if shift == 0:
        return np.zeros(highest + 1)
    orders = np.arange(2, highest + 1)[:, None]
    before, count = np.full(highest - 1, np.nan), _FEWEST
    while count <= _MOST:
        t, step = np.linspace(-reach, reach, count + 1, retstep=True)
        x = shift / 2 + np.sinh(t)
        log_weights = log_density(x) + np.log(np.cosh(t)) + math.log(step)
        ratio = log_ratio(x, shift)
        now = _log_moments(orders, ratio, log_weights)
        with np.errstate(invalid="ignore"):
            agree = np.abs(now - before) <= ACCURACY * np.abs(now)
        if agree.all():
            break
        before, count = now, 2 * count
    found = np.where(agree, now, np.inf)
    return np.concatenate([[0.0, 0.0], found])


def _log_moments(orders: np.ndarray, ratio: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    found = np.empty(len(orders))
    small = (orders[:, 0] * np.abs(ratio).max()) < _SMALL
    if small.any():
        k, single = orders[small], np.expm1(ratio)
        excess = np.expm1(k * ratio) - k * single
        # Its Taylor series to fifth order, where the difference would cancel.
        tiny = np.abs(k * ratio) < 1e-3
        series = (k * k - k) * ratio**2 / 2 + (k**3 - k) * ratio**3 / 6 + (k**4 - k) * ratio**4 / 24
        excess = np.where(tiny, series + (k**5 - k) * ratio**5 / 120, excess)
        found[small] = np.log1p(excess @ np.exp(log_weights))
    if not small.all():
        found[~small] = logsumexp(orders[~small] * ratio + log_weights, axis=1)
    return found


def student_t(df: float, shift: float, highest: int) -> np.ndarray:
    """``log M_k(shift)`` for Student's t with ``df`` degrees of freedom: see `quadrature`.

    Its likelihood ratios are bounded, so that every moment is finite.
    """
    constant = gammaln((df + 1) / 2) - gammaln(df / 2) - math.log(df * math.pi) / 2

    def log_density(x: np.ndarray) -> np.ndarray:
        return np.asarray(constant - (df + 1) / 2 * np.log1p(x * x / df))

    def log_ratio(x: np.ndarray, v: float) -> np.ndarray:
        return np.asarray(-(df + 1) / 2 * np.log1p(v * (v - 2 * x) / (df + x * x)))

    # f falls like x^-(df+1) and the rest of the integrand like x^-2; what lies beyond the reach is below rounding.
    reach = 40 / (df + 2) + math.log(2 * max(shift, math.sqrt(df), 1.0)) + 1
    return quadrature(log_density, log_ratio, reach, shift, highest)


def gaussian(shift: float, highest: int) -> np.ndarray:
    """``log M_k(shift) = k(k - 1) shift² / 2`` for the standard normal distribution."""
    k = np.arange(highest + 1)
    return k * (k - 1) * shift**2 / 2


def laplace(shift: float, highest: int) -> np.ndarray:
    """``log M_k(shift)`` for the Laplace distribution of scale 1: Mironov 2017, proposition 6.

    ``M_k = (k e^{(k-1)v} + (k-1) e^{-kv}) / (2k - 1)``; where it is near 1, ``M_k - 1`` from differences of ``exp - 1``
    that keep their digits.
    """
    k = np.arange(highest + 1, dtype=float)
    k[:2] = 2.0  # orders 0 and 1 are set below
    up, down = (k - 1) * shift, k * shift
    with np.errstate(over="ignore"):
        excess = (k * (np.expm1(up) - up) + (k - 1) * (np.expm1(-down) + down)) / (2 * k - 1)
    large = np.logaddexp(np.log(k) + up, np.log(k - 1) - down) - np.log(2 * k - 1)
    found = np.where(up < _SMALL, np.log1p(excess), large)
    found[:2] = 0.0
    return found[: highest + 1]


class Density(Protocol):
    """The distribution of the noise on one coordinate, at scale 1: symmetric, and falling away from 0."""

    def log_moments(self, shift: float, highest: int) -> np.ndarray:
        """``log E_{x~f}[(f(x - shift)/f(x))^k]`` for k = 0 … ``highest``; infinity where not finite."""


@dataclass(frozen=True)
class GaussianDensity:
    """``N(0, 1)``."""

    def log_moments(self, shift: float, highest: int) -> np.ndarray:
        return gaussian(shift, highest)


@dataclass(frozen=True)
class LaplaceDensity:
    """``f(x) ∝ exp(-|x|)``."""

    def log_moments(self, shift: float, highest: int) -> np.ndarray:
        return laplace(shift, highest)


@dataclass(frozen=True)
class StudentTDensity:
    """Student's t with ``df`` degrees of freedom."""

    df: float

    def log_moments(self, shift: float, highest: int) -> np.ndarray:
        return student_t(self.df, shift, highest)


#: By the names under which a ledger stores them.
DENSITIES: dict[str, type[Density]] = {
    "gaussian": GaussianDensity,
    "laplace": LaplaceDensity,
    "student_t": StudentTDensity,
}


def log_sampled_moment(rate: float, log_moments: np.ndarray, order: int) -> float:
    """``log Σ_k C(α, k) (1 - q)^(α-k) q^k M_k`` for integer α = ``order`` ≥ 2.

    ``Σ_k C(α, k) (1 - q)^(α-k) q^k = 1``, so that only what exceeds 1 is summed, and keeps its digits for tiny q.
    """
    k = np.arange(2, order + 1)
    excess = log_moments[2 : order + 1]
    if rate == 1:
        return float(excess[-1])
    with np.errstate(divide="ignore"):
        log_excess = np.where(excess < 1, np.log(np.expm1(np.minimum(excess, 1))), excess + np.log1p(-np.exp(-excess)))
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = log_binomial + (order - k) * math.log1p(-rate) + k * math.log(rate) + log_excess
    return float(np.logaddexp(0.0, logsumexp(terms)))
