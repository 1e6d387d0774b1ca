"""Reductions: owners are joined along dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import SUM, State, aligned, join
from lightning_dp.training.independence.rules.elementwise import pointwise, terms_of
from lightning_dp.training.independence.rules.moves import moved_states
from lightning_dp.training.independence.rules.registry import Call, names_in, rule

# -- reductions ----------------------------------------------------------------------------------------------------


def reduced_state(
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
        terms = terms_of(call, state)
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
    return [reduced_state(call, state, tensor.shape, _dims(call, tensor), keepdim, output, mean=call.name == "mean")]


@rule(
    *names_in(
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
    *names_in(
        "cumsum cumprod _softmax _log_softmax sort argsort cummax cummin logcumsumexp topk flip roll "
        "_softmax_backward_data _log_softmax_backward_data _sparse_softmax"
    )
)
def along_a_dimension(call: Call) -> list[State]:
    """Mixes along one dimension and leaves all others alone; ``flip`` and ``roll`` only move owners."""
    tensor = call.args[0]
    if call.name in ("flip", "roll"):
        return moved_states(call)
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
    """Zeroes entries by their place, which is allowed within a matrix that belongs to one record."""
    state = call.state(call.args[0])
    if any(d >= call.args[0].dim() - 2 for d in owners.varying(state.owner)):
        return call.mixed(f"{call.name} treats places in the batch differently")
    return [call.result(state.owner, call.outputs[0])]


@rule("dot", "vdot", "mv", "inner")
def inner_product(call: Call) -> list[State]:
    """``Σ_b left_b right_b`` is a sum over records where both factors belong to the same one."""
    left, right = call.args[:2]
    [output] = call.outputs
    both = join(aligned(call.state(left).owner, left.dim()), aligned(call.state(right).owner, left.dim()), scaling=True)
    state = State(both, any(s.ragged for s in call.states()), next((s.why for s in call.states() if s.why), ""))
    return [reduced_state(call, state, left.shape, [left.dim() - 1], False, output, mean=False)]
