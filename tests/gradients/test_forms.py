"""How layers are called is found once and held: nothing is read from the shape of a tensor that another batch has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BackpropClipping,
    FlatClipping,
    FlatCodebook,
    GaussianNoise,
    GradientEncoding,
    PerLayerClipping,
    PrivateStrategy,
    UnsupportedModelError,
)
from lightning_dp.errors import FormChanged
from lightning_dp.gradients.arrangement import ROWS
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.forms import Beside, CallForms, LayerForm
from tests.conftest import Net, fit, loader, trainer

RULES: list[Any] = [
    FlatClipping(1.0),
    PerLayerClipping(1.0),
    AutomaticClipping(),
    AdaptiveClipping(1.0),
    GradientEncoding(FlatCodebook()),
    BackpropClipping(1.0, 0.1),
]


class RareHead(Net):
    """A head for what few records have, on those records only."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(5, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, values = batch
        hidden = torch.tanh(self.net[0](inputs))  # type: ignore[index]
        loss = F.cross_entropy(self.net[2](hidden), labels)  # type: ignore[index]
        known = ~values.isnan()
        if known.any():
            loss = loss + F.mse_loss(self.extra(hidden[known]).squeeze(-1), values[known])
        return loss


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("self_check", [True, False])
def test_one_row_is_not_taken_for_what_all_share(rule: Any, self_check: bool) -> None:
    """399 records without a value, and one with: its row of the head is not everybody's."""
    values = torch.full((400,), math.nan)
    values[399] = 50.0
    data = TensorDataset(0.1 * torch.randn(400, 6), torch.arange(400) % 2, values)
    strategy = PrivateStrategy(rule, GaussianNoise(0.0), self_check=self_check)
    with pytest.raises(UnsupportedModelError, match=r"(?s)'extra'.*test_forms.py:\d+|test_forms.py:\d+.*'extra'"):
        fit(trainer(strategy=strategy), RareHead(), DataLoader(data, batch_size=400))
    assert len(strategy.ledger) == 0


