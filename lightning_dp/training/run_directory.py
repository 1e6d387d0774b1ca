"""Where a run keeps its files, and the software that it ran with."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata

from lightning.pytorch import Trainer


def run_directory(trainer: Trainer) -> str:
    """Where `ModelCheckpoint` makes its folder ``checkpoints``: the first logger's directory, or the Trainer's root."""
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a private step."""
    packages = ("lightning-dp", "torch", "lightning", "dp-accounting", "numpy", "scipy", "randomgen")
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
