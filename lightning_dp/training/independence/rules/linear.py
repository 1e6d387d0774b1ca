"""Linear maps whose weights are public."""

from __future__ import annotations

from dataclasses import replace

from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import State
from lightning_dp.training.independence.rules.elementwise import placed_alike
from lightning_dp.training.independence.rules.probe import probe
from lightning_dp.training.independence.rules.registry import Call, rule

# -- linear maps whose weights are public -----------------------------------------------------------------------------


@rule("mm", "addmm")
def matrix_product(call: Call) -> list[State]:
    """Entry (i, j) is row i of one matrix times column j of the other: its owner is that of the row, or of the column.

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
    return [placed_alike(call, bias, output, replace(call.result(owner, output), terms=known.terms, why=known.why))]


@rule("convolution")
def convolution(call: Call) -> list[State]:
    """Acts on every entry of dimension 0 by itself; anything else is probed."""
    input = call.args[0]
    state = call.state(input)
    public = all(call.tracer.state(t) is None for t in call.tensors()[1:])
    if not public or owners.varying(state.owner) not in ([], [0]) or not state.is_owned:
        return probe(call)
    return [call.result(state.owner, call.outputs[0])]
