"""Indexing: what is read where records say, and what is written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import MIXED, PUBLIC, State, compress, constant, join
from lightning_dp.training.independence.rules.registry import Call, aten, rule


def _is_in_order(owner: Tensor) -> bool:
    """Whether records follow one another as in the batch."""
    placed = owners.blocks(compress(owner))
    return placed is not None and bool((placed[1][1:] > placed[1][:-1]).all())


def indexed_state(call: Call, tensor: Tensor, index: Tensor, dim: int, gathered: Tensor, index_owner: Tensor) -> State:
    """Owners of what an index chose: those of the entries, and of the index.

    An index that depends on a record may point anywhere along its dimension: only where all of that belongs to that
    record, or to nobody, is the result its own. Two exceptions are noted as decisions: an index that picks its own
    record's rows (from `nonzero`), and a permutation of all rows.
    """
    [output] = call.outputs
    state, of_index = call.state(tensor), call.state(index)
    if not of_index.is_public and state.owner.shape[dim] > 1:
        everything = _is_order(index.flatten(), tensor.shape[dim])
        own = bool(((index_owner == gathered) | (gathered < 0)).all()) and of_index.ragged
        if everything and not of_index.is_owned:
            call.tracer.decide("rows are put into another order, by what records hold")
            ordered = call.result(gathered, output, ragged=of_index.ragged)
            return replace(ordered, reordered=not (state.reordered and _is_in_order(gathered)))
        if own:
            call.tracer.decide("rows are chosen by what records hold")
        else:
            return call.tracer.mixed(output.dim(), "rows of the batch are looked up by what records hold")
    # Along the dimension of the records, the result has as many rows as the index.
    ragged = of_index.ragged or (state.ragged and state.owner.shape[dim] == 1)
    return call.result(join(gathered, index_owner), output, ragged=ragged)


@rule("index_select")
def index_select(call: Call) -> list[State]:
    tensor, dim, index = call.args[:3]
    dim = dim % max(tensor.dim(), 1)
    gathered = call.owner(tensor).index_select(dim, index.cpu())
    along = call.owner(index).view([-1 if d == dim else 1 for d in range(tensor.dim())])
    return [indexed_state(call, tensor, index, dim, gathered, along.expand(gathered.shape))]


@rule("gather", "take_along_dim")
def gather(call: Call) -> list[State]:
    tensor, dim, index = call.args[:3]
    dim = dim % max(tensor.dim(), 1)
    gathered = call.owner(tensor).gather(dim, index.cpu())
    return [indexed_state(call, tensor, index, dim, gathered, call.owner(index))]


@rule("embedding")
def embedding(call: Call) -> list[State]:
    table, index = call.args[:2]
    gathered = call.owner(table)[index.cpu()]
    own = call.owner(index)[..., None].expand(gathered.shape)
    return [indexed_state(call, table, index, 0, gathered, own)]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[State]:
    """A bag is its entries', and its weights': where it begins is public, or what a collate function has counted.

    Such offsets depend on the lengths of earlier records; they are looked at together with what they were counted for
    alone: each of these bags is one record's own entries.
    """
    table, index, offsets = call.args[:3]
    weights = call.argument("per_sample_weights")
    output = call.outputs[0]
    joined = {call.state(given).joined for given in (index, weights) if given is not None}
    counted = call.state(offsets).joined < 0 and joined == {-call.state(offsets).joined}
    if not call.state(table).is_public or not (call.state(offsets).is_public or counted):
        return call.mixed("bags that begin where records decide")
    along = call.owner(index).flatten()
    if weights is not None and not counted:
        along = join(along, call.owner(weights).flatten())
    bounds = [*offsets.tolist(), len(along)][: len(output) + 1]
    if not counted:  # public numbers must do the same with every record
        uneven = len({end - start for start, end in pairwise(bounds)}) > 1
        weighted = weights is not None and call.state(weights).is_public
        if uneven or (weighted and not owners.is_same_everywhere(weights.flatten(), along.shape, along)):
            call.tracer.doubt_place(call.name)
    bags = [
        owners.reduce(along[start:end], [0], linear=False, keepdim=True) if end > start else constant(PUBLIC, 1)
        for start, end in pairwise(bounds)
    ]
    owner = torch.cat(bags) if bags else constant(PUBLIC, 1)
    if counted:
        own = torch.arange(len(output), dtype=owner.dtype)
        if not bool(((owner == own) | (owner == PUBLIC)).all()):
            return call.mixed("bags that hold entries of several records")
        owner = own
    state = call.result(owner.view([-1, 1]), output, ragged=False)
    # What else it returns is for its backward pass.
    return [state, *(State(constant(MIXED, o.dim()), why=state.why) for o in call.outputs[1:])]


def _advanced(call: Call, tensor: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Tensor]:
    """The indices as integers, and owners of the whole index, broadcastable to the shape of the result."""
    expanded: list[Tensor | None] = []
    owner_parts: list[Tensor] = []
    for index in indices:
        if index is None:
            expanded.append(None)
        elif index.dtype in (torch.bool, torch.uint8):
            own = call.owner(index)[index.cpu().bool()]
            for part in index.cpu().nonzero(as_tuple=True):
                expanded.append(part)
                owner_parts.append(own)
        else:
            expanded.append(index.cpu())
            owner_parts.append(call.owner(index))
    joint = owner_parts[0]
    for part in owner_parts[1:]:
        joint = join(joint, part)
    given = [d for d, index in enumerate(expanded) if index is not None]
    adjacent = given == list(range(given[0], given[0] + len(given)))
    rest = tensor.dim() - len(expanded) + sum(1 for i in expanded[given[-1] + 1 :] if i is None)
    before = given[0] if adjacent else 0
    after = rest if adjacent else tensor.dim() - len(given)
    if adjacent:
        after = tensor.dim() - given[-1] - 1
    joint = joint.reshape([1] * before + list(joint.shape) + [1] * after)
    return expanded, joint


@rule("index")
def index(call: Call) -> list[State]:
    tensor, indices = call.args[:2]
    [output] = call.outputs
    state = call.state(tensor)
    expanded, index_owner = _advanced(call, tensor, indices)
    gathered = aten.index(call.owner(tensor).contiguous(), expanded)
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    tainted = [i for i in indices if i is not None and not call.state(i).is_public]
    ragged = state.ragged
    if any(not call.state(mask).is_public for mask in masks):
        call.tracer.decide("rows are chosen by a mask")
        ragged = True
        if any(call.state(mask).is_mixed for mask in masks):
            return call.mixed()
    dim = -1
    for item in indices:
        if item is None:
            dim += 1
            continue
        mask = item.dtype in (torch.bool, torch.uint8)
        covered = range(dim + 1, dim + 1 + (item.dim() if mask else 1))
        dim = covered[-1]
        varies = any(state.owner.shape[d] > 1 for d in covered)
        if mask or not varies or call.state(item).is_public:
            continue
        alone = len(tainted) == 1 and item.dim() == 1
        own = bool(((index_owner.expand(gathered.shape) == gathered) | (gathered < 0)).all())
        if alone and not call.state(item).is_owned and _is_order(item, tensor.shape[dim]):
            call.tracer.decide("rows are put into another order, by what records hold")
            back = state.reordered and _is_in_order(gathered)
            return [replace(call.result(gathered, output), reordered=not back)]
        if own and call.state(item).ragged:
            call.tracer.decide("rows are chosen by what records hold")
            ragged = True
        else:
            return [call.tracer.mixed(output.dim(), "rows of the batch are looked up by what records hold")]
    ragged |= any(call.state(i).ragged for i in tainted)
    what = "rows of some records are looked up by others"
    return [call.result(join(gathered, index_owner), output, ragged=ragged, what=what)]


def _is_order(index: Tensor, size: int) -> bool:
    """Whether an index takes every row, each as often as the others."""
    if index.is_floating_point() or not len(index) or len(index) % size:
        return False
    return bool((torch.bincount(index.cpu(), minlength=size) == len(index) // size).all())


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> list[State]:
    """``tensor[indices] = values``: where a record says where to write, it owns all that it could have written to."""
    tensor, indices, values = call.args[:3]
    [output] = call.outputs
    state, dims = call.state(tensor), tensor.dim()
    owner = call.owner(tensor).clone()
    expanded, index_owner = _advanced(call, tensor, indices)
    new = join(call.owner(values) if values.dim() else call.state(values).owner, index_owner)
    anywhere: list[int] = []
    dim = -1
    for item in indices:
        if item is None:
            dim += 1
            continue
        if _is_mask(item):
            if not call.state(item).is_public:
                if indices[0] is not item:
                    return call.mixed("a mask on other dimensions than the first")
                # Where nothing is written depends on the mask as well.
                along = call.owner(item).reshape(list(item.shape) + [1] * (dims - item.dim()))
                owner = join(owner, along).expand(tensor.shape).contiguous()
                call.tracer.decide("rows are written where a mask says so")
            dim += item.dim()
            continue
        dim += 1
        if call.state(item).is_public:
            continue
        if call.state(item).ragged:  # from `nonzero`: the place of its own mask
            call.tracer.decide("rows are written where records say")
        elif state.owner.shape[dim] == 1:
            anywhere.append(dim)
        else:
            return [call.tracer.mixed(output.dim(), "rows of the batch are written where records say")]
    before = owner.clone()
    place = aten.index(owner, expanded)
    new = torch.broadcast_to(new, place.shape)
    if bool(call.argument("accumulate", False)):
        new = join(place, new, linear=True)
        given = torch.stack(torch.broadcast_tensors(*[i for i in expanded if i is not None])).flatten(1)
        if given.unique(dim=1).shape[1] < given.shape[1]:
            return call.mixed("several numbers are added up in one place")
    elif bool(((place >= 0) & (new >= 0) & (place != new)).any()):
        return [call.tracer.mixed(output.dim(), "a record's rows are overwritten with another's")]
    chosen: Any = tuple(slice(None) if i is None else i for i in expanded)
    owner.index_put_(chosen, new)
    if not any(_is_mask(i) for i in indices if i is not None) and _takes_places(call, before, owner):
        return [call.tracer.mixed(output.dim(), ONE_PLACE)]
    for dim in anywhere:
        owner = owners.reduce(owner, [dim], linear=False, keepdim=True).expand(tensor.shape)
    what = "records write where others could have written"
    return [call.result(owner, output, ragged=state.ragged, what=what)]


ONE_PLACE = "one place of the batch is overwritten, whichever record is there"


def _takes_places(call: Call, before: Tensor, after: Tensor) -> bool:
    """Whether something public overwrites what some records own, and not what others do."""
    lost = before[(before >= 0) & (after < 0)].unique()
    return 0 < len(lost) < call.tracer.examples


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
def scatter(call: Call) -> list[State]:
    """Writes along one dimension: an entry there depends on every record that could have written to it."""
    tensor, dim, index = call.args[:3]
    dim = dim % max(tensor.dim(), 1)
    source = call.argument("src", call.argument("source"))
    if source is None:
        source = call.argument("value")
    [output] = call.outputs
    state, of_index = call.state(tensor), call.state(index)
    lined = of_index.owner
    if index.dim() != tensor.dim():
        lined = lined.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
    parts = [state.owner, lined]
    if isinstance(source, Tensor):
        parts.append(call.state(source).owner if source.dim() else constant(PUBLIC, tensor.dim()))
    if all(p.shape[dim] == 1 for p in parts) and all(
        p.shape[d] in (1, tensor.shape[d]) for p in parts for d in range(tensor.dim())
    ):
        owner = parts[0]
        for part in parts[1:]:
            owner = join(owner, part)
        return [call.result(owner, output, what=f"{call.name} of several records into one place")]
    if of_index.is_public and call.name in ("scatter", "index_copy"):
        before = call.owner(tensor)
        if not isinstance(source, Tensor) or not source.dim():
            owner = before.clone().scatter_(dim, index.cpu(), PUBLIC)
        elif call.name == "scatter":
            owner = before.clone().scatter_(dim, index.cpu(), call.owner(source).contiguous())
        else:
            owner = before.clone().index_copy_(dim, index.cpu(), call.owner(source).contiguous())
        if _takes_places(call, before, owner):
            return [call.tracer.mixed(output.dim(), ONE_PLACE)]
        return [call.result(owner, output)]
    return [call.tracer.mixed(output.dim(), f"{call.name} of several records")]


@rule("nonzero", "argwhere")
def nonzero(call: Call) -> list[State]:
    """Indices of the entries that are set: as many as records say, each of the record whose entry it is."""
    mask = call.args[0]
    if call.state(mask).is_mixed:
        return call.mixed()
    call.tracer.decide("rows are chosen by what records hold (nonzero)")
    own = call.owner(mask)[mask.cpu().bool()][:, None]
    return [State(compress(own), ragged=True)]


@rule("masked_select")
def masked_select(call: Call) -> list[State]:
    _, mask = torch.broadcast_tensors(*call.args[:2])
    own, of_mask = torch.broadcast_tensors(call.owner(call.args[0]), call.owner(call.args[1]))
    if not call.state(call.args[1]).is_public:
        call.tracer.decide("rows are chosen by a mask")
    chosen = mask.cpu().bool()
    return [call.result(join(own[chosen], of_mask[chosen]), call.outputs[0], ragged=True)]
