"""Every layer rule against autograd, one example at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import Tensor, nn

from lightning_dp import FlatClipping, GaussianNoise, PrivacyLedger, UnsupportedModelError
from lightning_dp.gradients import convolution as convolutions
from lightning_dp.gradients import linear as linears
from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.linear import OuterProducts, Rows, RowsAndOuterProducts
from lightning_dp.gradients.rules.layers import convolution
from lightning_dp.gradients.rules.registry import refusal_for, registered_types, rule_for
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.zoo.wide_resnet import StandardizedConv2d
from tests.conftest import assert_close, oracle_gradients
from tests.steps import make_step

pytestmark = pytest.mark.on_device

BATCH = 6


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


#: Per type: named examples of a module and an input with ``BATCH`` examples.
EXAMPLES: dict[type[nn.Module], dict[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    nn.Linear: {
        "plain": lambda: (nn.Linear(4, 3), randn(BATCH, 4)),
        "no bias": lambda: (nn.Linear(4, 3, bias=False), randn(BATCH, 4)),
        "long sequence": lambda: (nn.Linear(4, 3), randn(BATCH, 9, 4)),
        "short sequence": lambda: (nn.Linear(20, 30), randn(BATCH, 2, 20)),
        "two sequence dimensions": lambda: (nn.Linear(4, 3), randn(BATCH, 2, 3, 4)),
        "sequence of length one": lambda: (nn.Linear(4, 3), randn(BATCH, 1, 4)),
    },
    nn.Conv1d: {
        "plain": lambda: (nn.Conv1d(2, 3, 3), randn(BATCH, 2, 8)),
        "causal": lambda: (nn.Conv1d(2, 4, 3, padding=2, dilation=2, groups=2), randn(BATCH, 2, 8)),
    },
    nn.Conv2d: {
        "plain": lambda: (nn.Conv2d(2, 3, 3), randn(BATCH, 2, 6, 7)),
        "strided": lambda: (nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 2)), randn(BATCH, 2, 8, 9)),
        "stride that leaves a rest": lambda: (nn.Conv2d(2, 3, 3, stride=2), randn(BATCH, 2, 8, 8)),
        "dilated, no bias": lambda: (nn.Conv2d(2, 3, 2, dilation=(2, 3), bias=False), randn(BATCH, 2, 7, 8)),
        "grouped": lambda: (nn.Conv2d(4, 6, 3, groups=2, padding=1), randn(BATCH, 4, 5, 5)),
        "depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4), randn(BATCH, 4, 5, 5)),
        "one by one": lambda: (nn.Conv2d(4, 3, 1), randn(BATCH, 4, 5, 5)),
        "kernel of the image's size": lambda: (nn.Conv2d(6, 8, 4), randn(BATCH, 6, 4, 4)),
        "same": lambda: (nn.Conv2d(2, 3, (4, 3), padding="same"), randn(BATCH, 2, 6, 6)),
        "valid": lambda: (nn.Conv2d(2, 3, 3, padding="valid"), randn(BATCH, 2, 6, 6)),
        "reflect": lambda: (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), randn(BATCH, 2, 6, 6)),
        "replicate": lambda: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), randn(BATCH, 2, 6, 6)),
        "circular, same": lambda: (nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), randn(BATCH, 2, 6, 6)),
    },
    nn.Conv3d: {
        "plain": lambda: (nn.Conv3d(2, 3, 2), randn(BATCH, 2, 4, 4, 4)),
        "everything": lambda: (
            nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=1, dilation=(1, 1, 2), groups=2),
            randn(BATCH, 2, 4, 5, 5),
        ),
    },
    nn.Embedding: {
        "sequence": lambda: (nn.Embedding(5, 3), torch.randint(5, (BATCH, 8))),
        "one index": lambda: (nn.Embedding(5, 3), torch.randint(5, (BATCH,))),
        "padding": lambda: (nn.Embedding(5, 3, padding_idx=1), torch.randint(5, (BATCH, 8))),
        "two dimensions": lambda: (nn.Embedding(5, 3), torch.randint(5, (BATCH, 2, 4))),
    },
    nn.ConvTranspose1d: {
        "strided": lambda: (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), randn(BATCH, 2, 5)),
    },
    nn.ConvTranspose2d: {
        "plain": lambda: (nn.ConvTranspose2d(2, 3, 3), randn(BATCH, 2, 4, 5)),
        "grouped, dilated": lambda: (
            nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), dilation=2, groups=2, bias=False),
            randn(BATCH, 4, 3, 4),
        ),
    },
    nn.ConvTranspose3d: {"plain": lambda: (nn.ConvTranspose3d(2, 2, 2, stride=2), randn(BATCH, 2, 2, 3, 2))},
    nn.PReLU: {
        "one slope": lambda: (nn.PReLU(), randn(BATCH, 4, 3)),
        "a slope per channel": lambda: (nn.PReLU(4), randn(BATCH, 4, 3)),
        "vectors": lambda: (nn.PReLU(4), randn(BATCH, 4)),
    },
    StandardizedConv2d: {
        "plain": lambda: (StandardizedConv2d(2, 3, 3), randn(BATCH, 2, 5, 5)),
        "strided, grouped": lambda: (StandardizedConv2d(4, 6, 3, 2, 1, groups=2, bias=False), randn(BATCH, 4, 6, 6)),
    },
    nn.EmbeddingBag: {
        "mean": lambda: (nn.EmbeddingBag(6, 3), torch.randint(6, (BATCH, 4))),
        "sum, padding": lambda: (nn.EmbeddingBag(6, 3, mode="sum", padding_idx=2), torch.randint(6, (BATCH, 4))),
        "mean, padding": lambda: (nn.EmbeddingBag(6, 3, padding_idx=2), torch.randint(6, (BATCH, 4))),
        "max": lambda: (nn.EmbeddingBag(6, 3, mode="max"), torch.randint(6, (BATCH, 4))),
        "max, padding": lambda: (nn.EmbeddingBag(6, 3, mode="max", padding_idx=2), torch.randint(6, (BATCH, 4))),
    },
    nn.LayerNorm: {
        "vectors": lambda: (nn.LayerNorm(4), randn(BATCH, 4)),
        "sequence": lambda: (nn.LayerNorm(4), randn(BATCH, 3, 4)),
        "two dimensions, no bias": lambda: (nn.LayerNorm((3, 4), bias=False), randn(BATCH, 2, 3, 4)),
    },
    nn.RMSNorm: {
        "vectors": lambda: (nn.RMSNorm(4), randn(BATCH, 4)),
        "sequence, eps": lambda: (nn.RMSNorm(4, eps=0.1), randn(BATCH, 3, 4)),
    },
    nn.GroupNorm: {
        "vectors": lambda: (nn.GroupNorm(2, 4), randn(BATCH, 4)),
        "images": lambda: (nn.GroupNorm(2, 4, eps=0.1), randn(BATCH, 4, 3, 3)),
    },
    nn.InstanceNorm1d: {"affine": lambda: (nn.InstanceNorm1d(3, affine=True), randn(BATCH, 3, 5))},
    nn.InstanceNorm2d: {"affine": lambda: (nn.InstanceNorm2d(3, affine=True, eps=0.1), randn(BATCH, 3, 4, 5))},
    nn.InstanceNorm3d: {"affine": lambda: (nn.InstanceNorm3d(3, affine=True), randn(BATCH, 3, 2, 4, 5))},
}

CASES = [pytest.param(make, id=f"{cls.__name__}: {name}") for cls in EXAMPLES for name, make in EXAMPLES[cls].items()]


def test_every_registered_rule_has_an_example() -> None:
    assert set(registered_types()) == set(EXAMPLES)


def weighted_sum(gradient: PerExampleGradient, weights: Tensor, like: Tensor) -> Tensor:
    """Added to something that is already there, as with micro-batches."""
    total = torch.ones_like(like, dtype=weights.dtype)
    gradient.add_weighted_sum_(total, weights)
    return total - 1


def check_against_oracle(module: nn.Module, input: Tensor, copies: int = 1) -> None:
    """Also where an example's gradient is the sum over ``copies`` consecutive rows of the input."""
    module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    # A loss whose upstream gradient differs at every output element.
    target = torch.randn_like(module(input))

    def loss(rows: slice) -> Tensor:
        return (module(input[rows]) * target[rows]).pow(2).sum()

    examples = len(input) // copies
    expected = oracle_gradients(module, lambda i: loss(slice(i * copies, (i + 1) * copies)), examples)
    engine = BookKeeping(module)
    engine.copies = copies
    with engine.forward(len(input)):
        total = loss(slice(None))
    with engine.backward():
        total.backward()
    gradients = engine.gradients()
    assert set(gradients) == set(expected)
    weights = torch.rand(examples, dtype=torch.float64)
    for name, gradient in gradients.items():
        rows = expected[name].flatten(1)
        assert_close(gradient.squared_norms(), rows.pow(2).sum(1), 1e-10)
        assert_close(gradient.materialise().view_as(expected[name]), expected[name], 1e-10)
        assert_close(
            weighted_sum(gradient, weights, expected[name][0]), (weights @ rows).view_as(expected[name][0]), 1e-10
        )
        half = examples // 2
        assert_close(gradient.part(half, examples).squared_norms(), rows[half:].pow(2).sum(1), 1e-10)
        without_first = gradient.without(torch.arange(examples) == 0)
        assert without_first.squared_norms()[0] == 0
        assert_close(without_first.squared_norms()[1:], rows[1:].pow(2).sum(1), 1e-10)
        assert all(p.grad is None for p in module.parameters()), "ordinary weight gradients were computed"


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("make", CASES)
def test_norms_and_weighted_sums_equal_the_loop(make: Callable[[], tuple[nn.Module, Tensor]], copies: int) -> None:
    check_against_oracle(*make(), copies)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("make", CASES)
