"""What runs have logged: CSV, TensorBoard, wandb."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        raise ValueError(f"{path} holds no metrics.csv, no TensorBoard event file and no run-*.wandb.")
    if len(folders) > 1:
        names = ", ".join(sorted(str(folder) for folder in folders)[:5])
        raise ValueError(f"{path} holds the logs of {len(folders)} runs; name those to draw: {names}")
    run = RunLog(str(path))
    for file in found:
        if file.suffix == ".csv":
            _read_csv(file, run)
        elif file.suffix == ".wandb":
            _read_wandb(file, run)
        elif "tfevents" in file.name:
            _read_tensorboard(file, run)
        else:
            raise ValueError(f"{file} is neither a metrics.csv, nor a TensorBoard event file, nor a run-*.wandb.")
        if EPSILON in run.metrics:
            break  # several loggers wrote the same
    return run


def _log_files(folder: Path) -> list[Path]:
    for pattern in ("metrics.csv", "*tfevents*", "run-*.wandb"):
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


def _read_wandb(path: Path, run: RunLog) -> None:
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise missing_package("wandb", "Weights & Biases' run files", "wandb") from error
    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        values: dict[str, Any] = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        step = next((int(values[key]) for key in _STEP_KEYS if key in values), record.history.step.num)
        for name, value in values.items():
            if isinstance(value, int | float) and name not in (*_STEP_KEYS, "epoch", "_runtime", "_timestamp"):
                run.add(name, step, float(value))


def wandb_records(path: Path) -> Iterator[bytes]:
    """The serialised records of a ``run-*.wandb`` file, up to its end or to where a crash cut it off.

    The format is LevelDB's log: after a header of 7 bytes, blocks of 32 KiB (the header belongs to the first) that
    hold chunks of a checksum (4 bytes), a length (2) and a type (1: whole, 2: first, 3: middle, 4: last).

    Raises:
        ValueError: It is no such file.
    """
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is no run file of Weights & Biases.")
    position, block, record = 7, 2**15, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # the rest of a block that no chunk header fits into
            position += block - position % block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        if len(chunk) < length or kind not in (1, 2, 3, 4):
            return
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            yield record


def missing_package(package: str, purpose: str, extra: str) -> ImportError:
    """The error that names the extra to install."""
    return ImportError(f"{package} is needed for {purpose}: pip install 'lightning-dp[{extra}]'")


_STEP_KEYS = ("trainer/global_step", "_step")
