"""Nothing without noise steers a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Subset

from lightning_dp import FlatClipping, GaussianNoise, PrivacyConfigurationError, PrivacyMonitor, PrivateStrategy
from tests.conftest import Net, dataset, fit, loader, trainer


class Logging(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True)
        self.log("rate", 0.5)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", super().training_step(batch, batch_idx))


class Plateau(Logging):
    def __init__(self, monitor: str) -> None:
        super().__init__()
        self.monitor = monitor

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer), "monitor": self.monitor},
        }


def train(module: Net, *validation: Any, **kwargs: Any) -> PrivateStrategy:
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    fit(trainer(strategy=strategy, **kwargs), module, loader(), *validation)
    return strategy


@pytest.mark.parametrize(
    ("module", "callback"),
    [
        (Plateau("train_loss"), None),
        (Plateau("train_loss_epoch"), None),
        (Logging(), EarlyStopping("train_loss")),
        (Logging(), ModelCheckpoint(monitor="train_loss_step")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_training_step_logs_decides_nothing(module: Net, callback: Any) -> None:
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    extra = {"callbacks": [callback], "enable_checkpointing": True} if callback else {}
    with pytest.raises(PrivacyConfigurationError, match="monitors 'train_loss.*without noise.*schedule by"):
        fit(trainer(strategy=strategy, **extra), module, loader())
    assert len(strategy.ledger) == 0


def test_validation_records_that_are_not_trained_on_may_decide() -> None:
    train(Plateau("val_loss"), DataLoader(dataset(16), batch_size=8))
    train(Plateau("rate"))


def test_validation_on_records_of_the_train_set_decides_nothing() -> None:
    data = dataset()
    parts = Subset(data, range(30)), Subset(data, range(30, 40))
    for train_set, validation, refused in ((data, data, True), (data, parts[1], True), (*parts, False)):
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
        run = trainer(strategy=strategy, max_epochs=1)
        loaders = DataLoader(train_set, batch_size=8), DataLoader(validation, batch_size=8)
        if refused:
            with pytest.raises(PrivacyConfigurationError, match="holds records of the train set"):
                fit(run, Plateau("val_loss"), *loaders)
        else:
            fit(run, Plateau("val_loss"), *loaders)


def test_an_optimizer_that_reads_its_loss_is_refused() -> None:
    class Polyak(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"] = 0.01 * float(closure())
            return super().step()

    class Adaptive(Net):
        def configure_optimizers(self) -> Any:
            return Polyak(self.parameters(), lr=1.0)

    with pytest.raises(PrivacyConfigurationError, match="reads the loss that its closure returns"):
        train(Adaptive())


def test_a_batch_that_is_skipped_is_refused() -> None:
    class Skipping(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    with pytest.raises(PrivacyConfigurationError, match="returned -1"):
        train(Skipping(), max_epochs=2)


def test_clipping_by_the_trainer_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_dp.training import steering

    lines: list[str] = []
    monkeypatch.setattr(steering, "rank_zero_info", lines.append)
    train(Net(), gradient_clip_val=1.0)
    assert any("rescales the noisy gradient" in line for line in lines)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_batch_end"])
def test_what_other_hooks_log_of_the_train_set_decides_nothing(hook: str) -> None:
    class Collected(Net):
        pass

    def log(self: Collected, *args: Any) -> None:
        self.log("collected", 1.0)

    setattr(Collected, hook, log)
    with pytest.raises(PrivacyConfigurationError, match=f"EarlyStopping monitors 'collected', which {hook} logs"):
        train(Collected(), callbacks=[EarlyStopping("collected")], max_epochs=3)
    train(Collected(), callbacks=[EarlyStopping("privacy/epsilon"), PrivacyMonitor(1e-5)], max_epochs=2)


def test_a_step_that_is_examined_again_logs_once() -> None:
    class Later(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("one", 1.0, reduce_fx="sum", on_step=False, on_epoch=True)
            loss = super().training_step(batch, batch_idx)
            if self.global_step >= 2:
                loss = loss + 0.1 * self.net(batch[0]).square().mean(1).mean()
            self.log("two", 1.0, reduce_fx="sum", on_step=False, on_epoch=True)
            return loss

    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    run = trainer(strategy=strategy)
    fit(run, Later(), loader())
    assert run.callback_metrics["one"] == run.callback_metrics["two"] == len(strategy.ledger)


def test_a_metric_that_training_step_begins_to_log_later_decides_nothing() -> None:
    class Late(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.trainer.is_last_batch:
                self.log("late", loss)
            return loss

    with pytest.raises(PrivacyConfigurationError, match="monitors 'late', which training_step logs"):
        train(Late(), callbacks=[EarlyStopping("late", strict=False)], max_epochs=3)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_counter_in_a_hook_counts_batches_and_not_records(hook: str) -> None:
    class Counting(Net):
        count = 0

    def increase(self: Counting, *args: Any) -> None:
        self.count += 1

    setattr(Counting, hook, increase)
    for options in ({"engine": "per_example"}, {"max_physical_batch_size": 4}):
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), **options)
        fit(trainer(strategy=strategy), Counting(), loader())
        assert len(strategy.ledger) == 5
