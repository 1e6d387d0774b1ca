"""``lightning-dp check``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from lightning_dp.cli.from_config import from_config
from lightning_dp.training.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.training.callbacks.lookup import trainer_callbacks
from lightning_dp.training.check import check_with


def check_command(arguments: Sequence[str]) -> None:
    """``lightning-dp check --config …``: what the training would be like; exit status 1 where it would be refused."""
    parser = argparse.ArgumentParser(
        prog="lightning-dp check",
        description="What a training would be like, before it is begun: how every layer is dealt with, whether records "
        "are independent, noise against clip, the time of a step. Trains nothing, charges nothing. Further arguments "
        "(--trainer.max_epochs 20) are LightningCLI's.",
    )
    parser.add_argument("--config", required=True, action="append", help="the recipe; further ones override it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options, others = parser.parse_known_args(list(arguments))

    cli = from_config(options.config, others)
    privacy = next((c for c in trainer_callbacks(cli.trainer) if isinstance(c, DifferentialPrivacy)), None)
    if privacy is None:
        parser.error("the recipe trains without privacy: add the callback lightning_dp.DifferentialPrivacy")
    report = check_with(privacy, cli.model, cli.datamodule, cli.trainer)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    if not report.ok:
        raise SystemExit(1)
