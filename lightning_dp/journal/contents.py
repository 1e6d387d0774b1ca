"""Reads privacy journals, also damaged ones and those whose training went on in another directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dp_accounting import DpEvent
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import JournalError
from lightning_dp.journal import files
from lightning_dp.journal.files import OWN_DIRECTORY

#: The journal's name within its directory.
JOURNAL_NAME = "privacy_journal.jsonl"


FORMAT = 1


def encoded(event: DpEvent) -> dict[str, Any]:
    """An event as it stands in a journal."""
    ledger = PrivacyLedger()
    ledger.record(event)
    encoded: dict[str, Any] = ledger.state_dict()["runs"][0]["steps"][0]["event"]
    return encoded


@dataclass
class JournalRun:
    """What a journal knows about one fit."""

    name: str
    #: The "run" entry: process, boot, start, configuration (with versions), steps in the model at the start.
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
        """Charges ``used`` of the reserved steps, and drops the reservation."""
        if self.reserved is not None and used:
            self.steps.append((self.reserved[0], used))
        self.reserved, self.begun = None, 0

    def open_steps(self, believe_numbers: bool) -> int:
        """Steps of the open reservation that must be charged.

        Args:
            believe_numbers: Whether the step numbers in the file are complete; otherwise all reserved steps count.
        """
        if self.reserved is None:
            return 0
        same_boot = self.about.get("boot") is not None and self.about["boot"] == files.boot_identifier()
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
        #: The mechanism of the first training; another one is warned of (`warn_of_another_training`).
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
        #: Whether more than an unfinished line is missing, as after a loss of power: then reservations count in full.
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
                        f"was changed by something else. Restore it from a backup. {OWN_DIRECTORY} if there is none."
                    )
                self.damaged = True
                return
            try:
                self._read(value)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise JournalError(
                    f"Line {number} of the privacy journal {self.path} makes no sense ({error}): is it another "
                    f"program's file, or has it been edited? {OWN_DIRECTORY}."
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
                if value["format"] > FORMAT:
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
    """The journal of this name: where it lies relative to ``directory``, where it was written, or nearby.

    Raises:
        JournalError: The file where it was written cannot be read as a journal.
    """
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


def everything_known(path: Path) -> PrivacyLedger:
    """The ledger of a journal and of those that went on from it."""
    ledger = PrivacyLedger()
    for contents in read_with_continuations(path):
        ledger.include(contents.ledger())
    return ledger


def process_of(path: Path) -> str:
    """Which process trains in a journal's directory, for a message; empty where nobody can tell."""
    try:
        run = JournalContents(path).last_run()
    except JournalError:
        return ""
    return f" (process {run.about['process']})" if run is not None and not run.ended else ""
