"""Private centering: what one record moves, the noise, the account, and what the layer makes of records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy, FlatClipping, GaussianNoise, PrivateCentering, PrivateStrategy
from tests.conftest import Net, fit, loader, trainer
from tests.mechanism.test_noise import is_gaussian_of_std
from tests.statistics.test_projection import NUMBERS, random_loader

DELTA = 1e-3


class Centered(Net):
    def __init__(self, noise_multiplier: float = 2.0, features: int = 6) -> None:
        super().__init__(nn.Sequential(PrivateCentering(features, noise_multiplier), nn.Linear(features, 3)))

    @property
    def centering(self) -> PrivateCentering:
        layer = self.net[0]  # type: ignore[index]
        assert isinstance(layer, PrivateCentering)
        return layer


def private(**kwargs: Any) -> PrivateStrategy:
    return PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0), self_check=False, **kwargs)


def units(records: Tensor) -> np.ndarray:
    rows = records.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class SpyStrategy(PrivateStrategy):
    """Keeps the exact sums that were released."""

    exact: Tensor

    def release_sum(self, total: Any, noise_multiplier: float, what: str) -> Tensor:
        self.exact = total()
        return super().release_sum(total, noise_multiplier, what)


def exact_sum(records: Tensor) -> Tensor:
    strategy = SpyStrategy(FlatClipping(1.0), GaussianNoise(2.0), self_check=False)
    table = DataLoader(TensorDataset(records, torch.zeros(len(records), dtype=torch.long)), batch_size=2, shuffle=True)
    fit(trainer(strategy=strategy, max_steps=1, limit_train_batches=1), Centered(1.0, records[0].numel()), table)
    return strategy.exact


@given(st.integers(0, 3), st.lists(NUMBERS, min_size=5, max_size=5), st.sampled_from([torch.float32, torch.float64]))
def test_one_record_moves_the_sum_by_at_most_one(others: int, extra: list[float], dtype: torch.dtype) -> None:
    layer = PrivateCentering(5, 1.0)
    records, record = torch.randn(others, 5, dtype=dtype), torch.tensor([extra], dtype=dtype)

    def total(rows: Tensor) -> Tensor:
        return layer.add_up(iter(rows.split(1)), lambda part: part.sum(0))

    moved = total(torch.cat([records, record])) - (total(records) if others else 0)
    assert moved.norm() <= 1 + 1e-12
    usable = bool(record.isfinite().all()) and bool(record.any())
    assert moved.norm() == pytest.approx(float(usable), abs=1e-12), "and no less than it could"


def test_in_a_fit_one_record_moves_what_is_released_by_one_whatever_its_scale() -> None:
    records, record = torch.randn(9, 6), 1e20 * torch.randn(1, 6)
    moved = exact_sum(torch.cat([records, record])) - exact_sum(records)
    assert moved.numpy() == pytest.approx(units(record)[0], abs=1e-6)


def test_a_record_of_another_type_leaves_the_others_as_they_are() -> None:
    layer = PrivateCentering(6, 1.0)
    large, half = torch.tensor([[100_000, 1, 1, 1, 1, 1]]), torch.ones(1, 6, dtype=torch.float16)

    def total(records: list[Tensor]) -> Tensor:
        return layer.add_up(iter(records), lambda rows: rows.sum(0))

    assert (total([large] * 50 + [half]) - total([large] * 50)).norm() <= 1 + 1e-12


@pytest.mark.parametrize("options", [{}, {"secure_rng": True}, {"seed": 3}], ids=str)
def test_the_noise_is_what_the_ledger_claims(options: dict[str, Any]) -> None:
    data, module = random_loader(40, 4000), Centered(3.0, features=4000)
    strategy = private(**options)
    fit(trainer(strategy=strategy, limit_train_batches=1), module, data)
    exact = torch.from_numpy(units(data.dataset.tensors[0]).sum(0))  # type: ignore[attr-defined]
    noise = module.centering.mean.double() * 40 - exact
    [(event, count)] = strategy.ledger.statistics()
    assert count == 1 and isinstance(event, GaussianDpEvent)
    assert is_gaussian_of_std(noise, event.noise_multiplier)
    assert not is_gaussian_of_std(noise * 2 / 3, event.noise_multiplier)
    assert not is_gaussian_of_std(noise * 3 / 2, event.noise_multiplier)


def test_rows_are_centred_and_of_unit_length() -> None:
    layer, records = PrivateCentering(4, 1.0), torch.randn(30, 2, 2) + 3
    layer.fill(records)
    rows = units(records.flatten(1))
    expected = units(torch.from_numpy(rows - rows.mean(0)))
    assert layer(records).numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(layer(records[:1]), layer(records)[:1])


def test_records_that_are_zero_or_the_mean_give_finite_rows() -> None:
    layer = PrivateCentering(4, 1.0)
    layer.fill(torch.ones(3, 4))
    assert layer(torch.stack([torch.zeros(4), torch.ones(4), torch.full((4,), 1e30)])).isfinite().all()


@pytest.mark.parametrize("target", [1.0, 4.0])
def test_a_budget_pays_for_both(target: float) -> None:
    multipliers = []
    for module in (Centered(5.0), Net()):
        training = trainer(callbacks=[DifferentialPrivacy(target, DELTA, self_check=False)], max_epochs=2)
        fit(training, module, loader())
        strategy: Any = training.strategy
        assert 0.99 * target <= strategy.ledger.epsilon(DELTA) <= target
        multipliers.append(strategy.noise_multiplier)
    assert multipliers[0] > multipliers[1]


def test_a_resumed_fit_charges_nothing_again(tmp_path: Path) -> None:
    module, first = Centered(), trainer(strategy=private(), max_epochs=1, default_root_dir=tmp_path)
    fit(first, module, loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    again, strategy = Centered(), private()
    resumed = trainer(strategy=strategy, max_epochs=2, default_root_dir=tmp_path)
    fit(resumed, again, loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(strategy.ledger.statistics()) == 1 and strategy.ledger.steps == 10
    assert torch.equal(again.centering.mean, module.centering.mean)


def test_public_records_fill_the_layer_and_nothing_is_charged() -> None:
    module, strategy = Centered(), private()
    module.centering.fill(torch.randn(30, 6))
    before = module.centering.mean.clone()
    fit(trainer(strategy=strategy), module, loader())
    assert strategy.ledger.statistics() == [] and torch.equal(module.centering.mean, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0), "in_features must be at least 1, got 0"),
        ((6, -1.0), "noise_multiplier must be non-negative and finite, got -1"),
        ((6, math.inf), "noise_multiplier"),
        ((6, math.nan), "noise_multiplier"),
    ],
)
def test_impossible_layers_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivateCentering(*arguments)


def test_what_cannot_be_the_mean_is_refused() -> None:
    layer = PrivateCentering(6, 1.0)
    with pytest.raises(ValueError, match=r"keeps finite numbers of shape \(6,\), and was given \(1,\)"):
        layer.fill(torch.randn(30, 1))
    for records in (torch.zeros(0, 6), torch.zeros(6)):
        with pytest.raises(ValueError, match="takes records"):
            layer.fill(records)
    with pytest.raises(ValueError, match="not finite"):
        layer.set_value(torch.full((6,), math.nan))
    assert not layer.is_released
    layer.fill(torch.randn(30, 6))
    with pytest.raises(ValueError, match="in_features is 6, and a record has 1 features"):
        layer(torch.randn(4, 1))


def test_nothing_is_left_of_a_trial_run_that_failed_between_two_releases() -> None:
    first, second = PrivateCentering(6, 2.0), PrivateCentering(3, 2.0)
    module = Net(nn.Sequential(first, second, nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="in_features is 3"):
        fit(trainer(strategy=private(), fast_dev_run=True), module, loader())
    assert not first.is_released and first.mean.isnan().all()


def test_training_without_privacy_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"no means yet.*DifferentialPrivacy"):
        fit(trainer(), Centered(), loader())


def test_records_of_another_size_are_refused_before_anything_is_charged() -> None:
    strategy = private()
    with pytest.raises(ValueError, match="in_features is 5, and a record has 6 features"):
        fit(trainer(strategy=strategy), Centered(features=5), loader())
    assert not len(strategy.ledger)