def test_a_frozen_parameter_gets_nothing(make: Callable[[], tuple[nn.Module, Tensor]], frozen: str) -> None:
    module, input = make()
    parameter = getattr(module, frozen, None)
    if parameter is None or len(list(module.parameters())) == 1:
        pytest.skip("nothing to freeze, or nothing left to train")
    parameter.requires_grad_(False)
    check_against_oracle(module, input)


small = st.integers(1, 4)


@settings(max_examples=60, deadline=None)
@given(
    batch=small, steps=st.integers(1, 12), features=st.integers(1, 12), outputs=st.integers(1, 12), bias=st.booleans()
)
def test_linear_of_any_shape(batch: int, steps: int, features: int, outputs: int, bias: bool) -> None:
    check_against_oracle(nn.Linear(features, outputs, bias=bias), randn(batch, steps, features))


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(), dimensions=st.integers(1, 3), mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"])
)
def test_convolution_of_any_shape(data: Any, dimensions: int, mode: str) -> None:
    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, stride, dilation, padding = draw(1, 3), draw(1, 3), draw(1, 2), draw(0, 2)
    size, groups = draw(4, 6), data.draw(st.integers(1, 2))
    assume(all(dil * (k - 1) < s + 2 * pad for dil, k, s, pad in zip(dilation, kernel, size, padding, strict=True)))
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    inputs, outputs = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 2))
    module = conv(
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=data.draw(st.booleans()),
    )
    copies = data.draw(st.integers(1, 3))
    input, as_on_gpu = randn(copies * data.draw(small), inputs, *size), data.draw(st.booleans())
    unfolded, side_by_side = data.draw(small), data.draw(st.sampled_from([1, 2**24]))
    with (
        patch.object(convolutions, "is_asynchronous", lambda tensor: as_on_gpu),
        patch.object(convolutions, "MAX_UNFOLDED_ELEMENTS", 500 * unfolded),
        patch.object(convolutions, "_MAX_COPIED_ELEMENTS", side_by_side),
    ):
        check_against_oracle(module, input, copies)


