"""A user's script: ``python ddp_script.py STRATEGY FOLDER [--nodes N] [--devices D] [--fault raise|die|hang]``."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_dp import DifferentialPrivacy, GaussianNoise, PrivacyBudget, PrivateDDPStrategy
from tests.conftest import Net, loader

START_METHODS = {"private_ddp": "popen", "private_ddp_spawn": "spawn", "private_ddp_notebook": "fork"}


class Fault(Callback):
    """What happens in one process after three steps."""

    def __init__(self, kind: str | None, rank: int) -> None:
        self.kind, self.rank = kind, rank

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != self.rank or trainer.global_step != 3:
            return
        if self.kind == "raise":
            raise ZeroDivisionError("user code failed")
        if self.kind == "die":
            os._exit(3)
        if self.kind == "hang":
            time.sleep(600)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy")
    parser.add_argument("folder")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--fault")
    parser.add_argument("--rank", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    strategy: Any = arguments.strategy
    callbacks: list[Callback] = [Fault(arguments.fault, arguments.rank)]
    if strategy.startswith("ddp"):
        callbacks.append(DifferentialPrivacy(3.0, 1e-3))
    else:
        callbacks.append(PrivacyBudget(3.0, 1e-3))
        if arguments.fault:
            method: Any = START_METHODS[strategy]
            # Only a process that hangs is found by the timeout; a slow machine may take longer to choose the noise.
            timeout = timedelta(seconds=20 if arguments.fault == "hang" else 120)
            strategy = PrivateDDPStrategy(noise=GaussianNoise(), timeout=timeout, start_method=method)
    trainer = pl.Trainer(
        max_epochs=2,
        default_root_dir=arguments.folder,
        accelerator="cpu",
        devices=arguments.devices,
        num_nodes=arguments.nodes,
        strategy=strategy,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), loader(40, 8 // (arguments.devices * arguments.nodes)))
    if trainer.is_global_zero:
        epsilon = trainer.callback_metrics.get("privacy/epsilon", float("nan"))
        if arguments.strategy != "ddp_spawn":  # there, only the processes that train know of the ledger
            private: Any = trainer.strategy
            epsilon = private.ledger.epsilon(1e-3)
        print(f"\nresult: epsilon {epsilon:.4f}", flush=True)


if __name__ == "__main__":
    main()
