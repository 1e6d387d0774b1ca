from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import DifferentialPrivacy, FlatClipping, GaussianNoise, PrivacyBudget, PrivateStrategy
from lightning_dp.accounting.events import subsampled_gaussian
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import JournalError
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.journal import files, writer
from lightning_dp.journal.contents import JOURNAL_NAME, JournalContents, read_with_continuations
from lightning_dp.journal.writer import PrivacyJournal
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.training import books as books_module
from tests.conftest import Net, fit, loader, trainer
from tests.steps import make_step

ROOT = Path(__file__).parents[2]
ONE, OTHER = subsampled_gaussian(1.0, 0.1), subsampled_gaussian(2.0, 0.1)


def private(**kwargs: Any) -> PrivateStrategy:
    return PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0), self_check=False, **kwargs)


def opened(directory: Path, num_records: int = 10, **configuration: Any) -> PrivacyJournal:
    found = PrivacyJournal(directory, num_records=num_records, configuration=configuration)
    found.start_run(f"run{len(found.contents.runs)}", lambda: {"model_steps": 0})
    return found


def gone(found: PrivacyJournal) -> None:
    """What is left of a process that was killed: its file, and no lock."""
    found._abandon()


def charged(directory: Path) -> int:
    return len(JournalContents(directory / JOURNAL_NAME).ledger())


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The last line of the privacy journal")
@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from([ONE, OTHER]), st.integers(1, 6)), max_size=15),
    lost=st.floats(0, 1),
    power=st.booleans(),
)
def test_no_step_is_missing_after_a_kill_or_a_loss_of_power(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, int]], lost: float, power: bool
) -> None:
    """Power loss takes any part of what was not synced, and the boot identifier changes with it."""
    directory = tmp_path_factory.mktemp("journal")
    with pytest.MonkeyPatch.context() as patch:
        synced = [0]
        fsync = os.fsync

        def remember(fd: int) -> None:
            fsync(fd)
            if (directory / JOURNAL_NAME).exists():
                synced[0] = (directory / JOURNAL_NAME).stat().st_size

        patch.setattr(os, "fsync", remember)
        found = opened(directory)
        taken = {ONE: 0, OTHER: 0}
        for event, reserve in steps:
            patch.setattr(found, "_steps_to_reserve", lambda at_most, reserve=reserve: reserve)
            found.charge(event)
            taken[event] += 1
        gone(found)
        if power:
            size = (directory / JOURNAL_NAME).stat().st_size
            os.truncate(directory / JOURNAL_NAME, synced[0] + round(lost * (size - synced[0])))
            patch.setattr(files, "boot_identifier", lambda: "another")
        again = opened(directory)
        known = again.known()
        counts = dict.fromkeys(taken, 0)
        for event, count in known:
            counts[event] += count
        if power:
            assert all(counts[event] >= taken[event] for event in taken)
            assert len(known) - sum(taken.values()) <= 5
        else:
            assert counts == taken
        gone(again)
        assert charged(directory) == len(known), "what was charged once stays"


def test_every_reservation_reaches_the_disk_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[bytes] = []
    write, fsync = os.write, os.fsync

    def logged_write(fd: int, data: bytes) -> int:
        log.append(data)
        return write(fd, data)

    def logged_fsync(fd: int) -> None:
        log.append(b"sync")
        fsync(fd)

    monkeypatch.setattr(os, "write", logged_write)
    monkeypatch.setattr(os, "fsync", logged_fsync)
    found = opened(tmp_path)
    monkeypatch.setattr(found, "_steps_to_reserve", lambda at_most: 3)
    for event in [ONE] * 7 + [OTHER] * 2:
        found.charge(event)
    found.close()
    reservations = [i for i, data in enumerate(log) if b'"reserve"' in data]
    assert len(reservations) == 4
    assert all(log[i + 1] == b"sync" for i in reservations)
    assert [int(data) for data in log if data.strip().isdigit()] == [1, 2, 3, 1, 2, 3, 1, 1, 2]


def test_a_clean_end_gives_back_what_was_reserved_and_not_taken(tmp_path: Path) -> None:
    found = opened(tmp_path)
    found._steps_to_reserve = lambda at_most: 100  # type: ignore[method-assign]
    for _ in range(5):
        found.charge(ONE)
    found.close()
    assert charged(tmp_path) == 5


