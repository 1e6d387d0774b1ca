"""Operations that move data: owners move with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.torch_api import tree_flatten, tree_unflatten
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import PUBLIC, State, constant
from lightning_dp.training.independence.rules.registry import Call, aten, names_in, rule

# -- data that moves ---------------------------------------------------------------------------------------------------


def moved_states(call: Call, *also: Tensor) -> list[State]:
    """Owners go where the numbers go: the operation is run on the owners of its first tensor."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    first = next(t for t in call.tensors())

    def owners_of(leaf: Any) -> Any:
        # Padding with zeros belongs to nobody: owners are shifted, so that 0 is free.
        return call.owner(leaf).float().add(_SHIFT) if isinstance(leaf, Tensor) and leaf is first else leaf

    args, kwargs = tree_unflatten([owners_of(leaf) for leaf in leaves], spec)
    moved = call.func(*args, **kwargs)
    outputs = [t for t in tree_flatten(moved)[0] if isinstance(t, Tensor)]
    back = [torch.where(m == 0, PUBLIC, m - _SHIFT).to(owners.DTYPE) for m in outputs]
    return [call.result(m, o) for m, o in zip(back, call.outputs, strict=True)]


_SHIFT = 10


@rule(*names_in("repeat im2col pixel_shuffle pixel_unshuffle channel_shuffle unfold_copy reflection_pad1d"))
def rearranged(call: Call) -> list[State]:
    if call.state(call.args[0]).is_mixed:
        return call.mixed()
    return moved_states(call)


@rule("reflection_pad2d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "reflection_pad3d")
def padded_by_itself(call: Call) -> list[State]:
    return rearranged(call)


@rule("constant_pad_nd")
def padded(call: Call) -> list[State]:
    tensor, padding = call.args[0], call.args[1]
    moved = aten.constant_pad_nd(call.owner(tensor).float().contiguous(), padding, float(PUBLIC))
    state = call.state(tensor)
    if len(owners.varying(state.owner)) == 1:  # padding of a record's own rows is its own
        dim = owners.varying(state.owner)[0]
        index = tensor.dim() - 1 - dim
        if 2 * index >= len(padding) or not any(padding[2 * index : 2 * index + 2]):
            return [call.result(state.owner, call.outputs[0])]
    return [call.result(moved.to(owners.DTYPE), call.outputs[0])]


@rule("cat", "stack", "_cat", "concat")
def joined(call: Call) -> list[State]:
    parts, dim = call.args[0], call.argument("dim", 0)
    [output] = call.outputs
    if call.name == "cat":
        parts = [p for p in parts if p.dim() == output.dim()]
    owner = call.func([call.owner(p) for p in parts], dim)
    result = call.result(owner, output)
    return [replace(result, packed=False)]


@rule(
    "masked_scatter",
    "unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
)
def by_value(call: Call) -> list[State]:
    call.tracer.decide(f"{call.name}: a shape depends on what records hold")
    return call.mixed(call.name)


@rule("searchsorted", "bucketize")
def bucketized(call: Call) -> list[State]:
    """Where numbers lie among boundaries, which must be public."""
    values, boundaries = call.args[:2] if call.name == "bucketize" else call.args[1::-1]
    if not isinstance(values, Tensor) or not call.state(boundaries).is_public:
        return call.mixed(f"{call.name} among numbers of records")
    return [call.result(call.state(values).owner, call.outputs[0])]


@rule("_pack_padded_sequence")
def packed(call: Call) -> list[State]:
    tensor, lengths, batch_first = call.args[:3]
    call.tracer.decide("sequences are packed by their lengths")
    moved, _ = call.func(call.owner(tensor).float().contiguous(), lengths, batch_first)
    data, sizes = call.outputs
    return [
        replace(call.result(moved.to(owners.DTYPE), data, ragged=True), packed=True, ragged=True),
        State(constant(PUBLIC, sizes.dim())),  # noted as a decision above
    ]


@rule("_pad_packed_sequence")
def unpacked(call: Call) -> list[State]:
    data, sizes, batch_first, _, length = call.args[:5]
    moved, _ = call.func(call.owner(data).float().contiguous(), sizes, batch_first, float(PUBLIC), length)
    output, lengths = call.outputs
    owner = moved.to(owners.DTYPE)
    dim = 0 if batch_first else 1
    others = [d for d in range(owner.dim()) if d != dim]
    per_record = owner.amax(others, keepdim=True)  # padding belongs to the record that it follows
    return [call.result(per_record, output, ragged=False), State(constant(PUBLIC, lengths.dim()))]
