"""Parameters that code uses, rather than a layer with a rule: trained as one example at a time would train them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader

from lightning_dp import BackpropClipping, FlatClipping, GaussianNoise, PrivateStrategy, UnsupportedModelError
from lightning_dp.gradients.engines import BookKeeping
from tests.conftest import Net, fit, loader, trainer

D, T, H = 6, 3, 4  # inputs of the data set, as T positions of 2 numbers


def tokens(x: Tensor) -> Tensor:
    return x.view(-1, T, 2)


class Positions(nn.Module):
    """A learned position and class token, as vision transformers have them."""

    def __init__(self, spread: str) -> None:
        super().__init__()
        self.spread = spread
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 2)), nn.Parameter(torch.randn(1, T + 1, 2))
        self.inside, self.out = nn.Linear(2, H), nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = tokens(x)
        token = {
            "expand": lambda: self.token.expand(len(x), -1, -1),
            "repeat": lambda: self.token.repeat(x.shape[0], 1, 1),
            "as": lambda: self.token.expand_as(x[:, :1]),
            "broadcast": lambda: torch.broadcast_to(self.token[0, 0], (len(x), 1, 2)),
        }[self.spread]()
        position = self.position.to(x).type_as(x)
        return self.out(torch.tanh(self.inside(torch.cat([token, x], 1) + position)).mean(1))


class Cell(nn.Module):
    """A recurrence of one's own: matrices are used at every step, and the first state is made of zeros."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.a, self.b, self.bias = (
            nn.Parameter(torch.randn(2, H)),
            nn.Parameter(torch.randn(H, H)),
            nn.Parameter(torch.zeros(H)),
        )
        self.out = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = tokens(x)
        state, states = torch.zeros(len(x), H), torch.zeros(len(x), T, H)
        for t in range(T):
            state = torch.tanh(x[:, t] @ self.a + state @ self.b + self.bias)
            if self.in_place:
                states[:, t] = state
        return self.out(states.mean(1) if self.in_place else state)


class Adapted(nn.Module):
    """A frozen layer whose weight is changed by what is computed from parameters alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.base, self.out = nn.Linear(D, H), nn.Linear(H, 3)
        self.base.requires_grad_(False)
        self.parts = nn.ParameterDict({"a": torch.randn(2, D), "b": torch.randn(H, 2), "scale": torch.rand(H) + 0.5})

    def forward(self, x: Tensor) -> Tensor:
        a, b, scale = self.parts["a"], self.parts["b"], self.parts["scale"]
        if self.kind == "lora":
            hidden = self.base(x) + x @ a.T @ b.T * scale
        elif self.kind == "merged":
            hidden = F.linear(x, self.base.weight + b @ a, scale)
        else:  # the length of the changed weight, of which no gradient is taken
            length = (self.base.weight + b @ a).norm(dim=1).detach()
            hidden = self.base(x) * scale / length + x @ (b @ a).T
        return self.out(torch.tanh(hidden))


class Scaled(nn.Module):
    """Own parameters beside children that draw random numbers."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.inside, self.out, self.drop = nn.Linear(D, H), nn.Linear(H, 3), nn.Dropout(drop)
        self.gamma, self.mask = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(H))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.gamma * torch.tanh(self.inside(x)))
        return self.out(torch.where(x[:, :1] > 0, hidden, self.mask))


class Bias(nn.Module):
    """A table of relative positions that is added to scores of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * T, 1)
        self.qkv, self.out = nn.Linear(2, 3 * H), nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(T)
        bias = self.table(place[:, None] - place[None, :] + T).permute(2, 0, 1)[None]
        q, k, v = self.qkv(tokens(x))[:, None].chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[:, 0].mean(1))


class Flattened(nn.Module):
    """Layers and parameters that see ``(B · T, d)``, ``(T, B, d)``, ``(T · B, d)``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inside, self.norm, self.out = nn.Linear(2, H), nn.LayerNorm(H), nn.Linear(H, 3)
        self.shift, self.mix = nn.Parameter(torch.randn(H)), nn.Parameter(torch.randn(H, H))

    def forward(self, x: Tensor) -> Tensor:
        x = tokens(x)
        moved = x.transpose(0, 1) if "time" in self.kind else x
        flat = moved.reshape(-1, 2) if "flat" in self.kind else moved
        hidden = torch.relu(self.norm(self.inside(flat)) + self.shift) @ self.mix
        hidden = F.linear(hidden, self.mix).view(*moved.shape[:2], H)
        return self.out(hidden.mean(0 if "time" in self.kind else 1))


