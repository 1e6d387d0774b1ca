from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dp_accounting import NeighboringRelation
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.linear import OuterProducts
from lightning_dp.mechanism import contributions as contributions_module
from lightning_dp.mechanism.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    Clipping,
    FlatClipping,
    PerLayerClipping,
)
from lightning_dp.mechanism.noise import GaussianNoise
from lightning_dp.mechanism.randomness import Randomness
from tests.steps import make_step

pytestmark = pytest.mark.on_device

ADD_OR_REMOVE, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE

#: Every clipping rule; a new one inherits the tests below.
CLIPPINGS = [
    FlatClipping(1.0),
    FlatClipping(0.01),
    FlatClipping(50.0),
    PerLayerClipping(1.0),
    PerLayerClipping(0.02),
    AutomaticClipping(),
    AutomaticClipping(gamma=1.0),
    AdaptiveClipping(0.3),
]


@given(norms=st.lists(st.floats(0, 1e30), min_size=1, max_size=20), max_norm=st.floats(1e-6, 1e6))
def test_clipped_norms_are_bounded_and_small_ones_untouched(norms: list[float], max_norm: float) -> None:
    norm = torch.tensor(norms, dtype=torch.float64)[:, None]
    for rule in (FlatClipping(max_norm), PerLayerClipping(max_norm), AdaptiveClipping(max_norm)):
        clipped = rule.weights(norm, [("w",)], rule.initial_state()) * norm
        assert (clipped <= max_norm * (1 + 1e-12)).all()
        assert torch.equal(clipped[norm <= max_norm], norm[norm <= max_norm])
    assert (AutomaticClipping(max_norm).weights(norm, [("w",)]) * norm <= 1).all()


@pytest.mark.parametrize("rule", CLIPPINGS, ids=repr)
def test_sensitivity_is_joint_over_the_groups_and_doubles_for_replacement(rule: Clipping) -> None:
    groups = rule.groups(["a.weight", "a.bias", "b.weight"])
    single = rule.group_sensitivities(groups, rule.initial_state())
    assert len(single) == len(groups)
    assert rule.sensitivity(ADD_OR_REMOVE, groups) == pytest.approx(math.hypot(*single))
    assert rule.sensitivity(REPLACE, groups) == 2 * rule.sensitivity(ADD_OR_REMOVE, groups)


def test_per_layer_norms_split_the_joint_norm() -> None:
    rule = PerLayerClipping(2.0)
    groups = rule.groups(["a.weight", "a.bias", "b.weight", "c.d.weight", "c.d.bias"])
    assert groups == [("a.weight", "a.bias"), ("b.weight",), ("c.d.weight", "c.d.bias")]
    assert rule.sensitivity(ADD_OR_REMOVE, groups) == pytest.approx(2.0)
    named = PerLayerClipping(max_norms={"a": 1.0, "b": 2.0, "c.d": 3.0})
    assert named.group_sensitivities(named.groups([name for group in groups for name in group])) == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \['z'\]"):
        PerLayerClipping(max_norms={"a": 1.0, "z": 2.0}).groups(["a.weight", "b.weight"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FlatClipping(0.0), "max_norm must be positive and finite"),
        (lambda: FlatClipping(float("inf")), "max_norm must be positive and finite"),
        (lambda: FlatClipping(float("nan")), "max_norm must be positive and finite"),
        (lambda: PerLayerClipping(), "either max_norm"),
        (lambda: PerLayerClipping(1.0, {"a": 1.0}), "either max_norm"),
        (lambda: PerLayerClipping(max_norms={"a": -1.0}), "a must be positive"),
        (lambda: AutomaticClipping(0.0), "gamma must be positive"),
        (lambda: AdaptiveClipping(-1.0), "initial_norm must be positive"),
        (lambda: AdaptiveClipping(target_quantile=1.0), "target_quantile must lie"),
        (lambda: AdaptiveClipping(count_std=1.0).query_std(2.0, 100.0), "more than half"),
    ],
)
def test_bounds_that_bound_nothing_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("value", ["1.0", True, None])
def test_a_bound_is_a_number(value: Any) -> None:
    with pytest.raises(TypeError, match="max_norm"):
        FlatClipping(value)


