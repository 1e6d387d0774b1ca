"""Rules per layer type: from what was recorded of one call of a layer to the per-example gradients of its parameters.

A rule is a function ``rule(module, input, grad_output) -> {parameter name: PerExampleGradient}``, registered for a
module type. ``input`` is the layer's first argument and ``grad_output`` the gradient of the loss at its output, both
with the batch in the leading dimension; the gradients are those of the same loss. To add a layer, write its rule here:
`tests/test_layers.py` checks every registered rule against autograd, one example at a time, as soon as it is given an
example module in ``EXAMPLES`` there.

A rule may come with a *refusal*: a function that returns a sentence when a module of that type, in this configuration,
has no per-example gradient or keeps statistics of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_dp.gradients import Blocks, Convolution, Dense, OuterProducts, PerExampleGradient, Rows

Rule = Callable[[Any, Tensor, Tensor], Mapping[str, PerExampleGradient]]
Refusal = Callable[[Any], str | None]

Entry = TypeVar("Entry")

_RULES: dict[type[nn.Module], Rule] = {}
_RULES_BY_NAME: dict[str, Rule] = {}
_REFUSALS: dict[type[nn.Module], Refusal] = {}


def register_rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Registers a rule for these module types (exactly these: a subclass may compute something else)."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def register_rule_by_name(name: str) -> Callable[[Rule], Rule]:
    """Registers a rule for a type of a library that need not be installed, by its full name."""

    def register(rule: Rule) -> Rule:
        _RULES_BY_NAME[name] = rule
        return rule

    return register


def register_refusal(*types: type[nn.Module]) -> Callable[[Refusal], Refusal]:
    """Registers why some configurations of these module types cannot be trained privately."""

    def register(refusal: Refusal) -> Refusal:
        _REFUSALS.update(dict.fromkeys(types, refusal))
        return refusal

    return register


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of this module's type; see `registered_for`."""
    return registered_for(module, _RULES, _RULES_BY_NAME)


def registered_for(
    module: nn.Module, registry: Mapping[type[nn.Module], Entry], by_name: Mapping[str, Entry]
) -> Entry | None:
    """What is registered for this module's type.

    A subclass that keeps its parent's ``forward`` (a renamed `Linear`, say) has its parent's entry; one that overrides
    it has none, for nobody knows what it computes.
    """
    for cls in type(module).__mro__:
        if cls in registry:
            return registry[cls] if _computes_the_same(type(module), cls) else None
    return by_name.get(f"{type(module).__module__}.{type(module).__qualname__}")


def _computes_the_same(cls: type[nn.Module], parent: type[nn.Module]) -> bool:
    return cls.forward is parent.forward and getattr(cls, "_conv_forward", 0) is getattr(parent, "_conv_forward", 0)


def refusal_for(module: nn.Module) -> str | None:
    """Why this module, as it is configured, cannot be trained privately; ``None`` when it can."""
    for cls in type(module).__mro__:
        if cls in _REFUSALS:
            return _REFUSALS[cls](module)
    return None


def registered_types() -> list[type[nn.Module]]:
    """The module types that have a rule."""
    return list(_RULES)


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
        gradients["bias"] = Dense(_sum_positions(grad_output))
    return gradients


def _sum_positions(grad_output: Tensor) -> Tensor:
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
            input = F.pad(input, module._reversed_padding_repeated_twice, mode=mode)
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


@register_rule(nn.EmbeddingBag)
def embedding_bag(module: nn.EmbeddingBag, input: Tensor, grad_output: Tensor) -> dict[str, PerExampleGradient]:
    """Every row of the bag receives ``e``, over the size of the bag when the bag is averaged."""
    share = grad_output / input.shape[1] if module.mode == "mean" else grad_output
    values = share[:, None].expand(-1, input.shape[1], -1)
    if module.padding_idx is not None:
        values = values.masked_fill((input == module.padding_idx)[..., None], 0)
    return {"weight": Rows(input, values, len(module.weight))}


@register_refusal(nn.EmbeddingBag)
def _refuse_embedding_bag(module: nn.EmbeddingBag) -> str | None:
    if module.mode == "max":
        return "the rows that attain a maximum are not recorded; use mode='sum' or 'mean'"
    if module.mode == "mean" and module.padding_idx is not None:
        return "the mean over rows that are not padding is not recorded; use mode='sum'"
    return _refuse_embedding(module)


