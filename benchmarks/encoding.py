"""Which part of gradient encoding and denoising helps: codebook x noise x denoiser beside plain DP-SGD at equal ε.

    python benchmarks/encoding.py test --out runs/encoding --seeds 1 2 3
    python benchmarks/encoding.py table --out runs/encoding
    python benchmarks/encoding.py epsilons

MNIST, the network of Nasr et al. 2020 with tanh (convolutions 16@8x8 and 32@4x4, a hidden layer of 50), expected batch
256, one epoch. All rows take steps of the same learning rate, but for those of `ROWS` that say otherwise; nothing is
tuned row by row. Every result is a line of JSON under ``--out``; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from curve import Data, interval, run
from dp_accounting import PoissonSampledDpEvent

import lightning_dp as ldp
from lightning_dp.accounting.events import ShiftedNoiseDpEvent
from lightning_dp.zoo import Classifier, DigitsDataModule, TanhCNN

EPSILON, DELTA, BATCH_SIZE, MAX_NORM = 2.5, 1e-5, 256, 0.1

CLIPPINGS: dict[str, Any] = {
    "none": ldp.FlatClipping(MAX_NORM),
    "flat": ldp.GradientEncoding(ldp.FlatCodebook(), MAX_NORM),
    "random": ldp.GradientEncoding(ldp.RandomCodebook(), MAX_NORM),
    "public digits": ldp.GradientEncoding(ldp.PublicCodebook(""), MAX_NORM),
}
NOISES: dict[str, Any] = {
    "Gaussian": ldp.GaussianNoise(),
    "Laplace": ldp.LaplaceNoise(),
    "Student-t, 9 df": ldp.StudentTNoise(9),
}
DENOISERS: dict[str, Any] = {
    "none": None,
    "KS scale": ldp.KSDenoiser(),
    "James-Stein": ldp.JamesSteinDenoiser(),
    "low-pass": ldp.LowPassDenoiser(),
}
#: Codebook, noise, denoiser, learning rate. The low-pass filter takes the place of momentum 0.9, which makes steps ten
#: times as long; the KS denoiser multiplies by up to 5; a flat codebook halves the gradients.
ROWS = [
    ("none", "Gaussian", "none", 2.0),
    ("none", "Gaussian", "KS scale", 0.5),
    ("none", "Gaussian", "James-Stein", 2.0),
    ("none", "Gaussian", "low-pass", 20.0),
    ("flat", "Gaussian", "none", 4.0),
    ("flat", "Student-t, 9 df", "none", 4.0),
    ("random", "Gaussian", "none", 2.0),
    ("random", "Laplace", "none", 2.0),
    ("random", "Student-t, 9 df", "none", 2.0),
    ("public digits", "Student-t, 9 df", "none", 2.0),
    ("random", "Student-t, 9 df", "KS scale", 0.5),
]


class SmallBatches(Data):
    """MNIST in expected batches of 256."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.batch_size = BATCH_SIZE


