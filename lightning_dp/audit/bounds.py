"""From what an attack found to a lower bound on ε."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Args:
        attack: Which one.
        lower_bound: ε is at least that, at `delta`, with probability `confidence`.
        claimed: What the ledger claims.
        delta, confidence: At which both are stated.
        trials: Canaries, or pairs of steps.
        details: What the bound was computed from.
    """

    attack: str
    lower_bound: float
    claimed: float
    delta: float
    confidence: float
    trials: int
    details: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the claim stands."""
        return self.lower_bound <= self.claimed

    def __str__(self) -> str:
        chance = f"THE CLAIM IS FALSE (a true one fails with probability {1 - self.confidence:.2g}: repeat the audit)"
        verdict = "the claim stands" if self.passed else chance
        return (
            f"{self.attack}: ε ≥ {self.lower_bound:.3f} with {100 * self.confidence:g} % confidence, claimed ε = "
            f"{self.claimed:.3f} (δ = {self.delta:g}): {verdict}"
        )


# -- bounds ------------------------------------------------------------------------------------------------------------


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest ε, up to 60, that so many correct guesses reject; 0.0 if they reject none.

    Every canary was included with probability 1/2, independently; ``guesses`` of them were guessed to be in or out.
    With ``p = e^ε/(1 + e^ε)``, ``B ~ Bin(guesses, p)``, ``β = P[B ≥ v]`` and ``α = max_i (P[B ≥ v - i] - β)/i``, what
    is (ε, δ)-private gives ``correct = v`` or more with probability at most ``β + 2 m δ α``.
    Source: Steinke et al. 2023, theorem 5.2.

    Args:
        canaries: m, how many were included with probability 1/2.
        guesses: How many were guessed; the others abstained. The number must not depend on which are in.
        correct: How many guesses were right.
        delta: δ of the claim.
        confidence: One minus the probability that the bound is above the truth.

    Raises:
        ValueError: Not ``0 ≤ correct ≤ guesses ≤ canaries``.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"There are {correct} correct of {guesses} guesses about {canaries} canaries.")

    def probability(epsilon: float) -> float:
        binomial = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
        at_least = binomial.sf(correct - 1)
        fewer = np.arange(1, correct + 1)
        slack = float(np.max((binomial.sf(correct - 1 - fewer) - at_least) / fewer, initial=0.0))
        return float(at_least + 2 * canaries * delta * slack)

    significance = 1 - confidence
    if probability(0.0) > significance:
        return 0.0
    if probability(_LARGEST_EPSILON) <= significance:
        return _LARGEST_EPSILON
    low, high = 0.0, _LARGEST_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) <= significance else (low, middle)
    return low


def error_rates(mistakes: int, trials: int, confidence: float) -> float:
    """Clopper and Pearson's upper bound on a probability, of which ``mistakes`` in ``trials`` were seen."""
    return 1.0 if mistakes >= trials else float(stats.beta.ppf(confidence, mistakes + 1, trials - mistakes))


def gaussian_bound(
    false_positives: int, false_negatives: int, trials: int, delta: float, confidence: float = 0.95
) -> float:
    """The ε at δ of the most private Gaussian mechanism that allows a test with so few errors.

    ``μ ≥ Φ⁻¹(1 - fpr) - Φ⁻¹(fnr)`` for every test between neighbours under μ-GDP, with Clopper and Pearson's bounds on
    both rates, each at half of the significance. It is a bound on ε if the mechanism is Gaussian.

    Args:
        false_positives, false_negatives: Errors of a test that was fixed before, each among ``trials``.
    """
    each = 1 - (1 - confidence) / 2
    fpr, fnr = (error_rates(errors, trials, each) for errors in (false_positives, false_negatives))
    separation = float(stats.norm.isf(fpr) - stats.norm.ppf(fnr))
    return 0.0 if not separation > 0 else gaussian_epsilon(separation, delta)


def gaussian_epsilon(separation: float, delta: float) -> float:
    """ε at δ of μ-GDP, ``δ(ε) = Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2)`` (Dong et al. 2022, corollary 1)."""

    def excess(epsilon: float) -> float:
        first, second = -epsilon / separation + separation / 2, -epsilon / separation - separation / 2
        return float(stats.norm.cdf(first) - math.exp(epsilon + stats.norm.logcdf(second))) - delta

    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, 1.0 + separation**2 + 10 * separation))


def rates_bound(
    false_positives: int, false_negatives: int, trials: int, delta: float, confidence: float = 0.95
) -> float:
    """``ε ≥ log((1 - δ - fnr) / fpr)``, for any mechanism (Kairouz et al. 2015), with the same bounds on the rates."""
    each = 1 - (1 - confidence) / 2
    fpr, fnr = (error_rates(errors, trials, each) for errors in (false_positives, false_negatives))
    found = [math.log((1 - delta - miss) / hit) for miss, hit in ((fnr, fpr), (fpr, fnr)) if 1 - delta - miss > hit]
    return max(found, default=0.0)


#: The largest lower bound on ε that is searched for.
_LARGEST_EPSILON = 60.0


# -- a whole training, in one run --------------------------------------------------------------------------------------


def guess(scores: np.ndarray, guesses: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions that are guessed to be in, and out: the highest and the lowest scores, half each."""
    order = np.argsort(scores)
    half = guesses // 2
    return order[len(order) - half :], order[:half]


def one_run_audit(
    attack: str, scores: np.ndarray, included: np.ndarray, claimed: float, delta: float, confidence: float, share: float
) -> Audit:
    """The audit of one training, from the scores of its canaries."""
    guesses = max(2, 2 * int(share * len(scores) / 2))
    high, low = guess(scores, guesses)
    correct = int(included[high].sum() + (~included[low]).sum())
    bound = one_run_bound(len(scores), guesses, correct, delta, confidence)
    details = {"guesses": float(guesses), "correct": float(correct)}
    return Audit(attack, bound, claimed, delta, confidence, len(scores), details)
