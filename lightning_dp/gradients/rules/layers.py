"""Rules per layer type: from what was recorded of one call of a layer to the per-example gradients of its parameters.

A rule is a function ``rule(module, input, grad_output) -> {parameter name: PerExampleGradient}``, registered for a
module type. ``input`` is the layer's first argument and ``grad_output`` the gradient of the loss at its output, both
with the batch in the leading dimension; the gradients are those of the same loss. To add a layer, write its rule here:
`tests/gradients/test_layers.py` checks every registered rule against autograd, one example at a time, as soon as it is
given an example module in ``EXAMPLES`` there.

A rule may come with a *refusal*: a function that returns a sentence when a module of that type, in this configuration,
has no per-example gradient or keeps statistics of the batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.gradients.base import Dense, PerExampleGradient
from lightning_dp.gradients.convolution import Convolution
from lightning_dp.gradients.linear import OuterProducts, Rows
from lightning_dp.gradients.rules.registry import register_refusal, register_rule, register_rule_by_name
from lightning_dp.torch_api import padding_of


def _positions(tensor: Tensor) -> Tensor:
    """``(B, *, d) -> (B, T, d)``, with ``T = 1`` when there is nothing between."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


@register_rule(nn.Linear)
def linear(module: nn.Linear, input: Tensor, grad_output: Tensor) -> dict[str, PerExampleGradient]:
    """``g = Σ_t e_t a_tᵀ``; bias ``Σ_t e_t``."""
    gradients: dict[str, PerExampleGradient] = {}
    if module.weight.requires_grad:
        gradients["weight"] = OuterProducts(_positions(grad_output), _positions(input))
    if module.bias is not None and module.bias.requires_grad:
        gradients["bias"] = Dense(sum_positions(grad_output))
    return gradients


def sum_positions(grad_output: Tensor) -> Tensor:
    """The sum over all positions of a layer's outputs: ``(B, ..., d) -> (B, d)``."""
    if grad_output.dim() == 2:
        return grad_output
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    return grad_output.sum(tuple(range(1, grad_output.dim() - 1)), dtype=wide)


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, input: Tensor, grad_output: Tensor
) -> dict[str, PerExampleGradient]:
    """The kernel's gradient is a correlation of the input with the upstream gradient."""
    gradients: dict[str, PerExampleGradient] = {}
    if module.weight.requires_grad:
        padding: tuple[int, ...] | str = module.padding
        if module.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            input = F.pad(input, padding_of(module), mode=mode)
            padding = (0,) * len(module.kernel_size)
        gradients["weight"] = Convolution(
            grad_output, input, module.weight.shape, module.stride, padding, module.dilation, module.groups
        )
    if module.bias is not None and module.bias.requires_grad:
        wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
        gradients["bias"] = Dense(grad_output.sum(tuple(range(2, grad_output.dim())), dtype=wide))
    return gradients


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(
    module: nn.ConvTranspose2d, input: Tensor, grad_output: Tensor
) -> dict[str, PerExampleGradient]:
    """The adjoint of a convolution with the same kernel: input and upstream gradient exchange their roles."""
    gradients: dict[str, PerExampleGradient] = {}
    if module.weight.requires_grad:
        padding = cast("tuple[int, ...]", module.padding)
        gradients["weight"] = Convolution(
            input, grad_output, module.weight.shape, module.stride, padding, module.dilation, module.groups
        )
    if module.bias is not None and module.bias.requires_grad:
        wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
        gradients["bias"] = Dense(grad_output.sum(tuple(range(2, grad_output.dim())), dtype=wide))
    return gradients


@register_rule(nn.PReLU)
def prelu(module: nn.PReLU, input: Tensor, grad_output: Tensor) -> dict[str, PerExampleGradient]:
    """``y = max(x, 0) + w · min(x, 0)``, with one slope or one per channel (dimension 1)."""
    values = grad_output * input.clamp(max=0)
    summed = range(1 if module.num_parameters == 1 else 2, values.dim())
    values = values.sum(tuple(summed)) if len(summed) else values
    return {"weight": Dense(values.reshape(len(values), -1))}


