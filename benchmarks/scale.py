"""Private training in 1, 2, 4 … processes beside Lightning's own DDP: time, bytes on the wire, memory; and its terms.

    python benchmarks/scale.py [--models mlp transformer] [--processes 1 2 4] [--rounds 3] [--steps 10]
    python benchmarks/scale.py --terms [--device cuda]
    python benchmarks/scale.py --project runs/scale/terms.json

The first trains with a constant batch per process, every process on one thread; bytes are those that the loopback
interface has carried. The second measures what a step costs besides forward and backward pass: drawing the sample,
noise, the replicas' hash, the journal. The third adds such terms up for more devices than there are here.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lightning.pytorch as pl
import numpy as np
import torch
from models import WORKLOADS, Module
from speed import CLIPPINGS, WARM_UP, Stopwatch, _collated
from torch.utils.data import DataLoader

import lightning_dp as ldp
from lightning_dp.accounting.events import Phase
from lightning_dp.journal.writer import PrivacyJournal
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.sampling import PoissonBatchSampler
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.mechanism.sums import NoisySums
from lightning_dp.training.distributed import parameter_hash
from lightning_dp.zoo.data import TensorTable

#: "… afterwards": the sums are sent once the backward pass is over.
METHODS = ("non-private", "flat", "per layer", "per layer afterwards", "backprop", "backprop afterwards")


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError("There is no loopback interface to count bytes on.")


class Meter(Stopwatch):
    """Bytes sent, and the growth of this process, from the end of the warm-up on."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_batch_start(trainer, *args)
        if len(self.starts) == WARM_UP + 1:
            trainer.strategy.barrier()
            self.sent = loopback_bytes()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.strategy.barrier()
        self.sent = loopback_bytes() - self.sent


def child(model: str, method: str, steps: int) -> None:
    """Trains in this process, one of a group; the first one prints what came of it."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world_size, workload = int(os.environ["WORLD_SIZE"]), WORKLOADS[model]
    if method.endswith("afterwards"):
        NoisySums.complete = lambda self, names: None  # type: ignore[method-assign]
    strategy: Any = "ddp" if world_size > 1 else "auto"
    if method != "non-private":
        kind = ldp.PrivateDDPStrategy if world_size > 1 else ldp.PrivateStrategy
        strategy = kind(CLIPPINGS[method.removesuffix(" afterwards")], ldp.GaussianNoise(1.0), self_check=False)
    module = Module(workload.make())
    data = TensorTable(*workload.draw(workload.records))
    loader = DataLoader(data, workload.batch_size, shuffle=True, collate_fn=_collated)
    before, meter = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Meter()
    trainer = pl.Trainer(
        max_steps=steps + WARM_UP,
        max_epochs=-1,
        default_root_dir=tempfile.mkdtemp(prefix="scale_"),
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({"seconds": meter.seconds(), "sent": meter.sent / steps / world_size, "kilobytes": growth}))


def launch(model: str, method: str, processes: int, steps: int) -> dict[str, Any]:
    """What the first of a group of processes reports."""
    group = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*group, __file__, "--child", method, "--models", model, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{model}, {method}, {processes} processes: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def scale(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of medians over all rounds; the methods take turns."""
    workload = WORKLOADS[model]
    parameters = sum(p.numel() for p in workload.make().parameters())
    rows = []
    for processes in arguments.processes:
        reports: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for _ in range(arguments.rounds):
            for method in METHODS:
                if processes > 1 or not method.endswith("afterwards"):
                    reports[method].append(launch(model, method, processes, arguments.steps))
        bound = 2 * (processes - 1) / processes * parameters * 4
        base: dict[str, float] = {}
        for method, own in reports.items():
            if not own:
                continue
            row: dict[str, Any] = {
                "model": model,
                "processes": processes,
                "method": method,
                "milliseconds": 1e3 * statistics.median(s for report in own for s in report["seconds"]),
                "bytes": statistics.median(report["sent"] for report in own),
                "megabytes": statistics.median(report["kilobytes"] for report in own) / 1024,
            }
            base = base or row
            rows.append(row)
            ratio = row["bytes"] / bound if bound else 1.0
            print(
                f"{model}, {processes} processes, {method}: {row['milliseconds']:.0f} ms a step "
                f"({row['milliseconds'] / base['milliseconds']:.2f} of non-private), {row['bytes'] / 1e6:.2f} MB sent "
                f"by each ({ratio:.3f} of the bound {bound / 1e6:.2f}), {row['megabytes']:.0f} MB more memory "
                f"({row['megabytes'] / base['megabytes']:.2f})",
                flush=True,
            )
    return rows


