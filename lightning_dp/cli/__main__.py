"""``python -m lightning_dp.cli`` is the command."""

from lightning_dp.cli import main

main()
