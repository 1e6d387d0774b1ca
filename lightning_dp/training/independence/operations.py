"""What every operation does to owners: rules by kind of operation, and a probe for all others.

An elementwise operation joins the owners of its operands; one that moves data moves owners; a reduction joins along
dimensions. These are proofs: they follow from what the operation is. Any other operation (a convolution, a
normalisation, attention, a custom operation) is run a few times by itself, with all records of one half replaced by
other values, for halvings of which each pair of records is separated by one: an entry of the result that changes when
some half changes, and never when the other does, belongs to a record of the former. Values are those of the probe, not
of the data, so rare data hide nothing.

To add a rule: write a function ``(call) -> list of states`` and register it for its operations' names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import (
    MIXED,
    PUBLIC,
    RANDOM,
    SUM,
    State,
    aligned,
    compress,
    constant,
    join,
)

if TYPE_CHECKING:
    from lightning_dp.training.independence.tracer import RowTracer


aten = torch.ops.aten


@dataclass(eq=False)
class Call:
    """One operation, as it was called, and what it returned."""

    tracer: RowTracer
    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: Tensors among the results.
    outputs: list[Tensor]

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
        if name in self.kwargs:
            return self.kwargs[name]
        for index, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if index < len(self.args):
                    return self.args[index]
                return argument.default_value if argument.has_default_value() else default
        return default

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]

    def state(self, tensor: Any) -> State:
        """The state of an operand, public ones as well."""
        found = self.tracer.state(tensor)
        return found or State(constant(PUBLIC, tensor.dim() if isinstance(tensor, Tensor) else 0))

    def owner(self, tensor: Any) -> Tensor:
        """Owners of all entries of an operand, written out."""
        return self.state(tensor).owner.expand(tensor.shape)

    def states(self) -> list[State]:
        return [s for t in self.tensors() if (s := self.tracer.state(t)) is not None]

    def mixed(self, what: str = "") -> list[State]:
        """Results that depend on several records."""
        states = self.states()
        ragged = any(s.ragged for s in states)
        why = next((s.why for s in states if s.why), "") or self.tracer.mixed(0, what or self.name).why
        return [State(constant(MIXED, o.dim()), ragged, why) for o in self.outputs]

    def result(self, owner: Tensor, output: Tensor, ragged: bool | None = None, what: str = "") -> State:
        """A state for a result, with the reason where it is mixed."""
        states = self.states()
        ragged = any(s.ragged for s in states) if ragged is None else ragged
        packed = ragged and all(s.packed for s in states if s.ragged)
        owner = compress(aligned(owner, output.dim()))
        if packed and self._has_one_row_each(owner):  # the last state of every packed sequence
            ragged = packed = False
        why, terms = "", None
        if bool((owner == MIXED).any()):
            why = next((s.why for s in states if s.why), "") or self.tracer.mixed(0, what or self.name).why
        if bool((owner == SUM).any()):
            known = [s.terms for s in states if s.terms is not None]
            terms = torch.stack(known).sum(0) if known else None
        return State(owner, ragged, why, terms, packed, any(s.reordered for s in states))

    def _has_one_row_each(self, owner: Tensor) -> bool:
        along = owner.flatten()
        count = self.tracer.examples
        return len(owners.varying(owner)) == 1 and len(along) == count and len(along.unique()) == count


Rule = Callable[[Call], list[State]]


_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operations of these names (without a trailing underscore)."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _names(text: str) -> list[str]:
    return text.split()


#: Elementwise operations that PyTorch does not tag as such.
_POINTWISE = frozenset(
    _names(
        "copy _to_copy floor_divide hardswish special_erf masked_fill rrelu_with_noise log_sigmoid_forward prelu lerp "
        "native_dropout dropout alpha_dropout feature_dropout bernoulli special_erfinv erfinv sgn conj _conj imag real "
        "_copy_from clone _unsafe_view lift_fresh_copy _reshape_copy _fused_dropout masked_scale "
        "_log_softmax_backward_like square __and__ __or__ __xor__ exponential normal uniform _prelu_kernel"
    )
)


#: Elementwise operations that are linear, or scale by their second operand.
_LINEAR = frozenset(_names("add sub rsub copy _to_copy clone neg _unsafe_view positive detach alias lift_fresh_copy"))


_SCALING = frozenset(_names("mul div true_divide multiply divide"))


#: Results that depend on the form of their arguments only.
_PUBLIC = frozenset(
    _names(
        "empty_like zeros_like ones_like full_like new_zeros new_ones new_empty new_full new_empty_strided empty "
        "zeros ones full arange empty_strided sym_size sym_stride sym_numel is_same_size"
    )
)


_RANDOM_LIKE = frozenset(_names("rand_like randn_like randint_like randn rand randint randperm normal_functional"))


_COMPARISONS = frozenset(_names("eq ne lt le gt ge isin"))


#: Public numbers that records are compared with at once, at most.
_COMPARED = 4


#: Written to, whatever was there before.
_OVERWRITES = frozenset(_names("fill zero normal uniform random exponential geometric cauchy log_normal"))


def _is_pointwise(func: Any, name: str) -> bool:
    if name in _POINTWISE or torch.Tag.pointwise in func.tags:
        return True
    functional = getattr(aten, name, None) if func.namespace == "aten" else None
    overload = getattr(functional, func._overloadname, None) if functional is not None else None
    return overload is not None and torch.Tag.pointwise in overload.tags


def follow(tracer: RowTracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation, and works out who owns its results."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    written = _written(func, args, kwargs)
    known = [tracer.state(t) for t in tensors]
    name = func._opname if hasattr(func, "_opname") else func.overloadpacket.__name__
    base = name.rstrip("_") if written and name.endswith("_") else name
    if base == "_local_scalar_dense":
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
        outputs = written
        leaves = [before.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for tensor_id, copy in before.items():
            if (state := old[tensor_id]) is not None:
                tracer.set(copy, state)
        args, kwargs = tree_unflatten(leaves, spec)
    else:
        memory = {t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided}
        fresh = [o for o in outputs if o.layout != torch.strided or o.untyped_storage()._cdata not in memory]
        if not fresh:  # views, and reads
            if not outputs:
                _read(tracer, base)
            return result
        outputs = fresh
    call = Call(tracer, func, base, tuple(args), dict(kwargs), outputs)
    states = _apply(call)
    for output, state in zip(outputs, states, strict=True):
        if written:
            state = _checked_write(call, old[id(output)], state)
            tracer.write(output, state)
        elif not state.is_public or bool((state.owner == RANDOM).any()):
            tracer.set(output, state)
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


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if index >= len(args) else args[index]
            found += [value] if isinstance(value, Tensor) else [v for v in value or [] if isinstance(v, Tensor)]
    return found


def _checked_write(call: Call, old: State | None, new: State) -> State:
    """What a write of something public over some records' numbers means: their place is treated in its own way."""
    if old is None or not new.is_public or not old.is_owned:
        return new
    of = set(old.records())
    if of and len(of) < call.tracer.examples and call.name in (*_OVERWRITES, "copy"):
        return call.tracer.mixed(new.owner.dim(), _ONE_PLACE)
    return new


