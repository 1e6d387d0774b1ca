"""MNIST accuracy against ε for DP-SGD, backpropagation clipping and DP-DFA: same network, tuned equally.

    python benchmarks/curve.py search --out runs/curve
    python benchmarks/curve.py test --out runs/curve --seeds 1 2 3
    python benchmarks/curve.py table --out runs/curve

The search trains on 55 000 records and looks at the 5000 at the end of the train set: at ε = 3, ``--trials``
configurations of every method drawn at random; at the other ε, the `NEARBY` variations of the best of them. It is not
private itself. The test trains the best of them on all 60 000 and looks at the test set, once per seed.
Every result is a line of JSON under ``--out``; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from seeds import interval
from torch import Tensor

import lightning_dp as ldp
from lightning_dp.zoo import Classifier, FeedbackClassifier, MNISTDataModule, TanhCNN
from lightning_dp.zoo.data import TensorTable

EPSILONS = (0.1, 0.5, 1.0, 3.0, 8.0)
DELTA = 1e-5
METHODS = ("DP-SGD", "backpropagation clipping", "DP-DFA")
BATCH_SIZE = 1024

#: What is searched. ``step`` is the learning rate times the sensitivity: the size of a step in units of the bound.
COMMON: dict[str, list[Any]] = {
    "step": [0.2, 0.4, 0.8, 1.6],
    "epochs": [10, 20, 40],
    "darkest": [-1.0, 0.0],  # what black is mapped to; white is 1
}
BOUNDS: dict[str, list[Any]] = {
    "input_norm": [2.5, 5.0, 10.0],
    "upstream_norm": [0.002, 0.01, 0.05],
    "allocation": ["equal", "proportional"],
}
SPACES: dict[str, dict[str, list[Any]]] = {
    "DP-SGD": COMMON | {"max_norm": [0.01, 0.03, 0.1, 0.3, 1.0]},
    "backpropagation clipping": COMMON | BOUNDS,
    "DP-DFA": COMMON | BOUNDS,
}

#: Around the best configurations at ε = 3: factors of the step, and numbers of epochs.
NEARBY = [(0.35, 10), (1.0, 30), (1.0, 10), (0.35, 30)]


@lru_cache(maxsize=1)
def images(npz: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images and labels, test images and labels; images ``(N, 1, 28, 28)`` between 0 and 1."""
    if npz:  # for machines without `datasets`: {train,test}_{images,labels}, images as bytes
        arrays = np.load(npz)
        parts = []
        for part in ("train", "test"):
            parts.append(torch.from_numpy(arrays[f"{part}_images"]).float().unsqueeze(1) / 255)
            parts.append(torch.from_numpy(arrays[f"{part}_labels"]).long())
        return parts[0], parts[1], parts[2], parts[3]
    data = MNISTDataModule(darkest=0.0)
    data.setup("fit")
    assert data.train is not None and data.test is not None
    return data.train.columns[0], data.train.columns[1], data.test.columns[0], data.test.columns[1]


