from __future__ import annotations

import math

import pytest
import torch
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent
from scipy import stats

from lightning_dp.noise import BLOCK, GaussianNoise
from lightning_dp.randomness import Randomness


def draw(noise: GaussianNoise, multiplier: float, sensitivity: float, size: int = 20_000) -> torch.Tensor:
    out = torch.empty(size)
    randomness = Randomness(seed=5)
    noise.fill_(out, multiplier * sensitivity, lambda block: randomness.torch("noise", 0, out.device, block))
    return out.double()


def is_gaussian_of_std(sample: torch.Tensor, std: float) -> bool:
    """Whether variance (χ² test) and shape (Kolmogorov-Smirnov) of a sample fit, at a significance of 1e-6 each."""
    n = len(sample)
    statistic = sample.pow(2).sum().item() / std**2
    variance_fits = 5e-7 < stats.chi2.cdf(statistic, n) < 1 - 5e-7
    return bool(variance_fits and stats.kstest(sample.numpy(), "norm", args=(0, std)).pvalue > 1e-6)


@pytest.mark.parametrize(("multiplier", "sensitivity"), [(1.0, 1.0), (0.5, 3.0), (4.0, 0.1)])
def test_std_is_multiplier_times_sensitivity_and_no_other(multiplier: float, sensitivity: float) -> None:
    sample = draw(GaussianNoise(), multiplier, sensitivity)
    std = multiplier * sensitivity
    assert is_gaussian_of_std(sample, std)
    assert not is_gaussian_of_std(sample * 2 / 3, std)
    assert not is_gaussian_of_std(sample * 3 / 2, std)


def test_coordinates_are_independent() -> None:
    sample = draw(GaussianNoise(), 1.0, 1.0)
    for lag in (1, 2, 10_000):
        correlation = (sample[lag:] * sample[:-lag]).mean().item()
        assert abs(correlation) < 5 / math.sqrt(len(sample) - lag)


def test_long_draws_repeat_nothing() -> None:
    """Blocks have generators of their own: none is a copy of another."""
    sample = draw(GaussianNoise(), 1.0, 1.0, 3 * BLOCK + 5)
    assert is_gaussian_of_std(sample, 1.0)
    for lag in (BLOCK, 2 * BLOCK):
        assert abs((sample[lag:] * sample[:-lag]).mean()) < 5 / math.sqrt(BLOCK)


def test_zero_multiplier_adds_nothing_and_is_not_private() -> None:
    assert (draw(GaussianNoise(), 0.0, 1.0) == 0).all()
    assert GaussianNoise().event(0.0) == NonPrivateDpEvent()
    assert GaussianNoise().event(1.5) == GaussianDpEvent(1.5)


@pytest.mark.parametrize("multiplier", [-1.0, float("inf"), float("nan")])
def test_impossible_multipliers_are_refused(multiplier: float) -> None:
    with pytest.raises(ValueError, match="non-negative and finite"):
        GaussianNoise(multiplier)