def _read(tracer: RowTracer, name: str) -> None:
    if name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"):
        called = {"_local_scalar_dense": "a number is read (.item(), float(), if …)", "equal": "torch.equal()"}
        tracer.decide(called.get(name, name))


def _apply(call: Call) -> list[State]:
    if call.name in _PUBLIC:
        return [State(constant(PUBLIC, o.dim())) for o in call.outputs]
    if call.name in _RANDOM_LIKE or (call.name in _OVERWRITES and call.func._schema.is_mutable):
        code = PUBLIC if call.name in ("fill", "zero") else RANDOM
        source = call.argument("value")
        if isinstance(source, Tensor):
            return [call.result(aligned(call.state(source).owner, o.dim()), o) for o in call.outputs]
        return [State(constant(code, o.dim())) for o in call.outputs]
    function = _RULES.get(call.name)
    if function is not None:
        return function(call)
    if any(o.layout != torch.strided for o in call.outputs) or any(t.layout != torch.strided for t in call.tensors()):
        return call.mixed(f"a sparse tensor ({call.name})")
    if _is_pointwise(call.func, call.name):
        return pointwise(call)
    return probe(call)


# -- elementwise ---------------------------------------------------------------------------------------------------


def pointwise(call: Call) -> list[State]:
    """Entry i of the result depends on entry i of every operand, as broadcast."""
    linear, scaling = call.name in _LINEAR, call.name in _SCALING
    tensors = call.tensors()
    if call.name == "lerp":  # with a number as its weight
        linear = len(tensors) == 2
    results: list[State] = []
    for output in call.outputs:
        dims = output.dim()
        operands = [t for t in tensors if t.dim() <= dims and _broadcasts(t.shape, output.shape)]
        if any(call.tracer.state(t) is not None for t in tensors if not _broadcasts(t.shape, output.shape)):
            return call.mixed(f"{call.name} with an operand of another shape")
        if call.name == "copy":
            operands = [t for t in tensors[1:] if _broadcasts(t.shape, output.shape)]
        owner = constant(PUBLIC, dims)
        states = [call.state(t) for t in operands]
        for index, state in enumerate(states):
            summed = bool((state.owner == SUM).any())
            if summed and scaling and call.name != "mul" and index > 0:  # a quotient by a sum
                owner = join(owner, torch.full_like(aligned(state.owner, dims), MIXED))
                continue
            owner = join(owner, aligned(state.owner, dims), linear=linear, scaling=scaling)
        if not linear and not scaling and bool((owner == SUM).any()):
            owner = torch.where(owner == SUM, MIXED, owner)
        made_sum = bool((owner == SUM).any()) and not any(bool((s.owner == SUM).any()) for s in states)
        if made_sum and any(s.ragged for s in states):
            made_sum = True
        what = f"numbers of several records meet in {call.name}"
        if any(bool((s.owner == SUM).any()) for s in states):
            what = f"{call.name} of a sum over records is no longer a sum of one term per record"
        state = call.result(owner, output, what=what)
        if bool((owner == SUM).any()):
            terms = [_terms(call, s) for s in states if not s.is_public]
            met = state.why or next((s.why for s in states if s.why), "")
            met = met or call.tracer.mixed(0, f"numbers of several records meet in {call.name}").why
            state = replace(state, terms=torch.stack(terms).sum(0), why=met)
        results.append(_placed(call, operands, output, state))
    return results