class Frames(nn.Module):
    """A convolution that sees every frame of every example by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, H, 2), nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x.view(-1, 1, 2)).flatten(1)
        return self.out(torch.tanh(frames).view(-1, T, H).mean(1))


class Written(nn.Module):
    """A matrix into which parameters are written."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.out = nn.Parameter(torch.randn(15)), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(D, D, 1)
        matrix = torch.zeros(D, D)
        matrix[rows, columns] = self.upper
        return self.out(torch.tanh(x @ (matrix - matrix.T + torch.eye(D))))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return gradient * b, gradient * a


class Custom(nn.Module):
    """A weight that comes of an autograd function of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(3, D))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Doubled.apply(self.a, self.b))


class Elsewhere(nn.Module):
    """A layer's weight that is also used outside its forward; a penalty; an attribute that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(D, H), nn.Linear(H, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.out(self.second(hidden) + hidden @ self.first.weight)


class OnConstants(nn.Module):
    """A layer that is called with the batch, and with a constant (DoRA does so)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = (
            nn.Linear(D, 2, bias=False),
            nn.Linear(2, 3, bias=False),
            nn.Parameter(torch.ones(3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.b(self.a(torch.eye(D))).T
        return self.b(self.a(x)) * self.scale / weight.norm(dim=1)


class LookedUp(nn.Module):
    """A table of one's own, with a row for padding, and the same table as an output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table, self.mix, self.out = nn.Parameter(torch.randn(5, H)), nn.Parameter(torch.eye(H)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = (x.abs() * 2).long().clamp(max=4)
        words = words.T if self.kind == "time first" else words
        table = self.table @ self.mix if self.kind == "computed" else self.table
        found = F.embedding(words.reshape(-1) if self.kind == "flat" else words, table, padding_idx=0)
        found = found.view(*words.shape, H) if self.kind == "flat" else found
        return self.out(F.linear(torch.tanh(found), self.table).mean(0 if self.kind == "time first" else 1))


class MaskToken(nn.Module):
    """A token that is written where a mask of each example says."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inside, self.out = nn.Parameter(torch.randn(H)), nn.Linear(2, H), nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inside(tokens(x))
        hidden[tokens(x)[..., 0] > 0.3] = self.token
        return self.out(torch.tanh(hidden).mean(1))


class FirstState(nn.Module):
    """A first state that is learned, one for all examples, as recurrent layers take it."""

    def __init__(self, spread: str) -> None:
        super().__init__()
        self.spread = spread
        self.state = nn.Parameter(torch.randn(H) if spread == "of one" else torch.randn(2, 1, H))
        self.gru, self.out = nn.GRU(2, H, num_layers=2, batch_first=True), nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = len(x)
        state = {
            "expand": lambda: self.state.expand(-1, size, -1).contiguous(),
            "repeat": lambda: self.state.repeat(1, size, 1),
            "of one": lambda: self.state.expand(2, size, H).contiguous(),
        }[self.spread]()
        return self.out(self.gru(tokens(x), state)[0][:, -1])


class Slices(nn.Module):
    """Some of a list's parameters, and what a parameter says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.rand(D) for _ in range(3)])
        self.out = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert self.scales[0].grad_fn is None
        return self.out(x * sum(self.scales[:2]))


