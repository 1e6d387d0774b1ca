"""The journal: an append-only file beside a training's logs that knows of every private step before its result is used.

A checkpoint knows the steps that led to it; the steps that a killed process took afterwards are in nothing that it left
behind, except here. So that no step waits for the disk, steps are reserved ahead ("up to 20 more of this event"), and
only reservations are synced; every step then writes its number within the reservation, unsynced, before its gradient
is set.

Formal guarantee: at every moment the steps that the file accounts for include all whose noisy gradient has been used,

- after the end of the process, however it ended (SIGKILL included): exactly those, and at most one more;
- after the loss of power, read on another machine, or on a system without boot identifier (all but Linux): also the
  reserved ones that were perhaps never taken.

Proof: a reservation is on the disk (fsync) before its first step, and a step's number has been handed to the operating
system, which outlives the process, before the step. The numbers are believed only while the same system is running (by
its boot identifier); otherwise reservations count in full.

The file holds public information only: events, counts, configuration, N, q, the name, process and start of every run,
and notes (δ, names of metrics). No seed, no size of any batch that was drawn, nothing that was computed from records
without noise.

One line is one JSON value: an object with a ``"type"``, or a number n, "the n-th of the steps reserved last has begun".
"""

from __future__ import annotations

import json
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

from dp_accounting import DpEvent
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import JournalError
from lightning_dp.journal import files
from lightning_dp.journal.contents import (
    FORMAT,
    JOURNAL_NAME,
    JournalContents,
    encoded,
    everything_known,
    find_journal,
    process_of,
)
from lightning_dp.journal.files import OWN_DIRECTORY, open_locked, relative_path, sync_directory

#: The most steps that are reserved at once: what a loss of power can overcount by.
_MOST_RESERVED = 256


#: The share of the training's time that may be spent waiting for reservations to reach the disk.
_SYNC_SHARE = 0.01


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
        configuration: The mechanism, in plain data. If it or N differs from the journal's, a warning says so.

    Raises:
        JournalError: The directory is not local, another process has the file open, or it cannot be written, is damaged
            elsewhere than at its end, or is of a newer version.
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
        self._fd: int | None = open_locked(self.path, create=True, holder=process_of)
        _open_journals.add(self)
        try:
            contents = self._repaired()
            if len(contents.ledger()) or contents.continued:
                warn_of_another_training(contents, num_records, configuration)
                if num_records not in contents.num_records:
                    self._append({"type": "num_records", "num_records": num_records}, sync=True)
            else:  # nothing has been charged here: whatever was planned, something else may be trained
                os.ftruncate(self._fd, 0)
                head = {"type": "journal", "format": FORMAT, "name": contents.name or token_hex(8)}
                self._append({**head, "num_records": num_records, "configuration": configuration}, sync=True)
                sync_directory(self.path.parent)
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
        return everything_known(self.path)

    def continue_from(self, reference: Mapping[str, str], checkpoint_directory: Path) -> PrivacyLedger | None:
        """Every step that the journal of a checkpoint knows; that journal will know that training goes on here.

        Args:
            reference: The checkpoint's entry: the journal's ``name``, ``path``, and ``relative`` path.
            checkpoint_directory: What ``relative`` is relative to.

        Returns:
            ``None`` when the journal is not found.

        Raises:
            JournalError: It cannot be read, or another process has it open.
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
            return everything_known(found)
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

        Raises:
            JournalError: The file cannot be written: the step must not be taken.
        """
        if self._about is not None:
            head = {"type": "run", "run": self._run, "boot": files.boot_identifier(), "process": os.getpid()}
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
        record = {"type": "reserve", "run": self._run, "event": encoded(event), "count": count}
        started = time.perf_counter()
        self._append({**record, "used": self._begun}, sync=True)
        self._sync_seconds += time.perf_counter() - started
        self._syncs += 1
        self._event, self._begun, self._reserved = event, 0, count

    def _steps_to_reserve(self, at_most: int | None) -> int:
        """The number of steps at which waiting for the disk takes about `_SYNC_SHARE` of the time."""
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
            f"steps are charged to this one too. To account for this one alone: {OWN_DIRECTORY}."
        )
