from __future__ import annotations

import pytest
import torch
from dp_accounting import NeighboringRelation
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_dp.accounting import PrivacyLedger
from lightning_dp.clipping import Clipping, FlatClipping
from lightning_dp.engines import BookKeeping
from lightning_dp.gradients import OuterProducts
from lightning_dp.noise import GaussianNoise
from lightning_dp.pipeline import PrivateStep
from lightning_dp.randomness import Randomness

ADD_OR_REMOVE, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE

#: Every clipping rule; a new one inherits the tests below.
CLIPPINGS = [FlatClipping(1.0), FlatClipping(0.01), FlatClipping(50.0)]


@given(norms=st.lists(st.floats(0, 1e30), min_size=1, max_size=20), max_norm=st.floats(1e-6, 1e6))
def test_flat_clipping_bounds_every_norm_and_leaves_small_ones(norms: list[float], max_norm: float) -> None:
    norm = torch.tensor(norms, dtype=torch.float64)
    clipped = FlatClipping(max_norm).weights(norm) * norm
    assert (clipped <= max_norm * (1 + 1e-12)).all()
    assert torch.equal(clipped[norm <= max_norm], norm[norm <= max_norm])


def test_sensitivity_doubles_for_replacement() -> None:
    assert FlatClipping(0.7).sensitivity(ADD_OR_REMOVE) == 0.7
    assert FlatClipping(0.7).sensitivity(REPLACE) == 1.4


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_that_bounds_nothing_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be positive and finite"):
        FlatClipping(max_norm)


def bounded_sum(clipping: Clipping, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The sum that the noise is added to, black box: everything but the noise, through the private step."""
    for parameter in model.parameters():
        parameter.grad = None
    step = PrivateStep(
        BookKeeping(model), clipping, GaussianNoise(0.0), PrivacyLedger(), Randomness(0), lambda tensors: None
    )
    step.begin(0.0, 0.5, 1.0)
    if len(inputs):
        with step.engine.forward(len(inputs)):
            loss = model(inputs).pow(2).flatten(1).sum(1).mean()
        with step.engine.backward():
            loss.backward()
        step.accumulate(float(len(inputs)))
    step.release()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


MODELS = {
    "fully connected": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)), (7, 6)),
    "long layers, short sequence": (lambda: nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)), (3, 40)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 2)),
        (2, 8, 8),
    ),
}


@pytest.mark.parametrize(
    "extra", ["tiny", "huge", "negative huge", "aligned", "one-hot", "overflowing", "infinite", "nan"]
)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
def test_one_record_moves_the_sum_by_at_most_the_sensitivity(clipping: Clipping, model_name: str, extra: str) -> None:
    make, shape = MODELS[model_name]
    model = make()
    batch = torch.randn(5, *shape)
    first_weight = next(model.parameters())
    record = {
        "tiny": torch.full(shape, 1e-20),
        "huge": torch.full(shape, 1e8),
        "negative huge": torch.randn(shape) * -1e8,
        "aligned": first_weight.detach().flatten().repeat(500)[: batch[0].numel()].view(shape) * 1e3,
        "one-hot": torch.zeros(shape).index_put_(
            tuple(torch.zeros(len(shape), 1, dtype=torch.long)), torch.tensor(1e4)
        ),
        "overflowing": torch.full(shape, 1e30),
        "infinite": torch.full(shape, float("inf")),
        "nan": torch.full(shape, float("nan")),
    }[extra]
    bound = clipping.sensitivity(ADD_OR_REMOVE)
    without, alone = bounded_sum(clipping, model, batch), bounded_sum(clipping, model, record[None])
    with_record = bounded_sum(clipping, model, torch.cat([batch[:2], record[None], batch[2:]]))
    assert with_record.isfinite().all()
    assert (with_record - without).norm() <= bound * (1 + 1e-4)
    assert alone.norm() <= bound * (1 + 1e-5)
    replaced = bounded_sum(clipping, model, torch.cat([batch[:4], record[None]]))
    assert (replaced - without).norm() <= clipping.sensitivity(REPLACE) * (1 + 1e-4)


def test_low_precision_records_do_not_round_the_sum() -> None:
    """Many aligned examples: summed in bfloat16, one record would move the sum by the rounding of the whole."""
    left = torch.randn(1, 1, 32).repeat(1024, 1, 1).bfloat16() * 10
    right = torch.randn(1, 1, 32).repeat(1024, 1, 1).bfloat16()
    gradient = OuterProducts(left, right)
    weights = FlatClipping(1.0).weights(gradient.squared_norms().sqrt())
    with_record, without = torch.zeros(32, 32), torch.zeros(32, 32)
    gradient.add_weighted_sum_(with_record, weights)
    OuterProducts(left[1:], right[1:]).add_weighted_sum_(without, weights[1:])
    assert (with_record - without).norm() <= 1 + 1e-3


def test_the_bound_is_attained() -> None:
    """A test of an upper bound alone would pass for a rule that sends nothing."""
    model = nn.Linear(3, 2)
    moved = bounded_sum(FlatClipping(0.5), model, torch.full((1, 3), 100.0))
    assert abs(moved.norm() - 0.5) < 1e-5


def test_an_example_without_a_finite_gradient_contributes_nothing_and_is_counted() -> None:
    model = nn.Linear(3, 2)
    inputs = torch.randn(4, 3)
    expected = bounded_sum(FlatClipping(1.0), model, inputs)
    spoiled = torch.cat([inputs, torch.full((1, 3), float("nan"))])
    assert torch.allclose(bounded_sum(FlatClipping(1.0), model, spoiled), expected, atol=1e-6)
