from __future__ import annotations

import json
import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import calibration, rdp
from lightning_dp.accounting.calibration import (
    affordable_steps,
    calibrate_noise,
    calibrate_schedule,
    calibrate_steps,
    rough_noise,
)
from lightning_dp.accounting.events import (
    ACCOUNTANTS,
    ADJACENCIES,
    Accountant,
    Adjacency,
    Phase,
    ShiftedNoiseDpEvent,
    subsampled_gaussian,
)
from lightning_dp.accounting.ledger import PrivacyLedger, epsilon
from lightning_dp.accounting.ledger import delta as ledger_delta
from lightning_dp.accounting.monitor import EpsilonMonitor
from lightning_dp.mechanism.encoding.codebooks import FlatCodebook, PowerLawCodebook, RandomCodebook
from lightning_dp.mechanism.noise import CoordinatewiseNoise, GaussianNoise, LaplaceNoise, StudentTNoise

# δ/T stays above the rounding errors that our ε allows for and dp-accounting's does not.
GRID = [
    (0.01, 1.0, 1000, 1e-5),
    (0.1, 2.0, 100, 1e-6),
    (1.0, 10.0, 10, 1e-5),
    (0.5, 4.0, 1, 1e-8),
    (1e-3, 0.6, 5000, 1e-6),
    (0.01, 4.0, 10_000, 1e-5),
    (0.2, 1.0, 3, 1e-8),
]


@pytest.mark.parametrize(("q", "z", "steps", "delta"), GRID)
def test_epsilon_and_delta_equal_dp_accountings(q: float, z: float, steps: int, delta: float) -> None:
    step = PoissonSampledDpEvent(q, GaussianDpEvent(z)) if q < 1 else GaussianDpEvent(z)
    event = dp_accounting.SelfComposedDpEvent(step, steps)
    arguments: dict[str, Any] = {"noise_multiplier": z, "sampling_rate": q, "steps": steps}
    found = {name: epsilon(**arguments, delta=delta, accountant=name) for name in ACCOUNTANTS}
    theirs = {"pld": PLDAccountant().compose(event), "rdp": RdpAccountant().compose(event)}
    for name in ACCOUNTANTS:
        assert found[name] == pytest.approx(theirs[name].get_epsilon(delta), rel=1e-6)
        at = theirs[name].get_epsilon(delta)
        found_delta = ledger_delta(**arguments, epsilon=at, accountant=name)
        assert found_delta == pytest.approx(theirs[name].get_delta(at), rel=1e-4, abs=1e-12)
    assert found["pld"] < found["rdp"]


@pytest.mark.parametrize(("q", "z", "steps", "delta"), [(0.02, 1.0, 500, 1e-5), (0.1, 1.5, 60, 1e-6)])
def test_opacus_accountants_agree_within_their_error(q: float, z: float, steps: int, delta: float) -> None:
    from opacus.accountants import PRVAccountant
    from opacus.accountants import RDPAccountant as OpacusRDP

    arguments: dict[str, Any] = {"noise_multiplier": z, "sampling_rate": q, "steps": steps, "delta": delta}
    prv, rdp = PRVAccountant(), OpacusRDP()
    prv.history = rdp.history = [(z, q, steps)]
    # PRV: an upper bound, with an error in ε of at most 0.01 and in δ of a thousandth.
    upper = prv.get_epsilon(delta, eps_error=0.01, delta_error=delta / 1000)
    assert upper - 0.021 <= epsilon(**arguments) <= upper
    # Opacus has fewer orders, and so may be a little above.
    theirs = rdp.get_epsilon(delta)
    assert theirs * 0.98 <= epsilon(**arguments, accountant="rdp") <= theirs * 1.001


def test_published_values() -> None:
    """The DP-SGD paper (Abadi et al. 2016) states 1.26 for these by its moments accountant."""
    arguments: dict[str, Any] = {"noise_multiplier": 4.0, "sampling_rate": 0.01, "steps": 10_000, "delta": 1e-5}
    assert epsilon(**arguments, accountant="rdp") == pytest.approx(1.035, abs=5e-4)
    assert epsilon(**arguments) == pytest.approx(0.947, abs=5e-4)


