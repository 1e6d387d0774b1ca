"""`accumulate_grad_batches`: one sample of k times the loader's size, in parts that fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_dp import DifferentialPrivacy, FlatClipping, GaussianNoise, PrivateStrategy
from tests.conftest import Net, fit, loader, trainer

#: How many records the modules of a test saw at once.
SIZES: list[int] = []


class Watching(Net):
    """Notes how many records it sees at once, and what the Trainer plans."""

    planned = 0.0

    def setup(self, stage: str) -> None:
        self.planned = self.trainer.estimated_stepping_batches

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        SIZES.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def weights(module: Net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def private(**options: Any) -> PrivateStrategy:
    return PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), seed=1, **options)


def trained(strategy: PrivateStrategy, batch_size: int, **options: Any) -> tuple[Watching, Any]:
    torch.manual_seed(0)
    module = Watching()
    run = trainer(strategy=strategy, max_epochs=2, **options)
    fit(run, module, loader(40, batch_size))
    return module, run


def test_it_is_the_training_on_the_whole_logical_batch() -> None:
    accumulated, run = trained(private(), 2, accumulate_grad_batches=4)
    assert max(SIZES[-10:]) <= 2
    whole, other = trained(private(max_physical_batch_size=2), 8)
    torch.testing.assert_close(weights(accumulated), weights(whole))
    assert list(run.strategy.ledger) == list(other.strategy.ledger)
    assert run.strategy.sampling_rate == 0.2 and run.global_step == other.global_step == 10
    assert accumulated.planned == 10


def test_the_trainer_has_its_settings_back() -> None:
    _, run = trained(private(), 2, accumulate_grad_batches=4, limit_train_batches=10, val_check_interval=4)
    assert (run.accumulate_grad_batches, run.limit_train_batches, run.val_check_interval) == (4, 10, 4)
    assert run.global_step == 2 * 3  # ten batches are three steps, as in Lightning
    fit(run, Net(), loader(40, 2))
    assert run.accumulate_grad_batches == 4


@pytest.mark.parametrize(("size", "batch", "k", "steps"), [(40, 4, 3, 4), (40, 4, 100, 1), (45, 4, 3, 4)])
def test_steps_are_those_of_lightning(size: int, batch: int, k: int, steps: int) -> None:
    plain = trainer(accumulate_grad_batches=k)
    fit(plain, Net(), loader(size, batch))
    run = trainer(callbacks=[DifferentialPrivacy(None, 1e-3, noise=1.0)], accumulate_grad_batches=k)
    fit(run, Net(), loader(size, batch))
    assert plain.global_step == run.global_step == steps
    assert run.strategy.sampling_rate == pytest.approx(min(1.0, batch * k / size))


def test_what_fits_at_once_can_still_be_said() -> None:
    trained(private(max_physical_batch_size=3), 2, accumulate_grad_batches=4)
    assert max(SIZES[-10:]) == 3