def _terms(call: Call, state: State) -> Tensor:
    """How many terms of each record a state brings into a sum."""
    if state.terms is not None:
        return state.terms
    counts = torch.zeros(call.tracer.examples)
    owned = state.owner[state.owner >= 0].long()
    return counts.index_add_(0, owned, torch.ones(len(owned)))


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    if len(shape) > len(to):
        return False
    return all(a in (1, b) for a, b in zip(owners.aligned_shape(shape, len(to)), to, strict=True))


def _placed(call: Call, operands: list[Tensor], output: Tensor, state: State) -> State:
    """Refuses a public operand that treats records differently according to their place in the batch."""
    if not owners.varying(state.owner) or not bool((state.owner >= 0).any()):
        return state
    for operand in operands:
        own = call.tracer.state(operand)
        if operand.numel() <= 1 or (own is not None and not bool((own.owner == PUBLIC).all())):
            continue
        same = owners.is_same_everywhere(operand, output.shape, state.owner)
        if same is None:
            call.tracer.doubt_place(call.name)
        elif not same:
            what = f"{call.name} with numbers that differ from place to place in the batch"
            return call.tracer.mixed(output.dim(), what)
    return state


@rule(
    "mse_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "smooth_l1_loss",
    "huber_loss",
    "soft_margin_loss",
)
def elementwise_loss(call: Call) -> list[State]:
    """An elementwise loss, then perhaps a sum or a mean."""
    [output] = call.outputs
    reduction = call.argument("reduction", 1)
    tensors = call.tensors()
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    whole = torch.empty(shape, device="meta")
    inner = Call(call.tracer, call.func, call.name, call.args, call.kwargs, [whole])
    [state] = pointwise(inner)
    if reduction == 0 or state.is_mixed:
        return [State(constant(MIXED, output.dim()), why=state.why)] if state.is_mixed else [state]
    return [_reduced(call, state, shape, list(range(len(shape))), False, output, mean=reduction == 1)]


