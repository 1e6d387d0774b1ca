"""The ``lightning-dp`` command: LightningCLI, with a summary of accuracy and privacy at the end of a fit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from lightning_dp import __version__
from lightning_dp.cli.accounting import calibrate_command, epsilon_command
from lightning_dp.cli.audit import audit_command
from lightning_dp.cli.card import card_command
from lightning_dp.cli.check import check_command
from lightning_dp.cli.plot import plot_command
from lightning_dp.cli.recipes import recipes_command
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.training.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.training.callbacks.lookup import trainer_callbacks
from lightning_dp.training.callbacks.monitor import PrivacyMonitor
from lightning_dp.training.strategy import PrivateMixin


class PrivateCLI(LightningCLI):
    """LightningCLI whose ``fit`` ends with a test, when there is test data, and a line that says what came out."""

    def after_fit(self) -> None:
        metrics: Mapping[str, float] = {}
        has_test = self.datamodule is not None and _overrides(self.datamodule, "test_dataloader")
        if has_test and _overrides(self.model, "test_step") and not getattr(self.trainer, "fast_dev_run", False):
            [metrics] = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        line = summary(self.trainer, metrics)  # in every process: trainer.log_dir is a collective
        if self.trainer.is_global_zero:
            print(line)


def _overrides(instance: Any, method: str) -> bool:
    base = pl.LightningModule if isinstance(instance, pl.LightningModule) else pl.LightningDataModule
    return getattr(type(instance), method) is not getattr(base, method)


def summary(trainer: pl.Trainer, metrics: Mapping[str, float]) -> str:
    """One line: test metrics, ε, δ, adjacency, and where logs and checkpoint lie."""
    parts = [f"{name} = {float(value):.4f}" for name, value in metrics.items()]
    strategy = trainer.strategy
    if isinstance(strategy, PrivateMixin):
        monitors = [c.monitor if isinstance(c, DifferentialPrivacy) else c for c in trainer_callbacks(trainer)]
        deltas = [m.delta for m in monitors if isinstance(m, PrivacyMonitor)]
        steps = strategy.ledger.steps
        if deltas:
            epsilon = strategy.ledger.epsilon(deltas[0])
            shown = math.ceil(1e4 * epsilon) / 1e4 if math.isfinite(epsilon) else epsilon
            parts.append(f"ε = {shown:.4f} at δ = {deltas[0]:g} (adding or removing one record, {steps} private steps)")
        else:
            parts.append(f"{steps} private steps; add a PrivacyMonitor to state ε")
        if strategy.seed is not None:
            parts.append("seed= was given: this holds only while it is secret")
    else:
        parts.append("NOT PRIVATE (no DifferentialPrivacy callback, no private strategy)")
    if trainer.log_dir:
        parts.append(f"logs in {trainer.log_dir}")
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if checkpoint:
        parts.append(f"checkpoint {checkpoint}")
    return "lightning-dp: " + "; ".join(parts)


#: Commands besides LightningCLI's: what they are for, and what runs them.
COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "check": ("what a training would be like, before it is begun", check_command),
    "epsilon": ("the ε that a training costs", epsilon_command),
    "calibrate": ("the noise, or the number of steps, for a target ε", calibrate_command),
    "audit": ("lower bounds on ε, by attacks on a recipe", audit_command),
    "card": ("the privacy card of a run, from its journal", card_command),
    "recipes": ("list the shipped recipes, and copy one to change it (recipes copy NAME)", recipes_command),
    "plot": ("draw ε against steps and accuracy against ε, from logs", plot_command),
}


def _description() -> str:
    others = "; ".join(f"{name}: {purpose}" for name, (purpose, _) in COMMANDS.items())
    return (
        f"Differentially private training for PyTorch Lightning. Further commands, each with its own --help: {others}."
    )


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-dp fit|validate|test|predict --config …`` and of `COMMANDS`."""
    if args is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a recipe may name modules that lie beside it; installed ones come first
    arguments = sys.argv[1:] if args is None else args
    if arguments and arguments[0] in COMMANDS:
        COMMANDS[arguments[0]][1](arguments[1:])
        return
    if arguments[:1] == ["--version"]:
        print(f"lightning-dp {__version__}")
        return
    known = [*LightningCLI.subcommands(), *COMMANDS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        near = get_close_matches(arguments[0], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print(f"lightning-dp: no command {arguments[0]!r}{hint}. There are: {', '.join(known)}.", file=sys.stderr)
        raise SystemExit(2)
    try:
        PrivateCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            parser_kwargs={"prog": "lightning-dp", "description": _description()},
        )
    except (UnsupportedModelError, PrivacyConfigurationError) as error:
        if args is not None:  # called from Python
            raise
        sys.exit(f"lightning-dp: {error}")  # a refusal says all there is to say: no traceback
