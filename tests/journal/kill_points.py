"""Kills trainings with SIGKILL at random points, resumes them, and compares what they revealed with what is charged.

    python -m tests.journal.kill_points --kills 200 --directory runs/kills

A process that has imported everything forks a child for every training. A child is killed from outside after a random
time, or by itself in the middle of one of its writes to the journal, before one of its syncs, or after it. The first
thing that sees a noisy gradient, a hook, adds one byte to a file: so many steps have been revealed. After every death
the journal must account for at least as many steps, for at most one more for every death, and for every step that any
surviving checkpoint knows; and the next child resumes from one of those checkpoints.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import FlatClipping, GaussianNoise, PrivacyLedger, PrivateStrategy
from lightning_dp.journal.contents import JOURNAL_NAME, read_with_continuations
from tests.conftest import Net, loader, trainer

KINDS = ("time", "within a write", "before a sync", "after a sync")


class Reveal(Callback):
    """Counts, in a file, the noisy gradients that have been seen."""

    def __init__(self, path: Path, write: Callable[[int, bytes], int]) -> None:
        self.fd, self.write = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), write

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.write(self.fd, b".")


def train(root: Path, child: int, checkpoint: Path | None, versions: bool, steps: int) -> None:
    """A training in ``root``, or, with ``versions``, in a new directory beneath it."""
    callbacks = [
        Reveal(root / "revealed", _write),
        ModelCheckpoint(root / "kept", filename=f"{child}-{{step}}", every_n_train_steps=3, save_top_k=-1),
    ]
    run = trainer(
        strategy=PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0), self_check=False),
        default_root_dir=root,
        logger=CSVLogger(root) if versions else False,
        callbacks=callbacks,
        enable_checkpointing=True,
        max_epochs=-1,
        max_steps=steps or -1,
    )
    run.fit(Net(), loader(), ckpt_path=checkpoint)


_write, _fsync = os.write, os.fsync


def die_at(kind: str, number: int, share: float) -> None:
    """Makes this process kill itself at its ``number``-th write or sync of this kind."""
    left = {"count": number}

    def now() -> bool:
        left["count"] -= 1
        return left["count"] < 0

    def write(fd: int, data: bytes) -> int:
        if kind == "within a write" and now():
            _write(fd, data[: int(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return _write(fd, data)

    def fsync(fd: int) -> None:
        last = kind.endswith("sync") and now()
        if last and kind == "before a sync":
            os.kill(os.getpid(), signal.SIGKILL)
        _fsync(fd)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.write, os.fsync = write, fsync  # type: ignore[assignment]


def in_child(work: Callable[[], None]) -> int:
    """Runs it in a forked process and returns that process's number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait_for(pid: int, seconds: float = 60.0) -> int:
    """The exit code of a process, negative for a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"A training neither ended nor died within {seconds} seconds.")


def surviving(root: Path) -> dict[Path, PrivacyLedger]:
    """The newest checkpoints and their ledgers; the others are deleted, as a user's would be."""
    found = sorted((root / "kept").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for path in found[:-4]:
        path.unlink()
    state = {path: torch.load(path, weights_only=True)["lightning_dp"]["ledger"] for path in found[-4:]}
    return {path: PrivacyLedger.from_state_dict(ledger) for path, ledger in state.items()}


def charged(root: Path, versions: bool) -> PrivacyLedger:
    """Everything that the journals know."""
    first = root / "lightning_logs" / "version_0" if versions else root
    ledger = PrivacyLedger()
    for contents in read_with_continuations(first / JOURNAL_NAME):
        ledger.include(contents.ledger())
    return ledger


def check(root: Path, versions: bool, deaths: int) -> tuple[int, int]:
    """Revealed and charged steps, after having compared them."""
    ledger, revealed = charged(root, versions), (root / "revealed").stat().st_size
    assert revealed <= len(ledger), f"{revealed} steps were revealed, {len(ledger)} are charged"
    assert len(ledger) <= revealed + deaths, f"{revealed} steps revealed, {deaths} deaths, {len(ledger)} charged"
    for path, known in surviving(root).items():
        steps = len(ledger)
        ledger.include(known)
        assert len(ledger) == steps, f"{path.name} knows steps that the journal does not"
    return revealed, len(ledger)


def kill_and_resume(root: Path, kills: int, versions: bool, generator: random.Random) -> str:
    """Kills so many trainings of one history, and says what happened."""
    root.mkdir(parents=True)
    assert wait_for(in_child(lambda: train(root, 0, None, versions, steps=3))) == 0
    died: collections.Counter[str] = collections.Counter()
    child = 0
    while died.total() < kills:
        child += 1
        assert child <= 2 * kills + 10, "too many trainings ended before they could be killed"
        kind = generator.choice(KINDS)
        number, share, delay = generator.randrange(40), generator.random(), generator.uniform(0.0, 0.25)
        if kind.endswith("sync"):
            number %= 6
        checkpoint = generator.choice(list(surviving(root)))

        def work(
            kind: str = kind, number: int = number, share: float = share, path: Path = checkpoint, child: int = child
        ) -> None:
            if kind != "time":
                die_at(kind, number, share)
            train(root, child, path, versions, steps=0)

        pid = in_child(work)
        if kind == "time":
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        code = wait_for(pid)
        assert code == -signal.SIGKILL, f"training {child} ended with {code} instead of being killed"
        died[kind] += 1
        check(root, versions, died.total())
    before, _ = check(root, versions, kills)
    newest = list(surviving(root))[-1]
    steps = torch.load(newest, weights_only=True)["global_step"] + 4
    assert wait_for(in_child(lambda: train(root, child + 1, newest, versions, steps))) == 0, "not resumable"
    revealed, total = check(root, versions, kills)
    assert revealed == before + 4
    where = "a directory for each training" if versions else "one directory"
    return f"{where}: {kills} kills ({dict(died)}), {revealed} steps revealed, {total} charged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one, which is printed")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    generator = random.Random(seed)
    (arguments.directory / "warm").mkdir(parents=True)
    train(arguments.directory / "warm", 0, None, versions=True, steps=3)  # imports what only a training imports
    half = arguments.kills // 2
    print(kill_and_resume(arguments.directory / "one", half, False, generator), flush=True)
    print(kill_and_resume(arguments.directory / "many", arguments.kills - half, True, generator), flush=True)


if __name__ == "__main__":
    main()
