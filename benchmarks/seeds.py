"""Runs a recipe with several seeds and prints the mean of its test metric with a 95 % interval.

    python benchmarks/seeds.py recipes/mnist/dp_sgd.yaml --seeds 1 2 3

The seed decides the initial weights; sampling and noise are fresh secrets in every run.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats


@dataclass(frozen=True)
class Run:
    """What one training printed.

    Args:
        accuracy: ``test_accuracy``, between 0 and 1.
        epsilon, delta: As stated at the end of the training, ε rounded up. Infinity and 0 without privacy.
        steps: Private steps.
        seconds: From the start of the process to its end.
        folder: Of its logs, with the privacy card; ``None`` if it kept none.
    """

    accuracy: float
    epsilon: float
    delta: float
    steps: int
    seconds: float
    folder: Path | None


def run(recipe: str, seed: int, extra: Sequence[str]) -> Run:
    """One run in a process of its own; ``extra`` are further arguments of ``lightning-dp fit``.

    Raises:
        RuntimeError: It failed, or printed no ``test_accuracy`` with an ε, or that there is none.
    """
    command = [sys.executable, "-m", "lightning_dp.cli", "fit", "--config", recipe, "--seed_everything", str(seed)]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--trainer.enable_progress_bar", "false", *extra], text=True, stdout=subprocess.PIPE
    )
    seconds = time.perf_counter() - started
    last = (done.stdout.strip().splitlines() or [""])[-1]
    accuracy = re.search(r"test_accuracy = ([\d.]+)", last)
    privacy = re.search(r"ε = ([\d.]+|inf) at δ = (\S+) \(.*?(\d+) private steps\)", last)
    if privacy:
        epsilon, delta, steps = float(privacy[1]), float(privacy[2]), int(privacy[3])
    else:
        epsilon, delta, steps = math.inf, 0.0, 0
    if done.returncode or not accuracy or not (privacy or "NOT PRIVATE" in last):
        raise RuntimeError(f"{recipe}, seed {seed}, ended with {done.returncode} and no result:\n{done.stdout[-2000:]}")
    print(f"seed {seed}: {last} ({seconds:.0f} s)", flush=True)
    logs = re.search(r"logs in ([^;]+)", last)
    folder = Path(logs[1]) if logs else None
    return Run(float(accuracy[1]), epsilon, delta, steps, seconds, folder)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval (Student's t)."""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if values[1:] else 0.0
    return statistics.mean(values), float(half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments, extra = parser.parse_known_args()
    results = [run(arguments.recipe, seed, extra) for seed in arguments.seeds]
    accuracies = [100 * result.accuracy for result in results]
    mean, half = interval(accuracies)
    line = f"{arguments.recipe}: test accuracy {mean:.2f} %"
    if len(accuracies) > 1:
        line += f" ± {half:.2f} (95 % interval over {len(accuracies)} seeds; lowest {min(accuracies):.2f} %)"
    print(f"{line} at ε = {max(result.epsilon for result in results):.4f}, δ = {results[0].delta:g}")


if __name__ == "__main__":
    main()