@settings(max_examples=40, deadline=None)
@given(batch=small, steps=st.integers(1, 12), rows=st.integers(2, 6), padding=st.none() | st.integers(0, 1))
def test_embedding_of_any_shape(batch: int, steps: int, rows: int, padding: int | None) -> None:
    check_against_oracle(nn.Embedding(rows, 3, padding_idx=padding), torch.randint(rows, (batch, steps)))


def test_a_gradient_that_cancels_is_never_measured_too_small() -> None:
    """Two positions whose outer products nearly cancel: in float32 the Gram form alone would return noise."""
    left = torch.randn(1, 2, 64) * 1e4
    left[:, 1] = -left[:, 0]
    right = torch.randn(1, 1, 64).repeat(1, 2, 1)
    right[:, 1] *= 1 + 1e-6
    gradient = OuterProducts(left, right)
    exact = torch.einsum("btp,btd->bpd", left.double(), right.double()).pow(2).sum()
    assert gradient.squared_norms().item() >= exact.item()
    weight = 1 / math.sqrt(gradient.squared_norms().item())
    assert weighted_sum(gradient, torch.tensor([weight]), torch.zeros(64, 64)).norm() <= 1 + 1e-5


@pytest.mark.parametrize("copies", [2, 18, 40])
@pytest.mark.parametrize("size", [1e3, 1e9, 1e12])
@pytest.mark.parametrize("kind", ["linear", "convolution", "1x1 convolution", "standardised"])
def test_what_cancels_within_a_record_does_not_add_its_rounding(kind: str, size: float, copies: int) -> None:
    """A record whose augmentations, or whose constant part, cancel: what is left of it moves the sum by its bound."""
    torch.manual_seed(1)
    others, height = 12, 4
    if kind == "linear":
        layer: nn.Module = nn.Linear(64, 10, bias=False)
        nn.init.zeros_(layer.weight)
        net, shape = layer, (64,)
    else:
        kernel = 1 if kind == "1x1 convolution" else 3
        make = StandardizedConv2d if kind == "standardised" else nn.Conv2d
        layer = make(3, 10, kernel, bias=False)
        if kind != "standardised":
            nn.init.zeros_(layer.weight)
        net, shape = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, height, height)
    rows = torch.randn(others * copies, *shape)
    signs = torch.tensor([1.0, -1.0] * (copies // 2)).view(-1, *[1] * len(shape))
    adversary = size * (signs if kind != "standardised" else 1.0) * torch.ones(copies, *shape)
    labels = torch.randint(10, (others,))

    def released(inputs: Tensor, labels: Tensor) -> Tensor:
        engine = BookKeeping(net)
        engine.copies = copies
        step = make_step(engine, FlatClipping(1.0), GaussianNoise(), PrivacyLedger(), Randomness())
        step.begin(0.0, 1.0, 1.0)
        with engine.forward(len(inputs)):
            loss = F.cross_entropy(net(inputs), labels.repeat_interleave(copies))
        with step.backward(float(len(labels))):
            loss.backward()
        step.release()
        return layer.weight.grad.double()

    with_it = released(torch.cat([rows, adversary]), torch.cat([labels, labels[:1]]))
    assert (with_it - released(rows, labels)).norm() <= 1 + 1e-2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("steps", [64, 16384])
def test_a_token_whose_gradients_cancel_moves_the_sum_by_at_most_the_norm(steps: int, tied: bool) -> None:
    """One record that is one token many times over, with upstream gradients that add up to nothing but rounding."""
    moved = []
    for seed in range(10):
        torch.manual_seed(seed)
        first, then = torch.rand(()).expand(1, steps // 2, 1), torch.rand(1, steps // 2, 1)  # far from zero on the way
        then = then * (first.double().sum() / then.double().sum()).float()
        rows = Rows(torch.zeros(1, steps, dtype=torch.long), torch.cat([first, -then], 1), 5)
        zeros = OuterProducts(torch.zeros(1, 1, 5), torch.zeros(1, 1, 1))
        gradient = RowsAndOuterProducts(rows, zeros) if tied else rows
        total = torch.zeros(5, 1)
        gradient.add_weighted_sum_(total, gradient.squared_norms().rsqrt())
        moved.append(float(total.norm()))
    assert max(moved) <= math.sqrt(steps) / 300  # rounding all in one direction; by chance, 1 / 300


def test_a_subclass_that_overrides_forward_has_no_rule() -> None:
    class Renamed(nn.Linear):
        pass

    class Different(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sin()

    assert rule_for(Renamed(2, 2)) is rule_for(nn.Linear(2, 2))
    assert rule_for(Different(2, 2)) is None
    assert rule_for(nn.Bilinear(2, 2, 2)) is None


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(3, 2, sparse=True), "sparse"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "track_running_stats"),
        (nn.EmbeddingBag(3, 2, max_norm=1.0), "max_norm"),
        (nn.BatchNorm1d(3), "GroupNorm"),
        (nn.SyncBatchNorm(3), "GroupNorm"),
    ],
)
def test_configurations_without_a_bound_are_refused(module: nn.Module, says: str) -> None:
    assert says in (refusal_for(module) or "")


@pytest.mark.parametrize("kernel", [(4, 4, 2, 1), (6, 8, 5, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_pixel_grams_equal_the_materialised_norms(kernel: tuple[int, ...], stride: int) -> None:
    """Both ways on the same shapes, whichever of them the costs would choose."""
    inputs, outputs, size, taps = kernel
    groups = 2
    conv = nn.Conv2d(inputs, outputs, taps, stride=stride, padding=1, dilation=2, groups=groups).double()
    image = randn(3, inputs, 9 + size, 8 + size)
    grad = torch.randn_like(conv(image))
    gradient = convolution(conv, image, grad)["weight"]
    expected = gradient.materialise().flatten(1).pow(2).sum(1)
    assert_close(gradient._squared_norms_by_gram(), expected, 1e-10)  # type: ignore[attr-defined]
    assert_close(gradient.squared_norms(), expected, 1e-10)


@pytest.mark.parametrize("shape", [(7, 3, 20, 30), (7, 9, 4, 3), (7, 1, 4, 3)])
def test_low_precision_is_widened_a_few_examples_at_a_time(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, steps, p, d = shape
    left = torch.randn(batch, steps, p).bfloat16()
    right = torch.randn(batch, steps, d).bfloat16()
    weights = torch.rand(batch)
    exact = torch.bmm(left.double().transpose(1, 2), right.double())
    monkeypatch.setattr(linears, "_MAX_WIDENED_ELEMENTS", 2 * (left[0].numel() + right[0].numel()))
    found = OuterProducts(left, right)
    assert steps == 1 or len(found._parts()) == 4
    assert_close(found.squared_norms().double(), exact.flatten(1).pow(2).sum(1), 1e-5)
    expected = torch.einsum("b,bpd->pd", weights.double(), exact)
    assert_close(weighted_sum(found, weights, exact[0]).double(), expected, 1e-5)


#: Where Opacus 1.6 computes something else than autograd (with which `check_against_oracle` compares), or raises.
OPACUS_DIFFERS = {
    "Conv2d: reflect": "pads with zeros",
    "Conv2d: replicate": "pads with zeros",
    "Conv2d: circular, same": "pads with zeros",
    "Embedding: padding": "counts the padding row",
    "EmbeddingBag: mean": "wants offsets",
    "EmbeddingBag: sum, padding": "wants offsets",
    "EmbeddingBag: mean, padding": "wants offsets",
    "EmbeddingBag: max": "wants offsets",
    "EmbeddingBag: max, padding": "wants offsets",
    "LayerNorm: two dimensions, no bias": "wants a bias",
}

OPACUS_CASES = [
    pytest.param(
        make,
        id=f"{cls.__name__}: {name}",
        marks=[pytest.mark.xfail(strict=True, reason=OPACUS_DIFFERS[f"{cls.__name__}: {name}"])]
        if f"{cls.__name__}: {name}" in OPACUS_DIFFERS
        else [],
    )
    for cls in EXAMPLES
    if cls in GradSampleModule.GRAD_SAMPLERS
    for name, make in EXAMPLES[cls].items()
]


@pytest.mark.parametrize("make", OPACUS_CASES)
def test_opacus_agrees(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """An implementation that nobody here wrote, by another method (einsum, unfolding)."""
    module, input = make()
    module.double()
    target = torch.randn_like(module(input))
    engine = BookKeeping(module)
    with engine.forward(len(input)):
        loss = (module(input) - target).pow(2).sum()
    with engine.backward():
        loss.backward()
    gradients = engine.gradients()
    wrapped = GradSampleModule(module, loss_reduction="sum")
    (wrapped(input) - target).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        rows = parameter.grad_sample
        assert_close(gradients[name].squared_norms(), rows.flatten(1).pow(2).sum(1), 1e-8)
        assert_close(weighted_sum(gradients[name], torch.ones(len(input)).double(), parameter), rows.sum(0), 1e-8)


class Weighted(nn.Module):
    """A bag whose entries are weighted by numbers that another layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.bag = nn.Linear(4, 4), nn.EmbeddingBag(6, 3, mode="sum", padding_idx=2)

    def forward(self, index: Tensor) -> Tensor:
        return self.bag(index, per_sample_weights=self.weights(index.to(self.bag.weight.dtype)))


def test_weights_of_the_entries_of_a_bag_are_part_of_its_gradient() -> None:
    module, index = Weighted().double(), torch.randint(6, (5, 4))
    engine = BookKeeping(module)
    with engine.forward(5):
        losses = module(index).square().sum(1)
    with engine.backward():
        losses.sum().backward()
    gradients = engine.gradients()
    for i in range(5):
        module.zero_grad()
        module(index[i : i + 1]).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(gradients[name].materialise()[i], parameter.grad)


BAGS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "sum, padding": {"mode": "sum", "padding_idx": 2},
    "mean, padding": {"mode": "mean", "padding_idx": 2},
    "max, padding": {"mode": "max", "padding_idx": 2},
    "mean, last offset": {"mode": "mean", "include_last_offset": True},
    "sum, weights": {"mode": "sum"},
}


@pytest.mark.parametrize("kind", BAGS)
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_bags_by_offsets_give_what_one_bag_at_a_time_gives(kind: str, lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    module, count = nn.EmbeddingBag(6, 3, **BAGS[kind]).double(), len(lengths)
    index = torch.randint(6, (sum(lengths),))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    weights = torch.randn(len(index)).double() if "weights" in kind else None
    offsets = bounds if module.include_last_offset else bounds[:-1]
    target = torch.randn(count, 3).double()

    engine = BookKeeping(module)
    with engine.forward(count):
        loss = (module(index, offsets, weights) - target).pow(2).sum()
    with engine.backward():
        loss.backward()
    found = engine.gradients()["weight"].materialise()

    for i in range(count):
        own = slice(int(bounds[i]), int(bounds[i + 1]))
        module.zero_grad()
        alone = torch.tensor([0, lengths[i]]) if module.include_last_offset else torch.tensor([0])
        output = module(index[own], alone, None if weights is None else weights[own])
        (output - target[i : i + 1]).pow(2).sum().backward()
        assert_close(found[i], module.weight.grad, 1e-10)


def test_offsets_that_are_not_one_for_every_example_are_refused_with_the_way_out() -> None:
    module, index = nn.EmbeddingBag(6, 3, mode="sum"), torch.randint(6, (4,))
    for offsets in (torch.tensor([0, 2]), torch.tensor([0, 0, 1, 2, 3])):
        engine = BookKeeping(module)
        with pytest.raises(UnsupportedModelError, match="pad the bags.*leave offsets out"), engine.forward(4):
            module(index, offsets)
    engine = BookKeeping(module)  # the way out
    with engine.forward(4):
        losses = module(index[:, None])
    with engine.backward():
        losses.sum().backward()
    assert len(engine.gradients()["weight"].squared_norms()) == 4
