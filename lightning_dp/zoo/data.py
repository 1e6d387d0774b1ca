"""Data modules of the recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from lightning_dp.zoo.features.cache import FeatureCache

#: Name of the environment variable with a folder of data sets, one subfolder each, in the layout of the hub.
DATA_FOLDER_VARIABLE = "LIGHTNING_DP_DATA"


class TensorTable(Dataset[Any]):
    """Tensors with one row per record, looked up a batch at a time: ``__getitems__`` gives one tensor per column.

    The batch is collated already: use a ``collate_fn`` that returns it unchanged.
    """

    def __init__(self, *columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[index] for column in self.columns)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(column[indices] for column in self.columns)


class ViewTable(TensorTable):
    """A table whose first column, ``(N, V, ...)``, holds V views of every record: a look-up gives one of them.

    Where a record is looked up several times in a row (``augmentation_multiplicity``), its views come in turn, from a
    random one on: up to V copies are all different.

    Args:
        columns: As for `TensorTable`.
        together: Whether a look-up gives all views, ``(B, V, ...)``.
    """

    def __init__(self, *columns: Tensor, together: bool = False) -> None:
        super().__init__(*columns)
        self.together = together

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(column[0] for column in self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        views = self.columns[0]
        index = torch.as_tensor(indices, dtype=torch.long)
        if self.together:
            return views[index.to(views.device)].float(), *(c[index.to(c.device)] for c in self.columns[1:])
        begins = torch.ones_like(index, dtype=torch.bool)
        begins[1:] = index[1:] != index[:-1]
        run = begins.cumsum(0) - 1
        place = torch.arange(len(index)) - begins.nonzero()[:, 0][run]
        first = torch.randint(views.shape[1], (int(begins.sum()),))[run]
        index, view = index.to(views.device), ((first + place) % views.shape[1]).to(views.device)
        return views[index, view].float(), *(column[index] for column in self.columns[1:])


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

    def __init__(
        self,
        batch_size: int = 512,
        val_size: int = 0,
        darkest: float = -1.0,
        features: nn.Module | None = None,
        flips: bool = False,
        shifts: int = 0,
        on_device: bool = False,
        cache: str | None = None,
    ) -> None:
        super().__init__(batch_size)
        if features is not None and shifts:
            raise ValueError("shifts: features are computed once for every image, and not for every shift of it.")
        if features is not None and any(p.requires_grad for p in features.parameters()):
            raise ValueError("features must have no trainable parameters: they are computed once, before training.")
        self.val_size, self.darkest, self.features = val_size, darkest, features
        self.flips, self.shifts, self.on_device = flips, shifts, on_device
        self._cache = FeatureCache(cache, features)
        self._splits: Any = None

    def setup(self, stage: str) -> None:
        if self._splits is None:
            hub_name, folder_name, _ = self.source
            self._splits = load_hub_dataset(hub_name, folder_name)
        lacks_train = stage == "fit" and self.train is None
        lacks_val = stage in ("fit", "validate") and self.val is None
        if lacks_train or lacks_val:
            images, labels = _images(self._splits["train"], self.source[2], self.darkest)
            kept = len(labels) - self.val_size
            if lacks_val:
                self.val = self._table(images[kept:], labels[kept:])
            if lacks_train:
                self.train = self._table(images[:kept], labels[:kept], training=True)
        if stage in ("test", "predict") and self.test is None:
            self.test = self._table(*_images(self._splits["test"], self.source[2], self.darkest))

    def _table(self, images: Tensor, labels: Tensor, training: bool = False) -> TensorTable:
        """Images or their features, of every image by itself; with ``flips``, of its mirror image as well."""
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        place = device if self.on_device else torch.device("cpu")
        labels = labels.to(place)
        if self.features is None or not len(images):
            return TensorTable(images.to(place), labels)
        features = self.features.to(device).eval()  # in training, some layers look at all images of a batch

        def views(part: Tensor) -> Tensor:
            part = part.to(device)
            return torch.stack([features(view) for view in ([part, part.flip(-1)] if self.flips else [part])], 1)

        def compute() -> Tensor:
            parts = images.split(_AT_ONCE_CPU if device.type == "cpu" else _AT_ONCE_GPU)
            shown = tqdm(parts, "features", leave=False, disable=None)
            with torch.no_grad():
                _check_features(features, images[:_AT_ONCE_CPU].to(device))
                return torch.cat([_half(views(part)).to(place) for part in shown])

        table = self._cache.table(images, f"flips={self.flips}", compute).to(place)
        return ViewTable(table, labels, together=self.flips and not training)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments the images of a train batch, every row by itself."""
        training = self.trainer is not None and self.trainer.training
        if not training or self.features is not None or not (self.flips or self.shifts):
            return batch
        images, *rest = batch
        return [augmented(images, self.flips, self.shifts), *rest]


def _check_features(features: nn.Module, images: Tensor) -> None:
    """Refuses features of an image that depend on other images."""
    together, alone = features(images)[:1], features(images[:1])
    if not torch.allclose(together, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())):
        raise ValueError(
            f"features={type(features).__name__}: an image's features depend on which others are computed with it "
            "(normalisation over the batch, say), and would carry records into one another."
        )


