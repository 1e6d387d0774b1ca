"""Recurrent layers, recorded as linear maps: each sequence's gradients are those of its own recurrence, run alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.rules.composite import calls_linear

pytestmark = pytest.mark.on_device

LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


class Reader(nn.Module):
    """A recurrent layer, of which outputs and last states are used."""

    def __init__(self, kind: str, *, packed: bool, sorts: bool = False, **options: Any) -> None:
        super().__init__()
        self.packed, self.sorts, self.batch_first = packed, sorts, options.get("batch_first", False)
        self.rnn = LAYERS[kind](3, 4, **options)

    def forward(self, x: Tensor, lengths: Tensor, hx: Any = None) -> Tensor:
        """One number per sequence, of padded ones ``(B, T, 3)``."""
        inside = (torch.arange(x.shape[1])[None] < lengths[:, None])[..., None]
        input: Any = x if self.batch_first else x.transpose(0, 1)
        if self.packed:
            input = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=self.sorts)
        output, hidden = self.rnn(input, hx)
        if isinstance(output, PackedSequence):
            output = pad_packed_sequence(output, self.batch_first)[0]
        output = output if self.batch_first else output.transpose(0, 1)
        states = hidden if isinstance(hidden, tuple) else (hidden,)
        found = (output.square() * inside[:, : output.shape[1]]).sum((1, 2))
        return found + sum((i + 1) * s.transpose(0, 1).flatten(1).sin().sum(1) for i, s in enumerate(states))


def recorded(module: nn.Module, batch: int, *args: Any) -> tuple[Tensor, dict[str, PerExampleGradient]]:
    engine = BookKeeping(module)
    with engine.forward(batch):
        losses = module(*args)
    with engine.backward():
        losses.sum().backward()
    return losses.detach(), dict(engine.gradients())


def check_against_the_loop(module: Reader, x: Tensor, lengths: Tensor) -> None:
    module, x = module.double(), x.double()
    plain = module(x, lengths)
    losses, gradients = recorded(module, len(x), x, lengths)
    torch.testing.assert_close(losses, plain.detach())
    for i, length in enumerate(lengths.tolist()):
        module.zero_grad()
        module(x[i : i + 1, :length], lengths[i : i + 1]).sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(gradients[name].materialise()[i], parameter.grad)
            square = gradients[name].squared_norms()[i]
            assert parameter.grad is not None
            torch.testing.assert_close(square, parameter.grad.square().sum(), rtol=1e-6, atol=1e-9)
    assert all(p.requires_grad for p in module.parameters())
    assert "forward" not in vars(module.rnn)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*LAYERS]),
    packed=st.booleans(),
    layers=st.integers(1, 3),
    both=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_sequences_of_any_shape(
    kind: str, packed: bool, layers: int, both: bool, batch_first: bool, bias: bool, lengths: list[int]
) -> None:
    own = torch.tensor(lengths if packed else [max(lengths)] * len(lengths))
    options = {"num_layers": layers, "bidirectional": both, "batch_first": batch_first, "bias": bias}
    check_against_the_loop(Reader(kind, packed=packed, **options), torch.randn(len(own), int(own.max()), 3), own)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"proj_size": 2}),
        ("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
        ("RNN", {"nonlinearity": "relu"}),
    ],
)
def test_projections_and_other_activations(kind: str, options: dict[str, Any], packed: bool) -> None:
    lengths = torch.tensor([3, 1, 4]) if packed else torch.tensor([4, 4, 4])
    check_against_the_loop(Reader(kind, packed=packed, **options), torch.randn(3, 4, 3), lengths)


def test_sequences_that_the_user_has_sorted() -> None:
    check_against_the_loop(Reader("GRU", packed=True, sorts=True), torch.randn(3, 4, 3), torch.tensor([4, 3, 1]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_initial_states_belong_to_their_sequences(kind: str, packed: bool) -> None:
    module, lengths = Reader(kind, packed=packed, num_layers=2).double(), torch.tensor([2, 4, 3] if packed else [4] * 3)
    x, state = torch.randn(3, 4, 3).double(), torch.randn(2, 3, 4).double()
    hx = (state, -state) if kind == "LSTM" else state
    losses, gradients = recorded(module, 3, x, lengths, hx)
    torch.testing.assert_close(losses, module(x, lengths, hx).detach())
    for i in range(3):
        module.zero_grad()
        own = state[:, i : i + 1]
        module(x[i : i + 1, : lengths[i]], lengths[i : i + 1], (own, -own) if kind == "LSTM" else own).sum().backward()
        torch.testing.assert_close(
            gradients["rnn.weight_hh_l0"].materialise()[i], module.get_parameter("rnn.weight_hh_l0").grad
        )


class Cells(nn.Module):
    """A cell that is called once a time step, and begins with nothing or a state."""

    def __init__(self, cell: nn.Module, given: bool) -> None:
        super().__init__()
        self.cell, self.given = cell, given

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(len(x), 4, dtype=x.dtype)
        state: Any = ((zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros) if self.given else None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return (state[0] if isinstance(state, tuple) else state).square().sum(1)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: nn.LSTMCell(3, 4), lambda: nn.GRUCell(3, 4, bias=False), lambda: nn.RNNCell(3, 4)]
)
def test_cells(make: Any, given: bool) -> None:
    module, x = Cells(make(), given).double(), torch.randn(5, 3, 3).double()
    losses, gradients = recorded(module, 5, x)
    torch.testing.assert_close(losses, module(x).detach())
    for i in range(5):
        module.zero_grad()
        module(x[i : i + 1]).sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(gradients[name].materialise()[i], parameter.grad)


def test_outside_a_private_step_the_layer_is_pytorch_s_own() -> None:
    module = Reader("LSTM", packed=False, num_layers=2, dropout=0.5)
    before = copy.deepcopy(module.state_dict())
    recorded(module, 2, torch.randn(2, 4, 3), torch.tensor([4, 4]))
    assert type(module.rnn).forward is nn.LSTM.forward and "forward" not in vars(module.rnn)
    assert module.state_dict().keys() == before.keys()
    torch.testing.assert_close(module.state_dict(), before)


def test_dropout_between_layers_is_drawn() -> None:
    module = Reader("GRU", packed=False, num_layers=2, dropout=0.9).train()
    x, lengths = torch.randn(4, 5, 3), torch.tensor([5] * 4)
    assert not torch.equal(recorded(module, 4, x, lengths)[0], recorded(module, 4, x, lengths)[0])
    module.eval()
    torch.testing.assert_close(recorded(module, 4, x, lengths)[0], module(x, lengths).detach())


def test_frozen_maps_have_no_gradient() -> None:
    module = Reader("LSTM", packed=False)
    module.rnn.weight_ih_l0.requires_grad_(False)
    _, gradients = recorded(module, 2, torch.randn(2, 3, 3), torch.tensor([3, 3]))
    assert gradients.keys() == {"rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"}


@pytest.mark.parametrize(("layer", "shape"), [(nn.GRU(3, 4), (5, 3)), (nn.GRUCell(3, 4), (3,))])
def test_a_sequence_without_a_batch_is_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    engine = BookKeeping(layer)
    with pytest.raises(UnsupportedModelError, match="without a batch"), engine.forward(1):
        layer(torch.randn(shape))


@pytest.mark.parametrize("make", [lambda: nn.LSTMCell(3, 4), lambda: nn.GRUCell(3, 4), lambda: nn.RNNCell(3, 4)])
def test_a_cell_of_several_rows_per_example_is_refused(make: Any) -> None:
    """Rows of two examples must not pass for two time steps of one."""
    cell = make()
    engine = BookKeeping(cell)
    with pytest.raises(UnsupportedModelError, match="leading dimension must be the batch"), engine.forward(2):
        cell(torch.randn(4, 3))


def test_a_state_of_several_rows_per_example_is_refused() -> None:
    layer = nn.GRU(3, 4)
    engine = BookKeeping(layer)
    with pytest.raises(UnsupportedModelError, match="leading dimension must be the batch"), engine.forward(2):
        layer(torch.randn(5, 2, 3), torch.randn(1, 4, 4))


def test_a_subclass_with_a_forward_of_its_own_is_another_layer() -> None:
    class Twice(nn.GRU):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    assert calls_linear(nn.GRU(3, 4)) and not calls_linear(Twice(3, 4))
