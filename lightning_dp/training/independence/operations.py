"""What every operation does to owners: rules by kind of operation, and a probe for all others.

An elementwise operation joins the owners of its operands; one that moves data moves owners; a reduction joins along
dimensions. These are proofs: they follow from what the operation is. Any other operation (layer normalisation,
attention, a custom operation) is run a few times by itself, with all records of one half replaced by other values, for
halvings of which each pair of records is separated by one: an entry of the result that changes when some half changes,
and never when the other does, belongs to a record of the former. Floating-point values are drawn by the probe and are
not those of the data; whole numbers are drawn from the operand's own. An operation that mixes records for rare values
only is not found.

To add a rule: write a function ``(call) -> list of states`` and register it for its operations' names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.torch_api import READ_NUMBER, operation_name, storage_id, tree_flatten, tree_unflatten, writes
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import PUBLIC, RANDOM, State, aligned, constant
from lightning_dp.training.independence.rules.elementwise import is_pointwise, pointwise
from lightning_dp.training.independence.rules.indexing import ONE_PLACE
from lightning_dp.training.independence.rules.probe import probe
from lightning_dp.training.independence.rules.registry import RULES, Call, names_in, written_by

if TYPE_CHECKING:
    from lightning_dp.training.independence.tracer import RowTracer


#: Results that depend on the shapes and data types of their arguments only; these count as public.
_PUBLIC = frozenset(
    names_in(
        "empty_like zeros_like ones_like full_like new_zeros new_ones new_empty new_full new_empty_strided empty "
        "zeros ones full arange empty_strided sym_size sym_stride sym_numel is_same_size"
    )
)


_RANDOM_LIKE = frozenset(names_in("rand_like randn_like randint_like randn rand randint randperm normal_functional"))


_COMPARISONS = frozenset(names_in("eq ne lt le gt ge isin"))


#: A comparison with more public numbers than these is not noted.
_COMPARED = 4


#: In-place operations that overwrite whatever was there before.
_OVERWRITES = frozenset(names_in("fill zero normal uniform random exponential geometric cauchy log_normal"))


def follow(tracer: RowTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation, and works out who owns its results."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    written = written_by(func, args, kwargs)
    known = [tracer.state(t) for t in tensors]
    name = operation_name(func)
    base = name.rstrip("_") if written and name.endswith("_") else name
    if func is READ_NUMBER:
        tracer.read(tensors[0])
    if not any(s is not None for s in known):
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            for output in written or [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]:
                tracer.write(output, State(constant(RANDOM, output.dim())))
        elif tracer.opaque and name in ("lift_fresh", "_to_copy") and isinstance(result, Tensor) and result.dim():
            # Made of Python's data, which may be what the batch holds besides tensors.
            count = len(result)
            if count and count % tracer.examples == 0:
                tracer.own(result, owners.rows(count, result.dim(), tracer.examples))
        return result
    if base in _COMPARISONS:
        _note_comparison(tracer, base, args)
    # What an operation overwrites is needed to work out, and to probe, what it does.
    before = {id(t): t.detach().clone() for t in written if tracer.state(t) is not None or base not in _OVERWRITES}
    old = {id(t): tracer.state(t) for t in written}
    result = func(*args, **kwargs)
    outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
    if written:
        memory = {storage_id(t) for t in tensors if t.layout == torch.strided}
        extra = [o for o in outputs if o.layout != torch.strided or storage_id(o) not in memory]
        outputs = extra or written
        leaves = [before.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for tensor_id, copy in before.items():
            if (state := old[tensor_id]) is not None:
                tracer.set(copy, state)
            elif extra and torch.Tag.nondeterministic_seeded in func.tags:  # where it puts what it draws
                tracer.set(copy, State(constant(RANDOM, copy.dim())))
        args, kwargs = tree_unflatten(leaves, spec)
    else:
        memory = {storage_id(t) for t in tensors if t.layout == torch.strided}
        fresh = [o for o in outputs if o.layout != torch.strided or storage_id(o) not in memory]
        if not fresh:  # views, and reads
            if not outputs:
                _read(tracer, base)
            return result
        outputs = fresh
    call = Call(tracer, func, base, tuple(args), dict(kwargs), outputs)
    states = _apply(call)
    if written and outputs is not written:  # results beside what it writes to
        for target in written:
            tracer.write(target, tracer.mixed(target.dim(), f"what {base} writes"))
        written = []
    memory = set()
    for output, state in zip(outputs, states, strict=True):
        if written:
            state = _checked_write(call, old[id(output)], state)
            tracer.write(output, state)
        elif not state.is_public or bool((state.owner == RANDOM).any()):
            shares = output.layout == torch.strided and storage_id(output) in memory
            (tracer.write if shares else tracer.set)(output, state)
        if output.layout == torch.strided:
            memory.add(storage_id(output))
    return result


def _note_comparison(tracer: RowTracer, name: str, args: tuple[Any, ...]) -> None:
    one, other = args[:2]
    if isinstance(other, Tensor):
        if tracer.state(other) is not None or other.numel() > _COMPARED:
            return
        values = other.detach().flatten().tolist()
    else:
        values = [other]
    for value in values if isinstance(one, Tensor) else ():
        tracer.compared(name, one, value)


def _checked_write(call: Call, old: State | None, new: State) -> State:
    """The state after a write: mixed, where public numbers overwrite those of some records and not of others."""
    if old is None or not new.is_public or not old.is_owned:
        return new
    of = set(old.records())
    if of and len(of) < call.tracer.examples and call.name in (*_OVERWRITES, "copy"):
        return call.tracer.mixed(new.owner.dim(), ONE_PLACE)
    return new


def _read(tracer: RowTracer, name: str) -> None:
    if name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"):
        called = {"_local_scalar_dense": "a number is read (.item(), float(), if …)", "equal": "torch.equal()"}
        tracer.decide(called.get(name, name))


def _apply(call: Call) -> list[State]:
    if call.name in _PUBLIC:
        return [State(constant(PUBLIC, o.dim())) for o in call.outputs]
    if call.name in _RANDOM_LIKE or (call.name in _OVERWRITES and writes(call.func)):
        code = PUBLIC if call.name in ("fill", "zero") else RANDOM
        source = call.argument("value")
        if isinstance(source, Tensor):
            return [call.result(aligned(call.state(source).owner, o.dim()), o) for o in call.outputs]
        return [State(constant(code, o.dim())) for o in call.outputs]
    function = RULES.get(call.name)
    if function is not None:
        return function(call)
    if any(o.layout != torch.strided for o in call.outputs) or any(t.layout != torch.strided for t in call.tensors()):
        return call.mixed(f"a sparse tensor ({call.name})")
    if is_pointwise(call.func, call.name):
        return pointwise(call)
    return probe(call)
