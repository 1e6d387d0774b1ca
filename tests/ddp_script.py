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

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_dp import DifferentialPrivacy, GaussianNoise, PrivacyBudget, PrivateDDPStrategy
from tests.conftest import Net, loader


class Fault(Callback):
    """What happens in the second process after three steps."""

    def __init__(self, kind: str | None) -> None:
        self.kind = kind

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != 1 or trainer.global_step != 3:
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
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    strategy: Any = arguments.strategy
    callbacks: list[Callback] = [Fault(arguments.fault)]
    if strategy.startswith("ddp"):
        callbacks.append(DifferentialPrivacy(3.0, 1e-3, seed=3))
    else:
        method = {"private_ddp": "popen", "private_ddp_spawn": "spawn", "private_ddp_notebook": "fork"}[strategy]
        if arguments.fault or arguments.nodes > 1:
            strategy = PrivateDDPStrategy(
                noise=GaussianNoise(), seed=3, timeout=timedelta(seconds=20), start_method=method
            )
        callbacks.append(PrivacyBudget(3.0, 1e-3))
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
    trainer.fit(Net(), loader(40, 4))
    private: Any = trainer.strategy
    if trainer.is_global_zero:
        print(f"\nresult: {len(private.ledger)} steps, epsilon {private.ledger.epsilon(1e-3):.6f}", flush=True)


if __name__ == "__main__":
    main()
