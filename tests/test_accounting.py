from __future__ import annotations

import json
import math
from typing import Any

import dp_accounting
import pytest
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import (
    Accountant,
    PrivacyLedger,
    affordable_steps,
    calibrate_noise,
    epsilon,
    subsampled_gaussian,
)

GRID = [
    (0.01, 1.0, 1000, 1e-5),
    (0.1, 2.0, 100, 1e-6),
    (1.0, 10.0, 10, 1e-5),
    (0.5, 4.0, 1, 1e-5),
    (1e-3, 0.6, 5000, 1e-6),
]


@pytest.mark.parametrize(("q", "z", "steps", "delta"), GRID)
def test_epsilon_equals_dp_accountings(q: float, z: float, steps: int, delta: float) -> None:
    event = dp_accounting.SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(z)), steps)
    found = {
        name: epsilon(noise_multiplier=z, sampling_rate=q, steps=steps, delta=delta, accountant=name)
        for name in ("pld", "rdp")
    }
    assert found["pld"] == pytest.approx(PLDAccountant().compose(event).get_epsilon(delta), rel=1e-6)
    assert found["rdp"] == pytest.approx(RdpAccountant().compose(event).get_epsilon(delta), rel=1e-6)
    assert found["pld"] < found["rdp"]


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
    assert affordable_steps(spent, NonPrivateDpEvent(), epsilon=2.0, delta=1e-5, at_most=10) == 0


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