class Rare(Net):
    """A term for few records, as one weight per record: legitimate, and rarely run."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(5, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels, values = batch
        hidden = torch.tanh(self.net[0](inputs))  # type: ignore[index]
        losses = F.cross_entropy(self.net[2](hidden), labels, reduction="none")  # type: ignore[index]
        known = ~values.isnan()
        if known.any():
            losses = losses + torch.where(known, self.extra(hidden).squeeze(1) - values.nan_to_num(), 0.0).pow(2)
        return losses.mean()


def test_a_branch_that_was_not_examined_is_examined_when_it_is_taken() -> None:
    values = torch.full((600,), math.nan)
    values[::200] = 2.0
    data = TensorDataset(torch.randn(600, 6), torch.arange(600) % 2, values)
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    fit(trainer(strategy=strategy, max_epochs=3), Rare(), DataLoader(data, batch_size=30))
    assert len(strategy.ledger) == 60
    assert strategy.findings is not None and set(strategy.findings.forms.layers) == {"net.0", "net.2", "extra"}


class _Scaled(torch.autograd.Function):
    """Takes another way later on, where PyTorch hides what is raised."""

    late = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if _Scaled.late:
            return torch.mul(x, 2.0)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def test_code_within_an_autograd_function_is_examined_as_well() -> None:
    class Custom(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            _Scaled.late = self.global_step >= 2
            return F.cross_entropy(_Scaled.apply(self.net(batch[0])), batch[1])

    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    fit(trainer(strategy=strategy), Custom(), loader())
    assert len(strategy.ledger) == 5


class Positions(Net):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 6)))
        self.places, self.out = nn.Embedding(9, 6), nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        hidden = self.net(inputs) + self.places(torch.arange(inputs.shape[1])[None])
        return F.cross_entropy(self.out(hidden.tanh()[:, 0]), labels)


def test_positions_may_grow_with_the_padding() -> None:
    records = [(torch.randn(2 + i % 7, 6), torch.tensor(i % 3)) for i in range(60)]

    def collate(items: Any) -> Any:
        return nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True), torch.stack([y for _, y in items])

    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    fit(trainer(strategy=strategy, max_epochs=3), Positions(), DataLoader(records, batch_size=6, collate_fn=collate))
    assert len(strategy.ledger) == 30


def held(shared: bool, constant: Tensor | None = None) -> CallForms:
    forms = CallForms()
    forms.layers["layer"] = LayerForm([shared], {} if constant is None else {0: constant})
    return forms


@pytest.mark.parametrize(
    ("forms", "input"),
    [
        (held(False), torch.randn(1, 3)),
        (held(False), torch.randn(3, 3)),
        (held(True, torch.arange(3.0)[None]), torch.randn(1, 3)),
        (held(True, torch.arange(3.0)[None]), torch.arange(3.0)[None].requires_grad_()),
        (CallForms(), torch.randn(4, 3)),
    ],
)
def test_a_call_of_another_form_is_not_guessed_at(forms: CallForms, input: Tensor) -> None:
    with pytest.raises(FormChanged, match="'layer'"):
        forms.is_shared("layer", nn.Linear(3, 2), 0, input, 4)


SPREAD: dict[str, Callable[[Tensor, int], Tensor]] = {
    "repeat": lambda q, b: q.repeat(b, 1, 1),
    "expand": lambda q, b: q.expand(b, -1, -1),
    "repeat_interleave": lambda q, b: q.repeat_interleave(b, 0),
    "squeeze": lambda q, b: q.squeeze(0)[None].expand(b, -1, -1),
    "index": lambda q, b: q[0].unsqueeze(0).repeat(b, 1, 1),
    "broadcast": lambda q, b: q,
    "after an activation": lambda q, b: q.tanh().repeat(b, 1, 1),
}


class Queries(Net):
    def __init__(self, how: str) -> None:
        super().__init__(nn.Sequential(nn.Linear(2, 8)))
        self.how, self.queries, self.out = how, nn.Embedding(4, 8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        hidden = self.net(inputs.view(-1, 3, 2))
        queries = SPREAD[self.how](self.queries(torch.arange(4)[None]), len(inputs))
        attended = (queries @ hidden.transpose(1, 2)).softmax(-1) @ hidden
        return F.cross_entropy(self.out((queries + attended).mean(1)), labels)


@pytest.mark.parametrize("how", SPREAD)
def test_what_all_examples_share_is_spread_as_people_write_it(how: str) -> None:
    def trained(engine: str) -> Tensor:
        torch.manual_seed(0)
        module = Queries(how)
        strategy = PrivateStrategy(FlatClipping(0.5), GaussianNoise(0.0), engine=engine, seed=1)
        fit(trainer(strategy=strategy, max_steps=2), module, loader())
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    torch.testing.assert_close(trained("bookkeeping"), trained("per_example"), rtol=1e-4, atol=1e-5)


class CentreLoss(nn.Module):
    """A loss that holds parameters and returns one number."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.centres, self.reduction = nn.Parameter(torch.randn(3, 5)), reduction

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        losses = (hidden - self.centres[labels]).pow(2).sum(1)
        return losses.mean() if self.reduction == "mean" else losses.sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_holds_parameters_may_return_one_number(reduction: str) -> None:
    class Centred(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = CentreLoss(reduction)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = torch.tanh(self.net[0](batch[0]))  # type: ignore[index]
            loss = F.cross_entropy(self.net[2](hidden), batch[1], reduction=reduction)  # type: ignore[index]
            return loss + 0.1 * self.extra(hidden, batch[1])

    def trained(engine: str) -> Tensor:
        torch.manual_seed(0)
        module = Centred()
        strategy = PrivateStrategy(
            FlatClipping(0.5), GaussianNoise(0.0), engine=engine, seed=1, loss_reduction=reduction
        )
        fit(trainer(strategy=strategy, max_steps=2), module, loader())
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    torch.testing.assert_close(trained("bookkeeping"), trained("per_example"), rtol=1e-4, atol=1e-5)


def test_a_mask_as_long_as_the_batch_is_not_taken_apart() -> None:
    """Which tensors have one entry per example is known, not read from their length."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (mask @ self.gain) * x

    module = nn.Sequential(Masked())
    mask, inputs = torch.tril(torch.ones(4, 4)), torch.randn(4, 4, 3)
    engine = BookKeeping(module)
    engine.forms = CallForms()
    engine.forms.beside[("0.gain",), "matmul", 1, 0] = Beside(constants=[mask])
    engine.forms.beside[("0.gain",), "mul", 1, 0] = Beside({3: ROWS})
    with engine.forward(4):
        loss = module[0](inputs, mask).pow(2).sum()
    with engine.backward():
        loss.backward()
    found = engine.gradients()["0.gain"].materialise()
    for row, x in zip(found, inputs, strict=True):
        gain = module[0].gain.detach().requires_grad_()
        ((mask @ gain) * x).pow(2).sum().backward()
        torch.testing.assert_close(row, gain.grad)
    with engine.forward(4), pytest.raises(FormChanged, match="'0.gain'"):
        module[0](inputs, 2 * mask)


def test_a_gradient_penalty_that_begins_later_is_followed() -> None:
    class Late(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs = batch[0].clone().requires_grad_()
            logits = self.net(inputs)
            loss = F.cross_entropy(logits, batch[1])
            if self.global_step >= 2:
                [slope] = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
                loss = loss + (slope.norm(dim=1) - 1).pow(2).mean()
            return loss

    found = []
    for options in ({}, {"self_check": False}, {"engine": "per_example"}):
        torch.manual_seed(0)
        module = Late()
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(0.0), seed=3, **options)
        fit(trainer(strategy=strategy), module, loader())
        assert len(strategy.ledger) > 2
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_batch_of_one_tells_nothing_about_inputs_that_all_examples_share(micro: int) -> None:
    class Positions(Net):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 3))
            self.positions = nn.Embedding(1, 6)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            if len(x) == 1:  # code that a larger batch does not run
                x = x * 1.0
            return F.cross_entropy(self.net(x + self.positions(torch.zeros(1, dtype=torch.long))), y)

    private = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), max_physical_batch_size=micro)
    fit(trainer(strategy=private), Positions(), loader())
    assert len(private.ledger) == 5


def test_what_a_layer_sets_in_its_first_call_is_no_counter() -> None:
    class Remembers(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.features = batch[0].shape[1]
            return super().training_step(batch, batch_idx)

    private = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), engine="per_example")
    fit(trainer(strategy=private), Remembers(), loader())
    assert len(private.ledger) == 5