class Steps(nn.Module):
    """A recurrence over lengths that differ, and its states together, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = (
            nn.Parameter(torch.randn(2, H)),
            nn.Parameter(torch.randn(H, H)),
            nn.Linear(H, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros(len(x), H), []
        for t in range(T):
            state = torch.tanh(tokens(x)[:, t] @ self.first + state @ self.again)
            states.append(state)
        return self.out((torch.stack(states) @ self.again).mean(0))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, D)), weight_norm(nn.Conv1d(1, 2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )


MODELS = {
    **{f"positions, {kind}": lambda kind=kind: Positions(kind) for kind in ("expand", "repeat", "as", "broadcast")},
    "own recurrence": lambda: Cell(False),
    "own recurrence, in place": lambda: Cell(True),
    **{kind: lambda kind=kind: Adapted(kind) for kind in ("lora", "merged", "dora")},
    "layer scale and mask token": lambda: Scaled(0.0),
    "table of positions": Bias,
    **{kind: lambda kind=kind: Flattened(kind) for kind in ("rows", "flat", "time first", "time first, flat")},
    "frames": Frames,
    "written into a matrix": Written,
    "custom function": Custom,
    "a weight used elsewhere": Elsewhere,
    "called with a constant": OnConstants,
    **{f"looked up, {k}": lambda k=k: LookedUp(k) for k in ("rows", "flat", "time first", "computed")},
    "mask token": MaskToken,
    **{f"first state, {kind}": lambda kind=kind: FirstState(kind) for kind in ("expand", "repeat", "of one")},
    "slices of a list": Slices,
    "recurrence and its states": Steps,
    "weight_norm": convolution,
    "weight_norm of old": lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(D, 3))),
}  # fmt: skip


def trained(module: nn.Module, engine: str, micro: int | None = None, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    strategy = PrivateStrategy(
        FlatClipping(0.5), GaussianNoise(0.0), engine=engine, seed=1, max_physical_batch_size=micro, **options
    )
    fit(trainer(strategy=strategy, max_steps=2), module, loader())
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("micro", [None, 5])
@pytest.mark.parametrize("name", MODELS)
def test_code_that_uses_parameters_trains_as_one_example_at_a_time(name: str, micro: int | None) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(Net(MODELS[name]()))
    before = [p.detach().clone() for p in models[0].parameters()]
    found, expected = trained(models[0], "bookkeeping", micro), trained(models[1], "per_example")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6)
    assert any(not torch.equal(start, one) for start, one in zip(before, found, strict=True))


class Clamped(nn.Module):
    """A parameter that is kept within limits before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(2 * torch.randn(D)), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data = self.scale.data.clamp(-0.5, 0.5)
        with torch.no_grad():
            self.scale.clamp_(-0.4, 0.4)
        return self.out(x * self.scale)


def test_a_parameter_may_be_written_to_before_it_is_used() -> None:
    torch.manual_seed(3)
    fast = Net(Clamped())
    slow = copy.deepcopy(fast)
    for one, two in zip(trained(fast, "bookkeeping"), trained(slow, "per_example"), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-6)


class Own(Net):
    """Parameters of the LightningModule itself, and a penalty on all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]) * self.temperature, batch[1])
        return loss + 0.1 * sum(p.square().sum() for p in self.parameters())


def test_a_penalty_on_weights_is_part_of_every_example_s_loss() -> None:
    torch.manual_seed(3)
    module = Own()
    other = copy.deepcopy(module)
    for one, two in zip(trained(module, "bookkeeping"), trained(other, "per_example"), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-6)


def test_what_draws_random_numbers_beside_own_parameters_runs() -> None:
    trained(Net(Scaled(0.5)), "bookkeeping")


def test_a_state_that_every_call_changes_is_followed() -> None:
    """Spectral normalisation: its power iteration goes on with every call, so that no other engine agrees with it."""
    torch.manual_seed(3)
    model = nn.Sequential(spectral_norm(nn.Linear(D, 3))).double()
    model.eval()
    x, engine = torch.randn(4, D, dtype=torch.float64), BookKeeping(model)
    with engine.forward(4):
        loss = model(x).pow(2).sum()
    with engine.backward():
        loss.backward()
    found = {name: gradient.materialise() for name, gradient in engine.gradients().items()}
    for row in range(4):
        alone = torch.autograd.grad(model(x[row : row + 1]).pow(2).sum(), list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), alone, strict=True):
            torch.testing.assert_close(found[name][row].view_as(gradient), gradient)
    trained(Net(nn.Sequential(spectral_norm(nn.Linear(D, 3)))), "bookkeeping")
    trained(Net(nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(D, 3)))), "bookkeeping")


@pytest.mark.parametrize("name", ["positions, expand", "time first, flat", "table of positions", "merged", "frames"])
def test_the_gradient_of_an_example_is_its_own(name: str) -> None:
    """Bounded, a record moves the sum by no more than the bound, whatever the others are."""
    torch.manual_seed(3)
    model, x = MODELS[name](), torch.randn(5, D)
    module = Net(model, "sum")
    labels = torch.tensor([0, 1, 2, 0, 1])

    def weighted(rows: list[int]) -> Tensor:
        torch.manual_seed(0)
        strategy = PrivateStrategy(FlatClipping(1e-3), GaussianNoise(0.0), seed=1, loss_reduction="sum")
        other = copy.deepcopy(module)
        other.configure_optimizers = lambda: torch.optim.SGD(other.parameters(), lr=1.0)  # type: ignore[method-assign]
        data = [(10 * x[i], labels[i]) for i in rows]
        fit(trainer(strategy=strategy, max_steps=1), other, DataLoader(data, batch_size=len(data)))
        return torch.cat([(b - a).flatten() for a, b in zip(module.parameters(), other.parameters(), strict=True)])

    whole, without = weighted([0, 1, 2, 3, 4]), weighted([0, 1, 2, 3])
    assert (whole * 5 - without * 4).norm() <= 1e-3 * (1 + 1e-3)  # sums: divided by the expected batch
    assert whole.norm() > 0


def test_another_constant_than_the_examined_one_is_not_taken_for_it() -> None:
    class Late(nn.Module):
        """A constant that is one record's, once a record is rare."""

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.ones(D)), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            rare = (x > 50).any()
            shift = torch.where(rare, x.detach().amax(0), torch.zeros(D))
            return self.out(x + self.scale * shift)

    with pytest.raises(UnsupportedModelError):
        trained(Net(Late()), "bookkeeping")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda self, x: x + self.scale * x.detach().mean(0), "depends on several records|several records meet"),
        (lambda self, x: torch.cat([x, self.scale[None].expand(2, -1)], 0)[: len(x)], "records|example"),
        (lambda self, x: x * (self.scale @ x.T).softmax(0)[:, None], "records"),
    ],
)
def test_what_mixes_records_is_refused(wrong: Any, says: str) -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.randn(D)), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(wrong(self, x))

    with pytest.raises(UnsupportedModelError, match=says):
        trained(Net(Wrong()), "bookkeeping")


