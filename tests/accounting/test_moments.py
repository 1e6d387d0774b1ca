from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

from lightning_dp.accounting import moments
from lightning_dp.accounting.cost import event_delta, event_epsilon
from lightning_dp.accounting.events import Magnitudes, ShiftedNoiseDpEvent
from lightning_dp.accounting.rdp import _step_rdp
from lightning_dp.mechanism.encoding.codebooks import FlatCodebook, PowerLawCodebook, RandomCodebook
from lightning_dp.mechanism.noise import CoordinatewiseNoise, GaussianNoise, LaplaceNoise, Noise, StudentTNoise

SHIFTS = [1e-6, 1e-3, 0.05, 0.7, 3.0]


def log_density(noise: Noise) -> Callable[[mpmath.mpf], mpmath.mpf]:
    if isinstance(noise, StudentTNoise):
        df = mpmath.mpf(noise.df)
        constant = mpmath.loggamma((df + 1) / 2) - mpmath.loggamma(df / 2) - mpmath.log(df * mpmath.pi) / 2
        return lambda x: constant - (df + 1) / 2 * mpmath.log1p(x * x / df)
    if isinstance(noise, LaplaceNoise):
        return lambda x: -abs(x) - mpmath.log(2)
    return lambda x: -x * x / 2 - mpmath.log(2 * mpmath.pi) / 2


@pytest.mark.parametrize(
    "noise",
    [StudentTNoise(9), *(pytest.param(StudentTNoise(df), marks=pytest.mark.slow) for df in (1, 2.5)), LaplaceNoise()],
    ids=repr,
)
@pytest.mark.parametrize("shift", SHIFTS)
def test_moments_equal_an_integral_in_many_digits(noise: Noise, shift: float) -> None:
    f, found = log_density(noise), noise.density().log_moments(shift, 64)
    with mpmath.workdps(40):
        v = mpmath.mpf(shift)
        for k in (2, 3, 16, 64):
            points = [-mpmath.inf, -30, -3, 0, v, v + 3, v + 30, mpmath.inf]
            integral = mpmath.quad(lambda x, k=k: mpmath.exp(f(x) + k * (f(x - v) - f(x))), points, maxdegree=9)
            assert found[k] == pytest.approx(float(mpmath.log(integral)), rel=1e-8)


@pytest.mark.parametrize("shift", [1e-4, 0.01, 0.5, 2.0])
def test_quadrature_of_a_gaussian_equals_its_closed_form(shift: float) -> None:
    found = moments.quadrature(
        lambda x: -x * x / 2 - math.log(2 * math.pi) / 2,
        lambda x, v: v * x - v * v / 2,
        math.asinh(40 + 256 * shift),
        shift,
        256,
    )
    np.testing.assert_allclose(found, moments.gaussian(shift, 256), rtol=1e-10)


@pytest.mark.parametrize("noise", [StudentTNoise(9), StudentTNoise(1.5), LaplaceNoise(), GaussianNoise()], ids=repr)
def test_moments_grow_with_the_shift_and_start_at_one(noise: Noise) -> None:
    table = np.stack([noise.density().log_moments(shift, 256) for shift in [0.0, *SHIFTS, 10.0]])
    assert (table[0] == 0).all() and (table[:, :2] == 0).all()
    assert (np.diff(table, axis=0)[:, 2:] > 0).all()


def test_an_integral_that_does_not_converge_makes_no_statement() -> None:
    """A density with tails so thin that the second moment of its ratio is infinite (its support ends)."""

    def cut_off(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < 1, math.log(0.5), -np.inf)

    with np.errstate(invalid="ignore"):
        found = moments.quadrature(cut_off, lambda x, v: cut_off(x - v) - cut_off(x), 3.0, 0.5, 8)
    assert (found[2:] == np.inf).all()
    assert np.isinf(moments.student_t(9, 1e6, 8)[2:]).any()


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.9, 1.0])
def test_sampled_moments_equal_the_sum_in_many_digits(rate: float) -> None:
    log_moments = moments.student_t(9, 0.3, 32)
    with mpmath.workdps(60):
        q = mpmath.mpf(rate)
        for order in (2, 5, 32):
            terms = [
                mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp(mpmath.mpf(log_moments[k]))
                for k in range(order + 1)
            ]
            expected = float(mpmath.log(sum(terms)))
            assert moments.log_sampled_moment(rate, log_moments, order) == pytest.approx(expected, rel=1e-9)


