"""What weights have cost stays with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_dp import FlatClipping, GaussianNoise, PrivacyBudget, PrivateCentering, PrivateStrategy
from tests.conftest import Net, dataset, fit, loader, trainer


def train(module: Net, data: Any = None, **kwargs: Any) -> PrivateStrategy:
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0))
    fit(trainer(strategy=strategy, **kwargs), module, loader() if data is None else data)
    return strategy


def test_a_second_trainer_goes_on_where_the_first_ended() -> None:
    module = Net()
    assert [len(train(module).ledger) for _ in range(3)] == [5, 10, 15]
    assert len(train(Net()).ledger) == 5


def test_it_is_said_with_the_way_to_begin_anew() -> None:
    module = Net()
    train(module)
    with pytest.warns(UserWarning, match="5 private steps.*To begin anew, make a new module"):
        trainer(strategy=PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0))).fit(module, loader())


def test_a_budget_holds_over_all_trainings_of_a_module() -> None:
    module, spent = Net(), []
    for _ in range(3):
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0))
        run = trainer(strategy=strategy, callbacks=[PrivacyBudget(1.5, 1e-3)], max_epochs=2)
        fit(run, module, loader())
        spent.append(strategy.ledger.epsilon(1e-3))
    assert spent == sorted(spent) and spent[-1] <= 1.5


def test_other_records_have_an_account_of_their_own() -> None:
    """Federated rounds: each client's records are charged for its own rounds."""
    module, data = Net(), dataset(80)
    clients = [Subset(data, range(40)), Subset(data, range(40, 80))]
    for round_ in (1, 2):
        for client in clients:
            assert len(train(module, DataLoader(client, batch_size=8)).ledger) == 5 * round_


def test_a_data_set_that_has_grown_is_still_the_same() -> None:
    module = Net()
    inputs, labels = dataset(41).tensors
    for count, steps in ((40, 5), (41, 11)):
        data = torch.utils.data.TensorDataset(inputs[:count].clone(), labels[:count].clone())
        assert len(train(module, DataLoader(data, batch_size=8)).ledger) == steps


class Augmented(torch.utils.data.Dataset[Any]):
    """Records in another order, with noise of their own every time that they are loaded."""

    def __init__(self, records: Any) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        x, y = self.records[index]
        return x + 0.1 * torch.randn(x.shape), y


def test_the_same_records_augmented_in_another_order_are_still_the_same() -> None:
    module, records = Net(), list(dataset(40))
    for order, steps in ((records, 5), (records[::-1], 10)):
        assert len(train(module, DataLoader(Augmented(order), batch_size=8)).ledger) == steps


def test_the_same_records_split_anew_are_still_the_same() -> None:
    module, (inputs, labels) = Net(), dataset(80).tensors
    for seed, steps in ((0, 8), (1, 16)):
        data = torch.utils.data.TensorDataset(inputs.clone(), labels.clone())
        part, _ = torch.utils.data.random_split(data, [64, 16], torch.Generator().manual_seed(seed))
        assert len(train(module, DataLoader(part, batch_size=8)).ledger) == steps


def test_a_checkpoint_brings_its_account(tmp_path: Path) -> None:
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0))
    run = trainer(strategy=strategy)
    fit(run, Net(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Net.load_from_checkpoint(tmp_path / "a.ckpt")
    assert len(train(again).ledger) == 10


def test_resuming_counts_once(tmp_path: Path) -> None:
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0))
    run, module = trainer(strategy=strategy), Net()
    fit(run, module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0))
    fit(trainer(strategy=other, max_epochs=2), module, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert len(other.ledger) == 10


class Centred(Net):
    def __init__(self) -> None:
        super().__init__()
        self.centre = PrivateCentering(6, noise_multiplier=3.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((self.centre(batch[0]), batch[1]), batch_idx)


def test_a_statistic_brings_its_cost_with_the_weights() -> None:
    first = Centred()
    one = train(first)
    assert len(one.ledger.statistics()) == 1
    second = Centred()
    second.load_state_dict(first.state_dict())
    two = train(second)
    assert two.ledger.statistics() == one.ledger.statistics()
    assert two.ledger.steps == 5
    assert torch.equal(second.centre.mean, first.centre.mean)


def test_weights_of_before_statistics_kept_their_cost_still_load() -> None:
    first = Centred()
    train(first)
    old = {name: value for name, value in first.state_dict().items() if "_extra_state" not in name}
    Centred().load_state_dict(old)
