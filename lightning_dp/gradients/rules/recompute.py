"""Layers without a rule are run once more, for every example by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_dp.gradients.base import Dense, PerExampleGradient
from lightning_dp.gradients.model import trainable
from lightning_dp.torch_api import tree_flatten, tree_unflatten


def recompute(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    grad_output: Tensor,
    per_example: Sequence[bool] | None = None,
) -> dict[str, PerExampleGradient]:
    """Gradients of a layer without a rule: its forward, once more, for every example by itself (``torch.func.vmap``).

    Tensors among the arguments that have one entry per example are taken apart: those that ``per_example`` marks, or,
    where that is ``None``, those whose leading dimension is the batch. All others are shared. The layer must
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