@rule("multi_margin_loss", "multilabel_margin_loss_forward")
def row_loss(call: Call) -> list[State]:
    """A loss per row of ``(B, C)``, then perhaps a sum or a mean."""
    scores, target = call.args[:2]
    reduction = call.argument("reduction", 1)
    last = [scores.dim() - 1]
    owner = owners.reduce(call.state(scores).owner, last, linear=False, keepdim=False)
    of_target = call.state(target).owner
    if target.dim() == scores.dim():
        of_target = owners.reduce(of_target, last, linear=False, keepdim=False)
    state = State(join(owner, of_target), any(s.ragged for s in call.states()))
    first, *rest = call.outputs
    if reduction == 0:
        found = call.result(state.owner, first)
    else:
        found = _reduced(call, state, scores.shape[:-1], [0], False, first, mean=reduction == 1)
    return [found, *(call.result(call.state(target).owner, o) for o in rest)]


# -- reductions ----------------------------------------------------------------------------------------------------


def _reduced(
    call: Call, state: State, shape: Sequence[int], dims: Sequence[int], keepdim: bool, output: Tensor, mean: bool
) -> State:
    """A sum or a mean over dimensions."""
    before = state.owner
    owner = owners.reduce(before, dims, linear=True, keepdim=keepdim)
    across = [d for d in dims if before.shape[d] > 1]
    if mean and state.ragged and across:
        what = "a mean over rows that were chosen by what records hold divides by their number"
        return call.tracer.mixed(output.dim(), what)
    terms = None
    if bool((owner == SUM).any()):
        terms = _terms(call, state)
    result = call.result(owner, output, what="a sum over numbers that mix records")
    ragged = state.ragged and (not across or bool((result.owner == SUM).any()))
    why = result.why or (state.why if result.is_mixed else "")
    return replace(result, ragged=ragged and result.ragged, why=why, terms=terms)


def _dims(call: Call, tensor: Tensor) -> list[int]:
    """The dimensions that a reduction is over: all, when none is given."""
    dims = call.argument("dim")
    if dims is None or dims == []:
        return list(range(tensor.dim()))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return [d % max(tensor.dim(), 1) for d in listed]


@rule("sum", "mean", "nansum")
def total(call: Call) -> list[State]:
    tensor = call.args[0]
    state, [output] = call.state(tensor), call.outputs
    keepdim = bool(call.argument("keepdim", False))
    return [_reduced(call, state, tensor.shape, _dims(call, tensor), keepdim, output, mean=call.name == "mean")]


@rule(
    *_names(
        "amax amin any all max min argmax argmin var std var_mean std_mean prod norm linalg_vector_norm logsumexp "
        "median nanmedian mode aminmax count_nonzero kthvalue"
    )
)
def extremum(call: Call) -> list[State]:
    """A reduction that is not linear: of several records' numbers, a mixture."""
    tensor = call.args[0]
    if len(call.tensors()) > 1:  # elementwise maximum
        return pointwise(call)
    state = call.state(tensor)
    keepdim = bool(call.argument("keepdim", False))
    what = f"{call.name} over several records"
    found = []
    for output in call.outputs:
        owner = owners.reduce(state.owner, _dims(call, tensor), linear=False, keepdim=keepdim)
        found.append(call.result(owner.reshape(owner.shape), output, what=what))
    return found


