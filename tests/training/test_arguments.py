"""Arguments as people type them, and epochs as long as they have asked for."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, RandomSampler

from lightning_dp import (
    DifferentialPrivacy,
    FlatClipping,
    GaussianNoise,
    PrivacyBudget,
    PrivacyCard,
    PrivacyMonitor,
    PrivateStrategy,
)
from lightning_dp.training.callbacks.lookup import default_delta
from tests.conftest import Net, dataset, fit, loader, trainer


@pytest.mark.parametrize("norm", [1, 0.5])
def test_numbers_are_a_norm_and_a_multiplier(norm: float) -> None:
    run = trainer(callbacks=[DifferentialPrivacy(None, 1e-3, clipping=norm, noise=2)])
    fit(run, Net(), loader())
    assert run.strategy.mechanism.clipping == FlatClipping(float(norm))
    assert run.strategy.mechanism.noise == GaussianNoise(2.0)
    strategy = PrivateStrategy(norm, 1.1)
    assert (strategy.mechanism.clipping, strategy.noise_multiplier) == (FlatClipping(norm), 1.1)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"clipping": -1.0}, ValueError, "max_norm"),
        ({"clipping": True}, TypeError, "clipping must be a clipping rule"),
        ({"clipping": "flat"}, TypeError, "clipping must be a clipping rule"),
        ({"noise": -0.1}, ValueError, "multiplier"),
        ({"noise": [1.1]}, TypeError, "noise must be a noise"),
        ({"repair": "yes"}, TypeError, "repair must be True or False"),
        ({"delta": "1e-5"}, TypeError, "delta must be a number"),
        ({"delta": 0}, ValueError, "delta must lie strictly between 0 and 1"),
    ],
)
def test_wrong_ones_are_refused_where_they_are_given(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        DifferentialPrivacy(**{"epsilon": 8.0, **arguments})


@pytest.mark.parametrize(
    ("records", "expected"), [(1, 0.1), (40, 1e-3), (99, 1e-3), (100, 1e-3), (101, 1e-4), (60_000, 1e-6)]
)
def test_delta_is_a_power_of_ten_that_is_at_most_a_tenth_of_one_over_n(records: int, expected: float) -> None:
    assert default_delta(records) == expected
    assert expected <= 1 / (10 * records) * (1 + 1e-12) < 10 * expected


def test_without_a_delta_it_follows_from_the_number_of_records_and_is_said(tmp_path: Any, caplog: Any) -> None:
    callback = DifferentialPrivacy(epsilon=8.0, accountant="rdp")
    run = trainer(callbacks=[callback], default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="number of records"):
        _ = callback.budget.delta  # type: ignore[union-attr]
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(run, Net(), loader())
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("PrivacyBudget: ε")]
    assert len(said) == 1 and "at δ = 0.001 (1/(10·N), rounded down" in said[0]
    assert run.callback_metrics["privacy/delta"] == pytest.approx(1e-3)
    assert callback.card is not None and callback.card.delta == 1e-3
    assert run.strategy.ledger.epsilon(1e-3) <= 8.0
    fit(trainer(callbacks=[callback]), Net(), loader(400))
    assert callback.card.delta == 1e-4


def test_callbacks_beside_a_strategy_find_the_same_delta(tmp_path: Any) -> None:
    budget, monitor, card = PrivacyBudget(8.0), PrivacyMonitor(), PrivacyCard()
    run = trainer(strategy=PrivateStrategy(1.0), callbacks=[budget, monitor, card], default_root_dir=tmp_path)
    fit(run, Net(), loader())
    assert budget.delta == monitor.delta == card.delta == 1e-3


class Counts(Callback):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epochs.append(0)

    def on_train_batch_end(self, *_: Any) -> None:
        self.epochs[-1] += 1


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda: loader(45), 6),
        (lambda: loader(45, drop_last=True), 5),
        (lambda: loader(5, drop_last=True), 1),
        (lambda: DataLoader(dataset(40), 8, sampler=RandomSampler(dataset(40), num_samples=20)), 3),
        (lambda: DataLoader(dataset(40), 8, sampler=RandomSampler(dataset(40), num_samples=20), drop_last=True), 2),
        (lambda: DataLoader(dataset(40), 8, sampler=RandomSampler(dataset(40), num_samples=100)), 13),
    ],
)
def test_an_epoch_has_as_many_steps_as_the_loader_says(make: Any, steps: int) -> None:
    data, counts = make(), Counts()

    class Cycle(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=2, steps_per_epoch=max(1, len(data)))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    strategy = PrivateStrategy(1.0, 1.0)
    fit(trainer(strategy=strategy, callbacks=[counts], max_epochs=2), Cycle(), data)
    assert counts.epochs == [steps, steps]
    assert len(strategy.ledger) == 2 * steps
    assert strategy.sampling_rate == pytest.approx(min(1.0, 8 / strategy.num_records))


def warned(callback: DifferentialPrivacy, module: Net, data: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[callback], **options).fit(module, data)
    return [str(w.message) for w in caught if "ε" in str(w.message) or "batch size is" in str(w.message)]


@pytest.mark.parametrize(
    ("epsilon", "options", "batch", "says"),
    [
        (50.0, {}, 20, "ε = 50 promises little.*Usual targets are 1 to 10"),
        (0.01, {}, 4, "larger than the norm C that a record is clipped to.*larger batch size.*fewer steps.*larger ε"),
        (8.0, {}, 1, "expected batch size is 1.*Batches of hundreds"),
    ],
)
def test_budgets_that_protect_little_or_allow_little_are_warned_about(
    epsilon: float, options: dict[str, Any], batch: int, says: str
) -> None:
    found = warned(DifferentialPrivacy(epsilon, 1e-3, accountant="rdp"), Net(), loader(40, batch), **options)
    assert [w for w in found if re.search(says, w)], found


def test_an_ordinary_budget_is_not_warned_about() -> None:
    assert warned(DifferentialPrivacy(8.0, 1e-3, accountant="rdp"), Net(), loader(40, 20)) == []


def test_a_budget_that_is_nearly_spent_is_warned_about_with_numbers() -> None:
    """The same module again: what is left of ε needs much more noise."""
    module = Net()
    assert not [
        w for w in warned(DifferentialPrivacy(2.0, 1e-3, accountant="rdp"), module, loader()) if "was spent before" in w
    ]
    [said] = [
        w for w in warned(DifferentialPrivacy(2.0, 1e-3, accountant="rdp"), module, loader()) if "was spent before" in w
    ]
    numbers = re.search(r"multiplier of ([\d.]+), (\d+) times the ([\d.]+).*epsilon=([\d.]+) would keep", said)
    assert numbers is not None
    noise, times, alone, enough = map(float, numbers.groups())
    assert noise > 2 * alone and abs(noise / alone - times) <= 0.5 and enough > 2.0
    again = DifferentialPrivacy(enough * 1.01, 1e-3, accountant="rdp")
    module = Net()
    warned(DifferentialPrivacy(2.0, 1e-3, accountant="rdp"), module, loader())
    assert not [w for w in warned(again, module, loader()) if "was spent before" in w]  # the way out
