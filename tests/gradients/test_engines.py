"""Models as a whole: reuse, ties, in-place operations, broadcast inputs, and both engines against the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.engines import BookKeeping, PerExample, make_engine
from lightning_dp.gradients.linear import OuterProducts
from lightning_dp.gradients.precision import rounds_products
from tests.conftest import assert_close, oracle_gradients

pytestmark = pytest.mark.on_device


class Recurrent(nn.Module):
    """One layer called a different number of times on inputs of different length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            hidden = torch.tanh(self.cell(hidden + x[:, t]))
        return self.out(hidden) + self.out(self.cell(x)).sum(1)


class Tied(nn.Module):
    """A language model whose output head is its embedding; the embedding is looked up twice."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=padding_idx)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens) + self.embedding(tokens.flip(1)))))


class TiedConvolutions(nn.Module):
    """One kernel used with two strides: no factored form, so the sum is materialised."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, stride=2, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x))).flatten(1)


class Positional(nn.Module):
    """Position numbers with a leading dimension of one, shared by all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        return self.out(torch.tanh(self.token(tokens) + self.position(positions))).sum(1)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x), inplace=True).mean((2, 3)).mul_(2.0))


class InPlaceSequence(nn.Sequential):
    """A linear layer over a sequence returns a view, which the activation overwrites."""

    def __init__(self, bias: bool) -> None:
        first, second = nn.Linear(4, 5, bias=bias), nn.Linear(5, 3, bias=bias)
        super().__init__(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), nn.Flatten())


class Unused(nn.Module):
    """A layer whose output does not reach the loss, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dropped, self.never = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.used(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "recurrent": (Recurrent, lambda: torch.randn(6, 3, 4)),
    "tied": (Tied, lambda: torch.randint(7, (6, 5))),
    "tied, with padding": (lambda: Tied(padding_idx=2), lambda: torch.randint(7, (6, 5))),
    "tied convolutions": (TiedConvolutions, lambda: torch.randn(6, 2, 7, 7)),
    "positional": (Positional, lambda: torch.randint(7, (6, 5))),
    "in place": (InPlace, lambda: torch.randn(6, 2, 5, 5)),
    "in place on a sequence": (lambda: InPlaceSequence(True), lambda: torch.randn(6, 3, 4)),
    "in place on a sequence, no bias": (lambda: InPlaceSequence(False), lambda: torch.randn(6, 3, 4)),
    "unused": (Unused, lambda: torch.randn(6, 4)),
}


@pytest.mark.parametrize("engine", ["bookkeeping", "per_example"])
@pytest.mark.parametrize("name", MODELS)
def test_joint_norms_and_sums_equal_the_loop(name: str, engine: str) -> None:
    make, draw = MODELS[name]
    module, inputs = make().double(), draw()
    if inputs.is_floating_point():
        inputs = inputs.double()
    expected = oracle_gradients(module, lambda i: module(inputs[i : i + 1]).pow(2).sum(), len(inputs))
    norms = torch.stack([rows.flatten(1).norm(dim=1) for rows in expected.values()]).norm(dim=0)
    weights = torch.rand(len(inputs), dtype=torch.float64)

    under_test = make_engine(engine, module)
    size = under_test.max_examples or len(inputs)
    squared, sums = [], {name: torch.zeros_like(rows[0]) for name, rows in expected.items()}
    for start in range(0, len(inputs), size):
        with under_test.forward(size):
            loss = module(inputs[start : start + size]).pow(2).sum()
        with under_test.backward():
            loss.backward()
        gradients = under_test.gradients()
        squared.append(torch.stack([g.squared_norms() for g in gradients.values()]).sum(0))
        for key, gradient in gradients.items():
            gradient.add_weighted_sum_(sums[key], weights[start : start + size])
    assert_close(torch.cat(squared).sqrt(), norms, 1e-10)
    for key, rows in expected.items():
        assert_close(sums[key], torch.einsum("b,b...->...", weights, rows), 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_copies_of_an_example_are_added_before_anything_is_measured(name: str) -> None:
    make, draw = MODELS[name]
    module, inputs = make().double(), draw()
    if inputs.is_floating_point():
        inputs = inputs.double()
    expected = oracle_gradients(module, lambda i: module(inputs[2 * i : 2 * i + 2]).pow(2).sum(), len(inputs) // 2)
    engine = BookKeeping(module)
    engine.copies = 2
    with engine.forward(len(inputs)):
        loss = module(inputs).pow(2).sum()
    with engine.backward():
        loss.backward()
    gradients = engine.gradients()
    for key, rows in expected.items():
        if key in gradients:
            assert_close(gradients[key].squared_norms(), rows.flatten(1).pow(2).sum(1), 1e-10)
            assert_close(gradients[key].materialise().view_as(rows), rows, 1e-10)
        else:
            assert not rows.any()


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 4), steps=st.integers(1, 6), vocabulary=st.integers(2, 5))
def test_tied_embedding_and_head_of_any_shape(batch: int, steps: int, vocabulary: int) -> None:
    embedding, head = nn.Embedding(vocabulary, 3).double(), nn.Linear(3, vocabulary, bias=False).double()
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Tanh(), head)
    tokens = torch.randint(vocabulary, (batch, steps))
    [expected] = oracle_gradients(model, lambda i: model(tokens[i : i + 1]).pow(2).sum(), batch).values()
    engine = BookKeeping(model)
    with engine.forward(batch):
        loss = model(tokens).pow(2).sum()
    with engine.backward():
        loss.backward()
    [gradient] = engine.gradients().values()
    assert_close(gradient.squared_norms(), expected.flatten(1).pow(2).sum(1), 1e-10)


