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


class MNISTDataModule(_TableDataModule):
    """MNIST through Hugging Face ``datasets``: the hub's ``ylecun/mnist``, or ``$LIGHTNING_DP_DATA/mnist`` when set.

    Args:
        batch_size: Expected number of records per private step.
        val_size: How many records at the end of the train set are held out for validation.
    """

    def __init__(self, batch_size: int = 512, val_size: int = 0) -> None:
        super().__init__(batch_size)
        self.val_size = val_size

    def setup(self, stage: str) -> None:
        if self.train is not None:
            return
        parts = load_hub_dataset("ylecun/mnist", "mnist")
        images, labels = _grey_images(parts["train"])
        kept = len(labels) - self.val_size
        self.train = TensorTable(images[:kept], labels[:kept])
        self.val = TensorTable(images[kept:], labels[kept:])
        self.test = TensorTable(*_grey_images(parts["test"]))


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


def _grey_images(split: Any) -> tuple[Tensor, Tensor]:
    """Images scaled by public constants to [-1, 1], ``(N, 1, H, W)``, and labels, ``(N,)``."""
    images = np.stack([np.asarray(image, dtype=np.uint8) for image in split["image"]])
    return torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1, torch.tensor(list(split["label"]))
