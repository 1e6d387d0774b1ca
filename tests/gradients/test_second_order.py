"""Losses that hold a gradient (gradient penalties): gradients per example are those of the loop over examples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.rules.second_order import _RULES

B = 4


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if x.dim() > 2 else x


class Doubled(nn.Module):
    """A layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x).square()


CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.2), nn.Linear(5, 1)), (3,)),
    "smooth": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 1)), (3,)),
    "no rule": (lambda: nn.Sequential(nn.Linear(3, 3), Doubled(), nn.Linear(3, 1)), (3,)),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), weight_norm(nn.Linear(4, 1))), (3,)
    ),
    "positions": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 1), nn.Flatten()), (6, 3)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)), (3,)),
    "layer norm over positions": (
        lambda: nn.Sequential(nn.LayerNorm((4, 3)), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)),
        (4, 3),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), Mean(), nn.Linear(4, 1)),
        (2, 7),
    ),
    "instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.InstanceNorm2d(3, affine=True), nn.Softplus(), Mean(), nn.Linear(3, 1)
        ),
        (1, 6, 6),
    ),
    "strided convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular"), nn.Tanh(), Mean(), nn.Linear(4, 1),
        ),
        (1, 6, 6),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, 2), nn.Tanh(), Mean(), nn.Linear(3, 1)),
        (2, 5),
    ),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), Mean(), nn.Linear(2, 1)), (1, 3, 3, 3)),
}  # fmt: skip


def wgan_gp(critic: nn.Module, x: Tensor) -> Tensor:
    """Mixtures with a fixed fake, as in Gulrajani et al. 2017."""
    mixed = (0.3 * x + 0.7 * torch.cos(torch.arange(x[0].numel()).view_as(x[0]))).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return (10 * (gradient.flatten(1).norm(2, 1) - 1).square() - critic(x).flatten(1).sum(1)).mean()


def r1(critic: nn.Module, x: Tensor) -> Tensor:
    """Of the records themselves (Mescheder et al. 2018), in one forward pass."""
    x = x.clone().requires_grad_(True)
    scores = critic(x)
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return (F.softplus(-scores).flatten(1).sum(1) + gradient.square().flatten(1).sum(1)).mean()


def along_a_direction(critic: nn.Module, x: Tensor) -> Tensor:
    """Two gradients of one forward pass."""
    x = x.clone().requires_grad_(True)
    scores = critic(x)
    (one,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    (two,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
    return (one.sin() * two).flatten(1).sum(1).mean()


@pytest.mark.parametrize("loss", [wgan_gp, r1, along_a_direction])
@pytest.mark.parametrize("name", CRITICS)
def test_gradients_are_those_of_the_loop(name: str, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
    make, shape = CRITICS[name]
    torch.manual_seed(0)
    critic, x = make().double(), torch.randn(B, *shape, dtype=torch.double)
    engine = BookKeeping(critic)
    with engine.forward(B):
        value = loss(critic, x)
    with engine.backward():
        value.backward()
    found = engine.gradients()
    for row in range(B):
        critic.zero_grad()
        loss(critic, x[row : row + 1]).backward()
        for parameter, gradient in found.items():
            expected = critic.get_parameter(parameter).grad
            assert expected is not None
            torch.testing.assert_close(gradient.materialise()[row] * B, expected, msg=f"{name} {parameter}")
    for parameter, p in critic.named_parameters():
        assert parameter in found or p.grad is None or not p.grad.any(), parameter


@pytest.mark.parametrize("size", [5, 200])
def test_norms_are_as_exact_in_a_large_batch(size: int) -> None:
    """What a mean over the batch divides, and what it does not, are of different lengths by the size of the batch."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(6, 300), nn.LeakyReLU(0.2), nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(size, 6)
    engine = BookKeeping(critic)
    with engine.forward(size):
        loss = wgan_gp(critic, x)
    with engine.backward(float(size)):
        loss.backward()
    found = {name: gradient.squared_norms().sqrt() * size for name, gradient in engine.gradients().items()}
    for record in range(5):
        alone = wgan_gp(critic, x[record : record + 1])
        gradients = torch.autograd.grad(alone, list(critic.parameters()), allow_unused=True)
        for (name, _), gradient in zip(critic.named_parameters(), gradients, strict=True):
            if gradient is not None and gradient.norm() > 0:
                assert float(found[name][record] / gradient.norm()) == pytest.approx(1.0, abs=1e-3), name


def test_every_rule_is_tried() -> None:
    tried = {type(layer) for make, _ in CRITICS.values() for layer in make().modules()}
    same = {nn.Conv1d: nn.Conv2d, nn.ConvTranspose2d: nn.ConvTranspose1d, nn.ConvTranspose3d: nn.ConvTranspose1d,
            nn.InstanceNorm1d: nn.InstanceNorm2d, nn.InstanceNorm3d: nn.InstanceNorm2d}  # fmt: skip
    assert {same.get(kind, kind) for kind in _RULES} <= tried


def twice_over(critic: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (one,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    (two,) = torch.autograd.grad(one.square().sum(), x, create_graph=True)
    return two.square().sum(1).mean()


@pytest.mark.parametrize(
    ("critic", "loss"),
    [
        (nn.Sequential(nn.PReLU(), nn.Linear(3, 1)), r1),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), twice_over),
    ],
)
def test_what_is_not_followed_is_refused(critic: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
    engine = BookKeeping(critic)
    with engine.forward(B):
        value = loss(critic, torch.randn(B, 3))
    refused = pytest.raises(UnsupportedModelError, match="which is not followed through this layer.*per_example")
    with refused, engine.backward():
        value.backward()