def _half(features: Tensor) -> Tensor:
    half = features.to(torch.float16)
    if (half.isinf() & features.isfinite()).any():
        raise ValueError("features are kept in half precision, which ends at 65504: scale them down.")
    return half


#: Images whose features are computed at once; few on a CPU, so that intermediate results stay in its cache.
_AT_ONCE_CPU, _AT_ONCE_GPU = 32, 1024


def augmented(images: Tensor, flips: bool, shifts: int) -> Tensor:
    """Every image ``(B, C, H, W)``, mirrored or not, and shifted by up to ``shifts`` pixels (edges are reflected)."""
    count, _, height, width = images.shape
    device = images.device
    if not count:
        return images
    padded = F.pad(images, [shifts] * 4, mode="reflect") if shifts else images
    rows = torch.arange(height, device=device) + torch.randint(2 * shifts + 1, (count, 1), device=device)
    columns = torch.arange(width, device=device) + torch.randint(2 * shifts + 1, (count, 1), device=device)
    if flips:
        columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    examples = torch.arange(count, device=device)[:, None, None]
    return padded.movedim(1, -1)[examples, rows[:, :, None], columns[:, None]].movedim(-1, 1).contiguous()


class MNISTDataModule(_ImageDataModule):
    """MNIST through Hugging Face ``datasets``: the hub's ``ylecun/mnist``, or ``$LIGHTNING_DP_DATA/mnist`` when set.

    Args:
        batch_size: Expected number of records per private step.
        val_size: How many records at the end of the train set are held out for validation.
        darkest: What black is mapped to; white is 1. At 0, an empty background adds nothing to an input's norm.
        features: A fixed transform, ``(B, C, H, W) -> (B, C', H', W')``, which is computed once for every image, on the
            Trainer's device, and kept in half precision: `Scattering2D`, say. ``None``: the images themselves.
        flips: Whether train images are mirrored at random (not for digits). With ``features``, what is evaluated is an
            image and its mirror image together, ``(B, 2, C', H', W')``.
        shifts: By how many pixels train images are shifted at random, at most.
        on_device: Whether the tables are kept in the Trainer's device's memory.
        cache: Folder in which features are kept for the next training (`FeatureCache`). ``None``: nowhere.

    Raises:
        ValueError: ``features`` can be trained, are combined with ``shifts``, mix images, or are too large.
    """

    source = ("ylecun/mnist", "mnist", "image")


class CIFAR10DataModule(_ImageDataModule):
    """CIFAR-10, ``(3, 32, 32)``: the hub's ``uoft-cs/cifar10``, or ``$LIGHTNING_DP_DATA/cifar10`` when set.

    Args:
        batch_size, val_size, darkest, features, flips, shifts, on_device, cache: As for `MNISTDataModule`.
    """

    source = ("uoft-cs/cifar10", "cifar10", "img")


def load_hub_dataset(hub_name: str, folder_name: str) -> Any:
    """The splits of a data set, by name: from the hub, or from ``$LIGHTNING_DP_DATA/<folder_name>`` when that is set.

    Raises:
        FileNotFoundError: The variable is set, and there is no such folder.
    """
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


class Upright(nn.Module):
    """Moves the ink of a digit to the middle and shears it until it stands upright, then passes it on.

    By the first and second moments of the image itself: every image is treated by itself, and nothing is revealed.
    Source: deslanting in LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", section III.

    Args:
        then: What the images ``(B, 1, H, W)`` are passed on to; they are in [-1, 1], where -1 is the background.
    """

    def __init__(self, then: nn.Module) -> None:
        super().__init__()
        self.then = then

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.then(upright(images))
        return features


def upright(images: Tensor) -> Tensor:
    """Images ``(B, 1, H, W)`` in [-1, 1], centred by mass and sheared along x until the ink is uncorrelated in x and y.

    An image without ink stays as it is.
    """
    ink = (images + 1) / 2
    count, _, height, width = images.shape
    half_y, half_x = (height - 1) / 2, (width - 1) / 2
    y = torch.linspace(-half_y, half_y, height, dtype=images.dtype, device=images.device).view(1, 1, height, 1)
    x = torch.linspace(-half_x, half_x, width, dtype=images.dtype, device=images.device).view(1, 1, 1, width)
    mass = ink.sum((1, 2, 3))
    weights = ink / mass.clamp(min=1e-6).view(-1, 1, 1, 1)
    mean_y, mean_x = (weights * y).sum((1, 2, 3)), (weights * x).sum((1, 2, 3))
    from_mean_y, from_mean_x = y - mean_y.view(-1, 1, 1, 1), x - mean_x.view(-1, 1, 1, 1)
    variance = (weights * from_mean_y**2).sum((1, 2, 3))
    covariance = (weights * from_mean_y * from_mean_x).sum((1, 2, 3))
    shear = covariance / variance.clamp(min=1e-6)
    one, zero = torch.ones_like(shear), torch.zeros_like(shear)
    rows = [one, shear * half_y / half_x, mean_x / half_x, zero, one, mean_y / half_y]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [count, 1, height, width], align_corners=True)
    return F.grid_sample(ink, grid, align_corners=True) * 2 - 1
