"""What the accounting of Stevens et al.'s corrected code amounts to: by derivation, and by an audit.

    python benchmarks/withdrawn_claims.py [--trials 200000]

The setting is that of their MNIST experiment: 4 layers, batches of 256 of 60 000, 5 epochs, δ = 1e-5. Their code counts
layers times steps as that many subsampled mechanisms, each with its own sample, and uses the central limit theorem for
Gaussian differential privacy. But the layers of a step share one sample, and are one mechanism of multiplier σ / √4.

The audit trains nothing: it draws what such a training releases of a record that reaches the bound of every layer in
every step, and of nobody else (the sum over the layers, in the direction of that record; all else is independent
noise), once with and once without that record. The best test there is, the likelihood ratio, then tells the two apart.
Its threshold is chosen on one half of the trials, and the lower bound on ε is computed on the other half, from
Clopper-Pearson intervals at 95 % confidence jointly.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from scipy import optimize, stats

from lightning_dp import epsilon

LAYERS, BATCH_SIZE, RECORDS, EPOCHS, DELTA = 4, 256, 60_000, 5, 1e-5
RATE = BATCH_SIZE / RECORDS
STEPS = RECORDS // BATCH_SIZE * EPOCHS
CONFIDENCE = 0.95


def noise_for(claim: float) -> float:
    """The noise multiplier σ per layer with which that accounting claims this ε: ``μ = q √(L·T·(e^(1/σ²) - 1))`` (Bu et
    al. 2020, "Deep Learning with Gaussian Differential Privacy", section 3) for the μ of (ε, δ)."""

    def delta(mu: float) -> float:
        return float(stats.norm.cdf(mu / 2 - claim / mu) - math.exp(claim) * stats.norm.cdf(-mu / 2 - claim / mu))

    mu = optimize.brentq(lambda mu: delta(mu) - DELTA, 1e-3, 20)
    return math.log1p((mu / RATE) ** 2 / (LAYERS * STEPS)) ** -0.5


def log_likelihood_ratios(sigma: float, trials: int, member: bool, rng: np.random.Generator) -> np.ndarray:
    """One number per trial: how much more likely its releases are with the record than without."""
    total = np.zeros(trials)
    shift, std = float(LAYERS), sigma * math.sqrt(LAYERS)  # of the sum over the layers, in units of a layer's bound
    for _ in range(STEPS):
        released = std * rng.standard_normal(trials)
        if member:
            released += shift * (rng.random(trials) < RATE)
        total += np.logaddexp(math.log1p(-RATE), math.log(RATE) + (released * shift - shift**2 / 2) / std**2)
    return total


def audited(sigma: float, trials: int, rng: np.random.Generator) -> float:
    """A lower bound on ε at δ, at 95 % confidence."""
    ins, outs = (log_likelihood_ratios(sigma, trials, member, rng).reshape(2, -1) for member in (True, False))
    half = trials // 2

    def bound(in_scores: np.ndarray, out_scores: np.ndarray, threshold: float) -> float:
        alpha = (1 - CONFIDENCE) / 2  # two intervals
        hits, misses = int((in_scores >= threshold).sum()), int((out_scores >= threshold).sum())
        hit_rate = stats.beta.ppf(alpha, hits, half - hits + 1) if hits else 0.0
        false_rate = stats.beta.ppf(1 - alpha, misses + 1, half - misses) if misses < half else 1.0
        return max(0.0, math.log((hit_rate - DELTA) / false_rate)) if hit_rate > DELTA else 0.0

    candidates = np.quantile(np.concatenate([ins[0], outs[0]]), np.linspace(0.5, 1, 2001)[:-1])
    threshold = max(candidates, key=lambda t: bound(ins[0], outs[0], float(t)))
    return bound(ins[1], outs[1], float(threshold))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200_000, help="per world; more of them see larger ε")
    parser.add_argument("--claims", type=float, nargs="+", default=[0.1, 0.2, 1.0, 3.0])
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| claimed ε | σ per layer | ε, one mechanism a step (PLD) | (RDP) | audit: ε is at least |")
    print("|---|---|---|---|---|")
    for claim in arguments.claims:
        sigma = noise_for(claim)
        joint = {"sampling_rate": RATE, "noise_multiplier": sigma / math.sqrt(LAYERS), "steps": STEPS, "delta": DELTA}
        by_pld, by_rdp = (epsilon(**joint, accountant=accountant) for accountant in ("pld", "rdp"))  # type: ignore[arg-type]
        found = audited(sigma, arguments.trials, rng)
        print(f"| {claim:g} | {sigma:.3f} | {by_pld:.2f} | {by_rdp:.2f} | {found:.2f} |", flush=True)


if __name__ == "__main__":
    main()
