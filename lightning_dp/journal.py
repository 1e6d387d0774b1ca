"""The journal: an append-only file beside a training's logs that knows of every private step before its result is used.

A checkpoint knows the steps that led to it; the steps that a killed process took afterwards are in nothing that it left
behind, except here. So that no step waits for the disk, steps are reserved ahead ("up to 20 more of this event"), and
only reservations are synced; every step then writes its number within the reservation, unsynced, before its gradient
is set.

Formal guarantee: at every moment the steps that the file accounts for include all whose noisy gradient has been used,

- after the end of the process, however it ended (SIGKILL included): exactly those, and at most one more;
- after the loss of power, or read on another machine: also the reserved ones that were perhaps never taken.

Proof: a reservation is on the disk (fsync) before its first step, and a step's number has been handed to the operating
system, which outlives the process, before the step. The numbers are believed only while the same system is running (by
its boot identifier); otherwise reservations count in full.

The file holds public information only: events, counts, names of runs, configuration, N and q. No seed, no size of any
batch that was drawn, nothing that was computed from records without noise.

One line is one JSON value: an object with a ``"type"``, or a number n, "the n-th of the steps reserved last has begun".
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from secrets import token_hex
from types import ModuleType
from typing import Any

from dp_accounting import DpEvent
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dp.accounting import PrivacyLedger

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: no lock; two processes in one directory are then the user's care
    fcntl = None

#: The journal's name within its directory.
JOURNAL_NAME = "privacy_journal.jsonl"

_FORMAT = 1

#: The most steps that are reserved at once: what a loss of power can overcount by.
_MOST_RESERVED = 256

#: The share of the training's time that may be spent waiting for reservations to reach the disk.
_SYNC_SHARE = 0.01

#: For so long a process that has just been killed may still hold its lock.
_LOCK_SECONDS = 1.0

_OWN_DIRECTORY = (
    "Give this training a directory of its own (a logger with a new version, or Trainer(default_root_dir=…))"
)


class JournalError(RuntimeError):
    """The journal cannot be used; the message says why, and what to do."""


def boot_identifier() -> str | None:
    """Names the running system until it is restarted; ``None`` where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


#: Windows would otherwise write two characters at the end of a line.
_BINARY = getattr(os, "O_BINARY", 0)


