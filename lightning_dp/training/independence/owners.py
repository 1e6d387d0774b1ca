"""Who owns every number of a tensor: one record, nobody (public), a sum over records, or a mixture.

An *owner tensor* has the shape of the tensor that it describes, with every dimension along which owners do not change
cut to 1. Its entries are the number of a record (0 … B-1) or one of the codes below. The functions here compute owners
of results from owners of operands; which operation does what is in `lightning_dp.training.independence.operations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Depends on no record; drawn at random, and on no record; a linear sum over records; depends on several records.
PUBLIC, RANDOM, SUM, MIXED = -1, -2, -3, -4


DTYPE = torch.int16


@dataclass(frozen=True, eq=False)
class State:
    """What is known of a tensor.

    Attributes:
        owner: Owners, broadcastable to the tensor's shape, with as many dimensions.
        ragged: How many numbers a record owns depends on what records hold (a mask selected them, sequences were
            packed).
        packed: It is ragged because sequences were packed, and for no other reason.
        reordered: Its rows are in an order that records decide.
        why: Where numbers of several records met, and how, when some entry is `MIXED`; of a `SUM`, it may be empty.
        terms: ``(B,)``: how many terms of every record a `SUM` has been given.
        joined: A number of `Joined` leaves, where it is their entries, one after another; less than 0: where each
            record's begin, as a collate function counted it; 0: neither.
    """

    owner: Tensor
    ragged: bool = False
    why: str = ""
    terms: Tensor | None = None
    packed: bool = False
    reordered: bool = False
    joined: int = 0

    @property
    def is_mixed(self) -> bool:
        return bool((self.owner == MIXED).any())

    @property
    def is_sum(self) -> bool:
        return bool((self.owner == SUM).all())

    @property
    def is_owned(self) -> bool:
        """Whether every entry belongs to one record, or to none."""
        return bool((self.owner >= RANDOM).all())

    @property
    def is_public(self) -> bool:
        """Whether no entry depends on any record."""
        return bool(((self.owner == PUBLIC) | (self.owner == RANDOM)).all())

    def records(self) -> list[int]:
        """The records that own some entry."""
        return [int(i) for i in self.owner[self.owner >= 0].unique()]

    def with_owner(self, owner: Tensor) -> State:
        return replace(self, owner=compress(owner), joined=0)


def compress(owner: Tensor) -> Tensor:
    """Cuts every dimension along which owners do not change to 1; if several remain, public entries are filled in."""
    for dim in range(owner.dim()):
        if owner.shape[dim] > 1 and bool((owner == owner.narrow(dim, 0, 1)).all()):
            owner = owner.narrow(dim, 0, 1)
    for dim in varying(owner):
        if len(varying(owner)) > 1:
            owner = _filled(owner, dim)
    return owner.clone()


def _filled(owner: Tensor, dim: int) -> Tensor:
    """Public numbers beside one record's (a token put before its own) count as that record's: never too few owners.

    Only where all owners along the dimension agree then; the dimension is cut to 1.
    """
    free = owner.le(PUBLIC) & owner.ge(RANDOM)
    highest = owner.amax(dim, keepdim=True)
    lowest = owner.masked_fill(free, torch.iinfo(DTYPE).max).amin(dim, keepdim=True)
    return highest if bool(((highest == lowest) & (highest >= 0) | free.all(dim, keepdim=True)).all()) else owner


def rows(count: int, dims: int, records: int, dim: int = 0) -> Tensor:
    """Owners of ``count`` rows along one of ``dims`` dimensions, ``count / records`` consecutive ones for each."""
    owner = torch.arange(count, dtype=DTYPE) // (count // records)
    return owner.view([-1 if d == dim else 1 for d in range(dims)])


def constant(code: int, dims: int) -> Tensor:
    """One owner, or code, for all entries."""
    return torch.full([1] * dims, code, dtype=DTYPE)


def aligned(owner: Tensor, dims: int) -> Tensor:
    """An owner tensor with dimensions of size 1 put in front, as broadcasting adds them."""
    return owner.reshape([1] * (dims - owner.dim()) + list(owner.shape))


def join(one: Tensor, other: Tensor, *, linear: bool = False, scaling: bool = False) -> Tensor:
    """Owners of an elementwise function of two operands.

    Args:
        linear: It is a sum or a difference: of different records' numbers, a `SUM`.
        scaling: It is a product: a `SUM` times a public number is one.
    """
    one, other = torch.broadcast_tensors(one, other)
    free_one, free_other = one.le(PUBLIC) & one.ge(RANDOM), other.le(PUBLIC) & other.ge(RANDOM)
    clash = torch.full_like(one, SUM if linear else MIXED)
    clash = torch.where((one == MIXED) | (other == MIXED), MIXED, clash)
    result = torch.where((one == other) & (one >= 0), one, clash)
    result = torch.where(free_other, one, torch.where(free_one, other, result))
    result = torch.where(free_one & free_other, torch.minimum(one, other), result)
    return result if linear or scaling else torch.where(result == SUM, MIXED, result)


def reduce(owner: Tensor, dims: Sequence[int], *, linear: bool, keepdim: bool) -> Tensor:
    """Owners of a reduction over some dimensions; with ``linear``, a sum or a mean."""
    for dim in dims:
        if owner.shape[dim] == 1:
            continue
        free = owner.le(PUBLIC) & owner.ge(RANDOM)
        highest = owner.amax(dim, keepdim=True)
        lowest = owner.masked_fill(free, torch.iinfo(DTYPE).max).amin(dim, keepdim=True)
        mixed = (owner == MIXED).any(dim, keepdim=True)
        summed = (owner == SUM).any(dim, keepdim=True)
        same = highest == lowest  # all entries that are not free belong to one record, or are sums
        clash = torch.full_like(highest, SUM if linear else MIXED)
        result = torch.where(same, highest, clash)
        result = torch.where(summed, SUM if linear else MIXED, result)
        result = torch.where(mixed, MIXED, result)
        owner = torch.where(free.all(dim, keepdim=True), owner.amin(dim, keepdim=True), result)
    if not linear:
        owner = torch.where(owner == SUM, MIXED, owner)
    if keepdim:
        return owner
    kept = [d for d in range(owner.dim()) if d not in dims]
    return owner.reshape([owner.shape[d] for d in kept])


def varying(owner: Tensor) -> list[int]:
    """The dimensions along which owners change."""
    return [d for d in range(owner.dim()) if owner.shape[d] > 1]


def blocks(owner: Tensor) -> tuple[int, Tensor] | None:
    """Where every record's entries lie, if along one dimension and as many for each.

    Returns:
        The dimension, and positions ``(records, n)`` along it, in order; ``None`` when there is no such arrangement.
    """
    dims = varying(owner)
    if len(dims) != 1:
        return None
    along = owner.reshape(-1)
    owned = (along >= 0).nonzero().flatten()
    if not len(owned):
        return None
    ids, counts = along[owned].unique(return_counts=True)
    if len(ids) < 2 or int(counts.min()) != int(counts.max()):
        return None
    order = owned[along[owned].argsort(stable=True)]
    return dims[0], order.view(len(ids), -1)


def is_same_everywhere(tensor: Tensor, shape: Sequence[int], owner: Tensor) -> bool | None:
    """Whether a public tensor, broadcast to ``shape``, treats all records of a result with these owners alike.

    Returns:
        ``None`` when nothing can be compared: records own different numbers of entries, or owners vary along several
        dimensions, and the tensor's numbers are not all equal.
    """
    dims = varying(owner)
    sizes = list(aligned_shape(tensor.shape, len(shape)))
    if all(sizes[d] == 1 for d in dims) or int((owner >= 0).sum()) == 0 or len(owner[owner >= 0].unique()) == 1:
        return True
    placed = blocks(owner)
    if placed is None:
        return True if tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all()) else None
    dim, index = placed
    values = tensor.reshape(sizes).movedim(dim, 0)[index.flatten().to(tensor.device)].unflatten(0, index.shape)
    first = values[:1].expand_as(values)
    same = values == first
    if tensor.is_floating_point():
        same |= values.isnan() & first.isnan()
    return bool(same.all())


def aligned_shape(shape: Sequence[int], dims: int) -> list[int]:
    """A shape with dimensions of size 1 in front."""
    return [1] * (dims - len(shape)) + list(shape)
