"""A penalty on parameters that is added to the loss of a batch: it is part of every example's own loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.base import Dense
from lightning_dp.gradients.expressions.copies import Copies
from lightning_dp.gradients.expressions.expression import Expression, Operands
from lightning_dp.gradients.expressions.functions import writes
from lightning_dp.gradients.forms import Share
from lightning_dp.torch_api import functions_unwatched


def add_penalty(func: Any, operands: Operands, copies: Copies, share: Share) -> Tensor:
    """What a function returns that adds a number of parameters alone to the loss of a batch.

    Formal guarantee: what is handed over for an example is ``factor · ∇penalty``, whatever batch it is in. So a record
    more changes no other record's contribution, which a share that depends on the number of records would.

    Args:
        func: Adds or subtracts.
        operands: The loss, and expressions that are single numbers.
        copies: Of this forward pass.
        share: How much of it is each example's.
    """
    with functions_unwatched():
        values = {i: operands.leaves[i].as_subclass(Tensor) for i in operands.places}
        penalty = torch.stack([slope * values[i] for i, slope in _slopes(func, operands).items()]).sum()
        plain = [values.get(i, leaf) for i, leaf in enumerate(operands.leaves)]
        if not copies.is_connected:
            plain = [leaf.detach() if i in values else leaf for i, leaf in enumerate(plain)]
        result: Tensor = operands.call(func, plain)
        copies.expect(operands.roots)

        def come_back(gradient: Tensor) -> None:
            if not copies.is_listening():
                return
            if gradient.device.type == "cpu" and not math.isclose(gradient.item(), share.factor, rel_tol=1e-5):
                raise UnsupportedModelError(
                    f"Parameter {operands.roots[0]!r}: a penalty on it has the weight {gradient.item():g} in the loss "
                    f"of this batch, and had {share.factor:g} in another: add it to the mean over examples, not to "
                    "their sum before it is divided."
                )
            sources = [copies.roots[name] for name in operands.roots]
            rows = copies.batch_size
            factor = share.factor / rows if share.reduction == "mean" else share.factor
            found = torch.autograd.grad(penalty, sources, retain_graph=True, allow_unused=True)
            for name, of_penalty in zip(operands.roots, found, strict=True):
                if of_penalty is not None:
                    copies.hand_over(name, Dense((factor * of_penalty).expand(rows, *of_penalty.shape)))

        result.register_hook(come_back)
        return result


def _slopes(func: Any, operands: Operands) -> dict[int, float]:
    """What each expression among the operands is multiplied with in the result: 1, -1, or a given factor."""
    leaves = list(operands.leaves)
    ones = {i: torch.ones_like(leaves[i].as_subclass(Tensor)).requires_grad_() for i in operands.places}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i] = ones.get(i, leaf.detach().clone())
    with torch.enable_grad():
        result = operands.call(func, leaves)
        found = torch.autograd.grad(result, list(ones.values()))
    return {i: float(slope) for i, slope in zip(ones, found, strict=True)}


def is_penalty(operands: Operands, func: Any) -> bool:
    """Whether the expressions among the operands are single numbers, none of which is written to."""
    first = operands.leaves[0]
    all_numbers = all(not operands.leaves[i].dim() for i in operands.places)
    return all_numbers and not (writes(func) and isinstance(first, Expression))
