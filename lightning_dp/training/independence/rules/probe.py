"""All other operations are run a few times by themselves, with the numbers of some records replaced."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from lightning_dp.torch_api import storage_id, tree_flatten, tree_unflatten, writes
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import MIXED, PUBLIC, RANDOM, SUM, State, compress, constant
from lightning_dp.training.independence.rules.registry import Call, written_by

# -- all others --------------------------------------------------------------------------------------------------------

#: Rounds of probing before a result that never changes is given up.
_ROUNDS = 6
#: Rounds for operations that choose among numbers: what was not chosen does not show.
_ROUNDS_OF_CHOICES = 10
_CHOICES = ("max", "min", "median", "mode", "sort", "topk", "quantile", "relu", "clamp", "threshold", "hard")
#: Of results that changed with some halves, and with too few to tell whose they are.
_PARTLY = MIXED


def probe(call: Call) -> list[State]:
    """Finds owners by running the operation on other values."""
    states = call.states()
    if any(s.is_mixed for s in states):
        return call.mixed()
    if any(bool((s.owner == SUM).any()) for s in states):
        return call.mixed(f"{call.name} of a sum over records")
    records = sorted({r for s in states for r in s.records()})
    if not records:
        return [State(constant(RANDOM, o.dim())) for o in call.outputs]
    if len(records) == 1:
        return [call.result(constant(records[0], o.dim()), o) for o in call.outputs]
    key = _key(call)
    found = call.tracer.probes().get(key)
    if found is None:
        found = call.tracer.probes()[key] = _Probe(call, records).owners()
    result = []
    for owner, output in zip(found, call.outputs, strict=True):
        if owner is None:
            result.append(call.tracer.mixed(output.dim(), f"{call.name} mixes records"))
        else:
            result.append(call.result(owner, output))
    if not any(s.is_mixed for s in result) and not _moves_with_records(call, result):
        what = f"{call.name} with numbers that differ from place to place in the batch"
        return [call.tracer.mixed(o.dim(), what) for o in call.outputs]
    return result


def _key(call: Call) -> Any:
    """What decides who owns the results: the operation, shapes, owners, public whole numbers, where public numbers are
    infinite, and what is no tensor."""
    leaves, _ = tree_flatten((call.args, call.kwargs))
    parts: list[Any] = [str(call.func)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            state = call.tracer.state(leaf)
            owner = None if state is None else (tuple(state.owner.shape), state.owner.numpy().tobytes())
            whole = not leaf.is_floating_point() and not leaf.is_complex()
            if owner is None and whole and leaf.numel() > 1:  # an index, say: its values matter
                owner = ((), _digest(leaf))
            if owner is None and not whole and leaf.numel() and not bool((ordinary := _is_ordinary(leaf)).all()):
                owner = ((), _digest(leaf.masked_fill(ordinary, 0)))  # a mask of attention: where it is infinite
            parts.append((tuple(leaf.shape), leaf.dtype, owner))
        else:
            parts.append(repr(leaf))
    return tuple(parts)


def _digest(tensor: Tensor) -> bytes:
    """The same for tensors of the same numbers, and for others never by accident."""
    values = tensor.detach().cpu()
    values = values if values.dtype == torch.bool or not values.is_floating_point() else values.double()
    return hashlib.sha256(values.numpy().tobytes()).digest()


class _Probe:
    """Runs an operation on values of its own, and sees what changes with what."""

    def __init__(self, call: Call, records: list[int]) -> None:
        self._call, self._records = call, records
        self._leaves, self._spec = tree_flatten((call.args, call.kwargs))
        self._owners = [call.owner(leaf) if call.tracer.state(leaf) is not None else None for leaf in self._leaves]
        self._generator = torch.Generator().manual_seed(len(call.tracer.probes()) + 1)
        self._bits = max(1, (len(records) - 1).bit_length())

    def owners(self) -> list[Tensor | None]:
        """Owners of every result; ``None`` where some depend on several records, or nobody could tell."""
        base = [self._other(leaf) if self._is_public_float(leaf) else leaf for leaf in self._leaves]
        changed: list[Tensor] | None = None
        least = _ROUNDS_OF_CHOICES if any(word in self._call.name for word in _CHOICES) else 1
        for round_ in range(max(_ROUNDS, least)):
            # One record's numbers may hide an effect of another's: every round starts from other values for all.
            start = [self._replaced(b, o, None) for b, o in zip(base, self._owners, strict=True)]
            reference = self._run(start)
            if reference is None:
                return [None] * len(self._call.outputs)
            seen = []
            for bit in range(self._bits):
                for value in (0, 1):
                    members = [r for i, r in enumerate(self._records) if (i >> bit) & 1 == value]
                    result = self._run(
                        [self._replaced(b, o, members) for b, o in zip(start, self._owners, strict=True)]
                    )
                    if result is None:
                        return [None] * len(self._call.outputs)
                    seen.append([_differs(a, b) for a, b in zip(reference, result, strict=True)])
            new = [torch.stack(list(column)) for column in zip(*seen, strict=True)]
            changed = new if changed is None else [a | b for a, b in zip(changed, new, strict=True)]
            answers = [self._read(c) for c in changed]
            told = all(answer is not None and bool((answer >= 0).all()) for answer in answers)
            if told and round_ + 1 >= least:
                return answers
            if all(answer is None for answer in answers):
                return answers
        # An entry that never changed counts as public if some operand has public or random entries; else it is unknown.
        partly = any(o is not None and bool((o < 0).any()) for o in self._owners)
        may_stay = [partly and (o.is_floating_point() or o.is_complex()) for o in self._call.outputs]
        return [
            None if a is None or bool((a == _PARTLY).any()) or (bool((a == PUBLIC).any()) and not ok) else a
            for a, ok in zip(answers, may_stay, strict=True)
        ]

    def _is_public_float(self, leaf: Any) -> bool:
        known = not isinstance(leaf, Tensor) or self._call.tracer.state(leaf) is not None
        return not known and (leaf.is_floating_point() or leaf.is_complex())

    def _random(self, like: Tensor) -> Tensor:
        """Other values of the same kind; whole numbers are drawn from those of the operand."""
        shape = like.shape
        if like.dtype == torch.bool:
            return torch.randint(0, 2, shape, generator=self._generator).bool().to(like.device)
        if not like.is_floating_point() and not like.is_complex():
            values = like.flatten()
            chosen = torch.randint(0, max(1, values.numel()), shape, generator=self._generator)
            return values[chosen.to(like.device)] if values.numel() else like
        kind = torch.complex64 if like.is_complex() else torch.float32
        noise = torch.randn(shape, generator=self._generator, dtype=kind).to(like.device, like.dtype)
        ordinary = like[_is_ordinary(like)]
        return noise * (1 + (ordinary.abs().mean() if ordinary.numel() else 0))

    def _other(self, leaf: Tensor) -> Tensor:
        """A public operand plus noise: one that is zero would hide what the operation does."""
        leaf = leaf.detach()
        moved = leaf + 0.3 * self._random(leaf)
        return torch.where(_is_ordinary(leaf), moved, leaf)

    def _replaced(self, leaf: Any, owner: Tensor | None, members: list[int] | None) -> Any:
        if owner is None:
            return leaf
        leaf = leaf.detach()
        random = self._random(leaf)
        if members is None:
            if leaf.is_floating_point() or leaf.is_complex():
                return leaf + 0.3 * random.where(random.isfinite(), torch.zeros_like(random))
            return leaf.clone()
        chosen = torch.isin(owner, torch.tensor(members, dtype=owner.dtype)).to(leaf.device)
        return torch.where(chosen, random, leaf)

    def _run(self, leaves: list[Any]) -> list[Tensor] | None:
        state = torch.get_rng_state()
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        try:
            torch.default_generator.manual_seed(0)
            result = self._call.func(*args, **kwargs)
        except Exception:  # values that this operation does not take
            return None
        finally:
            torch.set_rng_state(state)
        found = _results(self._call, args, kwargs, result)
        return found if len(found) == len(self._call.outputs) else None

    def _read(self, changed: Tensor) -> Tensor | None:
        """Owners from what changed, ``(2 · bits, *shape)``: along one dimension if that explains all, or by entry."""
        shape = changed.shape[1:]
        best: Tensor | None = None
        for dim in range(len(shape)):
            others = [d + 1 for d in range(len(shape)) if d != dim]
            along = changed.any(dim=tuple(others)) if others else changed
            owner = self._decode(along)
            if owner is not None and len(owner[owner >= 0].unique()) == len(self._records):
                owner = owner.view([-1 if d == dim else 1 for d in range(len(shape))])
                if bool((owner >= 0).all()):
                    return compress(owner)
                best = best if best is not None else owner
        if best is not None:
            return compress(best)
        owner = self._decode(changed.reshape(len(changed), -1))
        return None if owner is None else owner.reshape(shape)  # what has not changed yet is nobody's, for all we know

    def _decode(self, changed: Tensor) -> Tensor | None:
        """``(2 · bits, n)`` to owners ``(n,)``; `PUBLIC`: nothing changed; ``None``: several records count."""
        zero, one = changed[0::2], changed[1::2]
        if bool((zero & one).any()):
            return None
        known = (zero | one).all(0)
        powers = torch.tensor([1 << b for b in range(self._bits)])[:, None]
        index = (one * powers).sum(0)
        if bool((index >= len(self._records)).any()):
            return None
        ids = torch.tensor(self._records, dtype=owners.DTYPE)
        partly = torch.where((zero | one).any(0), _PARTLY, PUBLIC)
        return torch.where(known, ids[index], partly).to(owners.DTYPE)


def _results(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[Tensor]:
    """What an operation returns beside what it writes to; or, if that is nothing, what it has written."""
    found = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
    if not writes(call.func):
        return found
    written = written_by(call.func, args, kwargs)
    memory = {storage_id(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
    return [t for t in found if storage_id(t) not in memory] or written


def _is_ordinary(tensor: Tensor) -> Tensor:
    """Numbers that are not infinite, nor stand for that (masks of attention)."""
    return tensor.isfinite() & (tensor.abs() < 1e6)


def _differs(one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape:
        return torch.ones(one.shape, dtype=torch.bool)
    if one.is_floating_point() or one.is_complex():
        ordinary = one[_is_ordinary(one)]
        scale = float(ordinary.abs().max()) if ordinary.numel() else 1.0
        tolerance = 1e-2 if one.dtype in (torch.bfloat16, torch.float16) else 1e-5
        same = torch.isclose(one, other, rtol=tolerance, atol=tolerance * 1e-1 * scale, equal_nan=True)
        return ~same.cpu()
    return (one != other).cpu()


def _moves_with_records(call: Call, results: list[State]) -> bool:
    """Whether exchanging the places of all records exchanges those of the results, and does nothing else.

    Only a public operand that is as long as the batch could tell places apart.
    """
    placed = {id(t): owners.blocks(s.owner) for t in call.tensors() if (s := call.tracer.state(t)) is not None}
    lengths = {len(p[1].flatten()) for p in placed.values() if p is not None}
    suspicious = [t for t in call.tensors() if id(t) not in placed and t.numel() > 1 and lengths.intersection(t.shape)]
    if not suspicious:
        return True
    of_results = [owners.blocks(s.owner) for s in results]
    random = torch.Tag.nondeterministic_seeded in call.func.tags  # what it draws goes by places
    if random or any(p is None for p in [*placed.values(), *of_results]):
        call.tracer.doubt_place(call.name)
        return True

    def exchanged(tensor: Tensor, place: tuple[int, Tensor] | None) -> Tensor:
        assert place is not None
        dim, index = place
        order = torch.arange(tensor.shape[dim])
        order[index.flatten()] = index.roll(1, 0).flatten()
        return tensor.index_select(dim, order.to(tensor.device))

    leaves, spec = tree_flatten((call.args, call.kwargs))
    leaves = [exchanged(x, placed[id(x)]) if isinstance(x, Tensor) and id(x) in placed else x for x in leaves]
    args, kwargs = tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], spec)
    state = torch.get_rng_state()
    plain = tree_unflatten(
        [x.clone() if isinstance(x, Tensor) else x for x in tree_flatten((call.args, call.kwargs))[0]], spec
    )

    def run(arguments: Any) -> list[Tensor]:
        torch.default_generator.manual_seed(0)
        return _results(call, arguments[0], arguments[1], call.func(*arguments[0], **arguments[1]))

    try:
        moved, first = run((args, kwargs)), run(plain)
    finally:
        torch.set_rng_state(state)
    pairs = zip(first, moved, of_results, strict=True)
    return not any(bool(_differs(exchanged(f, place), m).any()) for f, m, place in pairs)
