"""Module, data and Trainer of a recipe, for commands that do not simply run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI


def from_config(configs: Sequence[str], others: Sequence[str]) -> LightningCLI:
    """What LightningCLI makes of these files and further arguments; nothing is run."""
    from lightning.pytorch.cli import LightningCLI

    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        args=[*(f"--config={config}" for config in configs), *others],
    )
