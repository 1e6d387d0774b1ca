"""``lightning-dp card``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_dp.errors import JournalError
from lightning_dp.reporting.card import card_of_run, write_card
from lightning_dp.reporting.markdown import render_card


def card_command(argv: Sequence[str]) -> None:
    """``lightning-dp card <run>``: the card of a run from its journal."""
    parser = argparse.ArgumentParser(
        prog="lightning-dp card",
        description="States what a run guarantees, from the journal in its directory: prints the privacy card, and "
        "writes it there as Markdown and JSON.",
    )
    parser.add_argument("run", help="the run's directory (the one that holds the checkpoints folder)")
    parser.add_argument("--delta", type=float, help="the δ to state ε at (default: that of the training)")
    parser.add_argument("--out", help="the directory to write to (default: the run's)")
    arguments = parser.parse_args(argv)
    try:
        card = card_of_run(arguments.run, arguments.delta)
        run = Path(arguments.run)
        paths = write_card(card, arguments.out or (run if run.is_dir() else run.parent))
    except (JournalError, ValueError, OSError) as error:
        parser.error(str(error))
    print(render_card(card))
    print(f"lightning-dp: written to {' and '.join(paths)}")
