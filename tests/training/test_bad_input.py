"""Bad records, files and signals: a clear error or a clean stop, nothing lost, and a ledger that is right."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import FlatClipping, GaussianNoise, PrivacyConfigurationError, PrivateStrategy
from lightning_dp.journal.contents import JOURNAL_NAME, JournalContents
from tests.conftest import Net, dataset, fit, loader, trainer


def private() -> PrivateStrategy:
    return PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))


def charged(folder: Path) -> int:
    return len(JournalContents(folder / JOURNAL_NAME).ledger())


class Validated(Net):
    """Has something to validate."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["features", "labels", "types"])
def test_records_that_the_model_cannot_take_stop_it_before_anything_is_charged(spoil: str, tmp_path: Path) -> None:
    inputs, labels = dataset().tensors
    data = {
        "features": TensorDataset(inputs[:, :4], labels),
        "labels": TensorDataset(inputs, labels[:, None].repeat(1, 2)),
        "types": TensorDataset(inputs.long(), labels),
    }[spoil]
    strategy = private()
    with pytest.raises((RuntimeError, ValueError)):
        fit(trainer(strategy=strategy, default_root_dir=tmp_path), Net(), DataLoader(data, batch_size=8))
    assert len(strategy.ledger) == 0 == charged(tmp_path)


def test_fewer_records_than_a_batch_are_all_drawn_and_that_is_said() -> None:
    strategy = private()
    with pytest.warns(UserWarning, match=r"expected batch size \(16\) exceeds the 5 records"):
        trainer(strategy=strategy, max_steps=2, max_epochs=-1).fit(Net(), loader(5, 16))
    assert strategy.sampling_rate == 1 and len(strategy.ledger) == 2


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = trainer(strategy=private(), default_root_dir=tmp_path)
    fit(run, Net(), loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


@pytest.mark.parametrize("length", [0, 100, 0.5, -1])
def test_a_checkpoint_that_is_cut_off_is_an_error_and_costs_nothing(saved: Path, length: float) -> None:
    whole = saved.read_bytes()
    cut = saved.with_name("cut.ckpt")
    cut.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    with pytest.raises((RuntimeError, EOFError, OSError, ValueError)):
        fit(trainer(strategy=private(), default_root_dir=saved.parent, max_epochs=2), Net(), loader(), ckpt_path=cut)
    assert charged(saved.parent) == 5
    again = private()
    fit(trainer(strategy=again, default_root_dir=saved.parent, max_epochs=2), Net(), loader(), ckpt_path=saved)
    assert len(again.ledger) == 10 == charged(saved.parent)


@pytest.mark.parametrize("ledger", ["what?", {}, {"runs": 3}, {"runs": [{"name": "a", "steps": [{"count": 1}]}]}])
def test_a_ledger_that_makes_no_sense_is_named(saved: Path, ledger: Any) -> None:
    checkpoint = torch.load(saved)
    checkpoint["lightning_dp"]["ledger"] = ledger
    torch.save(checkpoint, saved)
    with pytest.raises(PrivacyConfigurationError, match=r"ledger in the checkpoint .*run.ckpt"):
        fit(trainer(strategy=private(), max_epochs=2), Net(), loader(), ckpt_path=saved)


def test_a_disk_that_is_full_when_a_checkpoint_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    strategy = private()
    monkeypatch.setattr(torch, "save", full)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    run = trainer(strategy=strategy, default_root_dir=tmp_path, callbacks=[saving], enable_checkpointing=True)
    with pytest.raises(OSError, match="No space left"):
        fit(run, Net(), loader())
    assert len(strategy.ledger) == 3 == charged(tmp_path)


# -- signals -----------------------------------------------------------------------------------------------------------


class Interrupt(Callback):
    """Ctrl-C in a hook."""

    def __init__(self, hook: str) -> None:
        self.seen = 0
        setattr(self, hook, self.interrupt)

    def interrupt(self, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        raise KeyboardInterrupt

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        """Counts nothing; a name to be replaced."""


STAGES = {
    "setup": 0,
    "on_fit_start": 0,
    "on_sanity_check_start": 0,
    "on_train_start": 0,
    "on_train_batch_start": 0,
    "on_before_backward": 0,
    "on_after_backward": 1,
    "on_before_optimizer_step": 1,
    "on_train_batch_end": 1,
    "on_validation_batch_start": None,
    "on_train_epoch_end": 5,
    "on_train_end": 5,
}


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_any_stage_loses_nothing(stage: str, tmp_path: Path) -> None:
    strategy, interrupt = private(), Interrupt(stage)
    run = trainer(strategy=strategy, default_root_dir=tmp_path, callbacks=[interrupt])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(run, Validated(), loader(), loader())
    assert interrupt.seen
    if STAGES[stage] is not None:
        assert len(strategy.ledger) == STAGES[stage]
    if (tmp_path / JOURNAL_NAME).exists():
        assert charged(tmp_path) == len(strategy.ledger)
    again = private()
    fit(trainer(strategy=again, default_root_dir=tmp_path), Net(), loader())
    assert len(again.ledger) == len(strategy.ledger) + 5, "the directory is free, and knows of what was taken"


TERMINATED = ("setup", "on_train_start", "on_after_backward", "on_train_batch_end", "on_train_end")

SCRIPT = """
import os, signal, sys
from tests.training.test_bad_input import TERMINATED, Interrupt, Validated, fit, loader, private, trainer

for stage in TERMINATED:
    if os.fork():
        os.wait()
        continue
    terminate = Interrupt(stage)
    terminate.interrupt = None
    setattr(terminate, stage, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    run = trainer(strategy=private(), default_root_dir=os.path.join(sys.argv[1], stage), callbacks=[terminate])
    try:
        fit(run, Validated(), loader(), loader())
    finally:
        os._exit(0)  # what the processes share is its parent's to remove
"""


def test_sigterm_at_any_stage_loses_nothing(tmp_path: Path) -> None:
    """Lightning ends a training that is asked to end after the step that it is in."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200)
    taken = {}
    for stage in TERMINATED:
        journal = tmp_path / stage / JOURNAL_NAME
        if not journal.exists():  # it ended before a data set was loaded
            taken[stage] = 0
            continue
        contents = JournalContents(journal)
        last = contents.last_run()
        assert last is None or last.ended, (stage, done.stderr[-2000:])
        taken[stage] = len(contents.ledger())
    assert taken["setup"] == 0 and taken["on_train_end"] == 5
    assert 1 <= taken["on_after_backward"] <= taken["on_train_batch_end"] + 1 <= 3, taken
