"""``lightning-dp audit``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

from lightning_dp.audit.one_run import audit_mechanism, audit_training
from lightning_dp.audit.report import Audit, write_audits
from lightning_dp.audit.step import audit_module
from lightning_dp.cli.from_config import from_config
from lightning_dp.mechanism.clipping import Bounding
from lightning_dp.mechanism.noise import Noise, with_multiplier
from lightning_dp.training.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.training.callbacks.lookup import trainer_callbacks
from lightning_dp.training.callbacks.monitor import PrivacyMonitor
from lightning_dp.training.check import check_with
from lightning_dp.training.single_device import PrivateStrategy
from lightning_dp.training.users_loader import records_and_batch_size


def audit_command(arguments: Sequence[str]) -> None:
    """``lightning-dp audit --config …``: attacks a recipe: a training with canaries, its mechanism, single steps."""
    parser = argparse.ArgumentParser(
        prog="lightning-dp audit",
        description="Lower bounds on ε, by attacks, beside what the ledger claims: on a training of the recipe, on its "
        "records and wrongly labelled copies of some; on its mechanism; on single steps of its model. A bound above "
        "the claim proves a defect; one below proves nothing. Further arguments (--trainer.max_epochs 1) are "
        "LightningCLI's.",
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
    delta = _delta_of(cli.trainer, records_and_batch_size(loader, public_weights=True)[0])
    common: dict[str, Any] = {"delta": delta, "confidence": options.confidence}
    found: list[Audit] = []

    def show(audit: Audit) -> None:
        found.append(audit)
        print(audit, flush=True)

    if "training" in options.attacks:
        try:
            show(audit_training(cli.model, loader, cli.trainer, canaries=options.canaries, **common))
        except ValueError as error:
            parser.error(str(error))
        target = _trained(cli.trainer.strategy)
    else:
        target = _planned(cli)
        cli.model.trainer = cli.trainer  # as a training leaves it
    if "mechanism" in options.attacks:
        with tempfile.TemporaryDirectory() as root:
            show(
                audit_mechanism(
                    lambda: PrivateStrategy(target.clipping, target.noise),
                    records=target.num_records,
                    expected_batch_size=round(target.expected_batch_size),
                    steps=target.steps,
                    root=root,
                    **common,
                )
            )
    if "step" in options.attacks:
        show(
            audit_module(
                cli.model, loader, target.clipping, target.noise, multiplier=1.0, engine=target.engine,
                trials=options.trials, **common,
            )
        )  # fmt: skip
    folder = options.out or Path(cli.trainer.log_dir or cli.trainer.default_root_dir)
    print("lightning-dp: written to " + " and ".join(str(path) for path in write_audits(found, folder)))
    if not all(audit.passed for audit in found):
        raise SystemExit(1)


#: In the order in which they run.
ATTACKS = ("training", "mechanism", "step")


class _Target(NamedTuple):
    """What is attacked beside a whole training: the mechanism that it has, and how often it is used."""

    clipping: Bounding
    noise: Noise
    engine: str
    num_records: int
    expected_batch_size: float
    steps: int


def _trained(strategy: Any) -> _Target:
    noise = with_multiplier(strategy.mechanism.noise, strategy.noise_multiplier)
    return _Target(
        strategy.mechanism.clipping, noise, strategy.options.engine, strategy.num_records,
        strategy.expected_batch_size, strategy.ledger.steps,
    )  # fmt: skip


def _planned(cli: Any) -> _Target:
    """What the recipe would train with."""
    privacy = next((c for c in trainer_callbacks(cli.trainer) if isinstance(c, DifferentialPrivacy)), None)
    if privacy is None:
        raise SystemExit(
            "lightning-dp audit: without --attacks training, the noise is that which the callback DifferentialPrivacy "
            "plans, and the recipe has none. Add --attacks training, or the callback."
        )
    report = check_with(privacy, cli.model, cli.datamodule, cli.trainer)
    if not report.ok or report.plan is None:
        raise SystemExit(f"lightning-dp audit: the recipe would not be trained.\n{report}")
    plan, mechanism = report.plan, privacy.mechanism
    noise = with_multiplier(mechanism.noise, plan.noise_multiplier)
    return _Target(
        mechanism.clipping, noise, privacy.engine, plan.num_records, plan.expected_batch_size, plan.steps
    )  # fmt: skip


def _delta_of(trainer: pl.Trainer, num_records: int) -> float:
    for callback in trainer_callbacks(trainer):
        monitor = callback.monitor if isinstance(callback, DifferentialPrivacy) else callback
        if isinstance(monitor, PrivacyMonitor):
            return monitor.delta_of(num_records)
    raise SystemExit("lightning-dp audit: the recipe states no δ: add DifferentialPrivacy or PrivacyMonitor.")
