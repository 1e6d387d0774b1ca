"""What every process of a distributed test does: ``torchrun … tests/training/ddp_worker.py FOLDER CASE…`` runs the
cases one after the other in one process group, and writes what each gave into ``FOLDER/CASE.RANK``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BackpropClipping,
    DFAMixin,
    DifferentialPrivacy,
    FlatClipping,
    GaussianNoise,
    GradientEncoding,
    KSDenoiser,
    LowPassDenoiser,
    PerLayerClipping,
    PowerLawCodebook,
    PrivacyBudget,
    PrivacyConfigurationError,
    PrivateDDPStrategy,
    PrivateProjection,
    PrivateStrategy,
    StudentTNoise,
)
from lightning_dp.mechanism import sums
from lightning_dp.training import distributed
from tests.conftest import Net, dataset, loader, trainer
from tests.tensors import DEVICE

RECORDS, EXPECTED = 41, 12


class FeedbackNet(DFAMixin, Net):
    """The same network, trained by feedback."""


class Still(Net):
    """Gradients that are zero: what is left is noise."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 3000))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * F.mse_loss(self.net(batch[0]), torch.zeros(len(batch[0]), 3000, device=batch[0].device))


class Projected(Net):
    """On private principal components, which are released first."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(PrivateProjection(6, 3, 2.0), nn.Linear(3, 3)))


class Logging(Net):
    """Exchanges its loss in every training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, sync_dist=True)
        return loss


