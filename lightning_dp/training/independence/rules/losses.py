"""Losses that are one operation, and normalisations over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import MIXED, PUBLIC, State, aligned, constant, join
from lightning_dp.training.independence.rules.elementwise import pointwise
from lightning_dp.training.independence.rules.probe import probe
from lightning_dp.training.independence.rules.reductions import reduced_state
from lightning_dp.training.independence.rules.registry import Call, rule


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


def _of_all(call: Call, tensor: Tensor) -> Tensor:
    """The owner of what depends on all of an operand: a tensor of no dimension."""
    state = call.state(tensor)
    return owners.reduce(state.owner, list(range(state.owner.dim())), linear=False, keepdim=False)


@rule("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(call: Call) -> list[State]:
    """Mean over targets: divided by their weights, or their number, it is a sum only where both are public."""
    logits, target, weight, reduction, ignored = call.args[:5]
    output, _ = call.outputs
    per_target = State(constant(PUBLIC, target.dim()))
    own = owners.reduce(call.state(logits).owner, [min(1, logits.dim() - 1)], linear=False, keepdim=False)
    owner = join(own, call.state(target).owner)
    if isinstance(weight, Tensor):
        owner = join(owner, _of_all(call, weight).expand_as(owner))
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
    return [reduced_state(call, state, target.shape, dims, False, output, mean=reduction == 1), per_target]


@rule("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(call: Call) -> list[State]:
    """The gradient at a target's logits depends on that target, the upstream gradient and the total of the weights."""
    grad, logits, target = call.args[:3]
    total = call.argument("total_weight")
    if logits.dim() < 2:
        return probe(call)
    above = call.state(grad).owner
    above = above.unsqueeze(1) if grad.dim() == target.dim() else aligned(above, logits.dim())
    owner = join(call.state(target).owner.unsqueeze(1), above, scaling=True)
    owner = join(owner, aligned(call.state(total).owner, logits.dim()), scaling=True)
    if isinstance(weight := call.argument("weight"), Tensor):
        owner = join(owner, aligned(_of_all(call, weight), logits.dim()))
    return [call.result(owner, call.outputs[0], what="the gradient of a mean that several records decide")]


def _with_parameters(call: Call, owner: Tensor) -> Tensor:
    """Owners of what is normalised by statistics, scales and shifts of its channels."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(parameter := call.argument(name), Tensor):
            of_channels = call.state(parameter).owner
            owner = join(owner, of_channels.view(1, -1, *[1] * (owner.dim() - 2)))
    return owner


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
        found = [call.result(_with_parameters(call, owner), first)]
        return found + [call.result(owner.flatten() if o.dim() == 1 else constant(PUBLIC, o.dim()), o) for o in rest]
    return [call.result(_with_parameters(call, call.state(tensor).owner), call.outputs[0])] + [
        State(constant(PUBLIC, o.dim())) for o in call.outputs[1:]
    ]


@rule("_native_batch_norm_legit_no_training")
def frozen_batch_norm(call: Call) -> list[State]:
    return [call.result(_with_parameters(call, call.state(call.args[0]).owner), call.outputs[0])] + [
        State(constant(PUBLIC, o.dim())) for o in call.outputs[1:]
    ]


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
    return [reduced_state(call, state, shape, list(range(len(shape))), False, output, mean=reduction == 1)]


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
    owner = join(owner, of_target)
    if isinstance(weight := call.argument("weight"), Tensor):
        owner = join(owner, _of_all(call, weight).expand_as(owner))
    state = State(owner, any(s.ragged for s in call.states()))
    first, *rest = call.outputs
    if reduction == 0:
        found = call.result(state.owner, first)
    else:
        found = reduced_state(call, state, scores.shape[:-1], [0], False, first, mean=reduction == 1)
    return [found, *(call.result(call.state(target).owner, o) for o in rest)]
