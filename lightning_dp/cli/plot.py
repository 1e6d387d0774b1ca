"""``lightning-dp plot``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_dp.reporting.logs import read_run
from lightning_dp.reporting.plots import EPSILON, draw


def plot_command(arguments: Sequence[str]) -> None:
    """``lightning-dp plot``: reads runs, writes a PNG and an SVG."""
    parser = argparse.ArgumentParser(
        prog="lightning-dp plot",
        description="Draws ε against steps, and accuracy against ε, for the runs whose logs are named.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="log folders or files: CSV, TensorBoard")
    parser.add_argument("--metric", help="drawn against ε; default: an accuracy, of validation if there is one")
    parser.add_argument("--names", nargs="+", help="what to call the runs in the legend")
    parser.add_argument("--out", type=Path, default=Path("privacy"),
                        help="where to write: OUT.png and OUT.svg, or one of them if it has that ending")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.names and len(args.names) != len(args.runs):
        parser.error(f"--names: {len(args.names)} names for {len(args.runs)} runs")
    runs = []
    try:
        for number, path in enumerate(args.runs):
            if sys.stderr.isatty():
                print(f"reading {path} ({number + 1} of {len(args.runs)}) …", file=sys.stderr)
            run = read_run(path)
            run.name = args.names[number] if args.names else run.name
            runs.append(run)
        for run in runs:
            if EPSILON not in run.metrics and len(runs) > 1:
                print(f"{run.name} has no {EPSILON}: left out", file=sys.stderr)
        figure = draw(runs, args.metric)
    except (FileNotFoundError, ValueError, ImportError) as error:
        parser.error(str(error))
    out: Path = args.out
    files = [out] if out.suffix in (".png", ".svg") else [out.with_name(out.name + end) for end in (".png", ".svg")]
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        figure.savefig(file, dpi=150)
        print(file)
