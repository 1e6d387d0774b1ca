from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_dp import (
    BackpropClipping,
    DifferentialPrivacy,
    FlatClipping,
    GaussianNoise,
    PrivacyBudget,
    PrivacyConfigurationError,
    PrivacyMonitor,
    PrivateStrategy,
    epsilon,
)
from tests.conftest import Net, fit, loader, trainer

DELTA = 1e-3


def private(multiplier: float | None = None) -> PrivateStrategy:
    return PrivateStrategy(FlatClipping(1.0), GaussianNoise(multiplier))


# -- budget ------------------------------------------------------------------------------------------------------------


def test_the_budget_chooses_noise_with_which_all_planned_steps_fit() -> None:
    run = trainer(strategy=private(), max_epochs=3, callbacks=[PrivacyBudget(2.0, DELTA)])
    fit(run, Net(), loader())
    assert run.global_step == 15
    assert 0.98 * 2.0 < run.strategy.ledger.epsilon(DELTA) <= 2.0


@pytest.mark.parametrize("minimum", [{}, {"min_epochs": 10}, {"min_steps": 50}])
def test_given_noise_training_stops_before_the_budget_is_exceeded(minimum: dict[str, int]) -> None:
    run = trainer(strategy=private(2.0), max_epochs=10, callbacks=[PrivacyBudget(2.0, DELTA)], **minimum)
    fit(run, Net(), loader())
    taken = len(run.strategy.ledger)
    assert 0 < taken < 50

    def cost(steps: int) -> float:
        return epsilon(noise_multiplier=2.0, sampling_rate=0.2, steps=steps, delta=DELTA)

    assert cost(taken) <= 2.0 < cost(taken + 1)


def test_training_without_an_end_stops_with_the_budget() -> None:
    run = trainer(strategy=private(2.0), max_epochs=-1, callbacks=[PrivacyBudget(2.0, DELTA)])
    fit(run, Net(), loader())
    assert run.strategy.ledger.epsilon(DELTA) <= 2.0


def test_a_target_for_training_without_an_end_is_refused() -> None:
    with pytest.raises(PrivacyConfigurationError, match="without an end"):
        fit(trainer(strategy=private(), max_epochs=-1, callbacks=[PrivacyBudget(2.0, DELTA)]), Net(), loader())