class Data(MNISTDataModule):
    """MNIST on the training device, with what black is mapped to as a hyperparameter."""

    def __init__(self, npz: str | None, darkest: float, val_size: int, device: str) -> None:
        super().__init__(BATCH_SIZE, val_size, darkest)
        self.npz, self.device = npz, device

    def setup(self, stage: str) -> None:
        train, labels, test, test_labels = (part.to(self.device) for part in images(self.npz))
        train, test = (self.darkest + (1 - self.darkest) * part for part in (train, test))
        kept = len(labels) - self.val_size
        self.train = TensorTable(train[:kept], labels[:kept])
        self.test = TensorTable(test, test_labels) if not self.val_size else TensorTable(train[kept:], labels[kept:])


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One training, and its accuracy on the test set, or on the held-out records where ``val_size`` is not 0."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    clipping: Any
    if job["method"] == "DP-SGD":
        clipping, sensitivity = ldp.FlatClipping(job["max_norm"]), job["max_norm"]
    else:
        clipping = ldp.BackpropClipping(job["input_norm"], job["upstream_norm"], allocation=job["allocation"])
        sensitivity = job["input_norm"] * job["upstream_norm"]
    kind = FeedbackClassifier if job["method"] == "DP-DFA" else Classifier
    module = kind(TanhCNN(), learning_rate=job["step"] / sensitivity, decay=True)
    module.feedback_seed = job["seed"]  # type: ignore[union-attr]
    started = time.perf_counter()
    trainer = pl.Trainer(
        max_epochs=job["epochs"],
        default_root_dir=tempfile.mkdtemp(prefix="curve_"),
        accelerator="gpu" if job["device"] == "cuda" else "cpu",
        devices=1,
        strategy=ldp.PrivateStrategy(clipping, ldp.GaussianNoise(), journal=False),
        callbacks=[ldp.PrivacyBudget(job["epsilon"], DELTA)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Data(job["npz"], job["darkest"], job["val_size"], job["device"])
    trainer.fit(module, data)
    [metrics] = trainer.test(module, datamodule=data, verbose=False)
    spent = trainer.strategy.ledger.epsilon(DELTA)  # type: ignore[attr-defined]
    return {**job, "accuracy": metrics["test_accuracy"], "spent": spent, "seconds": time.perf_counter() - started}


def key(job: dict[str, Any]) -> str:
    """What makes two jobs the same."""
    ignored = ("accuracy", "spent", "seconds", "npz", "device", "threads")
    return json.dumps({k: v for k, v in job.items() if k not in ignored}, sort_keys=True)


def run(
    jobs: Iterable[dict[str, Any]],
    file: Path,
    arguments: argparse.Namespace,
    train: Callable[[dict[str, Any]], dict[str, Any]] = train,
) -> list[dict[str, Any]]:
    """The results of all jobs, of which those in the file are taken from there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {key(row): row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    extra = {"npz": arguments.npz, "device": arguments.device, "threads": arguments.threads}
    wanted = {key(job): {**job, **extra} for job in jobs}
    waiting = [job for name, job in wanted.items() if name not in known]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool, file.open("a") as out:
        for done, future in enumerate(as_completed([pool.submit(train, job) for job in waiting]), 1):
            row = future.result()
            known[key(row)] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            shown = f"{row['method']}, ε = {row['epsilon']:g}: {row['accuracy']:.4f} ({row['seconds']:.0f} s)"
            print(f"{done}/{len(waiting)} {shown}", flush=True)
    return [known[name] for name in wanted]


def configurations(method: str, count: int) -> list[dict[str, Any]]:
    """Drawn from the method's space without repetition, the same in every run."""
    space = SPACES[method]
    everything = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    return random.Random(0).sample(everything, min(count, len(everything)))


def best(rows: Sequence[dict[str, Any]], method: str, epsilon: float, count: int = 1) -> list[dict[str, Any]]:
    """The configurations of highest accuracy."""
    found = [row for row in rows if row["method"] == method and row["epsilon"] == epsilon]
    found.sort(key=lambda row: row["accuracy"], reverse=True)
    return [{name: row[name] for name in SPACES[method]} for row in found[:count]]


def search(arguments: argparse.Namespace) -> None:
    shared = {"seed": 0, "val_size": 5000}
    file = arguments.out / "search.jsonl"
    first = [
        {**shared, "method": method, "epsilon": 3.0, **configuration}
        for trial in zip(*(configurations(method, arguments.trials) for method in METHODS), strict=True)
        for method, configuration in zip(METHODS, trial, strict=True)
    ]
    rows = run(first, file, arguments)
    second = [
        {**shared, "method": method, "epsilon": epsilon, **chosen, "step": chosen["step"] * factor, "epochs": epochs}
        for factor, epochs in NEARBY
        for method in METHODS
        for chosen in best(rows, method, 3.0)
        for epsilon in EPSILONS
        if epsilon != 3.0
    ]
    run(second, file, arguments)


def test(arguments: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in (arguments.out / "search.jsonl").read_text().splitlines()]
    jobs = [
        {"seed": seed, "val_size": 0, "method": method, "epsilon": epsilon, **chosen}
        for seed in arguments.seeds
        for method in METHODS
        for epsilon in EPSILONS
        for chosen in best(rows, method, epsilon) or best(rows, method, 3.0)
    ]
    run(jobs, arguments.out / "test.jsonl", arguments)


def table(arguments: argparse.Namespace) -> None:
    """Prints the table, and draws the plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (arguments.out / "test.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(6, 4))
    print("| ε | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
    cells = {
        (method, epsilon): interval(
            [100 * r["accuracy"] for r in rows if (r["method"], r["epsilon"]) == (method, epsilon)]
        )
        for method in METHODS
        for epsilon in EPSILONS
    }
    for epsilon in EPSILONS:
        shown = (f"{mean:.2f} ± {half:.2f}" for mean, half in (cells[method, epsilon] for method in METHODS))
        print(f"| {epsilon:g} | " + " | ".join(shown) + " |")
    for method in METHODS:
        means, halves = zip(*(cells[method, epsilon] for epsilon in EPSILONS), strict=True)
        axes.errorbar(EPSILONS, means, halves, marker="o", capsize=3, label=method)
    axes.set_xscale("log")
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.set_xlabel(f"ε (δ = {DELTA:g}, adding or removing one record)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.out / "curve.png", dpi=120)
    for method in METHODS:
        searched = [json.loads(line) for line in (arguments.out / "search.jsonl").read_text().splitlines()]
        print(
            method,
            len([row for row in searched if row["method"] == method]),
            "trials; at ε = 3:",
            best(searched, method, 3.0)[0],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "test", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/curve"))
    parser.add_argument("--trials", type=int, default=20, help="configurations of every method at ε = 3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--npz", default=None, help="MNIST as arrays, where `datasets` is not installed")
    arguments = parser.parse_args()
    {"search": search, "test": test, "table": table}[arguments.what](arguments)


if __name__ == "__main__":
    main()