class Surprised(Logging):
    """Runs code, in one process and one step, that nobody has examined before."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 2 and self.global_rank == self.trainer.world_size - 1:
            loss = loss * 2 - F.cross_entropy(self.net(batch[0]), batch[1])
        return loss


class OwnSplit(LightningDataModule):
    """Splits records otherwise in every process."""

    def setup(self, stage: str) -> None:
        self.train, _ = random_split(dataset(60), [41, 19], torch.Generator().manual_seed(os.getpid()))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=6)


class Watch(Callback):
    """Notes the parameters after every step, and which records were drawn."""

    def __init__(self, disturb: bool = False) -> None:
        self.hashes: list[list[int]] = []
        self.records: list[list[float]] = []
        self.disturb = disturb

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.records.append(batch[0][:, 0].tolist())

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.hashes.append(distributed.parameter_hash(module).tolist())
        if self.disturb and trainer.global_rank == 1 and trainer.global_step == 3:
            with torch.no_grad():
                next(module.parameters()).view(-1)[0] += 1e-3


RULES: dict[str, Any] = {
    "flat": FlatClipping(0.3),
    "per_layer": PerLayerClipping(0.3),
    "automatic": AutomaticClipping(),
    "adaptive": AdaptiveClipping(0.3),
    "backprop": BackpropClipping(1.0, 0.1),
    "encoding": GradientEncoding(PowerLawCodebook(), 0.3),
}

#: By name: the module, arguments of the strategy, and of the Trainer.
CASES: dict[str, tuple[type[Net], dict[str, Any], dict[str, Any]]] = {
    **{name: (Net, {"clipping": rule, "noise": GaussianNoise(0.0)}, {"max_steps": 4}) for name, rule in RULES.items()},
    "feedback": (FeedbackNet, {"clipping": FlatClipping(0.3), "noise": GaussianNoise(0.0)}, {"max_steps": 4}),
    "per_example": (Net, {"noise": GaussianNoise(0.0), "engine": "per_example"}, {"max_steps": 4}),
    "micro_batches": (Net, {"noise": GaussianNoise(0.0), "max_physical_batch_size": 2}, {"max_steps": 4}),
    "low_pass": (Net, {"noise": GaussianNoise(1.0), "denoiser": LowPassDenoiser()}, {"max_steps": 4}),
    "ks": (Net, {"noise": GaussianNoise(1.0), "denoiser": KSDenoiser(10.0, least=0.0)}, {"max_steps": 4}),
    "student": (Net, {"clipping": RULES["encoding"], "noise": StudentTNoise(9, 1.0)}, {"max_steps": 4}),
    "noisy_backprop": (Net, {"clipping": RULES["backprop"], "noise": GaussianNoise(1.0)}, {"max_steps": 4}),
    "noisy_adaptive": (Net, {"clipping": RULES["adaptive"], "noise": GaussianNoise(1.0)}, {"max_steps": 4}),
    "projected": (Projected, {"noise": GaussianNoise(1.0)}, {"max_steps": 4}),
    "surprised": (Surprised, {"noise": GaussianNoise(0.0)}, {"max_steps": 4}),
    "noise_alone": (Still, {"clipping": FlatClipping(0.5), "noise": GaussianNoise(2.0)}, {"max_steps": 1}),
    "few_records": (
        Logging,
        {"noise": GaussianNoise(1.0), "max_physical_batch_size": 1},
        {"max_steps": 12, "max_epochs": -1},
    ),
    "hundred_steps": (Net, {"noise": GaussianNoise(1.0)}, {"max_steps": 100, "max_epochs": -1}),
    "budget": (Net, {"noise": GaussianNoise()}, {"max_epochs": 3}),
    "stopped": (Net, {"noise": GaussianNoise(1.0)}, {"max_epochs": 100}),
    "one_callback": (Net, {}, {"max_epochs": 1}),
    "whole": (
        Net,
        {"clipping": RULES["adaptive"], "noise": GaussianNoise(1.0), "denoiser": LowPassDenoiser()},
        {"max_epochs": 2},
    ),
    "first_half": (
        Net,
        {"clipping": RULES["adaptive"], "noise": GaussianNoise(1.0), "denoiser": LowPassDenoiser()},
        {"max_epochs": 1},
    ),
    "second_half": (
        Net,
        {"clipping": RULES["adaptive"], "noise": GaussianNoise(1.0), "denoiser": LowPassDenoiser()},
        {"max_epochs": 2},
    ),
    "own_split": (Net, {"noise": GaussianNoise(1.0)}, {"max_steps": 2}),
    "diverging": (Net, {"noise": GaussianNoise(1.0)}, {"max_steps": 30, "max_epochs": -1}),
}


def run(case: str, world_size: int, folder: Path) -> dict[str, Any]:
    """Trains in this process, one of ``world_size``; what came of it."""
    kind, arguments, trainer_arguments = CASES[case]
    torch.manual_seed(0)
    module, watch = kind(), Watch(disturb=case == "diverging")
    callbacks: list[Callback] = [watch]
    # So that several processes can share one device.
    shared = {"parallel_devices": [DEVICE] * world_size, "process_group_backend": "gloo"} if world_size > 1 else {}
    strategy: Any
    if case == "one_callback":
        strategy = DDPStrategy(**shared) if shared else "auto"
        callbacks.append(DifferentialPrivacy(2.0, 1e-3, seed=3))
    else:
        kind_of_strategy = PrivateDDPStrategy if shared else PrivateStrategy
        strategy = kind_of_strategy(seed=3, **arguments, **shared)
    if case in ("budget", "stopped"):
        callbacks.append(PrivacyBudget(4.0, 1e-3))
    distributed.REPLICA_CHECK_EVERY = 5
    bucket, sums.BUCKET = sums.BUCKET, 200  # so that even this network has several
    expected = 2 if case == "few_records" else EXPECTED
    error = None
    training = trainer(
        default_root_dir=folder / case,
        strategy=strategy,
        **({"accelerator": "auto", "devices": "auto"} if shared else {}),
        callbacks=callbacks,
        **trainer_arguments,
    )
    try:
        checkpoint = folder / "half.ckpt" if case == "second_half" else None
        data = OwnSplit() if case == "own_split" else loader(RECORDS, expected // world_size)
        training.fit(module, data, ckpt_path=checkpoint)
        if case == "first_half":
            training.save_checkpoint(folder / "half.ckpt")
    except (distributed.ReplicasDiverged, PrivacyConfigurationError) as raised:
        error = str(raised)
    finally:
        sums.BUCKET = bucket
    private: Any = training.strategy
    return {
        "parameters": torch.cat([p.detach().flatten() for p in module.parameters()]),
        "hashes": watch.hashes,
        "records": watch.records,
        "steps": len(private.ledger),
        "epsilon": private.ledger.epsilon(1e-3),
        "multiplier": private.noise_multiplier,
        "error": error,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        result = run(case, int(os.environ["WORLD_SIZE"]), folder)
        torch.save(result, folder / f"{case}.{os.environ['RANK']}")


if __name__ == "__main__":
    main()