def single_step_delta(q: float, z: float, epsilon: float, adjacency: str) -> float:
    """Hockey-stick divergence of one step, by direct integration, the worse of both directions."""
    from scipy.stats import norm

    x = np.linspace(-20 * z - 2, 20 * z + 2, 400_001)

    def mixture(mean: float) -> np.ndarray:
        return np.asarray((1 - q) * norm.pdf(x, 0, z) + q * norm.pdf(x, mean, z))

    p, other = mixture(1.0), mixture(-1.0) if adjacency == "replace_one" else norm.pdf(x, 0, z)
    return max(
        float(np.maximum(a - math.exp(epsilon) * b, 0).sum() * (x[1] - x[0])) for a, b in ((p, other), (other, p))
    )


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize(("q", "z"), [(0.3, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("at", [0.0, 0.2, 1.5])
def test_one_step_equals_direct_integration(q: float, z: float, at: float, adjacency: Adjacency) -> None:
    exact = single_step_delta(q, z, at, adjacency)
    arguments: dict[str, Any] = {"noise_multiplier": z, "sampling_rate": q, "steps": 1, "adjacency": adjacency}
    for accountant in ACCOUNTANTS:
        assert ledger_delta(**arguments, epsilon=at, accountant=accountant) >= exact * (1 - 1e-6)
    assert ledger_delta(**arguments, epsilon=at) == pytest.approx(exact, rel=1e-4, abs=1e-13)


@pytest.mark.parametrize("at", [0.05, 0.6])
def test_replacing_a_record_costs_no_more_than_half_the_noise_or_two_changes(at: float) -> None:
    q, z = 0.1, 1.0
    arguments: dict[str, Any] = {"sampling_rate": q, "steps": 1}
    found = ledger_delta(**arguments, noise_multiplier=z, epsilon=at, adjacency="replace_one")
    assert found > ledger_delta(**arguments, noise_multiplier=z, epsilon=at)
    assert found < ledger_delta(**arguments, noise_multiplier=z / 2, epsilon=at)
    assert found < (1 + math.exp(at / 2)) * ledger_delta(**arguments, noise_multiplier=z, epsilon=at / 2)


@given(
    st.floats(0.05, 0.9), st.floats(0.5, 3.0), st.floats(0.0, 2.0),
    st.lists(st.floats(-1, 1), min_size=4, max_size=4),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_no_pair_of_records_is_worse_than_opposite_ones(q: float, z: float, at: float, where: list[float]) -> None:
    """The proof's claim, in the plane: contributions u and v anywhere in the unit ball."""
    u, v = (np.array(w) / max(1.0, float(np.hypot(*w))) for w in (where[:2], where[2:]))
    grid = np.linspace(-8 * z - 1, 8 * z + 1, 201)
    x, y = np.meshgrid(grid, grid)

    def mixture(mean: np.ndarray) -> np.ndarray:
        def gauss(a: float, b: float) -> np.ndarray:
            return np.asarray(np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * z * z)) / (2 * math.pi * z * z))

        return (1 - q) * gauss(0, 0) + q * gauss(*mean)

    cell = (grid[1] - grid[0]) ** 2
    found = float(np.maximum(mixture(u) - math.exp(at) * mixture(v), 0).sum()) * cell
    worst = single_step_delta(q, z, at, "replace_one")
    assert found <= worst + 1e-4


def test_renyi_divergence_of_replacing_a_record_equals_an_independent_integral() -> None:
    from scipy.integrate import quad
    from scipy.stats import norm

    q, z = 0.2, 1.1

    def integrand(x: float, order: float) -> float:
        def ratio(mean: float) -> float:  # to the density of N(0, z²)
            return 1 - q + q * math.exp((mean * x - mean**2 / 2) / z**2)

        return float(norm.pdf(x, 0, z)) * ratio(1) ** order * ratio(-1) ** (1 - order)

    for order in (1.5, 3.0, 8.0):
        integral = quad(integrand, -25, 30, args=(order,), limit=400)[0]
        found = rdp._replacement_divergence(q, z, order)
        assert found == pytest.approx(math.log(integral) / (order - 1), rel=1e-8)
    assert rdp._replacement_divergence(1.0, z, 3.0) == pytest.approx(3 * 4 / (2 * z * z))


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("q", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("z", [1e-200, 1e-3, 0.5, 1e6])
def test_extreme_values_give_a_number_that_is_no_lower_than_for_less(
    q: float, z: float, accountant: Accountant, adjacency: Adjacency
) -> None:
    def cost(steps: int, delta: float) -> float:
        return epsilon(noise_multiplier=z, sampling_rate=q, steps=steps, delta=delta, accountant=accountant,
                       adjacency=adjacency)  # fmt: skip

    assert 0 <= cost(1, 0.5) <= cost(1, 1e-6) <= cost(1, 1e-14)
    assert cost(1, 1e-6) <= cost(10**7, 1e-6)


def test_ten_million_steps_of_the_whole_data_set_equal_one_gaussian_mechanism() -> None:
    z = 1.3e4
    many = epsilon(noise_multiplier=z, sampling_rate=1.0, steps=10**7, delta=1e-6)
    assert many == pytest.approx(epsilon(noise_multiplier=z * 10**-3.5, sampling_rate=1.0, steps=1, delta=1e-6))


def test_small_sampling_rates_are_not_rounded_up() -> None:
    """On dp-accounting's default grid this is 0.30: each step's loss is smaller than a cell."""
    found = epsilon(noise_multiplier=1.0, sampling_rate=1e-5, steps=10**7, delta=1e-5)
    rdp = epsilon(noise_multiplier=1.0, sampling_rate=1e-5, steps=10**7, delta=1e-5, accountant="rdp")
    # The central limit: a Gaussian mechanism of 1/z² = T q² (exp(1) - 1), Dong, Roth & Su 2022.
    limit = epsilon(noise_multiplier=(10**7 * 1e-10 * math.expm1(1)) ** -0.5, sampling_rate=1.0, steps=1, delta=1e-5)
    assert 0.98 * limit < found < 1.1 * limit
    assert found < rdp


def test_a_single_gaussian_mechanism_equals_its_closed_form() -> None:
    """Balle & Wang 2018, theorem 8: an independent formula for q = 1 and one step."""
    from scipy.stats import norm

    z, delta = 1.3, 1e-5
    found = epsilon(noise_multiplier=z, sampling_rate=1.0, steps=1, delta=delta)
    exact = norm.cdf(0.5 / z - found * z) - math.exp(found) * norm.cdf(-0.5 / z - found * z)
    assert exact == pytest.approx(delta, rel=2e-3)
    assert exact <= delta


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_no_noise_is_infinite_epsilon_and_no_steps_is_none(accountant: Accountant) -> None:
    common = {"sampling_rate": 0.1, "delta": 1e-5, "accountant": accountant}
    assert epsilon(noise_multiplier=0.0, steps=1, **common) == math.inf
    assert epsilon(noise_multiplier=0.0, steps=0, **common) == 0.0
    assert epsilon(noise_multiplier=1.0, steps=0, **common) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_impossible_deltas_are_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must lie strictly between 0 and 1"):
        epsilon(noise_multiplier=1.0, sampling_rate=0.1, steps=1, delta=delta)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.1}, "sampling_rate"),
        ({"steps": -1}, "count must not be negative"),
        ({"accountant": "gdp"}, "accountant must be one of"),
    ],
)
def test_other_impossible_arguments_are_refused(changed: dict[str, object], says: str) -> None:
    arguments = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 1, "delta": 1e-5, **changed}
    with pytest.raises(ValueError, match=says):
        epsilon(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("q", "steps", "target", "delta"), [(0.01, 1000, 1.0, 1e-5), (0.2, 100, 3.0, 1e-4), (1.0, 1, 8.0, 1e-6)]
)
def test_calibrated_noise_meets_the_target_and_hardly_wastes_any(
    q: float, steps: int, target: float, delta: float, accountant: Accountant
) -> None:
    z = calibrate_noise(epsilon=target, delta=delta, sampling_rate=q, steps=steps, accountant=accountant)
    spent = epsilon(noise_multiplier=z, sampling_rate=q, steps=steps, delta=delta, accountant=accountant)
    assert 0.98 * target < spent <= target