def test_a_callback_that_keeps_training_going_cannot_exceed_the_budget() -> None:
    class Stubborn(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = False

    run = trainer(strategy=private(2.0), max_epochs=10, callbacks=[PrivacyBudget(2.0, DELTA), Stubborn()])
    with pytest.raises(RuntimeError, match="budget allows"):
        fit(run, Net(), loader())
    assert run.strategy.ledger.epsilon(DELTA) <= 2.0


def test_a_budget_that_no_step_fits_into_takes_none() -> None:
    run = trainer(strategy=private(0.0), max_epochs=2, callbacks=[PrivacyBudget(2.0, DELTA)])
    module = Net()
    before = [p.clone() for p in module.parameters()]
    fit(run, module, loader())
    assert len(run.strategy.ledger) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def resumable(path: Path, epochs: int, target: float, resume: Path | None = None, callback: bool = False) -> Any:
    torch.manual_seed(0)
    if callback:
        run = trainer(max_epochs=epochs, callbacks=[DifferentialPrivacy(target, DELTA)])
    else:
        run = trainer(strategy=private(), max_epochs=epochs, callbacks=[PrivacyBudget(target, DELTA)])
    fit(run, Net(), loader(), ckpt_path=resume)
    run.save_checkpoint(path)
    return run.strategy


class StopAfterOneEpoch(Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize("callback", [True, False])
def test_a_resumed_run_ends_with_the_epsilon_of_an_uninterrupted_one(tmp_path: Path, callback: bool) -> None:
    whole = resumable(tmp_path / "whole.ckpt", 4, 2.0, callback=callback)
    stop: list[Callback] = [StopAfterOneEpoch()]
    if callback:
        run = trainer(max_epochs=4, callbacks=[DifferentialPrivacy(2.0, DELTA), *stop])
    else:
        run = trainer(strategy=private(), max_epochs=4, callbacks=[PrivacyBudget(2.0, DELTA), *stop])
    fit(run, Net(), loader())
    assert run.global_step == 5
    run.save_checkpoint(tmp_path / "part.ckpt")
    resumed = resumable(tmp_path / "resumed.ckpt", 4, 2.0, tmp_path / "part.ckpt", callback)
    assert list(resumed.ledger) == list(whole.ledger)
    assert resumed.ledger.epsilon(DELTA) == whole.ledger.epsilon(DELTA)


def test_a_longer_plan_gets_more_noise_for_what_is_left(tmp_path: Path) -> None:
    short = resumable(tmp_path / "short.ckpt", 2, 2.0)
    assert len(short.ledger) == 10
    resumed = resumable(tmp_path / "long.ckpt", 4, 2.5, tmp_path / "short.ckpt")
    assert len(resumed.ledger) == 20
    assert len(list(resumed.ledger)) == 2
    assert 0.95 * 2.5 < resumed.ledger.epsilon(DELTA) <= 2.5


def test_resuming_a_spent_budget_takes_no_step(tmp_path: Path) -> None:
    resumable(tmp_path / "spent.ckpt", 2, 2.0)
    resumed = resumable(tmp_path / "again.ckpt", 4, 1.0, tmp_path / "spent.ckpt")
    assert len(resumed.ledger) == 10


def test_the_budget_holds_when_the_batch_size_changes() -> None:
    class Growing(Net):
        def train_dataloader(self) -> Any:
            return loader(batch_size=4 * 4**self.current_epoch)

    run = trainer(
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[DifferentialPrivacy(1.0, DELTA, noise=GaussianNoise(2.0))],
    )
    fit(run, Growing())
    assert run.strategy.ledger.epsilon(DELTA) <= 1.0


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("PrivacyBudget")]


def test_the_budget_says_how_far_it_reaches_why_it_stopped_and_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        run = trainer(strategy=private(2.0), max_epochs=10, callbacks=[PrivacyBudget(2.0, DELTA)])
        fit(run, Net(), loader())
    taken = len(run.strategy.ledger)
    start, end = messages(caplog)
    assert f"{taken} of 50 planned steps are within the budget" in start
    assert f"stopping after {taken} private steps, because one more would exceed the budget" in end
    left = 2.0 - run.strategy.ledger.epsilon(DELTA)
    assert f"{left:.3g} is left" in end
    assert left > 0


def test_a_training_that_ends_as_planned_reports_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(trainer(strategy=private(2.0), callbacks=[PrivacyBudget(5.0, DELTA)]), Net(), loader())
    assert "training ended after 5 private steps, within the budget" in messages(caplog)[-1]
    assert "is left" in messages(caplog)[-1]
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(trainer(strategy=private(), callbacks=[PrivacyBudget(5.0, DELTA)]), Net(), loader())
    assert "training ended after 5 private steps, within the budget" in messages(caplog)[-1], "no step too many is left"


@pytest.mark.parametrize("trial", [True, False])
def test_a_trial_says_that_its_noise_is_not_that_of_the_training(trial: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(trainer(max_epochs=1, fast_dev_run=trial, callbacks=[DifferentialPrivacy(5.0, DELTA)]), Net(), loader())
    said = [message for message in messages(caplog) if "noise of the trial alone" in message]
    assert len(said) == trial and all("lightning_dp.check(" in message for message in said)


@pytest.mark.parametrize("changed", [{"size": 20}, {"batch_size": 20}, {"size": 80}])
def test_the_budget_holds_when_a_resumed_run_has_other_data(tmp_path: Path, changed: dict[str, int]) -> None:
    def run(epochs: int, resume: Path | None = None, **data: int) -> PrivateStrategy:
        # The journal would refuse another number of records: here the budget has to hold by itself.
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0), journal=False)
        run = trainer(strategy=strategy, max_epochs=epochs, callbacks=[PrivacyBudget(2.0, DELTA)])
        fit(run, Net(), loader(**data), ckpt_path=resume)
        run.save_checkpoint(tmp_path / "last.ckpt")
        return run.strategy

    before = len(run(1).ledger)
    resumed = run(60, tmp_path / "last.ckpt", **changed)
    assert len(resumed.ledger) > before
    assert len(list(resumed.ledger)) == 2
    assert resumed.ledger.epsilon(DELTA) <= 2.0
    more = resumed.ledger.copy()
    more.record(list(resumed.ledger)[-1][0])
    assert more.epsilon(DELTA) > 2.0, "the budget was not used up"


def test_two_budgets_are_refused() -> None:
    with pytest.raises(PrivacyConfigurationError, match="several privacy budgets"):
        fit(trainer(callbacks=[DifferentialPrivacy(2.0, DELTA), PrivacyBudget(3.0, DELTA)]), Net(), loader())


