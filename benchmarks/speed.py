"""Step time of private training as a multiple of non-private Lightning, beside Opacus, in one run.

    python benchmarks/speed.py [--models mlp vit_small …] [--rounds 5] [--steps 12] [--device cuda] [--growth]

Methods take turns, so that a machine that slows down slows all of them; every figure is a median over all timed steps.
The rows are saved as JSON and drawn as a PNG under ``--out``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from models import GROWTH, SMALL, WORKLOADS, FeedbackModule, Module, Workload, loss_of

import lightning_dp as ldp
from lightning_dp.mechanism.clipping import Bounding
from lightning_dp.zoo.data import TensorTable

WARM_UP = 3


class Stopwatch(Callback):
    """Seconds from the start of one batch to the start of the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.starts[WARM_UP:], self.starts[WARM_UP + 1 :], strict=False)]


def lightning_steps(
    workload: Workload, device: str, strategy: Callable[[], Any], precision: Any, of: type[Module] = Module
) -> Callable[[int], list[float]]:
    """A function that trains for some steps with a Trainer and returns their durations."""
    module = of(workload.make())
    loader = DataLoader(
        TensorTable(*workload.draw(workload.records)), workload.batch_size, shuffle=True, collate_fn=_collated
    )

    def steps(count: int) -> list[float]:
        watch = Stopwatch()
        trainer = pl.Trainer(
            max_steps=count + WARM_UP + 1,
            default_root_dir=tempfile.mkdtemp(prefix="speed_"),  # a journal of its own
            accelerator="gpu" if device == "cuda" else device,
            devices=1,
            precision=precision,
            strategy=strategy(),
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
        return watch.seconds()

    return steps


def _collated(batch: Any) -> Any:
    return batch


def opacus_steps(workload: Workload, device: str, mode: str) -> Callable[[int], list[float]]:
    """The same with Opacus in a plain loop over batches of constant size, which is its fastest case."""
    from opacus import PrivacyEngine

    module = workload.make().to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    loader = DataLoader(
        TensorTable(*workload.draw(workload.records)), workload.batch_size, shuffle=True, collate_fn=_collated
    )
    engine = PrivacyEngine(secure_mode=False)
    arguments: dict[str, Any] = {
        "module": module,
        "optimizer": optimizer,
        "data_loader": loader,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
        "grad_sample_mode": mode,
    }
    criterion: Callable[[Any, Any], Any] = loss_of
    if mode == "ghost":
        flat_loss = torch.nn.CrossEntropyLoss()
        module, optimizer, criterion, loader = engine.make_private(criterion=flat_loss, **arguments)
    else:
        module, optimizer, loader = engine.make_private(**arguments)

    def steps(count: int) -> list[float]:
        seconds = []
        batches = iter(loader)
        for index in range(count + WARM_UP):
            started = time.perf_counter()
            inputs, targets = (part.to(device) for part in next(batches))
            optimizer.zero_grad()
            logits = module(inputs)
            if mode == "ghost" and logits.dim() > 2:  # its criterion reduces over the examples of the leading dimension
                loss = criterion(logits.flatten(0, 1), targets.flatten(), shape=targets.shape)
            else:
                loss = criterion(logits, targets)
            loss.backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if index >= WARM_UP:
                seconds.append(time.perf_counter() - started)
        return seconds

    return steps


CLIPPINGS: dict[str, Bounding] = {
    "flat": ldp.FlatClipping(1.0),
    "per layer": ldp.PerLayerClipping(1.0),
    "automatic": ldp.AutomaticClipping(),
    "adaptive": ldp.AdaptiveClipping(1.0),
    "backprop": ldp.BackpropClipping(1.0, 0.01),
    "DFA": ldp.BackpropClipping(1.0, 0.01),
}

#: Networks that direct feedback alignment is meant for: their outputs are few.
FEEDBACK = ("mlp", "tanh_cnn", "wrn")


def private(clipping: str) -> Callable[[], Any]:
    return lambda: ldp.PrivateStrategy(CLIPPINGS[clipping], ldp.GaussianNoise(1.0), self_check=False)


def methods(workload: Workload, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    strategies = {"non-private": lambda: "auto"} | {name: private(name) for name in arguments.clippings}
    modes = () if arguments.no_opacus else ("hooks", "ghost", "functorch")
    return {
        name: lambda name=name, strategy=strategy: lightning_steps(
            workload, arguments.device, strategy, arguments.precision, FeedbackModule if name == "DFA" else Module
        )
        for name, strategy in strategies.items()
    } | {f"opacus {mode}": (lambda mode=mode: opacus_steps(workload, arguments.device, mode)) for mode in modes}


def measure(name: str, workload: Workload, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds per step of every method that runs."""
    runners: dict[str, Callable[[int], list[float]]] = {}
    for method, make in methods(workload, arguments).items():
        if method == "DFA" and name not in FEEDBACK:
            continue
        torch.manual_seed(0)
        runners[method] = make()
    seconds: dict[str, list[float]] = {method: [] for method in runners}
    for _ in range(arguments.rounds):
        for method, steps in list(runners.items()):
            count = arguments.steps if "opacus" not in method else max(2, arguments.steps // 4)
            try:
                if arguments.warm_up and not seconds[method] and "opacus" not in method:  # there, one size is all
                    steps(arguments.warm_up)
                seconds[method] += steps(count)
            except Exception as error:  # what a library cannot train has no figure
                print(f"{name}, {method}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                del runners[method]
    return {method: statistics.median(times) for method, times in seconds.items() if times}


def larger(workload: Workload, factor: int) -> Workload:
    """The same with larger batches, of no more data than makes twenty of them."""
    if factor == 1:
        return workload
    size = factor * workload.batch_size
    return dataclasses.replace(workload, batch_size=size, records=max(workload.records, 20 * size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(SMALL), choices=list(WORKLOADS))
    parser.add_argument("--growth", action="store_true", help="also as batch, width, depth and T grow")
    parser.add_argument("--clippings", nargs="+", default=list(CLIPPINGS), choices=list(CLIPPINGS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--warm-up", type=int, default=0, help="untimed steps: a GPU's libraries plan for every new shape"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-factor", type=int, default=1, help="batches so many times larger, to occupy a GPU")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--no-opacus", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for speed.json and speed.png")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = False
    workloads = {name: larger(WORKLOADS[name], arguments.batch_factor) for name in arguments.models}
    if arguments.growth:
        workloads |= {f"{what}={size}": w for what, sizes in GROWTH.items() for size, w in sizes.items()}
    rows = {}
    for name, workload in workloads.items():
        rows[name] = measure(name, workload, arguments)
        base = rows[name]["non-private"]
        cells = ", ".join(f"{m} {s / base:.2f}" for m, s in rows[name].items() if m != "non-private")
        print(f"{name}: non-private {1e3 * base:.1f} ms; times that: {cells}", flush=True)
    if arguments.out:
        save(rows, arguments.out)


def save(rows: dict[str, dict[str, float]], folder: Path) -> None:
    """The rows as JSON, and as a bar chart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(rows, indent=1))
    names = sorted({method for row in rows.values() for method in row} - {"non-private"})
    figure, axes = plt.subplots(figsize=(max(9, 2 * len(rows)), 4))
    width = 0.8 / len(names)
    for offset, method in enumerate(names):
        heights = [row.get(method, float("nan")) / row["non-private"] for row in rows.values()]
        axes.bar([i + offset * width for i in range(len(rows))], heights, width, label=method)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(rows))], list(rows))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("step time / non-private")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "speed.png", dpi=150)


if __name__ == "__main__":
    main()