def test_calibration_takes_into_account_what_is_spent() -> None:
    spent = PrivacyLedger()
    spent.record(subsampled_gaussian(1.0, 0.05), 200)
    target = 1.5 * spent.epsilon(1e-5)
    z = calibrate_noise(epsilon=target, delta=1e-5, sampling_rate=0.05, steps=300, spent=spent)
    spent.record(subsampled_gaussian(z, 0.05), 300)
    assert 0.98 * target < spent.epsilon(1e-5) <= target
    with pytest.raises(ValueError, match="spent already"):
        calibrate_noise(epsilon=0.5 * target, delta=1e-5, sampling_rate=0.05, steps=1, spent=spent)


def test_affordable_steps_is_the_largest_number_that_fits() -> None:
    event = subsampled_gaussian(1.0, 0.05)
    spent = PrivacyLedger()
    spent.record(event, 7)

    def total(steps: int) -> float:
        ledger = spent.copy()
        ledger.record(event, steps)
        return ledger.epsilon(1e-5)

    allowed = affordable_steps(spent, event, epsilon=2.0, delta=1e-5, at_most=10**6)
    assert total(allowed) <= 2.0 < total(allowed + 1)
    assert affordable_steps(spent, event, epsilon=2.0, delta=1e-5, at_most=3) == 3
    assert affordable_steps(spent, event, epsilon=1e-3, delta=1e-5, at_most=10) == 0
    assert affordable_steps(spent, event, epsilon=2.0, delta=1e-5, at_most=0) == 0
    assert affordable_steps(spent, NonPrivateDpEvent(), epsilon=2.0, delta=1e-5, at_most=10) == 0