def test_no_more_is_reserved_than_a_budget_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(writer.time, "perf_counter", lambda: next(clock))  # a sync takes as long as a step
    found = opened(tmp_path)
    reserved = []
    for left in range(40, 0, -1):
        found.charge(ONE, left)
        assert found._reserved - found._begun < left
        reserved.append(found._reserved)
    assert max(reserved) > 10, "nothing was reserved ahead"
    gone(found)
    monkeypatch.setattr(files, "boot_identifier", lambda: "another")
    assert charged(tmp_path) == 40


@pytest.mark.filterwarnings("ignore:The last line of the privacy journal")
def test_every_beginning_of_a_journal_can_be_opened(tmp_path: Path) -> None:
    found = opened(tmp_path / "whole")
    found._steps_to_reserve = lambda at_most: 12  # type: ignore[method-assign]
    for _ in range(14):
        found.charge(ONE)
    found.close()
    data = found.path.read_bytes()
    for size in {*range(0, len(data), 7), *range(data.index(b"\n1\n"), len(data))}:
        directory = tmp_path / str(size)
        directory.mkdir()
        (directory / JOURNAL_NAME).write_bytes(data[:size])
        whole_lines = data[:size].rpartition(b"\n")[0].splitlines()
        again = opened(directory)
        assert len(again.known()) == sum(line.isdigit() for line in whole_lines)
        again.charge(ONE)
        again.close()
        assert all(line for line in again.path.read_bytes().splitlines())


def test_a_repaired_end_is_announced(tmp_path: Path) -> None:
    found = opened(tmp_path)
    found.charge(ONE)
    gone(found)
    with open(found.path, "ab") as file:
        file.write(b'{"type":"res')
    with pytest.warns(UserWarning, match="never finished"):
        opened(tmp_path).close()


def test_zeros_at_the_end_as_a_loss_of_power_leaves_them_charge_all_that_was_reserved(tmp_path: Path) -> None:
    found = opened(tmp_path)
    found._steps_to_reserve = lambda at_most: 9  # type: ignore[method-assign]
    found.charge(ONE)
    gone(found)
    with open(found.path, "ab") as file:
        file.write(b"\0" * 20)
    with pytest.warns(UserWarning, match="power is lost"):
        again = opened(tmp_path)
    assert len(again.known()) == 9 and again.uncertain_steps == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: [lines[0], b"rubbish", *lines[1:]], "Line 2 .*damaged"),
        (lambda lines: [lines[0], b"7", *lines[1:]], "Line 2 .*not reserved"),
        (lambda lines: [b'{"hello": 1}', *lines], "Line 1 .*no sense"),
        (lambda lines: [lines[0].replace(b'"format":1', b'"format":99'), *lines[1:]], "newer version"),
        (lambda lines: [*lines[:2], b'{"type":"later"}', *lines[2:]], "unknown type 'later'"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    found = opened(tmp_path)
    found.charge(ONE)
    found.close()
    found.path.write_bytes(b"\n".join(change(found.path.read_bytes().splitlines())) + b"\n")
    before = found.path.read_bytes()
    with pytest.raises(JournalError, match=says):
        opened(tmp_path)
    assert found.path.read_bytes() == before


def test_two_at_once_are_refused_by_name(tmp_path: Path) -> None:
    found = opened(tmp_path)
    found.charge(ONE)
    with pytest.raises(JournalError, match=rf"process {os.getpid()}.*is training in .*directory of its own"):
        opened(tmp_path)
    found.charge(ONE)
    found.close()
    opened(tmp_path).close()
    assert charged(tmp_path) == 2


def test_a_forked_worker_neither_writes_nor_keeps_the_lock(tmp_path: Path) -> None:
    found = opened(tmp_path)
    found.charge(ONE)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(write)
            try:
                found.charge(ONE)
                found.close()
            except JournalError:
                os.read(read, 1)  # lives on
                os._exit(0)
        finally:
            os._exit(1)
    os.close(read)
    gone(found)
    opened(tmp_path).close()
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert charged(tmp_path) == 1


# -- training ----------------------------------------------------------------------------------------------------------


class AtEveryGradient(Callback):
    def __init__(self, look: Any) -> None:
        self.look = look

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer)


