"""What runs have logged: CSV and TensorBoard."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

EPSILON = "privacy/epsilon"


@dataclass
class RunLog:
    """The metrics of one run, each a list of ``(step, value)`` in the order of logging."""

    name: str
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, name: str, step: int, value: float) -> None:
        """Appends one logged value."""
        self.metrics.setdefault(name, []).append((step, value))

    def against_epsilon(self, metric: str) -> list[tuple[float, float]]:
        """Pairs of ε and the metric.

        ε at a step is the last that was logged at or before it; the first one, for steps before any.
        """
        spent = sorted(self.metrics.get(EPSILON, []))
        if not spent:
            return []
        pairs = []
        for step, value in sorted(self.metrics.get(metric, [])):
            earlier = [epsilon for at, epsilon in spent if at <= step]
            pairs.append((earlier[-1] if earlier else spent[0][1], value))
        return pairs


def read_run(path: Path) -> RunLog:
    """Reads one run.

    Args:
        path: A log file, or a folder that holds the log of one run (searched with its sub-folders).

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: No known log, or the logs of several runs.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    found = [path] if path.is_file() else _log_files(path)
    folders = {file.parent for file in found}
    if not found:
        raise ValueError(
            f"{path} holds no metrics.csv and no TensorBoard event file. (wandb has no public reader of its own files: "
            "log to a CSVLogger as well.)"
        )
    if len(folders) > 1:
        names = ", ".join(sorted(str(folder) for folder in folders)[:5])
        raise ValueError(f"{path} holds the logs of {len(folders)} runs; name those to draw: {names}")
    run = RunLog(str(path))
    for file in found:
        if file.suffix == ".csv":
            _read_csv(file, run)
        elif "tfevents" in file.name:
            _read_tensorboard(file, run)
        else:
            raise ValueError(f"{file} is neither a metrics.csv nor a TensorBoard event file.")
    return run


def _log_files(folder: Path) -> list[Path]:
    for pattern in ("metrics.csv", "*tfevents*"):
        if found := sorted(file for file in folder.rglob(pattern) if file.is_file()):
            return found
    return []


def _read_csv(path: Path, run: RunLog) -> None:
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    run.add(name, int(row["step"]), float(value))


def _read_tensorboard(path: Path, run: RunLog) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise missing_package("tensorboard", "TensorBoard's event files", "tensorboard") from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            run.add(name, event.step, event.value)


def missing_package(package: str, purpose: str, extra: str) -> ImportError:
    """The error that names the extra to install."""
    return ImportError(f"{package} is needed for {purpose}: pip install 'lightning-dp[{extra}]'")