def test_backpropagation_clipping_refuses_what_it_has_no_bound_of() -> None:
    class Reused(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            hidden = torch.tanh(self.net[0](batch[0]))  # type: ignore[index]
            return F.cross_entropy(F.linear(hidden, self.net[2].weight), batch[1])  # type: ignore[index]

    strategy = PrivateStrategy(BackpropClipping(1.0, 0.3), GaussianNoise(1.0))
    with pytest.raises(UnsupportedModelError, match="'net.2.weight'.*FlatClipping"):
        fit(trainer(strategy=strategy, max_steps=1), Reused(), loader())


def test_the_module_is_as_it_was_after_a_forward_pass_and_after_an_error() -> None:
    model = Positions("expand")
    parameters = dict(model.named_parameters())
    engine = BookKeeping(model)
    with engine.forward(5):
        assert model.token is not parameters["token"]
        model(torch.randn(5, D))
    with pytest.raises(RuntimeError), engine.forward(5):
        model(torch.randn(5, D + 1))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert isinstance(model.token, nn.Parameter)


def test_numbers_of_rows_are_not_read_from_shapes() -> None:
    """Three positions of three examples: which dimension is the batch was found before, and stays."""
    torch.manual_seed(3)
    model = Positions("expand")
    model.position = nn.Parameter(torch.randn(T + 1, 2))
    fast, slow = Net(model), Net(copy.deepcopy(model))
    for one, two in zip(trained(fast, "bookkeeping", T + 1), trained(slow, "per_example"), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-6)


class Slopes(nn.Module):
    """Public numbers beside parameters, one for each of as many heads as batches have examples (ALiBi, learned)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, nn.Parameter(torch.ones(1))
        self.qkv, self.out = nn.Linear(2, 3 * heads * 2), nn.Linear(heads * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens(x)).view(len(x), T, 3, self.heads, 2).permute(2, 0, 3, 1, 4)
        slopes = 2.0 ** -torch.arange(1, self.heads + 1).float()
        place = torch.arange(T).float()
        bias = -(place[:, None] - place).abs() * slopes[:, None, None] * self.scale
        mixed = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


class Rotation(nn.Module):
    """An orthogonal matrix of a learned skew one; as wide as batches are large."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.skew, self.inside, self.out = (
            nn.Parameter(torch.randn(width, width)),
            nn.Linear(D, width),
            nn.Linear(width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        skew, eye = self.skew - self.skew.T, torch.eye(len(self.skew))
        return self.out(torch.tanh(self.inside(x)) @ torch.linalg.solve(eye + skew, eye - skew))


@pytest.mark.parametrize("size", [5, 8, 18])
@pytest.mark.parametrize("kind", [Slopes, Rotation])
def test_sizes_that_batches_have_as_well_are_not_taken_for_examples(kind: Any, size: int) -> None:
    torch.manual_seed(3)
    fast = Net(kind(size))
    slow = copy.deepcopy(fast)
    for one, two in zip(trained(fast, "bookkeeping"), trained(slow, "per_example"), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-6)


class Layouts(Net):
    """A weight that is applied to flat rows, once more often in the first epoch; then to rows in another order."""

    def __init__(self, more: tuple[int, int], layer: bool) -> None:
        super().__init__()
        self.more, self.layer = more, layer
        self.net = nn.Linear(4, 4, bias=False)
        self.register_buffer("out", torch.randn(4, 3))

    def apply_weight(self, flat: Tensor) -> Tensor:
        return self.net(flat) if self.layer else F.linear(flat, self.net.weight)  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, labels = batch
        flat = x.reshape(-1, 4)
        for _ in range(self.more[min(self.current_epoch, 1)]):
            flat = torch.tanh(self.apply_weight(flat))
        flat = flat.view(len(x), -1, 4).transpose(0, 1).reshape(-1, 4)
        return F.cross_entropy(self.apply_weight(flat).view(-1, len(x), 4).mean(0) @ self.out, labels)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("more", [(2, 1), (1, 2), (1, 1)])
def test_flat_rows_in_two_orders_are_refused(more: tuple[int, int], layer: bool) -> None:
    """Sizes cannot tell them apart, and the number of a call changes: one record moved the sum by 13 bounds."""
    data = [(torch.randn(48), torch.tensor(i % 3)) for i in range(24)]
    strategy = PrivateStrategy(FlatClipping(1e-3), GaussianNoise(0.0), seed=1)
    with pytest.raises(UnsupportedModelError, match="in several places"):
        fit(
            trainer(strategy=strategy, max_epochs=2),
            Layouts(more, layer),
            DataLoader(data, batch_size=24),
        )  # type: ignore[arg-type]


class Begins(Net):
    """A term that begins in the second epoch, whose step is therefore examined on the batch that is drawn; the first
    step is of size 0."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return loss + 0.01 * logits.square().mean() if self.current_epoch >= 1 else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Basis(nn.Module):
    """Random features of learned length scales."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("frequencies", torch.randn(count, D))
        self.scale, self.out = nn.Parameter(torch.ones(1, D)), nn.Linear(2 * count, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        phase = x @ (self.scale.expand(self.count, -1) * self.frequencies).T
        return self.out(torch.cat([phase.sin(), phase.cos()], 1))


@pytest.mark.parametrize("size", [20, 24])
@pytest.mark.parametrize("kind", [Basis, Rotation])
def test_a_size_that_a_drawn_batch_has_as_well_is_not_taken_for_examples(kind: Any, size: int) -> None:
    """Of 24 records, all of which are drawn: one record moved the sum by 4 times the bound at a size of 24."""
    torch.manual_seed(3)
    model, data = kind(size), [(torch.randn(D), torch.tensor(i % 3)) for i in range(24)]
    start = [p.detach().clone() for p in model.parameters()]

    def moved(records: list[Any]) -> Tensor:
        module = Begins(copy.deepcopy(model))
        strategy = PrivateStrategy(FlatClipping(1e-3), GaussianNoise(0.0), seed=1)
        run = trainer(strategy=strategy, max_epochs=2)
        fit(run, module, DataLoader(records, batch_size=len(records)))  # type: ignore[arg-type]
        pairs = zip(start, module.net.parameters(), strict=True)
        return len(records) * torch.cat([(a - b).flatten() for a, b in pairs])

    whole = moved(data)
    for left_out in (0, 5):
        assert (whole - moved(data[:left_out] + data[left_out + 1 :])).norm() <= 1e-3 * (1 + 1e-2)
    assert whole.norm() > 0


@pytest.mark.parametrize("module", [nn.GRU(2, H, batch_first=True), nn.MultiheadAttention(2, 1, batch_first=True)])
def test_a_parametrization_that_a_kernel_hides_is_refused_with_a_way_out(module: nn.Module) -> None:
    name = "weight_hh_l0" if isinstance(module, nn.GRU) else "in_proj_weight"

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = copy.deepcopy(module), nn.Linear(2 if name.startswith("in") else H, 3)
            torch.nn.utils.parametrize.register_parametrization(self.inside, name, nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            x = tokens(x)
            return self.out((self.inside(x) if name.startswith("w") else self.inside(x, x, x))[0][:, -1])

    with pytest.raises(UnsupportedModelError, match="parametrization.*per_example"):
        trained(Net(Inside()), "bookkeeping")
    trained(Net(Inside()), "per_example")