def test_nothing_of_a_step_is_used_before_it_is_charged() -> None:
    model = torch.nn.Linear(3, 3)
    ledger = PrivacyLedger()
    seen: list[Any] = []

    def charge(event: Any, at_most: int | None) -> None:
        seen.append((event, at_most, len(ledger), model.weight.grad))
        if len(seen) == 2:
            raise JournalError("full")

    step = make_step(BookKeeping(model), FlatClipping(1.0), GaussianNoise(), ledger, Randomness(), charge=charge)
    step.begin(1.0, 0.1, 1.0, limit=lambda event: 5)
    step.release()
    assert seen == [(step.mechanism.event(1.0, 0.1), 5, 0, None)]
    model.zero_grad()
    step.begin(1.0, 0.1, 1.0)
    with pytest.raises(JournalError):
        step.release()
    assert seen[1] == (step.mechanism.event(1.0, 0.1), None, 1, None)
    assert len(ledger) == 1 and model.weight.grad is None


@pytest.mark.parametrize("logged", [True, False])
def test_the_journal_knows_every_step_before_anything_else_does(tmp_path: Path, logged: bool) -> None:
    seen = []
    run = trainer(
        strategy=private(),
        default_root_dir=tmp_path,
        logger=CSVLogger(tmp_path) if logged else False,
        enable_checkpointing=True,
        callbacks=[AtEveryGradient(lambda trainer: seen.append(charged(trainer.strategy.journal.path.parent)))],
        max_epochs=2,
    )
    fit(run, Net(), loader())
    assert seen == list(range(1, 11))
    [path] = tmp_path.rglob(JOURNAL_NAME)
    assert (path.parent / "checkpoints").is_dir()
    assert list(JournalContents(path).ledger()) == list(run.strategy.ledger)
    assert JournalContents(path).last_run().ended  # type: ignore[union-attr]


def test_a_step_that_cannot_be_written_down_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if data.strip().isdigit() and len(run.strategy.ledger) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    module = Net()
    weights = []
    run = trainer(
        strategy=private(),
        default_root_dir=tmp_path,
        callbacks=[AtEveryGradient(lambda trainer: weights.append(module.net[0].weight.clone()))],  # type: ignore
    )
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JournalError, match="No space left"):
        fit(run, module, loader())
    assert len(run.strategy.ledger) == 3 == len(weights)
    monkeypatch.undo()
    assert charged(tmp_path) == 3


@pytest.mark.parametrize(
    "option", [{"strategy": private(journal=False)}, {"fast_dev_run": True, "strategy": private()}]
)
def test_no_journal_is_kept_when_none_is_wanted(tmp_path: Path, option: dict[str, Any]) -> None:
    fit(trainer(default_root_dir=tmp_path, **option), Net(), loader())
    assert not list(tmp_path.rglob("*.jsonl"))


def test_the_callback_passes_the_choice_on(tmp_path: Path) -> None:
    def kept(journal: bool) -> bool:
        callback = DifferentialPrivacy(None, 1e-3, noise=GaussianNoise(1.0), journal=journal)
        fit(trainer(default_root_dir=tmp_path, callbacks=[callback], max_steps=1), Net(), loader())
        return bool(list(tmp_path.rglob(JOURNAL_NAME)))

    assert [kept(False), kept(True)] == [False, True]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_fit_charges_exactly_what_it_took(tmp_path: Path, error: type[BaseException]) -> None:
    def crash(trainer: Any) -> None:
        trainer.strategy.journal._steps_to_reserve = lambda at_most: 50
        if trainer.global_step == 3:
            raise error

    run = trainer(strategy=private(), default_root_dir=tmp_path, callbacks=[AtEveryGradient(crash)])
    with pytest.raises((RuntimeError, SystemExit)):
        fit(run, Net(), loader())
    assert charged(tmp_path) == 4 == len(run.strategy.ledger)


def test_the_journal_holds_nothing_that_is_not_public(tmp_path: Path) -> None:
    run = trainer(strategy=private(), default_root_dir=tmp_path)
    fit(run, Net(), loader())
    text = (tmp_path / JOURNAL_NAME).read_text()
    secret = run.strategy.randomness._entropy
    assert str(secret) not in text and f"{secret:x}" not in text
    allowed = {
        "journal": {"type", "format", "name", "num_records", "configuration"},
        "run": {"type", "run", "boot", "process", "started", "model_steps", "configuration"},
        "reserve": {"type", "run", "event", "count", "used"},
        "end": {"type", "run", "used", "killed"},
    }
    records = [json.loads(line) for line in text.splitlines()]
    assert {record["type"] for record in records if isinstance(record, dict)} == set(allowed)
    assert all(set(record) == allowed[record["type"]] for record in records if isinstance(record, dict))
    assert [record for record in records if isinstance(record, int)] == [
        n for record in records if isinstance(record, dict) and record["type"] == "reserve"
        for n in range(1, record["count"] + 1)
    ][:5]  # fmt: skip