def divergence(event: ShiftedNoiseDpEvent, rate: float, order: int) -> float:
    return moments.log_sampled_moment(rate, event.log_moments(order), order) / (order - 1)


@pytest.mark.parametrize("codebook", [FlatCodebook(), PowerLawCodebook(), RandomCodebook(4)], ids=repr)
@pytest.mark.parametrize(("z", "rate"), [(0.6, 0.004), (1.0, 0.02), (4.0, 0.5), (1.0, 1.0)])
def test_gaussian_noise_on_an_encoding_costs_what_a_gaussian_mechanism_costs(
    codebook: FlatCodebook, z: float, rate: float
) -> None:
    """Coordinate by coordinate, over 100 000 of them, and by the norm alone: dp-accounting's own."""
    event = ShiftedNoiseDpEvent(GaussianNoise().density(), z, codebook.entries(100_000))
    orders = [2, 3, 8, 32, 64]
    expected = RdpAccountant(orders).compose(PoissonSampledDpEvent(rate, GaussianDpEvent(z)))._rdp
    found = [divergence(event, rate, order) for order in orders]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_worst_entry_counts() -> None:
    flat, spike = (0.1,) * 100, (1.0,) + (0.0,) * 99
    for noise in (StudentTNoise(9), LaplaceNoise()):
        costs = [
            ShiftedNoiseDpEvent(noise.density(), 1.0, Magnitudes((1,) * 100, entries)).log_moments(8)
            for entries in ((flat,), (spike,), (flat, spike))
        ]
        np.testing.assert_allclose(costs[2], np.maximum(costs[0], costs[1]))
        assert not np.allclose(costs[0][2:], costs[1][2:], rtol=1e-3)


# -- against samples ---------------------------------------------------------------------------------------------------

ENTRIES = PowerLawCodebook((0.5,)).entries(40)


def outputs(noise: Noise, scale: float, shift: torch.Tensor, count: int) -> torch.Tensor:
    """Samples of the noise plus the shift, from the sampler that training uses, ``(count, d)``."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.empty(count * len(shift), dtype=torch.float64)
    noise.fill_(drawn, scale, lambda block: generator)
    return drawn.view(count, -1) + shift


def log_ratio(noise: Noise, scale: float, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``log F_v(x) / F(x)``."""
    if isinstance(noise, StudentTNoise):
        one, other = (torch.log1p((y / scale) ** 2 / noise.df) for y in (x - shift, x))
        return (noise.df + 1) / 2 * (other - one).sum(1)
    return (x.abs() - (x - shift).abs()).sum(1) / scale


def shift_of(entries: Magnitudes) -> torch.Tensor:
    """The worst vector of a codebook with one entry, with any signs, in any order."""
    values = torch.tensor(entries.values[0]).double().repeat_interleave(torch.tensor(entries.counts))
    generator = torch.Generator().manual_seed(2)
    signs = torch.randint(2, values.shape, generator=generator) * 2 - 1
    return (values * signs)[torch.randperm(len(values), generator=generator)]


@pytest.mark.parametrize("noise", [StudentTNoise(9), StudentTNoise(3), LaplaceNoise()], ids=repr)
@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_a_monte_carlo_estimate_of_the_moments_agrees_with_the_bound(noise: CoordinatewiseNoise, rate: float) -> None:
    """It does not exceed it, and is not far below; with the scale off by a factor of 3/2 it would be either."""
    scale, order, shift = 1.5, 4, shift_of(ENTRIES)
    x = outputs(noise, scale, torch.zeros(len(shift)), 200_000)
    mixed = torch.log1p(rate * torch.expm1(log_ratio(noise, scale, x, shift)))
    terms = torch.exp(order * mixed)
    estimate, error = terms.mean().item(), 5 * terms.std().item() / math.sqrt(len(terms))

    def bound(factor: float) -> float:
        event = ShiftedNoiseDpEvent(noise.density(), scale * factor, ENTRIES)
        return math.exp((order - 1) * divergence(event, rate, order))

    assert abs(estimate - bound(1)) < error
    assert estimate - error > bound(3 / 2)
    assert estimate + error < bound(2 / 3)