@given(st.floats(0.05, 20), st.floats(0.005, 1), st.integers(1, 3000), st.sampled_from([1e-3, 1e-5, 1e-8]))
@settings(max_examples=4, deadline=None)
def test_calibrated_noise_never_overshoots(target: float, q: float, steps: int, delta: float) -> None:
    for accountant in ACCOUNTANTS:
        z = calibrate_noise(epsilon=target, delta=delta, sampling_rate=q, steps=steps, accountant=accountant)
        spent = epsilon(noise_multiplier=z, sampling_rate=q, steps=steps, delta=delta, accountant=accountant)
        assert 0.98 * target <= spent <= target


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_a_schedule_keeps_its_proportions_and_meets_the_target(adjacency: Adjacency) -> None:
    plan = [Phase(50, 0.05, 2.0), Phase(30, 0.1, 1.0), Phase(10, 1.0, 8.0)]
    found = calibrate_schedule(plan, epsilon=2.0, delta=1e-5, adjacency=adjacency)
    scales = [phase.noise_multiplier / planned.noise_multiplier for phase, planned in zip(found, plan, strict=True)]
    assert scales == pytest.approx([scales[0]] * 3)
    assert [(phase.steps, phase.sampling_rate) for phase in found] == [(50, 0.05), (30, 0.1), (10, 1.0)]
    assert 0.98 * 2.0 < PrivacyLedger.of(found).epsilon(1e-5, adjacency=adjacency) <= 2.0


def test_the_ledger_of_a_schedule_equals_dp_accountings_composition() -> None:
    plan = [Phase(50, 0.05, 2.0), Phase(30, 0.1, 1.0), Phase(7, 1.0, 20.0)]
    theirs = PLDAccountant().compose(PoissonSampledDpEvent(0.05, GaussianDpEvent(2.0)), 50)
    theirs.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), 30).compose(GaussianDpEvent(20.0), 7)
    assert PrivacyLedger.of(plan).epsilon(1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)


@pytest.mark.parametrize("plan", [[], [Phase(0, 0.1)], [Phase(1, 0.1, 0.0)], [Phase(1, 2.0)]])
def test_impossible_schedules_are_refused(plan: list[Phase]) -> None:
    with pytest.raises(ValueError, match="schedule|steps|noise_multiplier|sampling_rate"):
        calibrate_schedule(plan, epsilon=1.0, delta=1e-5)


def test_steps_for_a_target_are_the_most_that_fit() -> None:
    arguments: dict[str, Any] = {"noise_multiplier": 2.0, "sampling_rate": 0.1, "delta": 1e-5}
    steps = calibrate_steps(epsilon=1.5, **arguments)
    assert epsilon(steps=steps, **arguments) <= 1.5 < epsilon(steps=steps + 1, **arguments)
    assert calibrate_steps(epsilon=1e-9, **arguments) == 0
    with pytest.raises(ValueError, match="epsilon must be positive"):
        calibrate_steps(epsilon=0.0, **arguments)


