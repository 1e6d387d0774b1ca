from __future__ import annotations

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

from lightning_dp.accounting.pld import GaussianLosses


@pytest.mark.parametrize("multiplier", [0.3, 0.55, 1.0, 5.0, 50.0])
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