@register_rule_by_name("transformers.pytorch_utils.Conv1D")
def transposed_linear(module: Any, input: Tensor, grad_output: Tensor) -> dict[str, PerExampleGradient]:
    """GPT-2's linear layer, whose weight is ``(inputs, outputs)``."""
    gradients: dict[str, PerExampleGradient] = {}
    if module.weight.requires_grad:
        gradients["weight"] = OuterProducts(_positions(input), _positions(grad_output))
    if module.bias.requires_grad:
        gradients["bias"] = Dense(_sum_positions(grad_output))
    return gradients


@register_rule(nn.Embedding)
def embedding(module: nn.Embedding, input: Tensor, grad_output: Tensor) -> dict[str, PerExampleGradient]:
    """Row ``x_t`` of the table receives ``e_t``; the padding row receives nothing."""
    index, values = input.reshape(len(input), -1), _positions(grad_output)
    if module.padding_idx is not None:
        values = values.masked_fill((index == module.padding_idx)[..., None], 0)
    return {"weight": Rows(index, values, len(module.weight))} if module.weight.requires_grad else {}


@register_refusal(nn.Embedding)
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


def _affine(module: Any, normalised: Tensor, grad_output: Tensor, kept: tuple[int, ...]) -> dict[str, Dense]:
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
    return _affine(module, normalised, grad_output, _last(grad_output, len(module.normalized_shape)))


@register_rule(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, input: Tensor, grad_output: Tensor) -> dict[str, Dense]:
    normalised = F.rms_norm(input, module.normalized_shape, eps=module.eps)
    return _affine(module, normalised, grad_output, _last(grad_output, len(module.normalized_shape)))


def _last(tensor: Tensor, count: int) -> tuple[int, ...]:
    return tuple(range(tensor.dim() - count, tensor.dim()))


@register_rule(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, input: Tensor, grad_output: Tensor) -> dict[str, Dense]:
    normalised = F.group_norm(input, module.num_groups, eps=module.eps)
    return _affine(module, normalised, grad_output, (1,))


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: nn.InstanceNorm2d, input: Tensor, grad_output: Tensor) -> dict[str, Dense]:
    normalised = F.instance_norm(input, eps=module.eps)
    return _affine(module, normalised, grad_output, (1,))


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
        "batch normalisation mixes the examples of a batch, so no example's influence can be bounded; use GroupNorm, "
        "or let Opacus exchange it in your module's __init__: "
        "`self.net = opacus.validators.ModuleValidator.fix(self.net)`. A pretrained one may stay as it is when it is "
        "frozen there: `layer.eval().requires_grad_(False)`"
    )


@dataclass(frozen=True)
class LinearMap:
    """One use of ``linear`` inside a layer: its parameters, and from and to which of their rows (``None``: all)."""

    weight: str
    weight_rows: tuple[int, int] | None
    bias: str | None
    bias_rows: tuple[int, int] | None


def calls_linear(module: nn.Module) -> bool:
    """Whether the layer is recorded as the linear maps that it is made of: attention, whatever it drops out.

    Attention with ``add_bias_kv`` also uses parameters in other ways: that is run once more.
    """
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(module)
        and module.bias_k is None
    )


