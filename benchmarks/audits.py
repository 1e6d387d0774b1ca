"""Audits of every mechanism, and of DP-SGD on as many records as MNIST has: lower bounds on ε beside the claims.

python benchmarks/audits.py [--trials 3000]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from lightning_dp import FlatClipping, GaussianNoise, PrivateStrategy, calibrate_noise
from lightning_dp.audit.one_run import audit_mechanism
from lightning_dp.audit.step import audit_module
from tests.audit.test_audit import MECHANISMS
from tests.conftest import loader, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name, (clipping, noise, kind) in MECHANISMS.items():
        torch.manual_seed(0)
        module = kind()
        module.trainer = trainer()
        found = audit_module(module, loader(), clipping, noise, multiplier=1.0, trials=arguments.trials)
        print(f"{name}: {found}", flush=True)
    for share, steps in ((1.0, 20), (0.5, 30)):
        for epsilon in (1.0, 2.0, 4.0, 8.0):
            multiplier = calibrate_noise(epsilon=epsilon, delta=1e-5, sampling_rate=share, steps=steps)
            with tempfile.TemporaryDirectory() as root:
                found = audit_mechanism(
                    lambda z=multiplier: PrivateStrategy(FlatClipping(1.0), GaussianNoise(z)),
                    records=60_000,
                    expected_batch_size=round(60_000 * share),
                    steps=steps,
                    delta=1e-5,
                    root=root,
                )
            print(f"q = {share:g}, {steps} steps: {found}", flush=True)


if __name__ == "__main__":
    main()