def test_a_search_that_would_spend_the_budget_is_refused() -> None:
    run = trainer(callbacks=[DifferentialPrivacy(2.0, DELTA), LearningRateFinder()])
    with pytest.raises(PrivacyConfigurationError, match="LearningRateFinder trains on the private data"):
        fit(run, Net(), loader())


# -- monitor -----------------------------------------------------------------------------------------------------------


def logged(folder: Path) -> list[dict[str, str]]:
    with open(next(folder.rglob("metrics.csv"))) as file:
        return list(csv.DictReader(file))


def test_the_monitor_logs_what_the_ledger_says(tmp_path: Path) -> None:
    run = trainer(
        strategy=private(2.0),
        max_epochs=2,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=5,
        callbacks=[PrivacyBudget(50.0, DELTA), PrivacyMonitor(DELTA)],
    )
    fit(run, Net(), loader())
    rows = [row for row in logged(tmp_path) if row.get("privacy/epsilon")]
    assert [int(row["step"]) for row in rows] == [4, 9]
    for row in rows:
        exact = epsilon(noise_multiplier=2.0, sampling_rate=0.2, steps=int(row["step"]) + 1, delta=DELTA)
        assert exact * (1 - 1e-7) <= float(row["privacy/epsilon"]) <= 1.01 * exact
        assert float(row["privacy/budget_spent"]) == pytest.approx(float(row["privacy/epsilon"]) / 50.0, rel=1e-5)
        assert float(row["privacy/delta"]) == pytest.approx(DELTA)
        assert float(row["privacy/noise_multiplier"]) == 2.0
    assert float(rows[-1]["privacy/epsilon"]) == pytest.approx(exact, rel=1e-6)
    assert run.progress_bar_metrics["ε"] == run.callback_metrics["privacy/epsilon"]
    assert "privacy/epsilon" not in run.progress_bar_metrics
    assert not [key for key in run.callback_metrics if key.startswith("not_private")]


def test_other_callbacks_can_monitor_epsilon(tmp_path: Path) -> None:
    run = trainer(
        strategy=private(2.0),
        max_epochs=20,
        enable_checkpointing=True,
        callbacks=[
            PrivacyMonitor(DELTA),
            EarlyStopping("privacy/epsilon", stopping_threshold=1.0, mode="max", patience=50),
            ModelCheckpoint(tmp_path, monitor="privacy/epsilon", mode="min"),
        ],
    )
    fit(run, Net(), loader())
    assert run.global_step < 100


def test_unnoised_diagnostics_of_backpropagation_clipping_are_those_of_its_upstream_gradients() -> None:
    strategy = PrivateStrategy(BackpropClipping(1.0, 1e-3), GaussianNoise(1.0), max_physical_batch_size=3)
    run = trainer(
        strategy=strategy, callbacks=[PrivacyMonitor(1e-5, log_not_private=True)], max_steps=3, max_epochs=-1,
        log_every_n_steps=1,
    )  # fmt: skip
    fit(run, Net(), loader())
    assert run.callback_metrics["not_private/clipped_fraction"] >= 0.5  # the output layer's always; the other sees that
    assert run.callback_metrics["not_private/gradient_norm_p90"] > 1e-3


def test_unnoised_diagnostics_are_logged_on_request_and_say_what_they_are() -> None:
    run = trainer(strategy=private(1.0), callbacks=[PrivacyMonitor(DELTA, log_not_private=True)], log_every_n_steps=1)
    fit(run, Net(), loader())
    assert 0 <= run.callback_metrics["not_private/clipped_fraction"] <= 1
    low, median, high = (
        run.callback_metrics[f"not_private/{name}"]
        for name in ("gradient_norm_p10", "median_gradient_norm", "gradient_norm_p90")
    )
    assert 0 < low <= median <= high


def test_the_epsilon_shown_never_exceeds_a_budget_that_holds(tmp_path: Path) -> None:
    run = trainer(max_epochs=20, logger=CSVLogger(tmp_path), log_every_n_steps=1,
                  callbacks=[DifferentialPrivacy(2.0, DELTA)])  # fmt: skip
    fit(run, Net(), loader())
    shown = [float(row["privacy/epsilon"]) for row in logged(tmp_path) if row.get("privacy/epsilon")]
    assert len(shown) == 100
    assert shown == sorted(shown)
    assert max(shown) <= 2.0 * (1 + 1e-6)
    assert shown[-1] == pytest.approx(run.strategy.ledger.epsilon(DELTA), rel=1e-6)