def public_codebook(file: str) -> ldp.PublicCodebook:
    """Learned from gradients of the same network on scikit-learn's digits, enlarged: public data of another kind."""
    if Path(file).exists():
        return ldp.PublicCodebook(file)
    data = DigitsDataModule()
    data.setup("fit")
    assert data.train is not None
    images, labels = data.train.columns
    images = torch.nn.functional.interpolate(images, size=28, mode="bilinear")
    module = Classifier(TanhCNN(hidden=50), optimizer="adam", learning_rate=1e-3)
    rows, optimizer = [], torch.optim.Adam(module.parameters(), 1e-3)
    for step, part in enumerate(torch.randperm(len(images)).split(128)):
        if step % 3 == 0:  # some before the network has learned anything, some after
            rows.append(ldp.public_gradients(module, [(images[part], labels[part])]))
        optimizer.zero_grad()
        module.training_step((images[part], labels[part]), step).backward()
        optimizer.step()
    return ldp.learn_codebook(torch.cat(rows), file)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One training, and its accuracy on the test set."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    momentum = 0.0 if job["denoiser"] == "low-pass" else 0.9
    module = Classifier(TanhCNN(hidden=50), learning_rate=job["learning_rate"], momentum=momentum, decay=True)
    clipping = CLIPPINGS[job["codebook"]]
    if job["codebook"] == "public digits":
        clipping = replace(clipping, codebook=public_codebook(job["codebook_file"]))
    strategy = ldp.PrivateStrategy(clipping, NOISES[job["noise"]], DENOISERS[job["denoiser"]], journal=False)
    started = time.perf_counter()
    trainer = pl.Trainer(
        max_epochs=job["epochs"],
        default_root_dir=tempfile.mkdtemp(prefix="encoding_"),
        accelerator="gpu" if job["device"] == "cuda" else "cpu",
        devices=1,
        strategy=strategy,
        callbacks=[ldp.PrivacyBudget(EPSILON, DELTA, job["accountant"])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SmallBatches(job["npz"], -1.0, 0, job["device"])
    trainer.fit(module, data)
    [metrics] = trainer.test(module, datamodule=data, verbose=False)
    found = {"accuracy": metrics["test_accuracy"], "spent": strategy.ledger.epsilon(DELTA, job["accountant"])}
    return {**job, **found, "method": f"{job['codebook']} / {job['noise']} / {job['denoiser']}", "epsilon": EPSILON,
            "scale": strategy.noise_multiplier, "seconds": time.perf_counter() - started}  # fmt: skip


def test(arguments: argparse.Namespace) -> None:
    """Rényi accounting in all rows: it is all there is for noise that is not Gaussian."""
    common = {"epochs": arguments.epochs, "accountant": "rdp", "codebook_file": str(arguments.out / "codebook.npz")}
    public_codebook(common["codebook_file"])  # once, before the processes start
    jobs = [
        {**common, "seed": seed, "codebook": codebook, "noise": noise, "denoiser": denoiser, "learning_rate": rate}
        for seed in arguments.seeds
        for codebook, noise, denoiser, rate in ROWS
    ]
    run(jobs, arguments.out / "test.jsonl", arguments, train)


def table(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    found = [json.loads(line) for line in (arguments.out / "test.jsonl").read_text().splitlines()]
    print("| codebook | noise | denoiser | learning rate | noise std / sensitivity | test accuracy (%) |")
    print("|---|---|---|---|---|---|")
    for row in ROWS:
        own = [r for r in found if (r["codebook"], r["noise"], r["denoiser"], r["learning_rate"]) == row]
        if own:
            mean, half = interval([100 * r["accuracy"] for r in own])
            std = own[0]["scale"] * NOISES[row[1]].std()
            print(f"| {' | '.join(row[:3])} | {row[3]:g} | {std:.3f} | {mean:.2f} ± {half:.2f} |")


def epsilons(arguments: argparse.Namespace) -> None:
    """Prints ε of 40 epochs for noise of the same standard deviation (that of Student-t at 9 degrees of freedom and
    scale 1), with one vector in the codebook."""
    coordinates, std = 35_424, ldp.StudentTNoise(9).std()
    rate, steps = BATCH_SIZE / 60_000, 40 * 60_000 // BATCH_SIZE
    shapes = {"flat": 0.0, "rank^-1/2": 0.5, "1 / rank": 1.0, "one spike": 50.0}
    noises = [ldp.GaussianNoise(), ldp.LaplaceNoise(), ldp.StudentTNoise(9), ldp.StudentTNoise(3)]
    print("| vector | " + " | ".join(map(str, noises)) + " |\n|---|" + "---|" * len(noises))
    for name, exponent in shapes.items():
        entries = ldp.PowerLawCodebook((exponent,)).entries(coordinates)
        cells = []
        for noise in noises:
            ledger = ldp.PrivacyLedger()
            event = ShiftedNoiseDpEvent(noise.density(), std / noise.std(), entries)
            ledger.record(PoissonSampledDpEvent(rate, event), steps)
            cells.append(f"{ledger.epsilon(DELTA):.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["test", "table", "epsilons"])
    parser.add_argument("--out", type=Path, default=Path("runs/encoding"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--npz", default=None, help="MNIST as arrays, where `datasets` is not installed")
    arguments = parser.parse_args()
    {"test": test, "table": table, "epsilons": epsilons}[arguments.what](arguments)


if __name__ == "__main__":
    main()
