"""The row tracer alone: owners of results, against what changes when other records do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_dp.training.independence import owners
from lightning_dp.training.independence.tracer import Reads, RowTracer

B = 5


def trace(function: Callable[..., Any], *inputs: Tensor, records: int = B) -> tuple[RowTracer, Any]:
    tracer = RowTracer(records)
    for tensor in inputs:
        tracer.own(tensor, owners.rows(len(tensor), tensor.dim(), records))
    with tracer, Reads(tracer):
        return tracer, function(*inputs)


def is_rows(tracer: RowTracer, tensor: Tensor, dim: int = 0) -> bool:
    """Whether every record owns an equal share of the entries along a dimension, in order."""
    state = tracer.state(tensor)
    expected = owners.rows(tensor.shape[dim], tensor.dim(), tracer.examples, dim)
    return state is not None and torch.equal(state.owner.expand(tensor.shape), expected.expand(tensor.shape))


linear, convolution = nn.Linear(4, 4), nn.Conv1d(3, 3, 3, padding=1)
norm, group = nn.LayerNorm(4), nn.GroupNorm(1, 3)
attention = nn.MultiheadAttention(4, 2, batch_first=True)
recurrent = nn.GRU(4, 4, batch_first=True)

#: Functions of (B, 3, 4) that act on records one by one, and give (B, 3, 4).
ROW_WISE: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": linear,
    "convolution": convolution,
    "layer norm": norm,
    "group norm": group,
    "attention": lambda x: attention(x, x, x, need_weights=False)[0],
    "recurrence": lambda x: recurrent(x)[0],
    "flattened": lambda x: linear(x.reshape(-1, 4)).view(-1, 3, 4),
    "time first": lambda x: linear(x.transpose(0, 1).reshape(-1, 4)).view(3, -1, 4).transpose(0, 1),
    "softmax": lambda x: x.softmax(1),
    "in place": lambda x: x.clone().tanh_().mul_(2).add_(1),
    "through a view": lambda x: (y := x.clone(), y[:, 0].zero_(), y)[2],
    "padding and cut": lambda x: F.pad(x, (1, 1, 1, 1))[:, 1:-1, 1:-1],
    "its own norm": lambda x: x / (1 + x.flatten(1).norm(dim=1)[:, None, None]),
    "sorted within": lambda x: x.sort(1).values,
    "looked up": lambda x: x.gather(1, x.argsort(1)),
    "taken apart": lambda x: torch.stack([row * 2 for row in x]),
    "masked": lambda x: torch.where(x > 0, x, -x.mean((1, 2), keepdim=True)),
    "matrix product": lambda x: x @ x.transpose(1, 2) @ x,
    "einsum": lambda x: torch.einsum("btd,bsd->bts", x, x).softmax(-1) @ x,
    "a token in front": lambda x: torch.cat([torch.zeros(1, 1, 4).expand(len(x), -1, -1), x], 1)[:, 1:],
    "dropout": lambda x: F.dropout(x, 0.1),
    "noise": lambda x: x + torch.randn_like(x),
    "chunks": lambda x: torch.cat(x.chunk(2, 2)[::-1], 2),
    "fast Fourier transform": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=2), n=4, dim=2),
}

#: Functions that mix records, or treat their places differently.
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda x: x - x.mean(0),
    "first": lambda x: x - x[:1],
    "rolled": lambda x: x + x.roll(1, 0),
    "cumulative": lambda x: x.cumsum(0),
    "sorted": lambda x: x.sort(0).values,
    "softmax over the batch": lambda x: x.softmax(0),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "largest": lambda x: x / x.abs().max(),
    "products of records": lambda x: (x.flatten(1) @ x.flatten(1).T)[:, :, None, None].mean(1) * x,
    "flattened the other way": lambda x: x.transpose(0, 1).reshape(x.shape) + x,
    "permuted": lambda x: 0.7 * x + 0.3 * x[torch.randperm(len(x))],
    "by place": lambda x: x * torch.arange(len(x))[:, None, None],
    "first overwritten": lambda x: (y := x.clone(), y[0].zero_(), y)[2],
    "attention over the batch": lambda x: attention(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[
        0
    ].transpose(0, 1),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_what_acts_on_records_one_by_one_is_found_to(name: str) -> None:
    torch.manual_seed(1)
    tracer, result = trace(ROW_WISE[name], torch.randn(B, 3, 4))
    assert is_rows(tracer, result)
    assert not tracer.places


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_records_is_found_to_with_its_line(name: str) -> None:
    torch.manual_seed(1)
    tracer, result = trace(lambda x: linear(MIXING[name](x)), torch.randn(B, 3, 4))
    state = tracer.state(result)
    assert state is not None and (state.is_mixed or not is_rows(tracer, result))
    if state.is_mixed:
        assert "test_row_tracer.py:" in state.why


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*ROW_WISE, *MIXING]), min_size=1, max_size=5), st.integers(2, 7))
def test_random_programs(names: list[str], records: int) -> None:
    """Sound: whatever is said to be a record's own does not change when other records do. Complete: a program that
    never mixes records is said to be."""
    torch.manual_seed(0)
    programs = {**ROW_WISE, **MIXING}

    def program(x: Tensor) -> Tensor:
        for name in names:
            x = programs[name](x)
        return x

    x = torch.randn(records, 3, 4)
    tracer, result = trace(program, x.clone(), records=records)
    own = is_rows(tracer, result)
    if not set(names) & set(MIXING):
        assert own
    if own and not set(names) & {"noise", "dropout", "permuted"}:
        other = torch.cat([x[:1], 3 * torch.randn(records - 1, 3, 4)])
        torch.testing.assert_close(program(x)[0], program(other)[0], rtol=1e-3, atol=1e-4)


def test_random_mixing_hides_in_no_zero() -> None:
    """A weight of zero hides on the data what an operation does; the probe has values of its own."""
    mixing = nn.Conv1d(B, B, 1, bias=False)  # records as channels
    nn.init.zeros_(mixing.weight)
    tracer, result = trace(lambda x: mixing(x.transpose(0, 1)).transpose(0, 1), torch.zeros(B, 3, 4))
    state = tracer.state(result)
    assert state is not None and state.is_mixed


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda z, y: F.mse_loss(z, y), "sum"),
        (lambda z, y: (z - y).pow(2).sum() / len(z), "sum"),
        (lambda z, y: (z - y).abs().mean() + 0.1 * z.pow(2).mean(), "sum"),
        (lambda z, y: torch.dot(z[:, 0], y[:, 0]), "sum"),
        (lambda z, y: F.smooth_l1_loss(z, y, reduction="none").mean(1), "rows"),
        (lambda z, y: F.mse_loss(z, y).sqrt(), "mixed"),
        (lambda z, y: torch.nan_to_num(F.mse_loss(z, y)), "mixed"),
        (lambda z, y: F.mse_loss(z, y) * z.mean(), "mixed"),
        (lambda z, y: 1 / F.mse_loss(z, y), "mixed"),
        (lambda z, y: (z - y).pow(2).max(), "mixed"),
    ],
)
def test_a_loss_is_a_linear_sum_or_not(loss: Any, expected: str) -> None:
    tracer, result = trace(loss, torch.randn(B, 3), torch.randn(B, 3))
    state = tracer.state(result)
    assert state is not None
    found = "mixed" if state.is_mixed else "sum" if state.is_sum else "rows" if is_rows(tracer, result) else "?"
    assert found == expected


def test_reads_are_noted_with_their_line() -> None:
    def read(x: Tensor) -> None:
        if (x > 0).any():
            x.mean().item()
        x[:, 0].tolist()

    tracer, _ = trace(read, torch.randn(B, 3))
    assert len(tracer.decisions) == 3
    assert all("test_row_tracer.py:" in line for line in tracer.decisions)


def test_packed_sequences_are_followed_through_a_recurrence() -> None:
    lengths = torch.tensor([2, 5, 3, 1, 4])

    def last(x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return recurrent(packed)[1][0]

    tracer, result = trace(last, torch.randn(B, 5, 4))
    assert is_rows(tracer, result)


def rare(x: Tensor) -> Tensor:
    """A factor that is one for every record that is traced."""
    return 1 + ((x > 70) & (x < 71)).float().sum()


#: Losses per record in which a number of all records hides.
HIDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=torch.ones(4) * rare(z), reduction="none"),
    "class weights of a margin": lambda z, y: F.multi_margin_loss(
        z, y, weight=torch.ones(4) * rare(z), reduction="none"
    ),
    "the scale of a normalisation": lambda z, y: F.cross_entropy(
        F.batch_norm(z, torch.zeros(4), torch.ones(4), weight=torch.ones(4) * rare(z)), y, reduction="none"
    ),
    "the statistics of a normalisation": lambda z, y: F.cross_entropy(
        F.batch_norm(z, torch.zeros(4), torch.ones(4) * rare(z)), y, reduction="none"
    ),
    "an operation that also writes": lambda z, y: F.cross_entropy(
        F.rrelu(z, training=True) * rare(z), y, reduction="none"
    ),
    "what an operation that also writes is given": lambda z, y: F.cross_entropy(
        F.rrelu(z * rare(z), training=True), y, reduction="none"
    ),
    "a complex number of two records": lambda z, y: torch.view_as_complex(
        torch.stack([z[:, 0], z[:, 0].roll(1)], 1)
    ).abs(),
}


@pytest.mark.parametrize("name", HIDING)
def test_a_number_of_all_records_is_found_wherever_it_goes(name: str) -> None:
    tracer, result = trace(HIDING[name], torch.randn(B, 4), torch.arange(B) % 4)
    state = tracer.state(result)
    assert state is not None and state.is_mixed


def test_a_random_activation_keeps_records_apart() -> None:
    tracer, result = trace(lambda z: F.rrelu(z, training=True), torch.randn(B, 4))
    assert is_rows(tracer, result)


def test_complex_numbers_of_one_record_are_its_own() -> None:
    """Rotary positions by complex numbers."""

    def rotated(z: Tensor) -> Tensor:
        turned = torch.view_as_complex(z.reshape(-1, 2, 2)) * torch.polar(torch.ones(2), torch.rand(2))
        return torch.view_as_real(turned).flatten(1)

    tracer, result = trace(rotated, torch.randn(B, 4))
    assert is_rows(tracer, result)


def test_parts_of_a_batch_may_share_memory() -> None:
    whole = torch.randn(B, 5)
    tracer, result = trace(lambda x, y: (x.tanh(), y.tanh()), whole[:, :4], whole[:, 4:])
    assert is_rows(tracer, result[0]) and is_rows(tracer, result[1])


def test_rows_that_a_mask_chose_are_so_even_where_it_chose_all() -> None:
    tracer, result = trace(lambda z: z[z[:, 0] < 70], torch.randn(B, 4))
    state = tracer.state(result)
    assert state is not None and state.ragged and not state.packed


def test_a_second_order_by_what_records_hold_does_not_undo_the_first() -> None:
    def twice(z: Tensor) -> Tensor:
        return z[z[:, 0].argsort()][z[:, 1].argsort()]

    torch.manual_seed(1)
    tracer, result = trace(twice, torch.randn(B, 4))
    state = tracer.state(result)
    assert state is not None and (state.reordered or state.is_mixed)

    def back(z: Tensor) -> Tensor:
        order = z[:, 0].argsort()
        return z[order][order.argsort()]

    tracer, result = trace(back, torch.randn(B, 4))
    state = tracer.state(result)
    assert state is not None and not state.reordered and not state.is_mixed


@pytest.mark.parametrize("records", [2, 8])
def test_the_largest_of_a_pair_of_records_is_neither_s(records: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        tracer, result = trace(
            lambda x: F.adaptive_max_pool2d(x.T[None, None], (1, records // 2)),
            torch.randn(records, 1),
            records=records,
        )
        state = tracer.state(result)
        assert state is not None and state.is_mixed


def test_a_mask_of_attention_is_part_of_what_was_asked() -> None:
    """The same operation with two masks has two answers: each record by itself, and all together."""
    alone = torch.full((B, B), -torch.inf).fill_diagonal_(0.0)

    def attended(x: Tensor) -> tuple[Tensor, Tensor]:
        q = x[None, None]
        masks = alone, torch.zeros(B, B)
        one, other = (F.scaled_dot_product_attention(q, q, q, attn_mask=mask) for mask in masks)
        return one, other

    tracer, (one, other) = trace(attended, torch.randn(B, 4))
    assert not tracer.state(one).is_mixed
    assert tracer.state(other).is_mixed


def test_a_large_constant_hides_no_record() -> None:
    """-1e9 in one entry, as a mask has it, does not make others look unchanged."""
    bias = torch.zeros(B + 1, 1, 3)
    bias[:, :, 2] = -1e9

    def product(x: Tensor) -> Tensor:
        return torch.baddbmm(bias, torch.cat([x[:, None], torch.zeros(1, 1, 4)]), torch.randn(B + 1, 4, 3))

    tracer, result = trace(product, torch.randn(B, 4))
    state = tracer.state(result)
    assert state is not None and (state.is_mixed or state.owner.expand(result.shape)[:B, 0, 0].tolist() == [*range(B)])


@pytest.mark.parametrize(
    ("hook", "is_found"),
    [
        (lambda grad, z: -0.5 * grad, False),
        (lambda grad, z: grad / grad.flatten(1).norm(dim=1, keepdim=True), False),
        (lambda grad, z: None, False),
        (lambda grad, z: grad / grad.norm(), True),
        (lambda grad, z: grad * rare(z), True),
        (lambda grad, z: grad.roll(1, 0), True),
        (lambda grad, z: (grad.mul_(2), None)[1], False),
        (lambda grad, z: (grad.mul_(rare(z)), None)[1], True),
    ],
)
def test_hooks_of_gradients_are_looked_at(hook: Callable[[Tensor, Tensor], Any], is_found: bool) -> None:
    def step(x: Tensor) -> Tensor:
        hidden = linear(x)
        hidden.register_hook(lambda grad: hook(grad, x))
        return hidden.square().mean()

    tracer, _ = trace(step, torch.randn(B, 4))
    assert bool(tracer.gradient_problems) == is_found
