"""Features on disk: computed once, and computed again for whatever would change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.zoo import CIFAR10DataModule, Upright
from lightning_dp.zoo.features.cache import FeatureCache
from tests.zoo.test_zoo import images_on_disk


class Scaled(nn.Module):
    """Counts how many images it has seen."""

    seen = 0

    offset: Tensor

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        Scaled.seen += len(images)
        return images * self.factor + self.offset


def table(folder: Path, images: Tensor, features: nn.Module, how: str = "") -> Tensor:
    return FeatureCache(folder, features).table(images, how, lambda: features(images))


def test_features_are_computed_once_and_again_for_anything_else(tmp_path: Path) -> None:
    images = torch.rand(4, 1, 5, 5)
    first = table(tmp_path, images, Scaled())
    before = Scaled.seen
    assert torch.equal(table(tmp_path, images, Scaled()), first)
    assert Scaled.seen == before, "the stored table was taken"
    moved = Scaled()
    moved.offset += 1
    others: list[tuple[Any, ...]] = [
        (images, Scaled(3.0)),
        (images, moved),
        (images, Scaled(), "flips"),
        (images + 1e-6, Scaled()),
        (images.view(1, 4, 5, 5), Scaled()),
        (images, Upright(Scaled())),
    ]
    for count, other in enumerate(others, 1):
        table(tmp_path, *other)
        assert Scaled.seen > before, f"case {count} took a table that is not its own"
        before = Scaled.seen
    assert len(list(tmp_path.iterdir())) == 7


def test_a_table_that_was_not_finished_is_not_taken(tmp_path: Path) -> None:
    images, before = torch.rand(2, 1, 5, 5), Scaled.seen
    table(tmp_path, images, Scaled())
    [path] = tmp_path.iterdir()
    path.rename(path.with_suffix(".1.part"))
    table(tmp_path, images, Scaled())
    assert Scaled.seen == before + 4


def test_a_class_without_a_file_is_refused(tmp_path: Path) -> None:
    made = type("Made", (Scaled,), {"__module__": "nowhere"})
    with pytest.raises(ValueError, match="Made has no source file"):
        FeatureCache(tmp_path, made())
    FeatureCache(None, made())


def test_a_data_module_takes_its_tables_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images_on_disk(tmp_path, 12, 4)
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    columns = []
    for _ in range(2):
        before = Scaled.seen
        data = CIFAR10DataModule(val_size=2, features=Scaled(), flips=True, cache=str(tmp_path / "features"))
        data.setup("fit")
        data.setup("test")
        assert data.train is not None and data.val is not None and data.test is not None
        columns.append([part.columns[0] for part in (data.train, data.val, data.test)])
    assert Scaled.seen == before, "nothing was computed the second time"
    for one, other in zip(*columns, strict=True):
        assert torch.equal(one, other)
