"""``max_physical_batch_size`` bounds what is loaded: the records of a sample come in parts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dp import FlatClipping, GaussianNoise, PrivateStrategy
from tests.conftest import Net, trainer

N = 48
INPUTS = torch.randn(N, 6, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
INPUTS[7] = 5.0


class Records(Dataset[Any]):
    def __init__(self) -> None:
        self.loaded: Counter[int] = Counter()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.loaded[index] += 1
        return INPUTS[index], index % 3


class Sizes:
    """A collate function that knows how much it was given at once; it makes what cannot be sliced, if asked."""

    def __init__(self, opaque: bool = False) -> None:
        self.opaque, self.seen = opaque, Counter[int]()

    def __call__(self, items: list[Any]) -> Any:
        self.seen[len(items)] += 1
        inputs = torch.stack([x for x, _ in items])
        labels = torch.tensor([y for _, y in items])
        return (Opaque(inputs), labels) if self.opaque else (inputs, labels)


class Opaque:
    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs


class Rare(Net):
    """Runs other code when a part holds the one large record."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        inputs = inputs.inputs if isinstance(inputs, Opaque) else inputs
        hidden = self.net[0](inputs)
        if bool((inputs > 4).any()):
            hidden = torch.where(inputs[:, :1] > 4, hidden * 0.5, hidden)
        return F.cross_entropy(self.net[2](self.net[1](hidden)), labels)


class Plain(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        inputs = inputs.inputs if isinstance(inputs, Opaque) else inputs
        return F.cross_entropy(self.net(inputs), labels)


def fit(
    module: type[Net], at_once: int | None, workers: int = 0, collate: Any = None, data: Any = None, **options: Any
) -> torch.Tensor:
    torch.manual_seed(0)
    made = module()
    private = PrivateStrategy(
        FlatClipping(1.0), GaussianNoise(1.0), seed=4, max_physical_batch_size=at_once, journal=False, **options
    )
    loader = DataLoader(data or Records(), batch_size=24, num_workers=workers, collate_fn=collate)
    trainer(strategy=private, max_epochs=2).fit(made, loader)
    return torch.cat([p.detach().flatten() for p in made.parameters()])


@pytest.mark.parametrize("module", [Plain, Rare])
@pytest.mark.parametrize("at_once", [1, 5, 16])
def test_parts_give_what_the_whole_gives(module: type[Net], at_once: int) -> None:
    torch.testing.assert_close(fit(module, at_once), fit(module, None))


@pytest.mark.parametrize("options", [{"augmentation_multiplicity": 2}, {"engine": "per_example"}])
def test_copies_and_engines_keep_their_parts(options: Any) -> None:
    torch.testing.assert_close(fit(Plain, 4, **options), fit(Plain, None, **options))


def test_no_more_than_that_is_loaded_at_once() -> None:
    whole, parts = Sizes(), Sizes()
    fit(Plain, None, collate=whole, self_check=False)
    fit(Plain, 5, collate=parts, self_check=False)
    assert max(parts.seen) == 5
    assert max(whole.seen) > 15  # what a test of the parts alone would not notice


def test_every_drawn_record_is_loaded_once() -> None:
    whole, parts = Records(), Records()
    fit(Plain, None, data=whole, self_check=False)
    fit(Plain, 5, data=parts, self_check=False)
    assert parts.loaded == whole.loaded and parts.loaded.total() > 48


def test_workers_load_parts_in_order() -> None:
    torch.testing.assert_close(fit(Rare, 5, workers=2), fit(Rare, 5))


def test_a_batch_that_cannot_be_sliced_trains_in_parts() -> None:
    found = fit(Plain, 5, collate=Sizes(opaque=True), self_check=False)
    torch.testing.assert_close(found, fit(Plain, 5, self_check=False))