def test_the_module_is_untouched_outside_the_forward() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    module[0].bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    engine = BookKeeping(module)
    with pytest.raises(RuntimeError, match="boom"), engine.forward(2):
        module(torch.randn(2, 3))
        raise RuntimeError("boom")
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before
    assert all(not child._forward_hooks for child in module.modules())


@pytest.mark.parametrize("make", [BookKeeping, PerExample])
def test_existing_gradients_survive(make: type[BookKeeping] | type[PerExample]) -> None:
    module = nn.Linear(3, 1)
    module.weight.grad = torch.full_like(module.weight, 7.0)
    engine = make(module)
    with engine.forward(1):
        loss = module(torch.randn(1, 3)).sum()
    with engine.backward():
        loss.backward()
    assert (module.weight.grad == 7).all()
    assert engine.gradients()["weight"].materialise().abs().max() < 7


def test_a_layer_without_the_batch_in_front_is_named() -> None:
    module = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 1))
    with (
        pytest.raises(UnsupportedModelError, match=r"Layer '1' \(Linear\).*\(8, 3\).*4 examples"),
        BookKeeping(module).forward(4),
    ):
        module(torch.randn(4, 2, 3))


def test_an_input_modified_after_use_is_named() -> None:
    module = nn.Linear(3, 3)
    engine = BookKeeping(module)
    x = torch.randn(2, 3)
    with engine.forward(2):
        loss = module(x).sum()
        x += 1
    with pytest.raises(UnsupportedModelError, match="modified in place"), engine.backward():
        loss.backward()


def test_backward_passes_within_the_step_are_not_recorded() -> None:
    """An adversarial perturbation computed with autograd inside training_step is not a gradient of the loss."""
    module = nn.Linear(3, 1).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    engine = BookKeeping(module)
    with engine.forward(2):
        probe = x.clone().requires_grad_()
        [direction] = torch.autograd.grad(module(probe).pow(2).sum(), probe)
        loss = module(x + direction).sum()
    with engine.backward():
        loss.backward()
    assert_close(engine.gradients()["weight"].materialise()[:, 0], x + direction, 1e-10)


@pytest.mark.parametrize("make", [BookKeeping, PerExample])
def test_a_backward_pass_of_the_users_own_leaves_nothing_behind(make: type[BookKeeping] | type[PerExample]) -> None:
    module = nn.Linear(3, 1).double()
    engine = make(module)
    x = torch.randn(1, 3, dtype=torch.float64)
    with engine.forward(1):
        module(x.clone().requires_grad_()).pow(2).sum().backward()
        loss = module(x).sum()
    with engine.backward():
        loss.backward()
    assert all(p.grad is None for p in module.parameters())
    assert_close(engine.gradients()["weight"].materialise().flatten(), x.flatten(), 1e-10)


def test_norms_and_sums_are_formed_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allowed for the model, which is as it was afterwards: factors of few digits void a bound."""
    seen: list[str] = []
    norms = OuterProducts._squared_norms
    monkeypatch.setattr(OuterProducts, "_squared_norms", lambda self: (seen.append(switch()), norms(self))[1])

    def switch() -> str:
        matmul: Any = torch.backends.mkldnn.matmul
        return str(matmul.fp32_precision)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert rounds_products(torch.device("cpu")) and switch() == "bf16"
        model, inputs = nn.Linear(64, 32), torch.randn(8, 3, 64)
        engine = BookKeeping(model)
        with engine.forward(8):
            loss = model(inputs).pow(2).sum()
        with engine.backward():
            loss.backward()
        assert seen == ["ieee"] and switch() == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert not rounds_products(torch.device("cpu"))
