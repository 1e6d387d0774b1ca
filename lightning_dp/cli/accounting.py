"""``lightning-dp epsilon`` and ``lightning-dp calibrate``."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from lightning_dp.accounting.calibration import calibrate_noise, calibrate_steps
from lightning_dp.accounting.events import ACCOUNTANTS, ADJACENCIES
from lightning_dp.accounting.ledger import epsilon

_ADJACENCY_TEXT = {"add_or_remove": "adding or removing one record", "replace_one": "replacing one record"}


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lightning-dp {command}", description=description)
    parser.add_argument("--delta", type=float, required=True, help="the δ at which ε is stated; well below 1/N")
    parser.add_argument(
        "--sampling-rate", type=float, nargs="+", metavar="Q", help="probability that a record joins a batch"
    )
    parser.add_argument(
        "--dataset-size", type=int, metavar="N", help="number of records; with --batch-size, instead of Q"
    )
    parser.add_argument("--batch-size", type=float, nargs="+", metavar="B", help="expected batch size")
    parser.add_argument("--steps", type=int, nargs="+", metavar="T", help="number of private steps")
    parser.add_argument("--epochs", type=float, nargs="+", metavar="E", help="passes over the data, instead of steps")
    parser.add_argument("--accountant", choices=ACCOUNTANTS, default="pld", help="default: %(default)s")
    parser.add_argument("--adjacency", choices=ADJACENCIES, default="add_or_remove", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    return parser


def _rates(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[float]:
    if (args.sampling_rate is None) == (args.batch_size is None):
        parser.error("give either --sampling-rate, or --dataset-size and --batch-size")
    if args.sampling_rate is not None:
        if args.dataset_size is not None:
            parser.error("--dataset-size goes with --batch-size, not with --sampling-rate")
        return list(args.sampling_rate)
    if args.dataset_size is None:
        parser.error("--batch-size needs --dataset-size")
    if args.dataset_size < 1:
        parser.error(f"--dataset-size must be at least 1, got {args.dataset_size}")
    if bad := [size for size in args.batch_size if not 0 < size <= args.dataset_size]:
        parser.error(f"--batch-size must lie between 0 and the dataset size ({args.dataset_size}), got {bad[0]:g}")
    return [size / args.dataset_size for size in args.batch_size]


def _lengths(parser: argparse.ArgumentParser, args: argparse.Namespace, rate: float) -> list[int]:
    """Numbers of steps. An epoch has ⌈1/q⌉ of them, as in training without ``drop_last``."""
    if (args.steps is None) == (args.epochs is None):
        parser.error("give either --steps or --epochs")
    if args.steps is not None:
        return list(args.steps)
    return [math.ceil(epochs * math.ceil(1 / rate - 1e-6) - 1e-9) for epochs in args.epochs]


def _run(args: argparse.Namespace, work: Sequence[Any], compute: Any) -> None:
    """Computes one row per item, with progress on a terminal, and prints them."""
    rows = []
    for number, item in enumerate(work, 1):
        if sys.stderr.isatty():
            print(f"\r{number} of {len(work)} …", end="", file=sys.stderr, flush=True)
        rows.append(compute(*item))
    if sys.stderr.isatty():
        print("\r" + " " * 30 + "\r", end="", file=sys.stderr, flush=True)
    if args.json:
        statement = {"delta": args.delta, "accountant": args.accountant, "adjacency": args.adjacency}
        rows = [{k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in row.items()} for row in rows]
        print(json.dumps({**statement, "rows": rows}, indent=2))
        return
    print(f"δ = {args.delta:g}, {_ADJACENCY_TEXT[args.adjacency]}, Poisson sampling, accountant {args.accountant}")
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def epsilon_command(arguments: Sequence[str]) -> None:
    """``lightning-dp epsilon``: ε of trainings, one row for every combination of the values given."""
    parser = _parser("epsilon", "The ε that a training costs, for every combination of the values given.")
    parser.add_argument("--noise-multiplier", type=float, nargs="+", required=True, metavar="Z",
                        help="standard deviation of the noise over the sensitivity")  # fmt: skip
    args = parser.parse_args(arguments)
    common = {"delta": args.delta, "accountant": args.accountant, "adjacency": args.adjacency}

    def row(multiplier: float, rate: float, steps: int) -> dict[str, Any]:
        found = epsilon(noise_multiplier=multiplier, sampling_rate=rate, steps=steps, **common)
        return {"noise_multiplier": multiplier, "sampling_rate": rate, "steps": steps, "epsilon": found}

    rates = _rates(parser, args)
    _check_rates(parser, rates)
    work = [(z, q, t) for z, q in itertools.product(args.noise_multiplier, rates) for t in _lengths(parser, args, q)]
    _or_error(parser, args, work, row)


def calibrate_command(arguments: Sequence[str]) -> None:
    """``lightning-dp calibrate``: the noise for a target ε, or with given noise the number of steps."""
    parser = _parser("calibrate", "The noise multiplier with which a training meets a target ε; or, with "
                     "--noise-multiplier, the most steps that stay within it.")  # fmt: skip
    parser.add_argument(
        "--epsilon", type=float, nargs="+", required=True, metavar="EPS", help="targets, never exceeded"
    )
    parser.add_argument(
        "--noise-multiplier", type=float, nargs="+", metavar="Z", help="given: find the number of steps"
    )
    args = parser.parse_args(arguments)
    common = {"delta": args.delta, "accountant": args.accountant, "adjacency": args.adjacency}
    rates = _rates(parser, args)
    _check_rates(parser, rates)

    def noise(target: float, rate: float, steps: int) -> dict[str, Any]:
        z = calibrate_noise(epsilon=target, sampling_rate=rate, steps=steps, **common)
        spent = epsilon(noise_multiplier=z, sampling_rate=rate, steps=steps, **common)
        return {"target": target, "sampling_rate": rate, "steps": steps, "noise_multiplier": z, "epsilon": spent}

    def length(target: float, rate: float, multiplier: float) -> dict[str, Any]:
        steps = calibrate_steps(epsilon=target, sampling_rate=rate, noise_multiplier=multiplier, **common)
        spent = epsilon(noise_multiplier=multiplier, sampling_rate=rate, steps=steps, **common)
        return {"target": target, "sampling_rate": rate, "noise_multiplier": multiplier, "steps": steps,
                "epochs": steps * rate, "epsilon": spent}  # fmt: skip

    targets = list(itertools.product(args.epsilon, rates))
    if args.noise_multiplier is None:
        _or_error(parser, args, [(e, q, t) for e, q in targets for t in _lengths(parser, args, q)], noise)
    elif args.steps is not None or args.epochs is not None:
        parser.error("with --noise-multiplier the number of steps is what is found: leave out --steps and --epochs")
    else:
        _or_error(parser, args, [(e, q, z) for e, q in targets for z in args.noise_multiplier], length)


def _check_rates(parser: argparse.ArgumentParser, rates: Sequence[float]) -> None:
    if bad := [rate for rate in rates if not 0 < rate <= 1]:
        parser.error(f"--sampling-rate must lie in (0, 1], got {bad[0]:g}")


def _or_error(parser: argparse.ArgumentParser, args: argparse.Namespace, work: Sequence[Any], compute: Any) -> None:
    """Bad values are errors of the command line, without a traceback."""
    try:
        _run(args, work, compute)
    except ValueError as error:
        parser.error(str(error))
