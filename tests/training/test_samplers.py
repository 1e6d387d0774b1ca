"""Samplers of the user's train loader, through the Trainer: weights that are public, parts of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_dp import DifferentialPrivacy
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism.sampling import inclusion_probabilities
from tests.conftest import Net

N = 40
DATA = TensorDataset(torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3)
WEIGHTS = torch.where(torch.arange(N) < 4, 9.0, 1.0)


class Seen(L.Callback):
    """Notes which records pass through."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0][:, 0].tolist())


def fit(sampler: Any, folder: Path, module: Any = None, epochs: int = 1, seen: Any = (), **options: Any) -> Any:
    run = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder),
        callbacks=[DifferentialPrivacy(epsilon=5.0, delta=1e-3, **options), *seen],
    )  # fmt: skip
    run.fit(module or Net(), DataLoader(DATA, batch_size=8, sampler=sampler))
    return run


def test_public_weights_are_accounted_at_the_largest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probabilities = inclusion_probabilities(WEIGHTS.numpy(), 8)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        run = fit(WeightedRandomSampler(WEIGHTS, 24), tmp_path, public_weights=True)
    strategy = run.strategy
    assert run.global_step == 3 and strategy.num_records == N
    assert strategy.sampling_rate == pytest.approx(probabilities.max()) == 1.0
    assert strategy.expected_batch_size == pytest.approx(8.0)
    ((event, count),) = list(strategy.ledger)
    assert count == 3 and event.sampling_probability == 1.0
    assert "weights of the sampler cost" in caplog.text and "likeliest" in caplog.text
    card = next(tmp_path.rglob("privacy_card.md")).read_text()
    assert "public_weights=True" in card and "at most q" in card


def test_records_join_as_often_as_their_weights_say(tmp_path: Path) -> None:
    seen = Seen()
    weights = torch.where(torch.arange(N) < 4, 4.0, 1.0)
    fit(WeightedRandomSampler(weights, 8 * 60), tmp_path, epochs=5, seen=[seen], public_weights=True)
    found = torch.tensor([value for batch in seen.seen for value in batch])
    often = np.array([(found == value).sum() / len(seen.seen) for value in DATA.tensors[0][:, 0]])
    expected = inclusion_probabilities(weights.numpy(), 8)
    assert len(seen.seen) == 300
    assert (np.abs(often - expected) <= 5 * np.sqrt(expected * (1 - expected) / 300)).all()
    assert (np.abs(often - 0.2) > 5 * np.sqrt(0.2 * 0.8 / 300)).any()


def test_without_the_declaration_weights_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    with pytest.raises((TypeError, PrivacyConfigurationError), match="weight=class_weights"):
        fit(WeightedRandomSampler(WEIGHTS, N), tmp_path)

    class Weighted(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return torch.nn.functional.cross_entropy(self.net(x), y, weight=torch.tensor([1.0, 9.0, 1.0]))

    assert fit(None, tmp_path, Weighted()).global_step == 5


def test_a_part_of_the_records_is_trained_on(tmp_path: Path) -> None:
    seen, part = Seen(), [3, 5, 8, 13, 21, 34, 39, 1, 2, 0]
    run = fit(SubsetRandomSampler(part), tmp_path, epochs=4, seen=[seen])
    assert run.strategy.num_records == 10 and run.strategy.sampling_rate == pytest.approx(0.8)
    assert {value for batch in seen.seen for value in batch} == set(DATA.tensors[0][part, 0].tolist())


def test_sampling_with_replacement_is_replaced_like_any_shuffling(tmp_path: Path) -> None:
    run = fit(RandomSampler(DATA, replacement=True, num_samples=16), tmp_path)
    assert run.global_step == 2 and run.strategy.sampling_rate == pytest.approx(0.2)


def test_a_plain_batch_sampler_is_replaced_like_a_sampler(tmp_path: Path) -> None:
    loader = DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, drop_last=True))
    run = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
        callbacks=[DifferentialPrivacy(epsilon=5.0, delta=1e-3)],
    )  # fmt: skip
    run.fit(Net(), loader)
    assert run.global_step == 5 and run.strategy.sampling_rate == pytest.approx(0.2)  # type: ignore[attr-defined]
