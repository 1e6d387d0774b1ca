"""Peak memory of one training step above the loaded model and data, as a multiple of non-private Lightning.

    python benchmarks/memory.py [--models mlp tanh_cnn wrn transformer]

Every figure comes from a process of its own: the most memory it held while training, less what it held before. With
``--batch-sizes`` the logical batch grows while micro-batches stay as they are.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

#: "capped": flat clipping with max_physical_batch_size at the expected batch size, which Poisson batches exceed half of
#: the time; the others are given batches of that size.
METHODS = ("non-private", "flat", "capped", "backprop", "DFA", "opacus hooks", "opacus ghost")


def resident() -> float:
    """Megabytes held now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def child(model: str, method: str, batch_size: int | None, micro: int | None) -> None:
    """Trains a few steps and prints the growth of this process in megabytes."""
    import dataclasses

    import lightning.pytorch as pl
    import speed
    import torch
    from models import WORKLOADS, FeedbackModule, Module

    import lightning_dp as ldp

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    workload = WORKLOADS[model]
    if batch_size:
        workload = dataclasses.replace(workload, batch_size=batch_size, records=10 * batch_size)

    if method == "capped":
        micro = workload.batch_size

    def strategy() -> ldp.PrivateStrategy:
        clipping = speed.CLIPPINGS["flat" if method == "capped" else method]
        return ldp.PrivateStrategy(clipping, ldp.GaussianNoise(1.0), self_check=False, max_physical_batch_size=micro)

    if method.startswith("opacus"):
        steps = speed.opacus_steps(workload, "cpu", method.split()[1])
    else:
        make = (lambda: "auto") if method == "non-private" else strategy
        kind = FeedbackModule if method == "DFA" else Module
        steps = speed.lightning_steps(workload, "cpu", make, "32-true", kind)
        pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)  # what it imports is no cost
    before = resident()
    steps(3)
    print(f"growth {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before:.1f}")


def measure(model: str, method: str, batch_size: int | None = None, micro: int | None = None) -> float | None:
    """Megabytes of growth in a fresh process; ``None`` when it could not train."""
    command = [sys.executable, __file__, "--child", model, method, str(batch_size or 0), str(micro or 0)]
    environment = {
        **os.environ,
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("growth ")]
    return float(lines[-1].split()[1]) if lines else None


def main() -> None:
    if "--child" in sys.argv:
        model, method, batch_size, micro = sys.argv[2:]
        child(model, method, int(batch_size) or None, int(micro) or None)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mlp", "tanh_cnn", "wrn", "transformer"])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[], help="logical batches, with --micro")
    parser.add_argument("--methods", nargs="+", default=list(METHODS[1:]), choices=METHODS[1:])
    parser.add_argument("--micro", type=int, default=None, help="max_physical_batch_size")
    arguments = parser.parse_args()
    for model in arguments.models:
        if arguments.batch_sizes:
            grown = [measure(model, "flat", size, arguments.micro) for size in arguments.batch_sizes]
            cells = ", ".join(f"{b}: {g:.0f} MB" for b, g in zip(arguments.batch_sizes, grown, strict=True) if g)
            print(f"{model}, micro-batches of {arguments.micro}: {cells}", flush=True)
            continue
        rows = {method: measure(model, method) for method in ("non-private", *arguments.methods)}
        base = rows.pop("non-private")
        cells = ", ".join(f"{m} {g / base:.2f}" for m, g in rows.items() if g and base)
        print(f"{model}: non-private {base:.0f} MB; times that: {cells}", flush=True)


if __name__ == "__main__":
    main()
