"""Where a run keeps its files, and the software that it ran with."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib import metadata

from lightning.pytorch import Trainer

#: The folder of runs without a logger, below the Trainer's root.
RUNS = "private_runs"


def run_directory(trainer: Trainer) -> str:
    """A fit's own directory: the first logger's, or one that no fit has had, numbered as loggers number theirs.

    Only ``ckpt_path=`` continues a training: its checkpoint knows where the journal is.
    """
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    root = os.path.join(trainer.default_root_dir, RUNS)
    taken = [int(m[1]) for name in _listed(root) if (m := re.fullmatch(r"version_(\d+)", name))]
    return os.path.join(root, f"version_{max(taken, default=-1) + 1}")


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # none was made yet, or it is not on this machine
        return []


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a private step."""
    packages = ("lightning-dp", "torch", "lightning", "dp-accounting", "numpy", "scipy", "randomgen")
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