@rule(
    *_names(
        "cumsum cumprod _softmax _log_softmax sort argsort cummax cummin logcumsumexp topk flip roll "
        "_softmax_backward_data _log_softmax_backward_data _sparse_softmax"
    )
)
def along_a_dimension(call: Call) -> list[State]:
    """Mixes along one dimension and leaves all others alone."""
    tensor = call.args[0]
    if call.name in ("flip", "roll"):
        return _moved(call)
    dim = call.argument("dim", -1)
    dim = -1 if dim is None else dim
    state = call.state(tensor)
    for other in call.tensors()[1:]:
        joined = join(state.owner, aligned(call.state(other).owner, tensor.dim()))
        state = State(joined, state.ragged, state.why)
    if tensor.dim() and state.owner.shape[dim] > 1:
        return call.mixed(f"{call.name} along the dimension of the batch")
    return [call.result(state.owner, o, what=call.name) for o in call.outputs]


@rule("renorm")
def renorm(call: Call) -> list[State]:
    """Scales every slice along a dimension by its norm over all others."""
    tensor, state = call.args[0], call.state(call.args[0])
    dim = call.args[2] % tensor.dim()
    if any(d != dim for d in owners.varying(state.owner)):
        return call.mixed("renorm over several records")
    return [call.result(state.owner, call.outputs[0])]


@rule("tril", "triu")
def triangle(call: Call) -> list[State]:
    """Zeros by place: within a matrix of one record's own."""
    state = call.state(call.args[0])
    if any(d >= call.args[0].dim() - 2 for d in owners.varying(state.owner)):
        return call.mixed(f"{call.name} treats places in the batch differently")
    return [call.result(state.owner, call.outputs[0])]


# -- data that moves ---------------------------------------------------------------------------------------------------


def _moved(call: Call, *also: Tensor) -> list[State]:
    """Owners go where the numbers go: the operation itself moves them."""
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


@rule(*_names("repeat im2col pixel_shuffle pixel_unshuffle channel_shuffle unfold_copy reflection_pad1d"))
def rearranged(call: Call) -> list[State]:
    if call.state(call.args[0]).is_mixed:
        return call.mixed()
    return _moved(call)


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
    return [State(result.owner, result.ragged, result.why, result.terms)]


def _indexed(call: Call, tensor: Tensor, index: Tensor, dim: int, gathered: Tensor, index_owner: Tensor) -> State:
    """Owners of what an index chose: those of the entries, and of the index.

    An index that depends on a record may point anywhere along its dimension: only where all of that belongs to that
    record, or to nobody, is the result its own.
    """
    [output] = call.outputs
    state, of_index = call.state(tensor), call.state(index)
    if not of_index.is_public and state.owner.shape[dim] > 1:
        everything = _is_order(index.flatten(), tensor.shape[dim])
        own = bool(((index_owner == gathered) | (gathered < 0)).all()) and of_index.ragged
        if everything and not of_index.is_owned:
            call.tracer.decide("rows are put into another order, by what records hold")
            ordered = call.result(gathered, output, ragged=of_index.ragged)
            return replace(ordered, reordered=not state.reordered)
        if own:
            call.tracer.decide("rows are chosen by what records hold")
        else:
            return call.tracer.mixed(output.dim(), "rows of the batch are looked up by what records hold")
    # As many as the index has, along the dimension of the records.
    ragged = of_index.ragged or (state.ragged and state.owner.shape[dim] == 1)
    return call.result(join(gathered, index_owner), output, ragged=ragged)


@rule("index_select")
def index_select(call: Call) -> list[State]:
    tensor, dim, index = call.args[:3]
    dim = dim % max(tensor.dim(), 1)
    gathered = call.owner(tensor).index_select(dim, index.cpu())
    along = call.owner(index).view([-1 if d == dim else 1 for d in range(tensor.dim())])
    return [_indexed(call, tensor, index, dim, gathered, along.expand(gathered.shape))]


@rule("gather", "take_along_dim")
def gather(call: Call) -> list[State]:
    tensor, dim, index = call.args[:3]
    dim = dim % max(tensor.dim(), 1)
    gathered = call.owner(tensor).gather(dim, index.cpu())
    return [_indexed(call, tensor, index, dim, gathered, call.owner(index))]