def test_a_data_set_that_grows_while_training_is_the_same_training(tmp_path: Path) -> None:
    class Growing(Net):
        def train_dataloader(self) -> Any:
            return loader(size=40 * (1 + self.current_epoch))

    run = trainer(strategy=private(), default_root_dir=tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    fit(run, Growing())
    assert charged(tmp_path) == len(run.strategy.ledger) == 15
    assert JournalContents(tmp_path / JOURNAL_NAME).num_records == [40, 80]


# -- resuming ----------------------------------------------------------------------------------------------------------


class PlansAhead(Net):
    """Asks for the number of steps before the checkpoint is loaded, as many recipes with a warm-up do."""

    def setup(self, stage: str) -> None:
        assert self.trainer.estimated_stepping_batches > 0


def kill_after(
    path: Path, steps: int, resume: Path | None = None, versions: bool = False, net: Any = None, **kwargs: Any
) -> Path:
    """Trains, saving a checkpoint two steps before it stops as a killed process does; returns that checkpoint."""
    saved = path / f"saved{len(list(path.glob('*.ckpt')))}.ckpt"

    def work(trainer: Any) -> None:
        if len(trainer.strategy.ledger) == steps - 1:
            trainer.save_checkpoint(saved)  # within a step: the step that was just charged is in its ledger
        if len(trainer.strategy.ledger) == steps:
            gone(trainer.strategy.journal)
            raise Killed

    run = trainer(
        strategy=private(**kwargs),
        default_root_dir=path,
        logger=CSVLogger(path) if versions else False,
        callbacks=[AtEveryGradient(work)],
        max_epochs=1000,
    )
    with pytest.raises(Killed):
        fit(run, (net or Net)(), loader(), ckpt_path=resume)
    return saved


class Killed(Exception):
    pass


def resumed(
    path: Path, checkpoint: Path | None, steps: int = 3, versions: bool = False, net: Any = None, **kwargs: Any
) -> Any:
    stop = steps if checkpoint is None else torch.load(checkpoint, weights_only=True)["global_step"] + steps
    run = trainer(
        strategy=private(**kwargs),
        default_root_dir=path,
        logger=CSVLogger(path) if versions else False,
        max_epochs=1000,
        max_steps=stop,
    )
    fit(run, (net or Net)(), loader(), ckpt_path=checkpoint)
    return run


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    def say(line: str) -> None:
        if "self_check=False" not in line:
            lines.append(line)

    monkeypatch.setattr(books_module, "rank_zero_info", say)
    monkeypatch.setattr(books_module, "rank_zero_warn", say)
    return lines


def test_a_resumed_run_charges_what_was_lost_and_says_so_in_one_line(tmp_path: Path, said: list[str]) -> None:
    saved = kill_after(tmp_path, 7)
    run = resumed(tmp_path, saved)
    assert len(run.strategy.ledger) == 7 + 3 == charged(tmp_path)
    [line] = said
    assert "contains 6 private steps; 1 more were taken and are lost; they are charged, 7 in all" in line
    assert str(tmp_path / JOURNAL_NAME) in line and "\n" not in line


def test_steps_that_were_only_reserved_are_named(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PrivacyJournal, "_steps_to_reserve", lambda self, at_most: 20)
        saved = kill_after(tmp_path, 7)
    monkeypatch.setattr(files, "boot_identifier", lambda: "another")
    assert len(resumed(tmp_path, saved).strategy.ledger) == 20 + 3
    assert "14 more were taken and are lost (of these, 13 were reserved and perhaps never taken)" in said[0]


@pytest.mark.parametrize("net", [Net, PlansAhead])
def test_a_run_that_resumes_in_a_new_directory_and_dies_is_charged_as_well(tmp_path: Path, net: type[Net]) -> None:
    saved = kill_after(tmp_path, 7, versions=True, net=net)
    kill_after(tmp_path, 7 + 5, resume=saved, versions=True, net=net)
    run = resumed(tmp_path, saved, versions=True, net=net)
    assert len(run.strategy.ledger) == 7 + 5 + 3
    folders = sorted(path.parent.name for path in tmp_path.rglob(JOURNAL_NAME))
    assert folders == ["version_0", "version_1", "version_2"]
    logs = tmp_path / "lightning_logs"
    assert charged(logs / "version_2") == 15, "each knows what its own models may reveal"
    everything = list(read_with_continuations(logs / "version_0" / JOURNAL_NAME))
    assert {contents.path.parent.name for contents in everything} == set(folders)


def test_a_run_is_found_when_all_of_it_has_moved(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    saved = kill_after(tmp_path / "old", 7, versions=True)
    kill_after(tmp_path / "old", 7 + 5, resume=saved, versions=True)
    shutil.move(tmp_path / "old", tmp_path / "new")
    run = resumed(tmp_path / "elsewhere", tmp_path / "new" / saved.name)
    assert len(run.strategy.ledger) == 15


def test_links_of_a_run_without_steps_are_kept(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    gone(first)
    second.continue_from(first.reference() | {"relative": "../a/" + JOURNAL_NAME}, tmp_path / "b")
    second.charge(ONE)
    second.close()
    again = opened(tmp_path / "a")
    assert len(again.known()) == 1
    gone(again)


def test_a_search_for_the_learning_rate_keeps_the_journal_with_the_run(tmp_path: Path) -> None:
    class Search(LearningRateFinder):
        def lr_find(self, trainer: Any, pl_module: Any) -> None:
            super().lr_find(trainer, pl_module)
            self.optimal_lr = None

    class Tunable(Net):
        lr = 1.0

    run = trainer(
        strategy=private(),
        default_root_dir=tmp_path,
        logger=CSVLogger(tmp_path / "logs"),
        callbacks=[Search(num_training_steps=3, update_attr=False)],
    )
    fit(run, Tunable(), loader())
    [found] = tmp_path.rglob(JOURNAL_NAME)
    assert found.parent == Path(run.logger.log_dir)


def test_a_journal_that_is_gone_is_missed_aloud(tmp_path: Path, said: list[str]) -> None:
    saved = kill_after(tmp_path, 7)
    (tmp_path / JOURNAL_NAME).unlink()
    run = resumed(tmp_path, saved)
    assert len(run.strategy.ledger) == 6 + 3 == charged(tmp_path)
    assert "is gone: steps that were taken after the checkpoint" in said[0]


def test_a_checkpoint_without_a_journal_is_resumed_with_a_word(tmp_path: Path, said: list[str]) -> None:
    run = trainer(strategy=private(journal=False), max_steps=2)
    fit(run, Net(), loader())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    assert len(resumed(tmp_path, tmp_path / "saved.ckpt").strategy.ledger) == 5
    assert "saved without a privacy journal" in said[0]


def test_a_fresh_start_in_the_same_directory_pays_for_what_was_taken_there(tmp_path: Path, said: list[str]) -> None:
    kill_after(tmp_path, 7)
    assert len(resumed(tmp_path, None).strategy.ledger) == 7 + 3
    assert "7 private steps were taken in this directory before" in said[0] and "directory of its own" in said[0]


def test_a_second_fit_of_one_trainer_pays_once(tmp_path: Path, said: list[str]) -> None:
    run = trainer(strategy=private(), default_root_dir=tmp_path)
    fit(run, Net(), loader())
    run.fit_loop.max_epochs = 2
    fit(run, Net(), loader())
    assert len(run.strategy.ledger) == charged(tmp_path)
    assert len(JournalContents(tmp_path / JOURNAL_NAME).runs) == 2
    assert not said


def test_lost_steps_count_towards_the_budget(tmp_path: Path) -> None:
    kill_after(tmp_path, 7)
    run = trainer(strategy=private(), default_root_dir=tmp_path, max_epochs=-1, callbacks=[PrivacyBudget(1.5, 1e-3)])
    fit(run, Net(), loader())
    assert len(JournalContents(tmp_path / JOURNAL_NAME).runs) == 2
    assert run.strategy.ledger.epsilon(1e-3) <= 1.5
    assert len(run.strategy.ledger) == 7 + run.global_step


def test_a_lost_step_is_never_repeated_under_a_seed(tmp_path: Path) -> None:
    """The step after the checkpoint draws new noise: the same noise on another gradient would reveal both."""
    saved = kill_after(tmp_path, 7, seed=1)
    drawn = []

    def look(trainer: Any) -> None:
        drawn.append(len(trainer.strategy.ledger))

    run = trainer(strategy=private(seed=1), default_root_dir=tmp_path, max_epochs=-1, max_steps=8)
    run.callbacks.append(AtEveryGradient(look))  # type: ignore[attr-defined]
    fit(run, Net(), loader(), ckpt_path=saved)
    assert drawn[0] == 8


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("size", "clipping", "says"),
    [
        (60, FlatClipping(1.0), r"begun by a training with 40 records \(now 60\).*directory of its own"),
        (40, FlatClipping(0.5), r"clipping = .*1.0.*\(now .*0.5.*directory of its own"),
    ],
)
def test_another_data_set_or_configuration_is_charged_and_said(
    tmp_path: Path, fresh: bool, size: int, clipping: FlatClipping, says: str
) -> None:
    """What a step costs is its noise and its sampling rate, which every entry states."""
    saved = kill_after(tmp_path, 7)
    run = trainer(
        strategy=PrivateStrategy(clipping, GaussianNoise(2.0)),
        default_root_dir=tmp_path if fresh else tmp_path / "other",
        max_epochs=2,
    )
    with pytest.warns(UserWarning, match=says):
        run.fit(Net(), loader(size), ckpt_path=None if fresh else saved)
    place = tmp_path if fresh else tmp_path / "other"
    assert len(run.strategy.ledger) == charged(place) > 7
    assert size in JournalContents(place / JOURNAL_NAME).num_records


def test_batch_size_noise_and_engine_may_change(tmp_path: Path) -> None:
    saved = kill_after(tmp_path, 7)
    changed = PrivateStrategy(FlatClipping(1.0), GaussianNoise(3.0), engine="per_example", max_physical_batch_size=2)
    run = trainer(strategy=changed, default_root_dir=tmp_path, max_epochs=-1, max_steps=9)
    fit(run, Net(), loader(batch_size=4), ckpt_path=saved)
    assert len(changed.ledger) == 7 + 9 - torch.load(saved, weights_only=True)["global_step"]


@pytest.mark.parametrize("directory", ["file/below", "s3://bucket/run"])
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, directory: str) -> None:
    (tmp_path / "file").touch()
    place = directory if "://" in directory else str(tmp_path / directory)
    with pytest.raises(JournalError, match=rf"{directory}.*journal=False"):
        PrivacyJournal(place, num_records=1, configuration={})


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_points_nothing_is_missing_and_training_resumes(tmp_path: Path, kills: int) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.journal.kill_points",
        "--kills",
        str(kills),
        "--directory",
        str(tmp_path / "kills"),
    ]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count(f"{kills // 2} kills") == 2