def bounded_sums(
    clipping: Clipping, model: nn.Module, inputs: torch.Tensor, streaming: bool = False
) -> tuple[list[torch.Tensor], list[float]]:
    """The sums that the noise is added to, one vector per group, and their sensitivities: black box, everything but the
    noise, through the private step; also as it is in one of several processes."""
    for parameter in model.parameters():
        parameter.grad = None
    add_up = (lambda tensor: lambda: None) if streaming else None
    step = make_step(BookKeeping(model), clipping, GaussianNoise(0.0), PrivacyLedger(), Randomness(0), add_up)
    step.begin(0.0, 0.5, 1.0)
    if len(inputs):
        with step.engine.forward(len(inputs)):
            loss = model(inputs).pow(2).flatten(1).sum(1).mean()
        with step.backward(float(len(inputs)), last=True):
            loss.backward()
    step.release()
    grads = {name: p.grad.flatten().double() for name, p in model.named_parameters() if p.grad is not None}
    groups = clipping.groups(list(grads))
    sensitivities = clipping.group_sensitivities(groups, clipping.initial_state())
    return [torch.cat([grads[name] for name in group]) for group in groups], sensitivities


class Attention(nn.Module):
    """Self-attention, then attention between sequences through the same layer: a whole matrix and blocks of it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.attention(x, x, x, need_weights=False)[0]
        return self.attention(attended, x[:, :2], x[:, 1:3])[0]


MODELS = {
    "attention": (Attention, (4, 6)),
    # In single precision, kernels that round by the size of the batch move the *other* records' gradients by up to 2e-4
    # of these small clipping norms.
    "transformer, double precision": (
        lambda: nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, dropout=0.0, batch_first=True).double(),
        (4, 6),
    ),
    "fully connected": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)), (7, 6)),
    "long layers, short sequence": (lambda: nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)), (3, 40)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 2)),
        (2, 8, 8),
    ),
    "convolution with many channels": (lambda: nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)), (16, 3, 3)),
}


@pytest.mark.parametrize(
    "extra", ["tiny", "huge", "negative huge", "aligned", "one-hot", "overflowing", "infinite", "nan"]
)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize(
    ("clipping", "place"),
    [(rule, "alone") for rule in CLIPPINGS]
    + [(rule, place) for rule in CLIPPINGS if rule.separable for place in ("among several", "among several GPUs")],
)
def test_one_record_moves_every_sum_by_at_most_its_sensitivity(
    clipping: Clipping, model_name: str, extra: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions_module, "is_asynchronous", lambda tensor: place == "among several GPUs")
    streaming = place != "alone"
    make, shape = MODELS[model_name]
    model = make()
    first_weight = next(model.parameters())
    batch = torch.randn(5, *shape, dtype=first_weight.dtype)
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
    }[extra].to(batch.dtype)
    without, bounds = bounded_sums(clipping, model, batch, streaming)
    alone, _ = bounded_sums(clipping, model, record[None], streaming)
    with_record, _ = bounded_sums(clipping, model, torch.cat([batch[:2], record[None], batch[2:]]), streaming)
    replaced, _ = bounded_sums(clipping, model, torch.cat([batch[:4], record[None]]), streaming)
    for group, bound in enumerate(bounds):
        assert with_record[group].isfinite().all()
        assert (with_record[group] - without[group]).norm() <= bound * (1 + 1e-4)
        assert alone[group].norm() <= bound * (1 + 1e-5)
        assert (replaced[group] - without[group]).norm() <= 2 * bound * (1 + 1e-4)


def test_low_precision_records_do_not_round_the_sum() -> None:
    """Many aligned examples: summed in bfloat16, one record would move the sum by the rounding of the whole."""
    left = torch.randn(1, 1, 32).repeat(1024, 1, 1).bfloat16() * 10
    right = torch.randn(1, 1, 32).repeat(1024, 1, 1).bfloat16()
    gradient = OuterProducts(left, right)
    weights = FlatClipping(1.0).weights(gradient.squared_norms().sqrt(), [("w",)])
    with_record, without = torch.zeros(32, 32), torch.zeros(32, 32)
    gradient.add_weighted_sum_(with_record, weights)
    OuterProducts(left[1:], right[1:]).add_weighted_sum_(without, weights[1:])
    assert (with_record - without).norm() <= 1 + 1e-3


@pytest.mark.parametrize("rule", CLIPPINGS, ids=repr)
def test_the_bound_is_attained(rule: Clipping) -> None:
    """A test of an upper bound alone would pass for a rule that sends nothing."""
    moved, bounds = bounded_sums(rule, nn.Linear(3, 2), torch.full((1, 3), 1e4))
    assert moved[0].norm().item() == pytest.approx(bounds[0], rel=1e-4)


def test_an_example_without_a_finite_gradient_contributes_nothing_and_is_counted() -> None:
    model = nn.Linear(3, 2)
    inputs = torch.randn(4, 3)
    [expected], _ = bounded_sums(FlatClipping(1.0), model, inputs)
    spoiled = torch.cat([inputs, torch.full((1, 3), float("nan"))])
    [found], _ = bounded_sums(FlatClipping(1.0), model, spoiled)
    assert torch.allclose(found, expected, atol=1e-6)


# -- noise: one mechanism, however many pieces -------------------------------------------------------------------------


def noise_stds(clipping: Clipping, model: nn.Module, multiplier: float, divisor: float, steps: int) -> dict[str, float]:
    """Measured standard deviation of the noise on every parameter's sum, and on the rule's query (key "")."""
    step = make_step(BookKeeping(model), clipping, GaussianNoise(), PrivacyLedger(), Randomness())
    samples: dict[str, list[torch.Tensor]] = {}
    for _ in range(steps):
        step.begin(multiplier, 0.1, divisor)
        step.contributions.hand_over()
        for name, total in step.sums.collect().items():
            samples.setdefault(name, []).append(total.flatten().double() * divisor)
        step.release()  # the next step has other noise, and here the same clipping norm
        step.clipping_state = clipping.initial_state()
    return {name: torch.cat(parts).pow(2).mean().sqrt().item() for name, parts in samples.items()}


@pytest.mark.parametrize("rule", [*CLIPPINGS, PerLayerClipping(max_norms={"0": 0.1, "1": 3.0})], ids=repr)
def test_all_pieces_together_are_one_mechanism_of_the_multiplier(rule: Clipping) -> None:
    """``Σ_g S_g² / σ_g² = z⁻²`` with the σ_g measured; rejected at 2/3 and 3/2 of the noise."""
    model = nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 60))
    multiplier, divisor = 1.3, 40.0
    stds = noise_stds(rule, model, multiplier, divisor, 60)
    groups = rule.groups([name for name, _ in model.named_parameters()])
    sensitivities = rule.group_sensitivities(groups, rule.initial_state())
    pieces = [s / stds[group[0]] for group, s in zip(groups, sensitivities, strict=True)]
    if rule.query(torch.ones(1, 1), rule.initial_state()) is not None:
        many = noise_stds(rule, nn.Linear(1, 1), multiplier, divisor, 4000)
        pieces.append(0.5 / many[""])
    found = math.hypot(*pieces) ** -1
    assert found == pytest.approx(multiplier, rel=0.03)
    assert 1.5 * found != pytest.approx(multiplier, rel=0.03) != found / 1.5


def test_the_adaptive_norm_finds_the_quantile_and_is_frozen_within_a_step() -> None:
    model = nn.Linear(4, 1, bias=False)
    rule = AdaptiveClipping(initial_norm=100.0, target_quantile=0.3, learning_rate=0.3)
    step = make_step(BookKeeping(model), rule, GaussianNoise(), PrivacyLedger(), Randomness(1))
    # The gradient of this loss is the input, so that norms are known: half normal times 3.
    inputs = torch.zeros(400, 4)
    inputs[:, 0] = 3 * torch.randn(400)
    for _ in range(120):
        step.begin(1.0, 0.1, 400.0)
        before = step.clipping_state
        for part in inputs.split(150):
            with step.engine.forward(len(part)):
                loss = model(part).sum()
            with step.backward(1.0):
                loss.backward()
            assert step.clipping_state == before
        step.release()
        assert step.clipping_state != before
    below = (inputs[:, 0].abs() <= step.clipping_state["max_norm"]).double().mean()
    assert abs(below - 0.3) < 0.1


def test_an_example_that_is_not_finite_is_not_counted_by_the_adaptive_norm() -> None:
    """What the count answers, without noise, is what it answers without the example."""
    rule = AdaptiveClipping(initial_norm=1.0, learning_rate=1.0)

    def next_norm(inputs: torch.Tensor) -> float:
        model = nn.Linear(4, 1, bias=False)
        step = make_step(BookKeeping(model), rule, GaussianNoise(), PrivacyLedger(), Randomness(1))
        step.begin(0.0, 0.1, 10.0)
        with step.engine.forward(len(inputs)):
            loss = model(inputs).sum()
        with step.backward():
            loss.backward()
        step.release()
        return step.clipping_state["max_norm"]

    inputs = torch.tensor([[0.5, 0, 0, 0], [3.0, 0, 0, 0], [0.1, 0, 0, 0]])
    spoiled = torch.cat([inputs, torch.full((1, 4), float("nan"))])
    assert next_norm(spoiled) == pytest.approx(next_norm(inputs), rel=1e-6)
    assert next_norm(inputs) != pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rule", "argument"),
    [
        (FlatClipping, "max_norm"),
        (PerLayerClipping, "max_norm"),
        (AutomaticClipping, "gamma"),
        (AdaptiveClipping, "initial_norm"),
        (AdaptiveClipping, "learning_rate"),
        (AdaptiveClipping, "count_std"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_norms_that_bound_nothing_are_refused_by_name(rule: type[Clipping], argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{rule.__name__}: {argument} must be positive and finite, got"):
        rule(**{argument: value})