@rule("embedding")
def embedding(call: Call) -> list[State]:
    table, index = call.args[:2]
    gathered = call.owner(table)[index.cpu()]
    own = call.owner(index)[..., None].expand(gathered.shape)
    return [_indexed(call, table, index, 0, gathered, own)]


def _advanced(call: Call, tensor: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Tensor]:
    """The indices as integers, and owners of the whole index, in the shape of the result."""
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
            return [replace(call.result(gathered, output), reordered=not state.reordered)]
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
        return [call.tracer.mixed(output.dim(), _ONE_PLACE)]
    for dim in anywhere:
        owner = owners.reduce(owner, [dim], linear=False, keepdim=True).expand(tensor.shape)
    what = "records write where others could have written"
    return [call.result(owner, output, ragged=state.ragged, what=what)]


_ONE_PLACE = "one place of the batch is overwritten, whichever record is there"


def _takes_places(call: Call, before: Tensor, after: Tensor) -> bool:
    """Whether something public overwrites what some records own, and not what others do."""
    lost = before[(before >= 0) & (after < 0)].unique()
    return 0 < len(lost) < call.tracer.examples


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
def scatter(call: Call) -> list[State]:
    """Writes along one dimension: an owner there is everybody's who could have written there."""
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
            return [call.tracer.mixed(output.dim(), _ONE_PLACE)]
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
        State(constant(PUBLIC, sizes.dim())),  # a decision, noted
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


@rule("dot", "vdot", "mv", "inner")
def inner_product(call: Call) -> list[State]:
    """``Σ_b left_b right_b`` is a sum over records where both factors belong to the same one."""
    left, right = call.args[:2]
    [output] = call.outputs
    both = join(aligned(call.state(left).owner, left.dim()), aligned(call.state(right).owner, left.dim()), scaling=True)
    state = State(both, any(s.ragged for s in call.states()), next((s.why for s in call.states() if s.why), ""))
    return [_reduced(call, state, left.shape, [left.dim() - 1], False, output, mean=False)]


@rule("_ctc_loss")
def ctc_loss(call: Call) -> list[State]:
    """Log probabilities ``(T, B, C)``, targets ``(B, S)`` or one after another; one loss per record."""
    log_probs, targets = call.args[:2]
    lengths = call.argument("target_lengths")
    call.tracer.decide("lengths are read")
    own = owners.reduce(call.state(log_probs).owner, [0, 2], linear=False, keepdim=False)
    if targets.dim() == 2:
        own = join(own, owners.reduce(call.state(targets).owner, [1], linear=False, keepdim=False))
    else:
        sizes = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        parts = call.owner(targets).split(sizes)
        each = [owners.reduce(p, [0], linear=False, keepdim=True) if len(p) else constant(PUBLIC, 1) for p in parts]
        own = join(own, torch.cat(each))
    losses, alphas = call.outputs
    ragged = call.state(log_probs).ragged
    return [call.result(own, losses, ragged=ragged), call.result(own.view(-1, 1, 1), alphas, ragged=ragged)]


