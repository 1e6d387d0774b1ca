"""Elementwise operations: entry i of the result depends on entry i of every operand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.torch_api import overload_name
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import MIXED, PUBLIC, SUM, State, aligned, constant, join
from lightning_dp.training.independence.rules.registry import Call, aten, names_in

#: Elementwise operations that PyTorch, or an older version of it, does not tag as such.
_POINTWISE = frozenset(
    names_in(
        "copy _to_copy floor_divide hardswish special_erf masked_fill rrelu_with_noise log_sigmoid_forward prelu lerp "
        "native_dropout dropout alpha_dropout feature_dropout bernoulli special_erfinv erfinv sgn conj _conj imag real "
        "_copy_from clone _unsafe_view lift_fresh_copy _reshape_copy _fused_dropout masked_scale "
        "_log_softmax_backward_like square __and__ __or__ __xor__ exponential normal uniform _prelu_kernel"
    )
)


#: What they return has the same numbers in the same places: it is still what a collate function made.
_COPIES = frozenset(names_in("_to_copy clone"))


#: Elementwise operations that are linear, or scale by their second operand.
_LINEAR = frozenset(names_in("add sub rsub copy _to_copy clone neg _unsafe_view positive detach alias lift_fresh_copy"))


_SCALING = frozenset(names_in("mul div true_divide multiply divide"))


def is_pointwise(func: Any, name: str) -> bool:
    if name in _POINTWISE or torch.Tag.pointwise in func.tags:
        return True
    functional = getattr(aten, name, None) if func.namespace == "aten" else None
    overload = getattr(functional, overload_name(func), None) if functional is not None else None
    return overload is not None and torch.Tag.pointwise in overload.tags


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
            terms = [terms_of(call, s) for s in states if not s.is_public]
            met = state.why or next((s.why for s in states if s.why), "")
            met = met or call.tracer.mixed(0, f"numbers of several records meet in {call.name}").why
            state = replace(state, terms=torch.stack(terms).sum(0), why=met)
        results.append(placed_alike(call, operands, output, state))
    return [
        replace(state, joined=_joined(call, tensors, output))
        for state, output in zip(results, call.outputs, strict=True)
    ]


def _joined(call: Call, tensors: list[Tensor], output: Tensor) -> int:
    """Entries of records one after another stay so where each is changed by itself; numbers that were counted stay what
    they are where they are copied."""
    known = [(call.state(t).joined, t) for t in tensors if call.tracer.state(t) is not None]
    numbers = {number for number, _ in known}
    if len(numbers) != 1 or any(t.shape != output.shape for _, t in known):
        return 0
    [number] = numbers
    if any(t.numel() > 1 for t in tensors if call.tracer.state(t) is None):
        return 0
    is_copy = call.name in _COPIES and all(t.dtype == output.dtype for _, t in known)
    return number if number > 0 or is_copy else 0


def terms_of(call: Call, state: State) -> Tensor:
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


def placed_alike(call: Call, operands: list[Tensor], output: Tensor, state: State) -> State:
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
