"""The command ``lightning-dp``."""

from lightning_dp.cli.command import main

__all__ = ["main"]
