"""Small models, a naive oracle and a Trainer without decorations, shared by the tests."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.tensors import DEVICE

_scratch = tempfile.TemporaryDirectory(prefix="lightning_dp_tests_")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _fixed_seed_and_device(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    if DEVICE.type != "cpu":  # a Trainer brings modules to its device, and back again
        elsewhere = request.node.get_closest_marker("on_device") and not request.node.get_closest_marker("trains")
        torch.set_default_device(DEVICE if elsewhere else "cpu")


class Net(pl.LightningModule):
    """A classifier around any network, with SGD of learning rate 1: an update is minus the gradient."""

    def __init__(self, net: nn.Module | None = None, reduction: str = "mean") -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.reduction = reduction

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels, reduction=self.reduction)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def dataset(size: int = 40, features: int = 6, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(size, features, generator=generator, device="cpu"),
        torch.randint(classes, (size,), generator=generator, device="cpu"),
    )


def loader(size: int = 40, batch_size: int = 8, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset(size), batch_size=batch_size, shuffle=True, **kwargs)


class OneFolder(Logger):
    """Logs nothing; every run that has it keeps its files in the one folder."""

    name = version = ""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self._folder = os.fspath(folder)

    @property
    def save_dir(self) -> str:
        return self._folder

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def trainer(**kwargs: Any) -> pl.Trainer:
    """A quiet Trainer, with a directory of its own; one that is named holds all runs of a test."""
    if "default_root_dir" in kwargs and not kwargs.get("logger"):
        kwargs["logger"] = OneFolder(kwargs["default_root_dir"])
    defaults: dict[str, Any] = {
        "default_root_dir": tempfile.mkdtemp(dir=_scratch.name),
        "accelerator": "cpu" if DEVICE.type == "cpu" else "gpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**defaults, **kwargs})


def fit(trainer: pl.Trainer, module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, *args, **kwargs)


def oracle_gradients(module: nn.Module, loss: Callable[[int], Tensor], count: int) -> dict[str, Tensor]:
    """Per-example gradients by the obvious loop: ``loss(i)`` is the loss of example i alone."""
    rows: dict[str, list[Tensor]] = {name: [] for name, p in module.named_parameters() if p.requires_grad}
    for example in range(count):
        module.zero_grad()
        loss(example).backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                rows[name].append(torch.zeros_like(parameter) if grad is None else grad.clone())
    module.zero_grad()
    return {name: torch.stack(values) for name, values in rows.items()}


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    error = (found - expected).norm()
    assert error <= relative * expected.norm() + 1e-12, f"relative error {error / expected.norm():.3g}"
