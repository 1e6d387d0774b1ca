from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent
from scipy import stats

from lightning_dp.accounting.events import Magnitudes, ShiftedNoiseDpEvent
from lightning_dp.mechanism.noise import (
    BLOCK,
    NOISES,
    CoordinatewiseNoise,
    GaussianNoise,
    LaplaceNoise,
    Noise,
    StudentTNoise,
)
from lightning_dp.mechanism.randomness import Randomness

pytestmark = pytest.mark.on_device


def draw(noise: Noise, multiplier: float, sensitivity: float, size: int = 20_000) -> torch.Tensor:
    out = torch.empty(size)
    randomness = Randomness(seed=5)
    noise.fill_(out, multiplier * sensitivity, lambda block: randomness.torch("noise", 0, out.device, block))
    return out.double()


def is_gaussian_of_std(sample: torch.Tensor, std: float) -> bool:
    """Whether variance (χ² test) and shape (Kolmogorov-Smirnov) of a sample fit, at a significance of 1e-6 each."""
    n = len(sample)
    statistic = sample.pow(2).sum().item() / std**2
    variance_fits = 5e-7 < stats.chi2.cdf(statistic, n) < 1 - 5e-7
    return bool(variance_fits and stats.kstest(sample.cpu().numpy(), stats.norm(0, std).cdf).pvalue > 1e-6)


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


# -- Laplace and Student's t -------------------------------------------------------------------------------------------

DISTRIBUTIONS = {
    LaplaceNoise(): stats.laplace(),
    StudentTNoise(9): stats.t(9),
    StudentTNoise(2.5): stats.t(2.5),
    StudentTNoise(1): stats.t(1),
    StudentTNoise(100): stats.t(100),
}


def follows(sample: torch.Tensor, distribution: Any, scale: float) -> bool:
    """Kolmogorov-Smirnov for the body, and the numbers of draws beyond quantiles of 1e-3 and 1e-4 for the tails."""
    values = sample.cpu().numpy() / scale
    if stats.kstest(values, distribution.cdf).pvalue < 1e-6:
        return False
    for tail in (1e-3, 1e-4):
        beyond = int((abs(values) > distribution.isf(tail / 2)).sum())
        if stats.binomtest(beyond, len(values), tail).pvalue < 1e-6:
            return False
    return True


@pytest.mark.parametrize("noise", DISTRIBUTIONS, ids=repr)
@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_samplers_follow_scipys_distribution_of_that_scale_and_no_other(noise: Noise, scale: float) -> None:
    sample = draw(noise, scale, 1.0, 200_000)
    assert follows(sample, DISTRIBUTIONS[noise], scale)
    assert not follows(sample, DISTRIBUTIONS[noise], scale * 2 / 3)
    assert not follows(sample, DISTRIBUTIONS[noise], scale * 3 / 2)
    for other, distribution in DISTRIBUTIONS.items():
        if other != noise and not (isinstance(other, StudentTNoise) and other.df == 100 == getattr(noise, "df", 0)):
            assert not follows(sample, distribution, scale), other
    for lag in (1, 100_000):
        signs = sample[lag:].sign() * sample[:-lag].sign()
        assert abs(signs.mean()) < 5 / math.sqrt(len(signs))
        large = (sample.abs() > sample.abs().median()).double() - 0.5
        assert abs((large[lag:] * large[:-lag]).mean()) < 5 / 4 / math.sqrt(len(signs))


@pytest.mark.parametrize("noise", [StudentTNoise(1), LaplaceNoise()], ids=repr)
def test_samples_are_finite_and_blocks_are_independent(noise: Noise) -> None:
    sample = draw(noise, 1.0, 1.0, BLOCK + 5000)
    assert sample.isfinite().all()
    assert not torch.equal(sample[:5000], sample[BLOCK:])


@pytest.mark.parametrize("noise", [LaplaceNoise(), StudentTNoise(9), StudentTNoise(4), GaussianNoise()], ids=repr)
def test_std_is_that_of_the_samples(noise: Noise) -> None:
    assert draw(noise, 1.0, 1.0, 400_000).std().item() == pytest.approx(noise.std(), rel=0.05)


def test_exponential_draws_use_the_whole_generator() -> None:
    """Rather than a small seed of their own per call, as some builds of torch did before 2.7."""
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    whole = torch.empty(1000, device="cpu").exponential_(generator=one)
    parts = [torch.empty(500, device="cpu").exponential_(generator=other) for _ in range(2)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("noise", [LaplaceNoise(), StudentTNoise(9), GaussianNoise()], ids=repr)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_scale_makes_the_noise_vanish(noise: Noise, scale: float) -> None:
    sample = draw(noise, scale, 1.0, 1000)
    assert (sample != 0).all() and sample.isfinite().all()
    assert torch.allclose(sample / scale, draw(noise, 1.0, 1.0, 1000), rtol=1e-4)


def test_students_t_of_few_degrees_has_no_std() -> None:
    assert math.isinf(StudentTNoise(2).std())


@pytest.mark.parametrize("noise", [LaplaceNoise(), StudentTNoise(9)], ids=repr)
def test_noise_on_coordinates_is_charged_with_what_it_hides(noise: CoordinatewiseNoise) -> None:
    magnitudes = Magnitudes((2, 1), ((0.6, 0.5),))
    assert noise.event(1.5, magnitudes) == ShiftedNoiseDpEvent(noise.density(), 1.5, magnitudes)
    assert type(noise)(scale=3.0).event(1.5, magnitudes).noise == noise.density()
    assert noise.event(0.0, magnitudes) == NonPrivateDpEvent()
    with pytest.raises(ValueError, match="Use clipping=GradientEncoding"):
        noise.event(1.5)
    assert (draw(noise, 0.0, 1.0) == 0).all()


def test_magnitudes_are_plain_numbers() -> None:
    found = Magnitudes(np.array([2, 1]), [np.array([0.5, 0.1])])  # type: ignore[arg-type]
    assert found == Magnitudes((2, 1), ((0.5, 0.1),)) and hash(found)
    assert type(found.counts[0]) is int and type(found.values[0][0]) is float
    with pytest.raises(ValueError, match=r"2 counts, and vectors of \[1\] levels"):
        Magnitudes((2, 1), ((0.5,),))


def test_every_noise_has_a_name_in_ledgers() -> None:
    assert set(NOISES.values()) == {GaussianNoise, LaplaceNoise, StudentTNoise}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StudentTNoise(0.5), "df must lie between 1"),
        (lambda: StudentTNoise(math.nan), "df must lie between 1"),
        (lambda: StudentTNoise(9, -1.0), "StudentTNoise: scale must be non-negative"),
        (lambda: LaplaceNoise(math.inf), "LaplaceNoise: scale must be non-negative"),
    ],
)
def test_impossible_scales_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