@rule("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(call: Call) -> list[State]:
    """Mean over targets: divided by their weights, or their number, it is a sum only where both are public."""
    logits, target, weight, reduction, ignored = call.args[:5]
    output, _ = call.outputs
    per_target = State(constant(PUBLIC, target.dim()))
    own = owners.reduce(call.state(logits).owner, [min(1, logits.dim() - 1)], linear=False, keepdim=False)
    owner = join(own, call.state(target).owner)
    ragged = call.state(logits).ragged or call.state(target).ragged
    state = State(owner, ragged, next((s.why for s in call.states() if s.why), ""))
    if reduction == 0:
        return [call.result(owner, output, ragged=ragged), per_target]
    if reduction == 1 and bool((owner >= 0).any()) and len(owner[owner >= 0].unique()) > 1:
        if isinstance(weight, Tensor):
            what = "a mean that is divided by the class weights of the batch"
            return [call.tracer.mixed(output.dim(), what), per_target]
        if bool((target == ignored).any()):
            what = f"a mean over the targets of the batch that are not {ignored}"
            return [call.tracer.mixed(output.dim(), what), per_target]
        call.tracer.decide(f"a mean over all targets: none of those looked at was {ignored}")
    dims = list(range(target.dim()))
    return [_reduced(call, state, target.shape, dims, False, output, mean=reduction == 1), per_target]


@rule("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(call: Call) -> list[State]:
    """The gradient at a target's logits is one number at its own class: of that target, and what comes from above."""
    grad, logits, target = call.args[:3]
    total = call.argument("total_weight")
    if logits.dim() < 2:
        return probe(call)
    above = call.state(grad).owner
    above = above.unsqueeze(1) if grad.dim() == target.dim() else aligned(above, logits.dim())
    owner = join(call.state(target).owner.unsqueeze(1), above, scaling=True)
    owner = join(owner, aligned(call.state(total).owner, logits.dim()), scaling=True)
    return [call.result(owner, call.outputs[0], what="the gradient of a mean that several records decide")]


@rule("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "_batch_norm_with_update")
def batch_norm(call: Call) -> list[State]:
    tensor = call.args[0]
    if call.argument("training", call.name == "_batch_norm_with_update"):
        # Per channel: instance normalisation is this as well, with every record's channels side by side.
        others = [d for d in range(tensor.dim()) if d != 1]
        owner = owners.reduce(call.state(tensor).owner, others, linear=False, keepdim=True)
        if not call.state(tensor).is_owned or bool((owner == MIXED).any()):
            return call.mixed("batch normalisation over the records of the batch")
        first, *rest = call.outputs
        found = [call.result(owner, first)]
        return found + [call.result(owner.flatten() if o.dim() == 1 else constant(PUBLIC, o.dim()), o) for o in rest]
    return [call.result(call.state(tensor).owner, call.outputs[0])] + [
        State(constant(PUBLIC, o.dim())) for o in call.outputs[1:]
    ]


@rule("_native_batch_norm_legit_no_training")
def frozen_batch_norm(call: Call) -> list[State]:
    return [call.result(call.state(call.args[0]).owner, call.outputs[0])] + [
        State(constant(PUBLIC, o.dim())) for o in call.outputs[1:]
    ]


# -- linear maps whose weights are public -----------------------------------------------------------------------------


@rule("mm", "addmm")
def matrix_product(call: Call) -> list[State]:
    """Entry (i, j) is a sum of row i of one matrix times numbers of the other: it is whose the row is, or the column.

    Where the entries that are added up are several records' own, or both matrices depend on records, it is probed.
    """
    one, other = call.args[-2:]
    output = call.outputs[0]
    bias = [call.args[0]] if call.name == "addmm" and call.argument("beta", 1) else []
    states = [call.state(one), call.state(other)]
    if any(call.tracer.state(t) is not None for t in bias) or not any(s.is_public for s in states) or one is other:
        return probe(call)
    dependent, contracted = (0, 1) if states[1].is_public else (1, 0)
    owner = states[dependent].owner
    if owner.shape[contracted] > 1 or states[dependent].is_mixed:
        return probe(call)
    known = states[dependent]
    return [_placed(call, bias, output, replace(call.result(owner, output), terms=known.terms, why=known.why))]


@rule("convolution")
def convolution(call: Call) -> list[State]:
    """Acts on every entry of dimension 0 by itself; anything else is probed."""
    input = call.args[0]
    state = call.state(input)
    public = all(call.tracer.state(t) is None for t in call.tensors()[1:])
    if not public or owners.varying(state.owner) not in ([], [0]) or not state.is_owned:
        return probe(call)
    return [call.result(state.owner, call.outputs[0])]


# -- all others --------------------------------------------------------------------------------------------------------

#: Rounds of probing before a result that never changes is given up.
_ROUNDS = 6


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
    found = call.tracer.probes().get(key) if key is not None else None
    if found is None:
        found = _Probe(call, records).owners()
        if key is not None:
            call.tracer.probes()[key] = found
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
    """What decides who owns the results: the operation, shapes, owners, and arguments that are no tensors."""
    leaves, _ = tree_flatten((call.args, call.kwargs))
    parts: list[Any] = [str(call.func)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            state = call.tracer.state(leaf)
            owner = None if state is None else (tuple(state.owner.shape), state.owner.numpy().tobytes())
            whole = not leaf.is_floating_point() and not leaf.is_complex()
            if owner is None and whole and leaf.numel() > 1:  # an index, say: its values matter
                if leaf.numel() > 4096:
                    return None
                owner = ((), leaf.detach().cpu().numpy().tobytes())
            parts.append((tuple(leaf.shape), leaf.dtype, owner))
        else:
            parts.append(repr(leaf))
    return tuple(parts)


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
        for _ in range(_ROUNDS):
            # Any record's numbers may hide what another's would do: also those that stay are other ones each round.
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
            if all(answer is not None and bool((answer != PUBLIC).all()) for answer in answers):
                return answers
            if all(answer is None for answer in answers):
                return answers
        # What never changes belongs to nobody where some of the operands' rows do not either; else nobody can tell.
        partly = any(o is not None and bool((o < 0).any()) for o in self._owners)
        told = [partly and (o.is_floating_point() or o.is_complex()) for o in self._call.outputs]
        return [
            None if a is None or (bool((a == PUBLIC).any()) and not ok) else a
            for a, ok in zip(answers, told, strict=True)
        ]

    def _is_public_float(self, leaf: Any) -> bool:
        known = not isinstance(leaf, Tensor) or self._call.tracer.state(leaf) is not None
        return not known and (leaf.is_floating_point() or leaf.is_complex())

    def _random(self, like: Tensor) -> Tensor:
        """Other values of the same kind."""
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
        """A public operand, moved: one that is zero would hide what the operation does."""
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
        if self._call.func._schema.is_mutable:
            return _written(self._call.func, args, kwargs)
        found = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
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
                if bool((owner != PUBLIC).all()):
                    return compress(owner)
                best = best if best is not None else owner
        if best is not None:
            return compress(best)
        owner = self._decode(changed.reshape(len(changed), -1))
        return None if owner is None else owner.reshape(shape)  # what has not changed yet is nobody's, for all we know

    def _decode(self, changed: Tensor) -> Tensor | None:
        """``(2 · bits, n)`` to owners ``(n,)``; `PUBLIC`: nothing changed; ``None``: several records did."""
        zero, one = changed[0::2], changed[1::2]
        if bool((zero & one).any()):
            return None
        known = (zero | one).all(0)
        powers = torch.tensor([1 << b for b in range(self._bits)])[:, None]
        index = (one * powers).sum(0)
        if bool((index >= len(self._records)).any()):
            return None
        ids = torch.tensor(self._records, dtype=owners.DTYPE)
        return torch.where(known, ids[index], PUBLIC).to(owners.DTYPE)


def _is_ordinary(tensor: Tensor) -> Tensor:
    """Numbers that are not infinite, nor stand for that (masks of attention)."""
    return tensor.isfinite() & (tensor.abs() < 1e6)


def _differs(one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape:
        return torch.ones(one.shape, dtype=torch.bool)
    if one.is_floating_point() or one.is_complex():
        scale = float(one[one.isfinite()].abs().max()) if bool(one.isfinite().any()) else 1.0
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
    if any(p is None for p in [*placed.values(), *of_results]):
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
        result = call.func(*arguments[0], **arguments[1])
        if call.func._schema.is_mutable:
            return _written(call.func, *arguments)
        return [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]

    try:
        moved, first = run((args, kwargs)), run(plain)
    finally:
        torch.set_rng_state(state)
    pairs = zip(first, moved, of_results, strict=True)
    return not any(bool(_differs(exchanged(f, place), m).any()) for f, m, place in pairs)
