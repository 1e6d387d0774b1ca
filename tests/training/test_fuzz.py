"""Sequences of fits, stops, resumptions and changes of configuration: nothing that was released is ever not charged."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_dp import FlatClipping, GaussianNoise, PrivateStrategy
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.mechanism.step import PrivateStep
from tests.conftest import Net, fit, loader, trainer


class Stop(Callback):
    """Ends a fit before, or after, a step has been released."""

    def __init__(self, how: str, step: int) -> None:
        self.how, self.step = how, step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.how == "interrupt" and batch_idx == self.step:
            raise KeyboardInterrupt

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if self.how == "error" and trainer.global_step % 5 == self.step:
            raise ZeroDivisionError("user code failed")


class Trainings(RuleBasedStateMachine):
    """What each directory's journal must know of, at least: every release of a fit in it, or that a fit in it went on
    from."""

    checkpoints = Bundle("checkpoints")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="fuzz_"))
        self.released: dict[Path, Counter[str]] = {}
        self.ledgers: dict[Path, PrivacyLedger] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize()
    def begin(self) -> None:
        self.released[self.root / "0"] = Counter()

    def train(self, folder: Path, checkpoint: Path | None, multiplier: float, batch: int, how: str, step: int) -> Any:
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(multiplier), self_check=False)
        saving = ModelCheckpoint(folder, filename=f"{len(list(self.root.rglob('*.ckpt')))}", every_n_train_steps=3)
        run = trainer(
            default_root_dir=folder,
            strategy=strategy,
            max_epochs=-1,
            max_steps=4 if checkpoint is None else torch.load(checkpoint)["global_step"] + 4,
            callbacks=[Stop(how, step), saving],
            enable_checkpointing=True,
        )
        released, release = self.released[folder], PrivateStep.release

        def counted(private: PrivateStep, others: Any = ()) -> None:
            release(private, others)
            released[str(private.mechanism.event(multiplier, strategy.sampling_rate))] += 1

        PrivateStep.release = counted  # type: ignore[method-assign]
        try:
            fit(run, Net(), loader(40, batch), ckpt_path=checkpoint)
        except (KeyboardInterrupt, SystemExit, ZeroDivisionError):
            pass
        finally:
            PrivateStep.release = release  # type: ignore[method-assign]
            if strategy.journal is not None:
                strategy.journal.close()
        self.ledgers[folder] = strategy.ledger
        return multiple(*((folder, path) for path in folder.glob("*.ckpt")))

    @rule(
        target=checkpoints,
        number=st.integers(0, 1),
        multiplier=st.sampled_from([0.8, 2.0]),
        batch=st.sampled_from([4, 10]),
        how=st.sampled_from(["end", "interrupt", "error"]),
        step=st.integers(0, 3),
    )
    def start(self, number: int, multiplier: float, batch: int, how: str, step: int) -> Any:
        folder = self.root / str(number)
        self.released.setdefault(folder, Counter())
        return self.train(folder, None, multiplier, batch, how, step)

    @rule(
        target=checkpoints,
        saved=checkpoints,
        number=st.integers(0, 3),
        multiplier=st.sampled_from([0.8, 2.0]),
        how=st.sampled_from(["end", "interrupt", "error"]),
        step=st.integers(0, 3),
    )
    def resume(self, saved: tuple[Path, Path], number: int, multiplier: float, how: str, step: int) -> Any:
        origin, checkpoint = saved
        folder = self.root / str(number)
        released = self.released.setdefault(folder, Counter())
        if folder != origin:  # the training goes on there: it owes what was released where it comes from
            for event, count in self.released[origin].items():
                released[event] = max(released[event], count)
        return self.train(folder, checkpoint, multiplier, 4, how, step)

    @invariant()
    def every_release_is_charged(self) -> None:
        for folder, ledger in self.ledgers.items():
            charged = Counter({str(event): count for event, count in _counted(ledger).items()})
            for event, count in self.released[folder].items():
                assert charged[event] >= count, (folder.name, event, charged, self.released[folder])


def _counted(ledger: PrivacyLedger) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for event, count in ledger:
        found[str(event)] += count
    return found


TestTrainings = Trainings.TestCase
TestTrainings.settings = settings(
    max_examples=12, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)
