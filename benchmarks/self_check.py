"""What the self-check at the start of a fit costs: its processor time, beside that of a private step.

python benchmarks/self_check.py
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from models import WORKLOADS, Module
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy, GaussianNoise

#: Workload and batch size.
CASES = (("mlp", 256), ("wrn", 32), ("wrn", 128), ("transformer", 16), ("transformer", 64))


class Seconds(Callback):
    """Processor time of every step; the first holds the self-check."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._started = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(time.process_time() - self._started)


def steps(workload: str, batch_size: int, self_check: bool) -> list[float]:
    work, seconds = WORKLOADS[workload], Seconds()
    data = DataLoader(TensorDataset(*work.draw(8 * batch_size)), batch_size=batch_size)
    private = DifferentialPrivacy(None, 1e-5, noise=GaussianNoise(1.0), card=False, self_check=self_check)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, callbacks=[private, seconds],
        )  # fmt: skip
        trainer.fit(Module(work.make()), data)
    return seconds.steps


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| model (batch) | self-check | step | ratio |\n|---|---|---|---|")
    for workload, batch_size in CASES:
        without, with_it = (steps(workload, batch_size, self_check) for self_check in (False, True))
        step = statistics.median(without[1:] + with_it[1:])
        check = with_it[0] - without[0]
        print(f"| {workload} ({batch_size}) | {check:.2f} s | {step:.2f} s | {check / step:.2f} |", flush=True)


if __name__ == "__main__":
    main()