def plain_trainer(root: Path, **kwargs: Any) -> Any:
    """A Trainer without any logger."""
    return pl.Trainer(
        default_root_dir=root, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        devices=1, **{"max_epochs": 1, **kwargs},
    )  # fmt: skip


def test_without_a_logger_every_fit_has_a_directory_of_its_own(tmp_path: Path) -> None:
    for number, size in enumerate((40, 60)):  # the second neither pays for the first, nor minds its other records
        run = plain_trainer(tmp_path, callbacks=[DifferentialPrivacy(3.0, 1e-3)])
        fit(run, Net(), loader(size))
        folder = tmp_path / "private_runs" / f"version_{number}"
        assert sorted(file.name for file in folder.iterdir()) == ["privacy_card.json", "privacy_card.md", JOURNAL_NAME]
        assert len(run.strategy.ledger) == len(JournalContents(folder / JOURNAL_NAME).ledger()) == -(-size // 8)


def test_without_a_logger_a_checkpoint_continues_its_training_in_a_directory_of_its_own(tmp_path: Path) -> None:
    first = plain_trainer(tmp_path, strategy=private())
    fit(first, Net(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = plain_trainer(tmp_path, strategy=private(), max_epochs=2)
    fit(again, Net(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert len(again.strategy.ledger) == 10
    assert again.strategy.ledger.epsilon(1e-3) > first.strategy.ledger.epsilon(1e-3)
    assert len(JournalContents(tmp_path / "private_runs" / "version_1" / JOURNAL_NAME).ledger()) == 10