def run_directory(trainer: Trainer) -> str:
    """Where `ModelCheckpoint` makes its folder ``checkpoints``: the first logger's directory, or the Trainer's root."""
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def relative_path(path: str | Path, folder: str | Path) -> str:
    """The path as seen from a folder; the path itself where there is no way (other drives)."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return str(path)


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a private step."""
    packages = ("lightning-dp", "torch", "lightning", "dp-accounting", "opacus", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _encode_event(event: DpEvent) -> dict[str, Any]:
    ledger = PrivacyLedger()
    ledger.record(event)
    encoded: dict[str, Any] = ledger.state_dict()["runs"][0]["steps"][0]["event"]
    return encoded


@dataclass
class JournalRun:
    """What a journal knows about one fit."""

    name: str
    #: The "run" record: process, boot, versions, configuration, steps that the model contained at the start.
    about: dict[str, Any]
    #: Encoded events and how often they were taken.
    steps: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    #: The encoded event and the number of steps that were reserved last, and how many of these have begun.
    reserved: tuple[dict[str, Any], int] | None = None
    begun: int = 0
    ended: bool = False
    #: Ended by a later process, which found that this one was gone.
    killed: bool = False

    def close_reservation(self, used: int) -> None:
        """So many of the reserved steps were taken, and no more will be."""
        if self.reserved is not None and used:
            self.steps.append((self.reserved[0], used))
        self.reserved, self.begun = None, 0

    def open_steps(self, believe_numbers: bool) -> int:
        """Steps of the open reservation that must be charged."""
        if self.reserved is None:
            return 0
        same_boot = self.about.get("boot") is not None and self.about["boot"] == boot_identifier()
        return self.begun if believe_numbers and same_boot else self.reserved[1]

    def charged(self, believe_numbers: bool) -> list[dict[str, Any]]:
        """All steps, as a ledger's ``state_dict`` writes them."""
        steps = list(self.steps)
        if self.reserved is not None:
            steps.append((self.reserved[0], self.open_steps(believe_numbers)))
        return [{"event": event, "count": count} for event, count in steps if count]


class JournalContents:
    """What is written in a journal's file. It can be read at any time, also while a process appends to it.

    Raises:
        JournalError: The file is not a journal, is damaged elsewhere than at its end, or is of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: The journal's random name; empty as long as nothing is written.
        self.name = ""
        #: Every N that it has been written with, in order.
        self.num_records: list[int] = []
        #: The mechanism: what must be the same in all runs of one journal.
        self.configuration: dict[str, Any] = {}
        self.runs: dict[str, JournalRun] = {}
        #: Journals that training went on in, from a checkpoint of this one.
        self.continued: list[dict[str, str]] = []
        #: Public facts that callbacks noted, the last one by each key; lists grow.
        self.notes: dict[str, Any] = {}
        self._included = PrivacyLedger()
        self._current: JournalRun | None = None
        try:
            data = path.read_bytes()
        except OSError as error:
            raise JournalError(f"The privacy journal {path} cannot be read: {error.strerror or error}.") from error
        #: Length in bytes of what is whole; the rest, if any, is a line that was never finished.
        self.size = 0
        #: Whether more than one unfinished line had to be left out, as a loss of power can make it.
        self.damaged = False
        self._parse(data)
        #: Whether the end of the file is missing something.
        self.torn = self.size < len(data)

    def _parse(self, data: bytes) -> None:
        number = 0
        while (end := data.find(b"\n", self.size)) >= 0:
            number += 1
            value = _value(data[self.size : end])
            if value is None:
                if any(isinstance(_value(later), dict) for later in data[end + 1 :].split(b"\n")[:-1]):
                    raise JournalError(
                        f"Line {number} of the privacy journal {self.path} is damaged, and later ones are not: it "
                        f"was changed by something else. Restore it from a backup. {_OWN_DIRECTORY} if there is none."
                    )
                self.damaged = True
                return
            try:
                self._read(value)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise JournalError(
                    f"Line {number} of the privacy journal {self.path} makes no sense ({error}): is it another "
                    f"program's file, or has it been edited? {_OWN_DIRECTORY}."
                ) from error
            self.size = end + 1
        self.damaged = b"\0" in data[self.size :]

    def _read(self, value: int | dict[str, Any]) -> None:
        if isinstance(value, int):
            run = self._current
            if run is None or run.reserved is None or not run.begun < value <= run.reserved[1]:
                raise ValueError("a step that was not reserved")
            run.begun = value
            return
        kind = value["type"]
        if kind != "journal" and not self.name:
            raise ValueError("it does not begin like a journal")
        match kind:
            case "journal":
                if value["format"] > _FORMAT:
                    raise JournalError(f"{self.path} was written by a newer version of lightning_dp; install that.")
                self.name, self.configuration = str(value["name"]), dict(value["configuration"])
                self.num_records.append(int(value["num_records"]))
            case "num_records":
                self.num_records.append(int(value["num_records"]))
            case "include":
                self._included.include(PrivacyLedger.from_state_dict(value["ledger"]))
            case "continued":
                self.continued.append({key: str(value[key]) for key in ("name", "relative", "path")})
            case "run":
                self._current = self.runs[value["run"]] = JournalRun(str(value["run"]), value)
            case "reserve":
                run = self._current = self.runs[value["run"]]
                run.close_reservation(int(value["used"]))
                run.reserved = (dict(value["event"]), int(value["count"]))
            case "end":
                run = self.runs[value["run"]]
                run.close_reservation(int(value["used"]))
                run.ended, run.killed, self._current = True, bool(value["killed"]), None
            case "note":
                for key, fact in value["note"].items():
                    lists = isinstance(fact, list) and isinstance(self.notes.get(key), list)
                    self.notes[key] = sorted({*self.notes[key], *fact}) if lists else fact
            case other:
                raise ValueError(f"a record of unknown type {other!r}; was it written by a newer version?")

    def ledger(self) -> PrivacyLedger:
        """Every private step that must be charged according to this file alone."""
        runs = [{"name": run.name, "steps": run.charged(not self.damaged)} for run in self.runs.values()]
        ledger = PrivacyLedger.from_state_dict({"runs": runs})
        ledger.include(self._included)
        return ledger

    def uncertain_steps(self) -> int:
        """Steps that are charged because they were reserved, without it being known that they were taken."""
        open_runs = [run for run in self.runs.values() if run.reserved is not None]
        return sum(run.open_steps(not self.damaged) - run.begun for run in open_runs)

    def last_run(self) -> JournalRun | None:
        """The fit that took the last steps."""
        return list(self.runs.values())[-1] if self.runs else None


def _value(line: bytes) -> int | dict[str, Any] | None:
    if line.isdigit():
        return int(line)
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_with_continuations(path: Path) -> Iterator[JournalContents]:
    """A journal, and all journals in which training went on from its checkpoints."""
    waiting, seen = [path], set()
    while waiting:
        contents = JournalContents(waiting.pop())
        if contents.name in seen:
            continue
        seen.add(contents.name)
        yield contents
        for link in contents.continued:
            found = find_journal(link, contents.path.parent)
            if found is not None:
                waiting.append(found)
            elif link["name"] not in seen:
                rank_zero_warn(
                    f"Training went on from a checkpoint of {contents.path} in {link['path']}, which is gone: what "
                    "was released there is not charged."
                )


def find_journal(reference: Mapping[str, str], directory: Path) -> Path | None:
    """The journal of this name: where it lies relative to ``directory``, where it was written, or nearby."""
    nearby = [directory / JOURNAL_NAME, directory.parent / JOURNAL_NAME]
    for path in (directory / reference["relative"], Path(reference["path"]), *nearby):
        try:
            if path.is_file() and JournalContents(path).name == reference["name"]:
                return path
        except JournalError as error:
            if path == Path(reference["path"]):
                raise
            rank_zero_warn(str(error))
    return None


def _everything(path: Path) -> PrivacyLedger:
    ledger = PrivacyLedger()
    for contents in read_with_continuations(path):
        ledger.include(contents.ledger())
    return ledger


#: Journals that this process has open. A forked child (a data loader's worker) must neither write nor hold the lock.
_open_journals: weakref.WeakSet[PrivacyJournal] = weakref.WeakSet()


def _abandon_in_child() -> None:
    for journal in list(_open_journals):
        journal._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)


class PrivacyJournal:
    """Appends to the journal of a directory. One process at a time; another is refused.

    Opening it repairs an unfinished last line, and charges what a process that is gone had begun.

    Args:
        directory: Where the file is, or will be; made if it does not exist.
        num_records: N, the number of records of the train set.
        configuration: The mechanism, in plain data: what must be the same in all runs of one journal.

    Raises:
        JournalError: It belongs to another data set or configuration, another process has it open, or it cannot be
            written.
    """

    def __init__(self, directory: str | Path, *, num_records: int, configuration: Mapping[str, Any]) -> None:
        if "://" in str(directory):
            raise JournalError(
                f"The privacy journal must be a local file, and this training's directory is {directory}. Give the "
                "Trainer a local default_root_dir (or its logger a local save_dir), or train with journal=False: then "
                "the steps that a crash loses are not charged when training is resumed."
            )
        self.path = Path(os.path.abspath(directory)) / JOURNAL_NAME
        self._run = ""
        self._about: Callable[[], Mapping[str, Any]] | None = None
        self._event: DpEvent | None = None
        self._begun, self._reserved = 0, 0
        self._steps, self._syncs, self._sync_seconds, self._first = 0, 0, 0.0, 0.0
        self._failed = False
        self._fd: int | None = _open_locked(self.path, create=True)
        _open_journals.add(self)
        try:
            contents = self._repaired()
            if len(contents.ledger()) or contents.continued:
                warn_of_another_training(contents, num_records, configuration)
                if num_records not in contents.num_records:
                    self._append({"type": "num_records", "num_records": num_records}, sync=True)
            else:  # nothing has been charged here: whatever was planned, something else may be trained
                os.ftruncate(self._fd, 0)
                head = {"type": "journal", "format": _FORMAT, "name": contents.name or token_hex(8)}
                self._append({**head, "num_records": num_records, "configuration": configuration}, sync=True)
                _sync_directory(self.path.parent)
                contents = JournalContents(self.path)
            self._num_records = num_records
            for run in contents.runs.values():
                if not run.ended:
                    used = run.open_steps(not contents.damaged)
                    self._append({"type": "end", "run": run.name, "used": used, "killed": True}, sync=True)
            self.contents = JournalContents(self.path)
            #: Steps that are charged though it is not known that they were taken.
            self.uncertain_steps = contents.uncertain_steps()
            if num_records != self.contents.num_records[-1]:
                self._append({"type": "num_records", "num_records": num_records})
        except BaseException:
            self._abandon()
            raise

    def _repaired(self) -> JournalContents:
        contents = JournalContents(self.path)
        if contents.torn:
            assert self._fd is not None
            os.ftruncate(self._fd, contents.size)
            os.fsync(self._fd)
            rank_zero_warn(
                f"The last line of the privacy journal {self.path} was never finished, as happens when a process is "
                "killed; it has been removed. The step that it was for had not been taken."
                if not contents.damaged
                else f"The end of the privacy journal {self.path} was damaged, as happens when power is lost; it has "
                "been removed. All steps that were reserved are charged."
            )
        return contents

    @property
    def name(self) -> str:
        """The journal's random name."""
        return self.contents.name

    def reference(self) -> dict[str, str]:
        """What a checkpoint says about its journal: name and place."""
        return {"name": self.name, "path": str(self.path)}

    # -- at the start of a fit -------------------------------------------------------------------------------------

    def known(self) -> PrivacyLedger:
        """Every step of this journal and of those that training went on in."""
        return _everything(self.path)

    def continue_from(self, reference: Mapping[str, str], checkpoint_directory: Path) -> PrivacyLedger | None:
        """Every step that the journal of a checkpoint knows; that journal will know that training goes on here.

        ``None`` when the journal is not found.
        """
        found = find_journal(reference, checkpoint_directory)
        if found is None or found.samefile(self.path):
            return None if found is None and reference["name"] != self.name else self.known()
        if not os.access(found, os.W_OK):
            warn_of_another_training(JournalContents(found), self._num_records, self.contents.configuration)
            rank_zero_warn(
                f"The checkpoint's privacy journal {found} cannot be written: when training is resumed from the same "
                "checkpoint once more, the steps taken now will not be charged there."
            )
            return _everything(found)
        other = PrivacyJournal(found.parent, num_records=self._num_records, configuration=self.contents.configuration)
        try:
            self.uncertain_steps += other.uncertain_steps
            if self.name not in [other.name, *(link["name"] for link in other.contents.continued)]:
                relative = relative_path(self.path, other.path.parent)
                other._append({"type": "continued", **self.reference(), "relative": relative}, sync=True)
            return other.known()
        finally:
            other.close()

    def include(self, ledger: PrivacyLedger) -> None:
        """Makes the journal account for all steps of a ledger, whoever took them."""
        merged = self.contents.ledger()
        before = len(merged)
        merged.include(ledger)
        if len(merged) > before:
            self._append({"type": "include", "ledger": merged.state_dict()}, sync=True)

    def start_run(self, run: str, about: Callable[[], Mapping[str, Any]]) -> None:
        """What is charged from now on belongs to this run; ``about`` describes it when its first step is taken."""
        if not run:
            raise ValueError("A run of the journal needs a name, by which its steps are told from those of others.")
        self._run, self._about = run, about

    def set_num_records(self, num_records: int) -> None:
        """The train set has been loaded again, and may have grown."""
        if num_records != self._num_records:
            self._append({"type": "num_records", "num_records": num_records}, sync=True)
            self._num_records = num_records

    # -- at every step ---------------------------------------------------------------------------------------------

    def charge(self, event: DpEvent, at_most: int | None = None) -> None:
        """Accounts for one step of this event; on return, the step may be taken.

        Args:
            event: The step's cost.
            at_most: The most steps, this one included, that a budget has room for: no more are reserved.
        """
        if self._about is not None:
            head = {"type": "run", "run": self._run, "boot": boot_identifier(), "process": os.getpid()}
            started = datetime.now(UTC).isoformat(timespec="seconds")
            self._append({**head, "started": started, **self._about()})
            self._about, self._first = None, time.perf_counter()
        if self._begun == self._reserved or event != self._event:
            self._reserve(event, at_most)
        self._begun += 1
        self._steps += 1
        self._write(b"%d\n" % self._begun)

    def _reserve(self, event: DpEvent, at_most: int | None) -> None:
        count = self._steps_to_reserve(at_most)
        record = {"type": "reserve", "run": self._run, "event": _encode_event(event), "count": count}
        started = time.perf_counter()
        self._append({**record, "used": self._begun}, sync=True)
        self._sync_seconds += time.perf_counter() - started
        self._syncs += 1
        self._event, self._begun, self._reserved = event, 0, count

    def _steps_to_reserve(self, at_most: int | None) -> int:
        """So many that waiting for the disk takes about `_SYNC_SHARE` of the time."""
        limit = _MOST_RESERVED if at_most is None else min(at_most, _MOST_RESERVED)
        if self._steps < 2:
            return 1
        step_seconds = (time.perf_counter() - self._first) / self._steps
        wanted = self._sync_seconds / self._syncs / (_SYNC_SHARE * max(step_seconds, 1e-9))
        return max(1, min(math.ceil(wanted), limit))

    def note(self, **facts: Any) -> None:
        """Keeps public facts for the privacy card."""
        if self._fd is not None:
            self._append({"type": "note", "note": facts})

    # -- at the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives back the reserved steps that were not taken, and lets other processes in."""
        if self._fd is None:
            return
        try:
            if self._about is None and self._run and not self._failed:
                self._append({"type": "end", "run": self._run, "used": self._begun, "killed": False}, sync=True)
        except JournalError as error:
            rank_zero_warn(f"{error} Steps that were reserved and not taken will be charged.")
        finally:
            self._abandon()

    def _abandon(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self._abandon()

    def _append(self, record: Mapping[str, Any], sync: bool = False) -> None:
        self._write(json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n", sync)

    def _write(self, data: bytes, sync: bool = False) -> None:
        if self._fd is None or self._failed:
            raise JournalError(f"The privacy journal {self.path} is not open in this process.")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            if sync:
                os.fsync(self._fd)
        except OSError as error:
            self._failed = True
            raise JournalError(
                f"The privacy journal {self.path} cannot be written: {error.strerror or error}. No step is taken that "
                "it does not know of."
            ) from error


def warn_of_another_training(contents: JournalContents, num_records: int, configuration: Mapping[str, Any]) -> None:
    """Says when a journal was begun with another train set or mechanism.

    Its steps are charged all the same: what a step costs is its noise and sampling rate, which every entry states.
    """
    differing = []
    if num_records not in contents.num_records:
        differing.append(f"{contents.num_records[-1]} records (now {num_records})")
    here = json.loads(json.dumps(configuration, default=str))
    for key in sorted({*here, *contents.configuration}):
        then, now = contents.configuration.get(key), here.get(key)
        if then != now:
            differing.append(f"{key} = {then} (now {now})")
    if differing:
        rank_zero_warn(
            f"lightning_dp: the privacy journal {contents.path} was begun by a training with {', '.join(differing)}. "
            "Its "
            f"steps are charged to this one too. To account for this one alone: {_OWN_DIRECTORY}."
        )


def _open_locked(path: Path, create: bool) -> int:
    """A file descriptor for appending that no other process has.

    The lock ends with the process, however it ends; at a fork the child gives it up (`_abandon_in_child`).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | _BINARY | (os.O_CREAT if create else 0), 0o666)
    except OSError as error:
        raise JournalError(
            f"The privacy journal {path} cannot be written: {error.strerror or error}. Give the Trainer a "
            "default_root_dir (or its logger a save_dir) that can, or train with journal=False: then the steps that a "
            "crash loses are not charged when training is resumed."
        ) from error
    if fcntl is None:
        return fd
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError as error:
            if time.monotonic() < end:
                time.sleep(0.02)
                continue
            os.close(fd)
            raise JournalError(
                f"Another process{_process_of(path)} is training in {path.parent}, and one journal cannot serve two. "
                f"{_OWN_DIRECTORY}, or wait for the other to end."
            ) from error
        except OSError as error:
            rank_zero_warn(f"{path.parent} has no locks ({error.strerror}): let only one process train there.")
            return fd


def _process_of(path: Path) -> str:
    try:
        run = JournalContents(path).last_run()
    except JournalError:
        return ""
    return f" (process {run.about['process']})" if run is not None and not run.ended else ""


def _sync_directory(directory: Path) -> None:
    """Makes a new file's name durable, where directories can be synced."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(fd)
    os.close(fd)