def timed(action: Callable[[], Any], device: torch.device, repeat: int = 5) -> float:
    """Median seconds of an action, after a first time that is not counted."""
    seconds = []
    for _ in range(repeat + 1):
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def terms(device: torch.device, coordinates: int = 2**25) -> dict[str, Any]:
    """Seconds of what a private step does besides forward and backward pass."""
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"}
    torch.set_num_threads(1)
    found["sample"] = {}
    for records in (10**7, 10**9):
        for batch in (2**12, 2**15, 2**18):
            sampler = PoissonBatchSampler(records, batch / records, Randomness(), lambda: 0, 0, 1024)
            draws = iter(sampler)
            found["sample"][f"{records:.0e} records, batch {batch}"] = timed(lambda draws=draws: next(draws), device)
    module = torch.nn.Linear(2**10, coordinates // 2**10, bias=False, device=device)
    whole = ldp.FlatClipping(1.0)
    step = PrivateStep.of(Mechanism(whole, ldp.GaussianNoise()), module)

    def draw() -> None:
        step.begin(1.0, 0.1, 1.0)
        step.contributions.hand_over()
        step.sums.collect()

    found["noise per coordinate"] = timed(draw, device) / coordinates
    secure = Randomness(secure=True)
    few = torch.empty(2**20, device=device)
    fill = lambda: ldp.GaussianNoise().fill_(few, 1.0, lambda block: secure.torch("noise", 0, device, block))  # noqa: E731
    found["secure noise per coordinate"] = timed(fill, device) / len(few)
    found["hash per coordinate"] = timed(lambda: parameter_hash(module), device) / coordinates
    sums = torch.ones(coordinates, device=device)
    found["copy per coordinate"] = timed(lambda: torch.cat([sums[:-1], sums[-1:]]), device) / coordinates
    with tempfile.TemporaryDirectory() as folder:
        journal = PrivacyJournal(folder, num_records=10**9, configuration={})
        journal.start_run("run", lambda: {"model_steps": 0, "configuration": {}})
        ledger, event = ldp.PrivacyLedger(), step.mechanism.event(1.0, 1e-4)

        def charge() -> None:
            for _ in range(1000):
                journal.charge(event, None)
                ledger.record(event)

        found["charge"] = timed(charge, torch.device("cpu")) / 1000
        journal.close()
    found["epsilon of 1e6 steps"] = timed(lambda: _million().epsilon(1e-10), torch.device("cpu"), 3)
    return found


def _million() -> ldp.PrivacyLedger:
    ledger = ldp.PrivacyLedger()
    event = Phase(1, 1e-4, 1.0, ldp.GaussianNoise().event).event()
    ledger.record(event, 10**6)
    return ledger


def project(measured: dict[str, Any], link: float, parameters: float = 1e9, batch: int = 256) -> None:
    """Milliseconds of every term for more and more devices, each with ``batch`` records and a link of ``link`` B/s."""
    sizes = [2**12, 2**15, 2**18]
    seconds = [measured["sample"][f"1e+09 records, batch {size}"] for size in sizes]
    slope, offset = np.polyfit(sizes, seconds, 1)
    print(f"{parameters:.0e} parameters, 1e9 records, {batch} records a device and step, links of {link / 1e9:g} GB/s")
    print("devices | sample | noise | sums on the wire | hash | journal (ms)")
    for devices in (1, 8, 64, 256, 1024):
        row = (
            max(0, offset) + slope * batch * devices,
            measured["noise per coordinate"] * parameters / devices,
            2 * (devices - 1) / devices * parameters * 4 / link,
            measured["hash per coordinate"] * parameters / 100,
            measured["charge"],
        )
        print(f"{devices} | " + " | ".join(f"{1e3 * term:.3g}" for term in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mlp", "transformer"], choices=list(WORKLOADS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--terms", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--project", type=Path, metavar="TERMS.json")
    parser.add_argument("--link", type=float, default=50e9, help="bytes per second that a device sends and receives")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.models[0], arguments.child, arguments.steps)
        return
    if arguments.project:
        project(json.loads(arguments.project.read_text()), arguments.link)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.terms:
        found = terms(torch.device(arguments.device))
        print(json.dumps(found, indent=1))
        (arguments.out / "terms.json").write_text(json.dumps(found, indent=1))
        return
    rows = [row for model in arguments.models for row in scale(model, arguments)]
    (arguments.out / "scale.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
