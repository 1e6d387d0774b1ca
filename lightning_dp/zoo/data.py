"""Data modules of the recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

#: Name of the environment variable with a folder of data sets, one subfolder each, in the layout of the hub.
DATA_FOLDER_VARIABLE = "LIGHTNING_DP_DATA"


class TensorTable(Dataset[Any]):
    """Tensors with one row per record, whose rows are looked up a batch at a time rather than one by one."""

    def __init__(self, *columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self.columns)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(column[indices] for column in self.columns)


def _already_collated(batch: Any) -> Any:
    return batch


class _TableDataModule(pl.LightningDataModule):
    """Train, validation and test tables in memory."""

    def __init__(self, batch_size: int, eval_batch_size: int = 2048) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.train: TensorTable | None = None
        self.val: TensorTable | None = None
        self.test: TensorTable | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.train is not None
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, collate_fn=_already_collated)

    def val_dataloader(self) -> Any:
        return self._eval_loader(self.val) if self.val is not None and len(self.val) else []

    def test_dataloader(self) -> DataLoader[Any]:
        assert self.test is not None
        return self._eval_loader(self.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()

    def _eval_loader(self, table: TensorTable) -> DataLoader[Any]:
        return DataLoader(table, batch_size=self.eval_batch_size, collate_fn=_already_collated)


class DigitsDataModule(_TableDataModule):
    """scikit-learn's 1797 digits, 8×8, which need no network: every fifth is for testing.

    Args:
        batch_size: Expected number of records per private step.
    """

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__(batch_size)

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
        labels = torch.from_numpy(digits.target).long()
        held_out = torch.arange(len(labels)) % 5 == 0
        self.train = TensorTable(images[~held_out], labels[~held_out])
        self.test = TensorTable(images[held_out], labels[held_out])


class _ImageDataModule(_TableDataModule):
    """Images of one size from the Hugging Face hub, or from ``$LIGHTNING_DP_DATA`` when that is set."""

    #: Name on the hub, name of the folder, and name of the column with the images.
    source: tuple[str, str, str]

    def __init__(self, batch_size: int = 512, val_size: int = 0, darkest: float = -1.0) -> None:
        super().__init__(batch_size)
        self.val_size, self.darkest = val_size, darkest

    def setup(self, stage: str) -> None:
        if self.train is not None:
            return
        hub_name, folder_name, column = self.source
        parts = load_hub_dataset(hub_name, folder_name)
        images, labels = _images(parts["train"], column, self.darkest)
        kept = len(labels) - self.val_size
        self.train = TensorTable(images[:kept], labels[:kept])
        self.val = TensorTable(images[kept:], labels[kept:])
        self.test = TensorTable(*_images(parts["test"], column, self.darkest))


class MNISTDataModule(_ImageDataModule):
    """MNIST through Hugging Face ``datasets``: the hub's ``ylecun/mnist``, or ``$LIGHTNING_DP_DATA/mnist`` when set.

    Args:
        batch_size: Expected number of records per private step.
        val_size: How many records at the end of the train set are held out for validation.
        darkest: What black is mapped to; white is 1. At 0, an empty background adds nothing to an input's norm.
    """

    source = ("ylecun/mnist", "mnist", "image")


class CIFAR10DataModule(_ImageDataModule):
    """CIFAR-10, ``(3, 32, 32)``: the hub's ``uoft-cs/cifar10``, or ``$LIGHTNING_DP_DATA/cifar10`` when set.

    Args:
        batch_size, val_size, darkest: As for `MNISTDataModule`.
    """

    source = ("uoft-cs/cifar10", "cifar10", "img")


def load_hub_dataset(hub_name: str, folder_name: str) -> Any:
    """The splits of a data set, from the hub or from the folder of data sets that the environment names."""
    from datasets import load_dataset

    folder = os.environ.get(DATA_FOLDER_VARIABLE)
    if not folder:
        return load_dataset(hub_name)
    path = Path(folder).expanduser() / folder_name
    if not path.is_dir():
        raise FileNotFoundError(
            f"{DATA_FOLDER_VARIABLE}={folder} has no folder '{folder_name}'. Unset the variable to load {hub_name} "
            "from the Hugging Face hub, or put the data set's files there."
        )
    return load_dataset(str(path))


def _images(split: Any, column: str, darkest: float) -> tuple[Tensor, Tensor]:
    """Images scaled by public constants to [darkest, 1], ``(N, C, H, W)``, and labels, ``(N,)``."""
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in split[column]]))
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    scaled = pixels.float().mul_((1 - darkest) / 255).add_(darkest).contiguous()
    return scaled, torch.tensor(list(split["label"]))
