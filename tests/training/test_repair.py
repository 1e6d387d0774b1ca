"""`repair`: BatchNorm is exchanged for what can be trained privately, and what was there is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp
from lightning_dp import DifferentialPrivacy, FlatClipping, GaussianNoise, PrivateStrategy, UnsupportedModelError
from lightning_dp.training import repair as repair_module
from tests.conftest import Net, fit, loader, trainer


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (40,), generator=generator)), batch_size=8)


def network(channels: int = 8) -> nn.Sequential:
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, 3))
    return nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True), head)


class Classifier(Net):
    def __init__(self) -> None:
        super().__init__(network())


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(epsilon=None, delta=1e-3, noise=GaussianNoise(1.0), **options)


@pytest.mark.parametrize("way", ["callback", "strategy", "by hand"])
def test_a_network_with_batch_norm_trains_by_one_argument(way: str) -> None:
    module, data = Classifier(), images()
    if way == "callback":
        run = trainer(callbacks=[private(repair=True)])
    else:
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), repair=way == "strategy")
        run = trainer(strategy=strategy)
        if way == "by hand":
            assert lightning_dp.repair(module) is module
    fit(run, module, data)
    norm = module.net[1]
    assert isinstance(norm, nn.GroupNorm)
    assert len(run.strategy.ledger) == 5
    assert run.strategy.public_configuration()["repaired"] == ["net.1 (GroupNorm)"]
    assert not torch.equal(norm.weight, torch.ones_like(norm.weight)), "the optimizer does not have its weights"


def test_without_it_the_refusal_names_it_once() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'net.1' \(BatchNorm2d\).*repair=True") as caught:
        fit(trainer(callbacks=[private()]), Classifier(), images())
    assert str(caught.value).count("repair=True") == 1


def test_what_was_exchanged_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(repair_module, "rank_zero_info", said.append)
    module = Net(nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(5)), nn.Linear(6, 3)))
    trainer(callbacks=[private(repair=True)]).fit(module, loader())
    assert said == [
        "lightning_dp: repair=True: GroupNorm in the place of 5 BatchNorm layers (net.0.1, net.1.1, net.2.1, …), with "
        "their weights and without their statistics."
    ]


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (nn.BatchNorm2d(64), 16),
        (nn.BatchNorm2d(256), 32),
        (nn.BatchNorm2d(48), 12),
        (nn.BatchNorm2d(7), 1),
        (nn.BatchNorm3d(8), 2),
        (nn.BatchNorm1d(64), 4),
        (nn.BatchNorm1d(8), 1),
        (nn.SyncBatchNorm(8), 2),
    ],
)
def test_a_group_is_never_one_number(layer: Any, groups: int) -> None:
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    weight, bias = layer.weight, layer.bias
    made: Any = lightning_dp.repair(layer.eval())
    assert isinstance(made, nn.GroupNorm) and made.num_groups == groups and not made.training
    assert made.weight is weight and made.bias is bias and made.eps == layer.eps


def test_no_weights_stay_none_and_data_types_stay() -> None:
    assert lightning_dp.repair(nn.BatchNorm2d(8, affine=False)).weight is None  # type: ignore[comparison-overlap]
    assert lightning_dp.repair(nn.BatchNorm2d(8).double()).weight.dtype == torch.float64  # type: ignore[union-attr]


def test_a_layer_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm1d(4)
    net = lightning_dp.repair(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm))
    assert net[1] is net[3]  # type: ignore[index]


def frozen() -> nn.Sequential:
    net = network()
    for _ in range(5):
        net(torch.randn(9, 1, 6, 6))  # pretraining
    net[:2].requires_grad_(False)
    return net


def test_a_frozen_pretrained_one_keeps_its_statistics() -> None:
    module = Net(frozen())
    norm = module.net[1]
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 1, 6, 6)
    expected = copy.deepcopy(module.net).eval()(x)
    run = trainer(callbacks=[private(repair=True)], max_epochs=2)
    run.fit(module, images(), images())  # Lightning puts the module back into training mode after validation
    assert isinstance(norm, nn.BatchNorm2d) and not norm.training
    torch.testing.assert_close(norm.state_dict(), before)
    plain = frozen()
    assert module.net.state_dict().keys() == plain.state_dict().keys()
    again: Any = lightning_dp.repair(frozen())
    again.load_state_dict(module.net.state_dict())
    assert torch.equal(again(x), module.net(x)) and again(x).shape == expected.shape
    copied = copy.deepcopy(module.net).train()
    assert not copied[1].training


def test_a_frozen_one_without_statistics_becomes_a_group_norm() -> None:
    net = network()
    net[1].requires_grad_(False)
    assert isinstance(lightning_dp.repair(net)[1], nn.GroupNorm)  # type: ignore[index]


def test_a_checkpoint_loads_into_the_class_as_it_was_written(tmp_path: Path) -> None:
    module = Classifier()
    run = trainer(
        callbacks=[private(repair=True), ModelCheckpoint(tmp_path, save_last=True)],
        enable_checkpointing=True,
    )
    run.fit(module, images())
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert type(loaded) is Classifier and isinstance(loaded.net[1], nn.GroupNorm)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict())
    again = trainer(callbacks=[private(repair=True)], max_epochs=2)
    again.fit(Classifier(), images(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert len(again.strategy.ledger) == 10


def test_layers_that_configure_model_makes_are_exchanged() -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = None  # type: ignore[assignment]

        def configure_model(self) -> None:
            if self.net is None:
                self.net = network()

    module = Late()
    fit(trainer(callbacks=[private(repair=True)]), module, images())
    assert isinstance(module.net[1], nn.GroupNorm)


def test_a_subclass_with_a_forward_of_its_own_is_refused_as_it_is() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    net = network()
    net[1] = Odd(8)
    with pytest.raises(UnsupportedModelError, match="Odd"):
        fit(trainer(callbacks=[private(repair=True)]), Net(net), images())
