"""Runs a recipe with several seeds and prints the mean of its test metric with a 95 % interval.

    python benchmarks/seeds.py recipes/mnist/dp_sgd.yaml --seeds 1 2 3

The seed decides the initial weights; sampling and noise are fresh secrets in every run.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time

from scipy import stats


def run(recipe: str, seed: int, extra: list[str]) -> tuple[float, float, str]:
    """Test accuracy, ε and seconds of one run."""
    command = [sys.executable, "-m", "lightning_dp.cli", "fit", "--config", recipe, "--seed_everything", str(seed)]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--trainer.enable_progress_bar", "false", *extra], text=True, stdout=subprocess.PIPE, check=True
    )
    seconds = time.perf_counter() - started
    last = done.stdout.strip().splitlines()[-1]
    found = re.search(r"test_accuracy = ([\d.]+); ε = ([\d.]+) at δ = (\S+)", last)
    if not found:
        raise SystemExit(f"The run printed no result:\n{done.stdout[-2000:]}")
    print(f"seed {seed}: {last} ({seconds:.0f} s)", flush=True)
    return float(found[1]), float(found[2]), found[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments, extra = parser.parse_known_args()
    results = [run(arguments.recipe, seed, extra) for seed in arguments.seeds]
    accuracies = [accuracy for accuracy, _, _ in results]
    line = f"{arguments.recipe}: test accuracy {100 * statistics.mean(accuracies):.2f} %"
    if len(accuracies) > 1:
        half = stats.t.ppf(0.975, len(accuracies) - 1) * statistics.stdev(accuracies) / len(accuracies) ** 0.5
        line += (
            f" ± {100 * half:.2f} (95 % interval over {len(accuracies)} seeds; lowest {100 * min(accuracies):.2f} %)"
        )
    print(f"{line} at ε = {max(epsilon for _, epsilon, _ in results):.4f}, δ = {results[0][2]}")


if __name__ == "__main__":
    main()
