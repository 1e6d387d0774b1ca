"""``lightning-dp audit``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_dp.audit.one_run import audit_mechanism, audit_training
from lightning_dp.audit.report import write_audits
from lightning_dp.audit.step import audit_module
from lightning_dp.cli.from_config import from_config
from lightning_dp.mechanism.noise import with_multiplier
from lightning_dp.training.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.training.callbacks.lookup import trainer_callbacks
from lightning_dp.training.callbacks.monitor import PrivacyMonitor
from lightning_dp.training.single_device import PrivateStrategy
from lightning_dp.training.users_loader import records_and_batch_size


def audit_command(arguments: Sequence[str]) -> None:
    """``lightning-dp audit --config …``: trains a recipe with canaries, and attacks what comes out."""
    parser = argparse.ArgumentParser(
        prog="lightning-dp audit",
        description="Lower bounds on ε, by attacks, beside what the ledger claims. Trains the recipe once, on its "
        "records and wrongly labelled copies of some. A bound above the claim proves a defect; one below proves "
        "nothing. Further arguments (--trainer.max_epochs 1) are LightningCLI's.",
    )
    parser.add_argument("--config", required=True, action="append", help="the recipe; further ones override it")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="default: all")
    parser.add_argument("--canaries", type=int, default=1000, help="wrongly labelled records; default: %(default)s")
    parser.add_argument("--trials", type=int, default=1000, help="single steps of each kind; default: %(default)s")
    parser.add_argument("--confidence", type=float, default=0.95, help="of every bound; default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder for audit.json and audit.png (default: that of the logs)")
    options, others = parser.parse_known_args(list(arguments))
    if not 0.5 <= options.confidence < 1:
        parser.error(f"--confidence must lie in [0.5, 1), got {options.confidence:g}")

    cli = from_config(options.config, others)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    loader = cli.datamodule.train_dataloader()
    delta = _delta_of(cli.trainer, records_and_batch_size(loader)[0])
    common: dict[str, Any] = {"delta": delta, "confidence": options.confidence}
    try:
        found = [audit_training(cli.model, loader, cli.trainer, canaries=options.canaries, **common)]
    except ValueError as error:
        parser.error(str(error))
    print(found[0], flush=True)
    strategy: Any = cli.trainer.strategy
    noise = with_multiplier(strategy.mechanism.noise, strategy.noise_multiplier)
    if "mechanism" in options.attacks:
        with tempfile.TemporaryDirectory() as root:
            found.append(
                audit_mechanism(
                    lambda: PrivateStrategy(strategy.mechanism.clipping, noise),
                    records=strategy.num_records,
                    expected_batch_size=round(strategy.expected_batch_size),
                    steps=strategy.ledger.steps,
                    root=root,
                    **common,
                )
            )
        print(found[-1], flush=True)
    if "step" in options.attacks:
        found.append(
            audit_module(
                cli.model, loader, strategy.mechanism.clipping, noise, multiplier=1.0, engine=strategy.options.engine,
                trials=options.trials, **common,
            )
        )  # fmt: skip
        print(found[-1], flush=True)
    folder = options.out or Path(cli.trainer.log_dir or cli.trainer.default_root_dir)
    print("lightning-dp: written to " + " and ".join(str(path) for path in write_audits(found, folder)))
    if not all(audit.passed for audit in found):
        raise SystemExit(1)


#: In the order in which they run; "training" always does, because the others use its strategy.
ATTACKS = ("training", "mechanism", "step")


def _delta_of(trainer: pl.Trainer, num_records: int) -> float:
    for callback in trainer_callbacks(trainer):
        monitor = callback.monitor if isinstance(callback, DifferentialPrivacy) else callback
        if isinstance(monitor, PrivacyMonitor):
            return monitor.delta_of(num_records)
    raise SystemExit("lightning-dp audit: the recipe states no δ: add DifferentialPrivacy or PrivacyMonitor.")