@pytest.mark.parametrize("noise", [StudentTNoise(9), LaplaceNoise()], ids=repr)
@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_a_monte_carlo_estimate_of_the_privacy_loss_never_exceeds_the_bound(
    noise: CoordinatewiseNoise, epsilon: float
) -> None:
    """δ(ε) of several steps, for the record's being added and its being removed, on the worst entry."""
    scale, rate, steps, runs, shift = 1.5, 0.2, 10, 20_000, shift_of(ENTRIES)
    count = runs * steps

    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch.log1p(rate * torch.expm1(log_ratio(noise, scale, x, shift))).view(runs, steps).sum(1)

    without = outputs(noise, scale, torch.zeros(len(shift)), count)
    sampled = torch.rand(count, 1, generator=torch.Generator().manual_seed(3)) < rate
    added, removed = loss(without + shift * sampled), -loss(without)
    event = PoissonSampledDpEvent(rate, ShiftedNoiseDpEvent(noise.density(), scale, ENTRIES))
    bound = event_delta(SelfComposedDpEvent(event, steps), epsilon)
    for losses in (added, removed):
        terms = -torch.expm1((epsilon - losses).clamp(max=0))
        estimate, error = terms.mean().item(), 5 * terms.std().item() / math.sqrt(runs)
        assert estimate - error <= bound
        assert estimate > bound / 30, "the test could not fail"


def test_orders_that_are_not_whole_have_no_divergence_and_hide_none_behind_them() -> None:
    event = ShiftedNoiseDpEvent(StudentTNoise(9).density(), 1.5, ENTRIES)
    found = _step_rdp(0.3, event, "add_or_remove", (2, 2.5, 3))
    assert found[1] == math.inf
    alone = [_step_rdp(0.3, event, "add_or_remove", (order,))[0] for order in (2, 3)]
    assert [found[0], found[2]] == pytest.approx(alone) and min(alone) > 0


def test_replacing_a_record_costs_no_more_than_is_stated() -> None:
    """Estimated for a record that is exchanged for its opposite; adding or removing alone is exceeded."""
    noise, scale, rate, order, shift = StudentTNoise(9), 1.5, 0.3, 2, shift_of(ENTRIES)
    x = outputs(noise, scale, torch.zeros(len(shift)), 200_000)
    one, other = (torch.log1p(rate * torch.expm1(log_ratio(noise, scale, x, s))) for s in (shift, -shift))
    estimate = math.log(torch.exp(order * one + (1 - order) * other).mean().item()) / (order - 1)
    event = ShiftedNoiseDpEvent(noise.density(), scale, ENTRIES)

    stated, *_ = _step_rdp(rate, event, "replace_one", (order, 3, 4))  # of order 2, by those of 3 and 4
    assert divergence(event, rate, order) < estimate <= stated
    # Mironov 2017, proposition 11, at order 2: (α - 1/2)/(α - 1) = 3/2.
    assert stated == pytest.approx(1.5 * divergence(event, rate, 4) + divergence(event, rate, 3))


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_either_accountant_states_the_renyi_bound(accountant: str) -> None:
    event = PoissonSampledDpEvent(
        0.01, ShiftedNoiseDpEvent(StudentTNoise(9).density(), 1.0, FlatCodebook().entries(1000))
    )
    many = SelfComposedDpEvent(event, 1000)
    found = event_epsilon(many, 1e-5, accountant)  # type: ignore[arg-type]
    assert event_delta(many, found, accountant) == pytest.approx(1e-5, rel=1e-6)  # type: ignore[arg-type]
    with_gaussian = ComposedDpEvent([many, SelfComposedDpEvent(PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0)), 10)])
    assert event_epsilon(with_gaussian, 1e-5, accountant) > found  # type: ignore[arg-type]
    # Student's t of 9 degrees of freedom is a little worse on a flat vector than a Gaussian of its standard deviation.
    gaussian = SelfComposedDpEvent(PoissonSampledDpEvent(0.01, GaussianDpEvent(StudentTNoise(9).std())), 1000)
    assert event_epsilon(gaussian, 1e-5, "rdp") < found < 1.2 * event_epsilon(gaussian, 1e-5, "rdp")