@register_rule_by_name("transformers.pytorch_utils.Conv1D")
def transposed_linear(module: Any, input: Tensor, grad_output: Tensor) -> dict[str, PerExampleGradient]:
    """GPT-2's linear layer, whose weight is ``(inputs, outputs)``."""
    gradients: dict[str, PerExampleGradient] = {}
    if module.weight.requires_grad:
        gradients["weight"] = OuterProducts(_positions(input), _positions(grad_output))
    if module.bias.requires_grad:
        gradients["bias"] = Dense(sum_positions(grad_output))
    return gradients


@register_rule(nn.Embedding)
def embedding(module: nn.Embedding, input: Tensor, grad_output: Tensor) -> dict[str, PerExampleGradient]:
    """Row ``x_t`` of the table receives ``e_t``; the padding row receives nothing."""
    index, values = input.reshape(len(input), -1), _positions(grad_output)
    if module.padding_idx is not None:
        values = values.masked_fill((index == module.padding_idx)[..., None], 0)
    return {"weight": Rows(index, values, len(module.weight))} if module.weight.requires_grad else {}


@register_refusal(nn.Embedding, nn.EmbeddingBag)
def _refuse_embedding(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.max_norm is not None:
        return (
            "max_norm renormalises the table by the rows that a batch happens to use, without noise; leave max_norm out"
        )
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq divides by counts taken over the whole batch; use scale_grad_by_freq=False"
    if module.sparse:
        return "sparse gradients reveal which rows the batch used, and noise makes them dense; use sparse=False"
    return None


def affine(module: Any, normalised: Tensor, grad_output: Tensor, kept: tuple[int, ...]) -> dict[str, Dense]:
    """``y = w · x̂ + b``, elementwise: gradients ``Σ e·x̂`` and ``Σ e``, over all but the batch and ``kept``."""
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    summed = tuple(d for d in range(1, grad_output.dim()) if d not in kept)
    gradients = {}
    for name, values in (("weight", grad_output * normalised), ("bias", grad_output)):
        parameter = getattr(module, name, None)
        if parameter is not None and parameter.requires_grad:
            values = values.sum(summed, dtype=wide) if summed else values
            gradients[name] = Dense(values.reshape(len(values), *parameter.shape))
    return gradients


@register_rule(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, input: Tensor, grad_output: Tensor) -> dict[str, Dense]:
    normalised = F.layer_norm(input, module.normalized_shape, eps=module.eps)
    return affine(module, normalised, grad_output, _last(grad_output, len(module.normalized_shape)))


@register_rule(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, input: Tensor, grad_output: Tensor) -> dict[str, Dense]:
    normalised = F.rms_norm(input, module.normalized_shape, eps=module.eps)
    return affine(module, normalised, grad_output, _last(grad_output, len(module.normalized_shape)))


def _last(tensor: Tensor, count: int) -> tuple[int, ...]:
    return tuple(range(tensor.dim() - count, tensor.dim()))


@register_rule(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, input: Tensor, grad_output: Tensor) -> dict[str, Dense]:
    normalised = F.group_norm(input, module.num_groups, eps=module.eps)
    return affine(module, normalised, grad_output, (1,))


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: nn.InstanceNorm2d, input: Tensor, grad_output: Tensor) -> dict[str, Dense]:
    normalised = F.instance_norm(input, eps=module.eps)
    return affine(module, normalised, grad_output, (1,))


@register_refusal(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _refuse_instance_norm(module: nn.InstanceNorm2d) -> str | None:
    if module.track_running_stats:
        return "running statistics are averages over the batch, without noise; use track_running_stats=False"
    return None


@register_refusal(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _refuse_batch_norm(module: nn.modules.batchnorm._BatchNorm) -> str | None:
    if not module.training and not any(p.requires_grad for p in module.parameters()) and module.track_running_stats:
        return None
    return (
        "batch normalisation mixes the examples of a batch, so no example's influence can be bounded; repair=True "
        "(of DifferentialPrivacy or PrivateStrategy; or lightning_dp.repair(self) at the end of __init__) puts "
        "GroupNorm in its place, and leaves a frozen one as it is, with its statistics"
    )
