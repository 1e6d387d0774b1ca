"""``precision="16-mixed"``: a constant scale, no skipped step, and what overflows is left out and counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import AutomaticClipping, FlatClipping, GaussianNoise, PerLayerClipping, PrivateStrategy
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.training.half_precision import SCALE
from tests.conftest import Net, trainer
from tests.training.test_manual import Gan
from tests.training.test_manual import records as gan_records

N = 24


def half() -> MixedPrecision:
    """What ``precision="16-mixed"`` makes on a GPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(N, 6, generator=generator), torch.arange(N) % 3)


def fit(module: Net, plugins: list[Any], seed: int = 3, **options: Any) -> tuple[Tensor, Any]:
    options = {"clipping": FlatClipping(0.5), "noise": GaussianNoise(0.0)} | options
    run = trainer(strategy=PrivateStrategy(seed=seed, journal=False, **options), max_steps=2, plugins=plugins)
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    run.fit(module, DataLoader(data(), batch_size=8))
    return torch.cat([p.detach().flatten() for p in module.parameters()]) - before, run


def net() -> Net:
    torch.manual_seed(0)
    return Net(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)))


@pytest.mark.parametrize("clipping", [FlatClipping(0.5), PerLayerClipping(0.5), AutomaticClipping(), FlatClipping(1e4)])
@pytest.mark.parametrize("options", [{}, {"max_physical_batch_size": 3}, {"engine": "per_example"}])
def test_steps_are_those_of_full_precision(clipping: Any, options: Any) -> None:
    found, _ = fit(net(), [half()], clipping=clipping, **options)
    expected, _ = fit(net(), [], clipping=clipping, **options)
    assert float((found - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_that_float16_has_no_number_for_are_kept(reduction: str) -> None:
    """A loss whose error signals are below 6e-8, the least number of float16 (with a sum: in the network)."""

    class Small(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs, labels = batch
            return F.cross_entropy(self.net(inputs).float() * 1e-8, labels, reduction=self.reduction)

    def small() -> Net:
        torch.manual_seed(0)
        return Small(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), reduction=reduction)

    options: dict[str, Any] = {"clipping": AutomaticClipping(gamma=1e-12), "loss_reduction": reduction}
    found, _ = fit(small(), [half()], self_check=False, **options)
    expected, _ = fit(small(), [], self_check=False, **options)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_what_overflows_adds_nothing_and_skips_no_step(caplog: pytest.LogCaptureFixture) -> None:
    class Steep(Net):
        """Of one class, a loss whose scaled error signals are beyond float16's largest number."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs, labels = batch
            steep = torch.where(labels == 1, 65504.0, 1.0)[:, None]
            out = self.net(inputs)
            return (out.float() * steep).sum(1).mean()

    torch.manual_seed(0)
    with caplog.at_level("INFO", logger="lightning.pytorch"), pytest.warns(UserWarning, match="not finite"):
        moved, run = fit(Steep(nn.Sequential(nn.Linear(6, 3))), [half()], self_check=False)
    assert run.global_step == 2 and len(run.strategy.ledger) == 2
    assert moved.isfinite().all() and moved.abs().max() > 0
    assert "a constant" in caplog.text and SCALE == 1024


def test_the_trainer_has_its_scaler_back() -> None:
    plugin = half()
    scaler = plugin.scaler
    _, run = fit(net(), [plugin])
    assert plugin.scaler is scaler and run.precision_plugin is plugin


def test_a_whole_network_of_many_kinds_trains() -> None:
    torch.manual_seed(0)
    layers = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.encoder, self.lstm = nn.Conv1d(1, 8, 3, padding=1), layers, nn.LSTM(8, 5, batch_first=True)
            self.norm, self.out = nn.GroupNorm(2, 8), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(self.conv(x[:, None])).transpose(1, 2)
            return self.out(self.lstm(self.encoder(hidden))[0][:, -1])

    deep = Deep()
    state = {name: value.clone() for name, value in deep.state_dict().items()}
    found, _ = fit(Net(deep), [half()], noise=GaussianNoise(0.0))
    deep.load_state_dict(state)
    expected, _ = fit(Net(deep), [])
    assert float((found - expected).norm() / expected.norm()) < 2e-2


def test_manual_optimization_is_refused_with_it() -> None:
    run = trainer(strategy=PrivateStrategy(1.0, 1.0), max_steps=2, plugins=[half()])
    with pytest.raises(PrivacyConfigurationError, match="16-mixed.*manual optimization.*bf16-mixed"):
        run.fit(Gan(), DataLoader(TensorDataset(gan_records()), batch_size=8))
