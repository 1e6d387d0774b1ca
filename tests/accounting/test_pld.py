from __future__ import annotations

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

from lightning_dp import epsilon
from lightning_dp.accounting.pld import EXACT, FAST, GaussianLosses, LossDistribution, composed_losses, log_moments


@pytest.mark.parametrize("multiplier", [0.15, 0.3, 0.55, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.01, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("direction", [AdjacencyType.ADD, AdjacencyType.REMOVE, AdjacencyType.REPLACE])
def test_deltas_of_many_losses_are_dp_accountings_one_by_one(
    multiplier: float, rate: float, direction: AdjacencyType
) -> None:
    ours = GaussianLosses(multiplier, sampling_prob=rate, adjacency_type=direction)
    theirs = GaussianPrivacyLoss(multiplier, sampling_prob=rate, adjacency_type=direction)
    bounds = ours.connect_dots_bounds()
    losses = np.unique(np.append(np.linspace(bounds.epsilon_lower, bounds.epsilon_upper, 200), 0.0))
    found, expected = ours.get_delta_for_epsilon(losses), theirs.get_delta_for_epsilon(losses)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-14)
    assert (expected > 0).any()
    assert ours.get_delta_for_epsilon(float(losses[3])) == pytest.approx(expected[3], rel=1e-12)


def test_many_steps_at_a_tiny_delta_are_not_rounded_to_a_large_epsilon() -> None:
    """10⁵ steps round δ by some 1e-10 in double precision, which would be all of it."""
    plan = {"noise_multiplier": 0.8, "sampling_rate": 1e-6, "steps": 10**5, "delta": 1e-10}
    found = epsilon(**plan)
    theirs = from_gaussian_mechanism(0.8, sampling_prob=1e-6, value_discretization_interval=3e-6)
    finer = theirs.self_compose(10**5).get_epsilon_for_delta(1e-10)
    assert finer < found < 2 * finer
    assert found < epsilon(**plan, accountant="rdp")


@pytest.mark.parametrize(("multiplier", "rate", "steps", "delta"), [(1.0, 0.01, 1000, 1e-5), (2.0, 0.1, 500, 1e-8)])
def test_both_arithmetics_agree(multiplier: float, rate: float, steps: int, delta: float) -> None:
    [fast, exact] = [
        composed_losses([(rate, multiplier, steps)], "add_or_remove", 1e-4, 1.0, floats) for floats in (FAST, EXACT)
    ]
    assert fast.epsilon(delta) == pytest.approx(exact.epsilon(delta), rel=1e-5)
    assert exact.infinity < fast.infinity / 100


def test_infinite_losses_of_several_steps_add_up() -> None:
    step = LossDistribution(0.1, 0, np.array([0.5, 0.49]), 0.01)
    composed = step.composed(3, log_moments(step))
    assert composed.infinity == pytest.approx(1 - 0.99**3, abs=1e-9)
    assert composed.delta(100.0) == pytest.approx(1 - 0.99**3, abs=1e-9)
