"""What only a GPU can show. The rest of the suite runs there with ``LIGHTNING_DP_TEST_DEVICE=cuda``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_dp import (
    AdaptiveClipping,
    BackpropClipping,
    FlatClipping,
    GaussianNoise,
    PerLayerClipping,
    PrivateDDPStrategy,
    PrivateStrategy,
)
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.gradients.engines import PerExample
from lightning_dp.mechanism import sums as sums_module
from lightning_dp.mechanism.clipping import Bounding
from lightning_dp.mechanism.noise import DEVICE_BLOCK
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.training.strategy import PrivateMixin
from tests.conftest import Net, fit, loader, trainer
from tests.mechanism.test_noise import is_gaussian_of_std
from tests.mechanism.test_step import take
from tests.steps import make_step
from tests.tensors import DEVICE

pytestmark = [
    pytest.mark.on_device,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: LIGHTNING_DP_TEST_DEVICE=cuda"),
]

RULES = [FlatClipping(0.3), PerLayerClipping(0.3), AdaptiveClipping(0.3), BackpropClipping(1.0, 0.1)]


class AddsUp(PrivateDDPStrategy):
    """Sends its sums, although there is nobody to send them to."""

    def _make_step(self, trainer: Any) -> None:
        super()._make_step(trainer)
        assert self.private_step is not None
        self.private_step._add_up = self.add_up


def trained(strategy: PrivateMixin, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 3))
    module = Net(net)
    fit(trainer(strategy=strategy, max_epochs=5, **arguments), module, loader())
    return torch.cat([p.detach().flatten().cpu() for p in module.parameters()])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_sums_that_travel_by_nccl_during_the_backward_pass_are_the_same(
    rule: Bounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums_module, "BUCKET", 500)
    alone = trained(PrivateStrategy(rule, GaussianNoise(1.0), seed=1))
    sent = trained(AddsUp(rule, GaussianNoise(1.0), seed=1, process_group_backend="nccl"))
    assert torch.distributed.get_backend() == "nccl"
    assert torch.allclose(alone, sent, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_micro_batches_and_mixed_precision(rule: Bounding) -> None:
    whole = trained(PrivateStrategy(rule, GaussianNoise(1.0), seed=1))
    parts = trained(PrivateStrategy(rule, GaussianNoise(1.0), seed=1, max_physical_batch_size=3))
    assert torch.allclose(whole, parts, atol=1e-4)
    if rule.allows_low_precision:
        low = trained(PrivateStrategy(rule, GaussianNoise(1.0), seed=1), precision="bf16-mixed")
        assert (low - whole).norm() < 0.1 * whole.norm()


def test_noise_of_several_blocks_on_the_device() -> None:
    parameter = nn.Parameter(torch.zeros(2 * DEVICE_BLOCK + 3))
    module = nn.Module()
    module.register_parameter("weight", parameter)
    step = make_step(PerExample(module), FlatClipping(0.5), GaussianNoise(), PrivacyLedger(), Randomness())
    take(step, 3.0, 20.0)
    assert parameter.grad is not None
    blocks = [block[:100_000].double().cpu() for block in parameter.grad.split(DEVICE_BLOCK)[:2]]
    for block in blocks:
        assert is_gaussian_of_std(block, 3.0 * 0.5 / 20)
        assert not is_gaussian_of_std(block, 3.0 * 0.5 / 20 * 1.5)
        assert not is_gaussian_of_std(block, 3.0 * 0.5 / 20 / 1.5)
    assert not torch.equal(*blocks)