@pytest.mark.parametrize("target", [1e-3, 500.0])
def test_extreme_targets_are_met(target: float) -> None:
    z = calibrate_noise(epsilon=target, delta=1e-6, sampling_rate=0.01, steps=100)
    assert epsilon(noise_multiplier=z, sampling_rate=0.01, steps=100, delta=1e-6) <= target


@pytest.mark.parametrize("at", [-0.1, math.nan])
def test_impossible_epsilons_are_refused(at: float) -> None:
    with pytest.raises(ValueError, match="epsilon must not be negative"):
        PrivacyLedger().delta(at)


def test_delta_without_steps_or_noise() -> None:
    assert PrivacyLedger().delta(0.0) == 0.0
    assert ledger_delta(noise_multiplier=0.0, sampling_rate=0.1, steps=1, epsilon=5.0) == 1.0
    with pytest.raises(ValueError, match="delta must lie"):
        PrivacyLedger().epsilon(1.0)


@pytest.mark.parametrize(("q", "z", "steps"), [(0.01, 4.0, 20_000), (0.1, 1.0, 300), (0.005, 0.7, 2000)])
@pytest.mark.parametrize("every", [1, 50])
def test_the_monitor_is_within_a_per_cent_above_at_logarithmic_cost(q: float, z: float, steps: int, every: int) -> None:
    event, delta = subsampled_gaussian(z, q), 1e-5
    ledger, monitor = PrivacyLedger(), EpsilonMonitor(delta)
    compared = {round(steps ** (k / 7)) // every * every for k in range(8)}
    for step in range(1, steps + 1):
        ledger.record(event)
        if step % every:
            continue
        shown = monitor.bound(ledger)
        if step in compared:
            exact = ledger.epsilon(delta)
            assert exact <= shown <= 1.01 * exact
    # One per step until half a per cent of ε is more than a step, then as many as ε has half per cents.
    assert monitor.evaluations <= min(steps / every, 120) + 150 * math.log(1 + steps / 100)
    assert monitor.evaluations <= steps / every + 20


def test_the_monitor_follows_a_change_of_noise_and_a_shorter_ledger() -> None:
    monitor, ledger = EpsilonMonitor(1e-5), PrivacyLedger()
    ledger.record(subsampled_gaussian(2.0, 0.1), 200)
    long = ledger.copy()
    for event in (subsampled_gaussian(1.0, 0.1), subsampled_gaussian(2.0, 0.2)):
        long.record(event, 3)
        exact = long.epsilon(1e-5)
        assert exact <= monitor.bound(long) <= 1.01 * exact
    exact = ledger.epsilon(1e-5)
    assert exact <= monitor.bound(ledger) <= 1.01 * exact
    assert monitor.bound(PrivacyLedger()) == 0.0
    ledger.record(NonPrivateDpEvent())
    assert monitor.bound(ledger) == math.inf


events = st.sampled_from([subsampled_gaussian(1.0, 0.1), subsampled_gaussian(2.0, 0.1), NonPrivateDpEvent()])
runs = st.lists(st.tuples(events, st.integers(0, 5)), max_size=6)


def ledger_of(entries: list[tuple[object, int]]) -> PrivacyLedger:
    ledger = PrivacyLedger()
    ledger.start_run()
    for event, count in entries:
        ledger.record(event, count)  # type: ignore[arg-type]
    return ledger


def unrolled(ledger: PrivacyLedger) -> list[object]:
    return [event for event, count in ledger for _ in range(count)]


@given(runs)
def test_run_length_encoding_loses_nothing(entries: list[tuple[object, int]]) -> None:
    ledger = ledger_of(entries)
    assert unrolled(ledger) == [event for event, count in entries for _ in range(count)]
    assert len(ledger) == len(unrolled(ledger))
    events = [event for event, _ in ledger]
    assert all(a != b for a, b in zip(events, events[1:], strict=False))
    stored = json.loads(json.dumps(ledger.state_dict()))
    assert list(PrivacyLedger.from_state_dict(stored)) == list(ledger)


@given(runs, runs, runs)
@settings(max_examples=200)
def test_merged_ledgers_count_common_steps_once_and_all_others(common: Any, one: Any, two: Any) -> None:
    history = ledger_of(common)
    first, second = (PrivacyLedger.from_state_dict(history.state_dict()) for _ in range(2))
    for ledger, entries in ((first, one), (second, two)):
        for event, count in entries:
            ledger.record(event, count)
    expected = sum(count for _, count in [*common, *one, *two])
    first.include(second)
    assert len(first) == expected
    first.include(second)
    first.include(history)
    assert len(first) == expected, "including again counted steps twice"


@given(runs)
def test_a_run_that_went_on_after_it_was_saved_is_counted_once(entries: list[tuple[object, int]]) -> None:
    ledger = ledger_of(entries[:3])
    saved = PrivacyLedger.from_state_dict(ledger.state_dict())
    for event, count in entries[3:]:
        ledger.record(event, count)  # type: ignore[arg-type]
    going_on = ledger.copy()
    going_on.include(saved)
    saved.include(ledger)
    assert unrolled(saved) == unrolled(ledger) == unrolled(going_on)


def test_an_unknown_event_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown type 'quantum'"):
        PrivacyLedger.from_state_dict({"runs": [{"name": "a", "steps": [{"event": {"type": "quantum"}, "count": 1}]}]})


# -- noise on coordinates ----------------------------------------------------------------------------------------------

MAGNITUDES = PowerLawCodebook((0.3, 1.0)).entries(5000)


@pytest.mark.parametrize("noise", [LaplaceNoise(), StudentTNoise(9), StudentTNoise(2.5)], ids=repr)
def test_a_ledger_keeps_noise_on_coordinates(noise: CoordinatewiseNoise) -> None:
    ledger = PrivacyLedger()
    for magnitudes in (MAGNITUDES, RandomCodebook(3).entries(100)):
        ledger.record(PoissonSampledDpEvent(0.01, noise.event(1.3, magnitudes)), 7)
    ledger.record(subsampled_gaussian(1.0, 0.01), 3)
    restored = PrivacyLedger.from_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert list(restored) == list(ledger)
    assert restored.epsilon(1e-5) == ledger.epsilon(1e-5)
    with pytest.raises(ValueError, match="written by a newer version"):
        text = json.dumps(ledger.state_dict()).replace("student_t", "noise_of_the_future")
        PrivacyLedger.from_state_dict(json.loads(text.replace("laplace", "noise_of_the_future")))


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("noise", [LaplaceNoise(), StudentTNoise(9)], ids=repr)
def test_scales_and_steps_are_calibrated_as_for_gaussian_noise(
    noise: CoordinatewiseNoise, adjacency: Adjacency
) -> None:
    def mechanism(multiplier: float) -> Any:
        return noise.event(multiplier, MAGNITUDES)

    scale = calibrate_noise(
        epsilon=2.0, delta=1e-5, sampling_rate=0.01, steps=500, adjacency=adjacency, mechanism=mechanism
    )
    event = Phase(500, 0.01, scale, mechanism).event()
    ledger = PrivacyLedger.of([Phase(500, 0.01, scale, mechanism)])
    assert 1.997 <= ledger.epsilon(1e-5, adjacency=adjacency) <= 2.0
    arguments: dict[str, Any] = {"epsilon": 2.0, "delta": 1e-5, "at_most": 10**6, "adjacency": adjacency}
    more = affordable_steps(PrivacyLedger(), event, **arguments)
    assert 500 <= more < 510
    assert affordable_steps(ledger, event, **arguments) == more - 500


@pytest.mark.parametrize("q", [0.004, 0.1, 1.0])
def test_a_gaussian_counted_coordinate_by_coordinate_costs_what_it_costs_by_its_norm(q: float) -> None:
    magnitudes = FlatCodebook().entries(1000)
    steps, z = (1000, 1.0) if q < 1 else (2, 8.0)
    found = PrivacyLedger()
    found.record(PoissonSampledDpEvent(q, ShiftedNoiseDpEvent(GaussianNoise().density(), z, magnitudes)), steps)
    integers = RdpAccountant(rdp._INTEGER_ORDERS)
    integers.compose(PoissonSampledDpEvent(q, GaussianDpEvent(z)), steps)
    assert found.epsilon(1e-5) == pytest.approx(integers.get_epsilon(1e-5), rel=1e-6)


def test_epsilon_shown_while_training_is_an_upper_bound_within_a_per_cent_with_any_noise() -> None:
    monitor, ledger = EpsilonMonitor(1e-5), PrivacyLedger()
    event = PoissonSampledDpEvent(0.01, StudentTNoise(9).event(1.3, MAGNITUDES))
    for steps in (1, 10, 100, 1000):
        ledger.record(event, steps)
        exact = ledger.epsilon(1e-5)
        assert exact <= monitor.bound(ledger) <= 1.01 * exact


def test_steps_are_calibrated_by_the_accountant_that_is_asked_for() -> None:
    common: dict[str, Any] = {"epsilon": 2.0, "delta": 1e-5, "noise_multiplier": 1.0, "sampling_rate": 0.01}
    found = {name: calibrate_steps(accountant=name, **common) for name in ("pld", "rdp")}
    assert found["rdp"] < found["pld"]
    for name, steps in found.items():
        costs = [
            epsilon(accountant=name, steps=s, **{k: common[k] for k in common if k != "epsilon"})
            for s in (steps, steps + 1)
        ]
        assert costs[0] <= 2.0 < costs[1]


def test_the_monitor_looks_ahead_by_less_than_it_tolerates() -> None:
    """One value serves for many steps; where one would be too far off, another is computed."""
    event, monitor, ledger = subsampled_gaussian(1.0, 0.01), EpsilonMonitor(1e-5), PrivacyLedger()
    shown: list[tuple[int, float]] = []
    for _ in range(400):
        ledger.record(event, 10)
        shown.append((len(ledger), monitor.bound(ledger)))
    values = dict.fromkeys(value for _, value in shown)
    assert len(values) < 0.75 * len(shown), "every value was computed anew"
    assert [value for _, value in shown] == sorted(value for _, value in shown)
    for value in list(values)[::20]:
        served = [steps for steps, other in shown if other == value]
        one = PrivacyLedger()
        one.record(event, served[0])
        assert one.epsilon(1e-5) <= value <= 1.006 * one.epsilon(1e-5)
    evaluated = monitor.evaluations
    shorter = PrivacyLedger()
    shorter.record(event, 1)  # another training
    exact = shorter.epsilon(1e-5)
    assert exact <= monitor.bound(shorter) <= 1.01 * exact
    assert monitor.evaluations == evaluated + 1


@pytest.mark.parametrize("threshold", [0.003, 0.9, 1.0, 7.0, 5000.0])
def test_the_smallest_number_from_which_a_predicate_holds_is_found_on_both_sides_of_the_start(threshold: float) -> None:
    found = calibration._smallest_power(lambda x: x >= threshold, start=1.0, end=2.0**20)
    assert threshold <= found <= 1.03 * threshold


def test_noise_is_found_however_much_is_needed() -> None:
    plan: dict[str, Any] = {"sampling_rate": 1.0, "steps": 100, "delta": 1e-5, "accountant": "rdp"}
    multiplier = calibrate_noise(epsilon=0.05, **plan)
    assert multiplier > 100
    assert 0.049 < epsilon(noise_multiplier=multiplier, **plan) <= 0.05


@pytest.mark.parametrize(("epsilon_", "rate", "steps"), [(2.0, 0.02, 50), (1.0, 0.01, 400)])
def test_noise_found_by_few_orders_is_enough_and_compares_plans(epsilon_: float, rate: float, steps: int) -> None:
    target: dict[str, float] = {"epsilon": epsilon_, "delta": 1e-4}
    plans: list[dict[str, Any]] = [
        {"sampling_rate": rate, "steps": steps},
        {"sampling_rate": 4 * rate, "steps": steps // 4},
    ]
    rough = [rough_noise(**target, **plan) for plan in plans]
    tight = [calibrate_noise(**target, **plan) for plan in plans]
    assert all(1.0 <= a / b < 1.25 for a, b in zip(rough, tight, strict=True))
    assert rough[1] / rough[0] == pytest.approx(tight[1] / tight[0], rel=0.05)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_what_is_left_of_a_budget_that_is_nearly_spent_takes_no_more_noise_than_it_must(accountant: Any) -> None:
    spent = PrivacyLedger()
    spent.record(calibration.subsampled_gaussian(1.0, 0.02), 500)
    target = 1.0005 * spent.epsilon(1e-5, accountant)
    options: dict[str, Any] = {"delta": 1e-5, "accountant": accountant}
    z = calibrate_noise(epsilon=target, sampling_rate=0.02, steps=300, spent=spent, **options)
    ledger = spent.copy()
    ledger.record(calibration.subsampled_gaussian(z / 1.4, 0.02), 300)
    assert ledger.epsilon(**options) > target