def forward_with_linear(module: nn.Module, linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """The attention layer's own ``forward``, with another function in the place of ``torch.nn.functional.linear``.

    PyTorch's code is kept, masks, dropout and all: its functions are taken with other globals.
    """
    functional = {**vars(F), "linear": linear, "has_torch_function": lambda tensors: False}
    for name in ("_in_projection", "_in_projection_packed", "multi_head_attention_forward"):
        functional[name] = _with_globals(getattr(F, name), functional)
    forward = nn.MultiheadAttention.forward
    return MethodType(_with_globals(forward, {**forward.__globals__, "F": SimpleNamespace(**functional)}), module)


def _with_globals(function: Any, names: dict[str, Any]) -> FunctionType:
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def linear_map(module: nn.Module, weight: Tensor, bias: Tensor | None) -> LinearMap:
    """Which parameters of the module, or parts of them, these tensors are."""
    return LinearMap(*_rows_of(module, weight), *((None, None) if bias is None else _rows_of(module, bias)))


def _rows_of(module: nn.Module, tensor: Tensor) -> tuple[str, tuple[int, int] | None]:
    for name, parameter in module.named_parameters():
        if tensor is parameter:
            return name, None
        if tensor._base is parameter:
            start = (tensor.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            return name, (start, start + len(tensor))
    raise RuntimeError(f"{type(module).__name__} applied a linear map that is none of its parameters.")


def of_linear_map(
    module: nn.Module, used: LinearMap, input: Tensor, grad_output: Tensor
) -> dict[str, PerExampleGradient]:
    """The gradients of one use of ``linear``: ``input`` is ``(B, T, d)``, ``grad_output`` ``(B, T, p)``."""
    gradients: dict[str, PerExampleGradient] = {}
    weight, bias = module.get_parameter(used.weight), module.get_parameter(used.bias) if used.bias else None
    if weight.requires_grad:
        gradient: PerExampleGradient = OuterProducts(grad_output, input)
        gradients[used.weight] = Blocks({used.weight_rows: gradient}, weight.shape) if used.weight_rows else gradient
    if used.bias and bias is not None and bias.requires_grad:
        gradient = Dense(_sum_positions(grad_output))
        gradients[used.bias] = Blocks({used.bias_rows: gradient}, bias.shape) if used.bias_rows else gradient
    return gradients


#: Layers that use the parameters of their children without calling the children.
OPAQUE: tuple[type[nn.Module], ...] = (nn.MultiheadAttention,)


def trainable(module: nn.Module) -> list[str]:
    """Names of the parameters that the module itself uses (not its children, unless it hides them) and that require a
    gradient."""
    opaque = isinstance(module, OPAQUE)
    own = [(name, p) for name, p in module.named_parameters(recurse=opaque) if p.requires_grad]
    if opaque or not own or not any(True for _ in module.children()):
        return [name for name, _ in own]
    # A name for a parameter that a child holds (Opacus's recurrent layers keep PyTorch's names): the child uses it.
    of_children = {id(p) for child in module.children() for p in child.parameters()}
    return [name for name, p in own if id(p) not in of_children]


def layers_with_parameters(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold parameters of their own, trainable or not, by name."""
    hidden = {id(child) for opaque in module.modules() if isinstance(opaque, OPAQUE) for child in opaque.modules()} - {
        id(child) for child in module.modules() if isinstance(child, OPAQUE)
    }
    return {
        name: m
        for name, m in module.named_modules()
        if id(m) not in hidden and any(True for _ in m.parameters(recurse=isinstance(m, OPAQUE)))
    }


def trained_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that use trainable parameters, by name."""
    return {name: m for name, m in layers_with_parameters(module).items() if trainable(m)}


def recompute(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    per_example: Sequence[bool] | None = None,
) -> dict[str, PerExampleGradient]:
    """Gradients of a layer without a rule: its forward, once more, for every example by itself (``torch.func.vmap``).

    Tensors among the arguments that have one entry per example are taken apart: those that ``per_example`` names, or,
    where nobody has found that out, those whose leading dimension is the batch. All others are shared. The layer must
    be a function of its arguments: one that draws random numbers raises a ``RuntimeError``. Source: Horace He &
    Richard Zou 2021, functorch.
    """
    batch = len(grad_output)
    leaves, structure = tree_flatten((args, dict(kwargs)))
    mapped = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch for leaf in leaves]
    if per_example is not None:
        if len(per_example) != len(leaves) or any(p and not m for p, m in zip(per_example, mapped, strict=True)):
            raise RuntimeError("it is called with other arguments than when the model was examined.")
        mapped = list(per_example)
    if any(isinstance(leaf, Tensor) and leaf.requires_grad and not m for leaf, m in zip(leaves, mapped, strict=True)):
        # Shared by all examples, it would let one example's data into another's gradient.
        raise RuntimeError("an argument that depends on the data does not have the batch as its leading dimension.")
    tensors = [leaf.detach() for leaf, is_mapped in zip(leaves, mapped, strict=True) if is_mapped]
    names = trainable(module)
    everything = {name: p.detach() for name, p in module.named_parameters()}
    own = {name: everything.pop(name) for name in names}

    def inner_product(own: dict[str, Tensor], tensors: list[Tensor], error: Tensor) -> Tensor:
        remaining = iter(tensors)
        pairs = zip(leaves, mapped, strict=True)
        filled = [next(remaining)[None] if is_mapped else leaf for leaf, is_mapped in pairs]
        args, kwargs = tree_unflatten(filled, structure)
        output = functional_call(module, {**everything, **own}, args, kwargs)
        first = output[0] if isinstance(output, tuple) else output
        return (first * error[None]).sum()

    gradients = vmap(grad(inner_product), in_dims=(None, 0, 0))(own, tensors, grad_output)
    return {name: Dense(values) for name, values in gradients.items()}
