"""Recurrent layers as the linear maps that they are made of, a time step after another.

PyTorch's kernels run all of a sequence at once and hide what every time step saw. During private training ``forward``
is the same recurrence in PyTorch's own operations, with the same parameters, so that its linear maps are recorded:
that of the inputs once for all time steps, that of the states once a time step. Packed sequences are padded first, and
a sequence's state stays as it is after its end: what lies in the padding reaches nothing.

Formulas: the documentation of `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`. Source of masking instead of
packing: the state is kept where ``t`` is not below the sequence's length, so that each sequence's outputs and
gradients are those of its own recurrence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.rules.composite import Linear, register_composite
from lightning_dp.torch_api import functions_unwatched

#: A layer's state: ``h``, and ``c`` of an LSTM, each ``(B, H)``.
Hidden = tuple[Tensor, ...]
#: From the gates' part of the input ``(B, G·H)``, the state before and its linear map to the state after.
Step = Callable[[Tensor, Hidden, Callable[[Tensor], Tensor]], Hidden]


def _lstm_step(gates: Tensor, state: Hidden, of_state: Callable[[Tensor], Tensor]) -> Hidden:
    h, c = state
    i, f, g, o = (gates + of_state(h)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(gates: Tensor, state: Hidden, of_state: Callable[[Tensor], Tensor]) -> Hidden:
    (h,) = state
    (r, z, n), (r_h, z_h, n_h) = gates.chunk(3, 1), of_state(h).chunk(3, 1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (n + (z + z_h).sigmoid() * (h - n),)


def _rnn_step(
    activation: Callable[[Tensor], Tensor], gates: Tensor, state: Hidden, of_state: Callable[[Tensor], Tensor]
) -> Hidden:
    return (activation(gates + of_state(state[0])),)


def _step_of(module: nn.Module) -> Step:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return _lstm_step
    if isinstance(module, nn.GRU | nn.GRUCell):
        return _gru_step
    return partial(_rnn_step, torch.relu if module.nonlinearity == "relu" else torch.tanh)


@register_composite(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
def cell(module: Any, linear: Linear) -> Callable[..., Any]:
    """One time step: ``input`` is ``(B, d)``, the state ``(B, H)``."""
    step = _step_of(module)

    def forward(input: Tensor, hx: Any = None) -> Any:
        with functions_unwatched():
            return unwatched(input, hx)

    def unwatched(input: Tensor, hx: Any) -> Any:
        _refuse_unbatched(module, input, 2)
        if hx is None:
            zeros = input.new_zeros(len(input), module.hidden_size)
            hx = (zeros, zeros) if isinstance(module, nn.LSTMCell) else zeros
        state = hx if isinstance(hx, tuple) else (hx,)
        # As one time step, (1, B, d): rows that are not one per example are an error, and no time steps.
        gates = linear(input[None], module.weight_ih, module.bias_ih)[0]
        after = step(gates, state, lambda h: linear(h[None], module.weight_hh, module.bias_hh)[0])
        return after if isinstance(module, nn.LSTMCell) else after[0]

    return forward


@register_composite(nn.LSTM, nn.GRU, nn.RNN)
def layers(module: Any, linear: Linear) -> Callable[..., Any]:
    """All layers and directions, of sequences ``(T, B, d)``, ``(B, T, d)`` with ``batch_first``, or packed ones."""

    def forward(input: Tensor | PackedSequence, hx: Any = None) -> Any:
        with functions_unwatched():
            return unwatched(input, hx)

    def unwatched(input: Tensor | PackedSequence, hx: Any) -> Any:
        output: Tensor | PackedSequence
        if isinstance(input, PackedSequence):
            padded, finals = _run(module, linear, pad_packed_sequence(input)[0], hx, _valid(input))
            output = _packed_like(padded, input)
        else:
            _refuse_unbatched(module, input, 3)
            padded, finals = _run(module, linear, input.transpose(0, 1) if module.batch_first else input, hx)
            output = padded.transpose(0, 1) if module.batch_first else padded
        hidden = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return output, hidden if isinstance(module, nn.LSTM) else hidden[0]

    return forward


def _valid(packed: PackedSequence) -> Tensor:
    """Where the padded sequences are not padding: ``(T, B, 1)``."""
    ones = packed._replace(data=packed.data.new_ones(len(packed.data), 1))
    return pad_packed_sequence(ones)[0] > 0


def _refuse_unbatched(module: nn.Module, input: Tensor, dims: int) -> None:
    if input.dim() != dims:
        raise UnsupportedModelError(
            f"{type(module).__name__} was called with an input of {input.dim()} dimensions, without a batch: the "
            f"examples cannot be told apart. Give it one of {dims}, with the batch in its own dimension."
        )


def _initial(module: Any, input: Tensor, hx: Any) -> list[Hidden]:
    """The state ``(B, H)`` that every layer and direction begins with."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    if hx is not None:
        given = hx if isinstance(hx, tuple) else (hx,)
        return list(zip(*(part.unbind(0) for part in given), strict=True))
    h = input.new_zeros(input.shape[1], module.proj_size or module.hidden_size)
    if not isinstance(module, nn.LSTM):
        return [(h,)] * count
    return [(h, input.new_zeros(input.shape[1], module.hidden_size))] * count


def _run(
    module: Any, linear: Linear, input: Tensor, hx: Any, valid: Tensor | None = None
) -> tuple[Tensor, list[Hidden]]:
    """All layers: the last one's output ``(T, B, H · directions)``, and every layer's and direction's last state."""
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    remaining, finals = iter(_initial(module, input, hx)), []
    for layer in range(module.num_layers):
        if layer and module.dropout:
            input = F.dropout(input, module.dropout, module.training)
        outputs = []
        for suffix in suffixes:
            output, final = _direction(module, linear, f"_l{layer}{suffix}", input, next(remaining), valid)
            outputs.append(output)
            finals.append(final)
        input = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    return input, finals


def _direction(
    module: Any, linear: Linear, suffix: str, input: Tensor, state: Hidden, valid: Tensor | None
) -> tuple[Tensor, Hidden]:
    """One layer in one direction: its outputs ``(T, B, H)`` and its last state."""

    def parameter(name: str) -> Any:
        return getattr(module, f"{name}{suffix}", None)

    step, projection, times = _step_of(module), parameter("weight_hr"), range(len(input))
    of_input = linear(input, parameter("weight_ih"), parameter("bias_ih")).unbind(0)
    of_state = linear.over_time(len(times), state[0], parameter("weight_hh"), parameter("bias_hh"))
    project = None if projection is None else linear.over_time(len(times), state[0], projection)
    outputs: list[Tensor] = [state[0]] * len(times)
    for time in reversed(times) if suffix.endswith("_reverse") else times:
        before = state
        state = step(of_input[time], state, of_state)
        if project is not None:
            state = (project(state[0]), *state[1:])
        if valid is not None:
            state = tuple(torch.where(valid[time], new, old) for new, old in zip(state, before, strict=True))
        outputs[time] = state[0]
    return torch.stack(outputs), state


def _packed_like(output: Tensor, packed: PackedSequence) -> PackedSequence:
    """Outputs ``(T, B, H)``, packed as the input was."""
    if packed.sorted_indices is not None:
        output = output.index_select(1, packed.sorted_indices)
    lengths = (packed.batch_sizes[None] > torch.arange(output.shape[1])[:, None]).sum(1)
    return packed._replace(data=pack_padded_sequence(output, lengths).data)
