"""The ledger of private steps: what has been released, from which ε is computed."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, SelfComposedDpEvent

from lightning_dp.accounting.cost import event_delta, event_epsilon
from lightning_dp.accounting.events import Accountant, Adjacency, Phase, decode_event, encode_event


class PrivacyLedger:
    """Every private step and statistic of a training, run-length encoded. ε is computed from it alone.

    The stage that adds the noise appends to it, before the noisy gradient becomes visible to anything. Steps are
    grouped by the run of a process that took them, under a random name, so that ledgers that share a history can be
    merged without counting a step twice, or leaving one out.
    """

    def __init__(self) -> None:
        self._runs: dict[str, list[tuple[DpEvent, int]]] = {}
        self._current = ""

    def start_run(self, name: str | None = None) -> None:
        """What is recorded from now on belongs to a new run, of a random name unless one is given."""
        self._current = secrets.token_hex(8) if name is None else name

    @property
    def run(self) -> str:
        """The name of the run that is being recorded."""
        return self._current

    def knows(self, run: str) -> bool:
        """Whether something was recorded under this name of a run."""
        return run in self._runs

    def __len__(self) -> int:
        """Number of releases: private steps, and statistics."""
        return sum(count for run in self._runs.values() for _, count in run)

    @property
    def steps(self) -> int:
        """Number of private steps of training."""
        return len(self) - sum(count for _, count in self.statistics())

    def statistics(self) -> list[tuple[DpEvent, int]]:
        """Releases that are not steps of training, and how often they happened: unsampled ones.

        A step is Poisson-sampled, also at q = 1. What has no noise counts as a step, as there is no telling.
        """
        return [(event, count) for event, count in self if isinstance(event, GaussianDpEvent)]

    def __iter__(self) -> Iterator[tuple[DpEvent, int]]:
        """Pairs of an event and how often it happened in a row."""
        steps = (entry for run in self._runs.values() for entry in run)
        for event, entries in itertools.groupby(steps, key=lambda entry: entry[0]):
            yield event, sum(count for _, count in entries)

    def record(self, event: DpEvent, count: int = 1) -> None:
        """Appends ``count`` releases of this event to the current run.

        Raises:
            ValueError: ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}.")
        if count == 0:
            return
        run = self._runs.setdefault(self._current, [])
        if run and run[-1][0] == event:
            count += run.pop()[1]
        run.append((event, count))

    def event(self) -> DpEvent:
        """All steps as one event; the same mechanism in different runs is composed as one."""
        counts: dict[DpEvent, int] = {}
        for event, count in self:
            counts[event] = counts.get(event, 0) + count
        return ComposedDpEvent([SelfComposedDpEvent(event, count) for event, count in counts.items()])

    def epsilon(self, delta: float, accountant: Accountant = "pld", adjacency: Adjacency = "add_or_remove") -> float:
        """ε at this δ of everything recorded: 0.0 for an empty ledger, infinity when a step had no noise."""
        return event_epsilon(self.event(), delta, accountant, adjacency)

    def delta(self, epsilon: float, accountant: Accountant = "pld", adjacency: Adjacency = "add_or_remove") -> float:
        """δ at this ε of everything recorded: 0.0 for an empty ledger, 1.0 when a step had no noise."""
        return event_delta(self.event(), epsilon, accountant, adjacency)

    @classmethod
    def of(cls, schedule: Sequence[Phase]) -> PrivacyLedger:
        """The ledger of a training that follows this schedule."""
        ledger = cls()
        for phase in schedule:
            ledger.record(phase.event(), phase.steps)
        return ledger

    def copy(self) -> PrivacyLedger:
        """A ledger with the same entries."""
        ledger = PrivacyLedger()
        ledger._runs = {name: list(run) for name, run in self._runs.items()}
        ledger._current = self._current
        return ledger

    def become(self, other: PrivacyLedger) -> None:
        """Replaces the entries and the current run of this ledger by copies of the other's."""
        self._runs, self._current = other.copy()._runs, other._current

    def extend(self, other: PrivacyLedger) -> None:
        """Appends all entries of the other to this ledger's current run, also those that both have."""
        for event, count in other:
            self.record(event, count)

    def include(self, other: PrivacyLedger) -> None:
        """Makes this ledger account for the steps of the other as well, counting common ones once.

        Both may hold the beginning of the same run: one process recorded it, so the longer one contains the shorter.
        """
        merged = {name: list(run) for name, run in other._runs.items()}
        for name, run in self._runs.items():
            if sum(count for _, count in run) >= sum(count for _, count in merged.get(name, [])):
                merged[name] = run
        self._runs = merged

    def state_dict(self) -> dict[str, Any]:
        """Plain data: lists, dictionaries, strings and numbers."""
        return {
            "runs": [
                {"name": name, "steps": [{"event": encode_event(event), "count": count} for event, count in run]}
                for name, run in self._runs.items()
            ]
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PrivacyLedger:
        """The ledger that `state_dict` described; what it records next belongs to a new run.

        Raises:
            ValueError: An event is of an unknown type.
        """
        ledger = cls()
        for run in state["runs"]:
            ledger._current = str(run["name"])
            for entry in run["steps"]:
                ledger.record(decode_event(entry["event"]), int(entry["count"]))
        ledger.start_run()
        return ledger


def epsilon(
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
) -> float:
    """ε of DP-SGD: ``steps`` Poisson-subsampled Gaussian mechanisms.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity; 0 gives infinity.
        sampling_rate: Probability with which each record joins each batch.
        steps: Number of private steps.
        delta: The δ to state ε at, strictly between 0 and 1.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.

    Raises:
        ValueError: An argument is out of its range.
    """
    return PrivacyLedger.of([Phase(steps, sampling_rate, noise_multiplier)]).epsilon(delta, accountant, adjacency)


def delta(
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    epsilon: float,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
) -> float:
    """δ of DP-SGD at a given ε ≥ 0; the other arguments as for `epsilon`. 1.0 without noise."""
    return PrivacyLedger.of([Phase(steps, sampling_rate, noise_multiplier)]).delta(epsilon, accountant, adjacency)