def test_the_last_epsilon_is_exact_and_logged_whatever_the_interval(tmp_path: Path) -> None:
    run = trainer(strategy=private(1.0), max_steps=7, max_epochs=-1, logger=CSVLogger(tmp_path), log_every_n_steps=3,
                  callbacks=[PrivacyMonitor(DELTA)])  # fmt: skip
    fit(run, Net(), loader())
    rows = [row for row in logged(tmp_path) if row.get("privacy/epsilon")]
    exact = epsilon(noise_multiplier=1.0, sampling_rate=0.2, steps=7, delta=DELTA)
    assert int(rows[-1]["step"]) == 6
    assert float(rows[-1]["privacy/epsilon"]) == pytest.approx(exact, rel=1e-6)


def test_signal_to_noise_is_estimated_from_the_noisy_gradient() -> None:
    """Per-example gradients of norm 1 in one direction: a signal of 4 against noise of 0.01·√d."""

    class Constant(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs, _ = batch
            return (self.net.weight.sum() * 1e3 + 0 * self.net(inputs).sum(1)).mean()

    run = trainer(strategy=PrivateStrategy(FlatClipping(1.0), GaussianNoise(0.01), engine="per_example"),
                  callbacks=[PrivacyMonitor(DELTA)], log_every_n_steps=1, max_steps=1)  # fmt: skip
    fit(run, Constant(torch.nn.Linear(6, 5, bias=False)), loader(4, batch_size=4))
    assert run.callback_metrics["privacy/signal_to_noise"] == pytest.approx(4 / (0.01 * 30**0.5), rel=1e-2)


@pytest.mark.parametrize("callback", [PrivacyMonitor(DELTA), PrivacyBudget(1.0, DELTA)])
def test_callbacks_that_read_the_ledger_say_what_they_need(callback: Callback) -> None:
    with pytest.raises(PrivacyConfigurationError, match="trains without privacy.*DifferentialPrivacy"):
        fit(trainer(callbacks=[callback]), Net(), loader())


def test_a_delta_of_one_over_n_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="not below 1/N"):
        run = trainer(strategy=private(1.0), callbacks=[PrivacyMonitor(0.03)], max_steps=1)
        run.fit(Net(), loader())


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("make", [PrivacyMonitor, lambda delta: PrivacyBudget(1.0, delta)])
def test_impossible_deltas_are_refused_at_once(make: Any, delta: float) -> None:
    with pytest.raises(ValueError, match="delta must lie strictly between"):
        make(delta)


# -- everything in one -------------------------------------------------------------------------------------------------


def test_one_callback_makes_a_plain_trainer_private() -> None:
    run = trainer(max_epochs=3, callbacks=[DifferentialPrivacy(epsilon=2.0, delta=DELTA, max_physical_batch_size=3)])
    fit(run, Net(), loader())
    assert run.global_step == 15 == len(run.strategy.ledger)
    assert 0.98 * 2.0 < run.strategy.ledger.epsilon(DELTA) <= 2.0
    assert run.callback_metrics["privacy/epsilon"] == pytest.approx(run.strategy.ledger.epsilon(DELTA), rel=1e-5)
    assert run.callback_metrics["privacy/budget_spent"] == pytest.approx(1.0, abs=0.02)
    assert run.strategy.expected_batch_size == 8


def test_a_second_fit_continues_the_ledger() -> None:
    run = trainer(max_epochs=1, callbacks=[DifferentialPrivacy(None, DELTA, noise=GaussianNoise(1.0))])
    fit(run, Net(), loader())
    assert len(run.strategy.ledger) == 5
    run.fit_loop.epoch_progress.reset()
    fit(run, Net(), loader())
    assert len(run.strategy.ledger) == 10


def test_two_ways_at_once_are_refused() -> None:
    with pytest.raises(PrivacyConfigurationError, match="use either"):
        fit(trainer(strategy=private(1.0), callbacks=[DifferentialPrivacy(2.0, DELTA)]), Net(), loader())


def test_strategies_that_are_not_known_are_refused_by_name() -> None:
    class OwnStrategy(SingleDeviceStrategy):
        """It may do anything to gradients."""

    with pytest.raises(PrivacyConfigurationError, match="OwnStrategy"):
        fit(trainer(strategy=OwnStrategy(), callbacks=[DifferentialPrivacy(2.0, DELTA)]), Net(), loader())


def test_neither_target_nor_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="give epsilon"):
        DifferentialPrivacy(None, DELTA)
