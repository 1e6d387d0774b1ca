"""Where expressions meet records: the function, applied to every example with a copy of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.arrangement import (
    FLAT,
    FLAT_SECOND,
    ROWS,
    by_example,
    put_together,
    spread_copies,
    take_apart,
)
from lightning_dp.gradients.base import Dense
from lightning_dp.gradients.expressions.copies import Copies
from lightning_dp.gradients.expressions.expression import WAY_OUT, Expression, Operands
from lightning_dp.gradients.expressions.functions import BROADCASTING, PRODUCTS, name_of, operator_of, writes
from lightning_dp.gradients.linear import OuterProducts, Rows
from lightning_dp.gradients.rules.layers import sum_positions
from lightning_dp.torch_api import base_of, functions_unwatched, tree_map, version_of


def meet(func: Any, operands: Operands, copies: Copies) -> Any:
    """What a function returns of expressions and records.

    Raises:
        UnsupportedModelError: It cannot be applied to one example at a time.
    """
    with functions_unwatched():
        for special in (_looked_up, _linear, _written_where):
            result = special(func, operands, copies)
            if result is not None:
                return result
        return _with_copies(func, operands, copies)


def _with_copies(func: Any, operands: Operands, copies: Copies) -> Any:
    leaves, places = operands.leaves, operands.places
    if isinstance(leaves[0], Expression) and writes(func):
        raise UnsupportedModelError(
            f"{operands.used_in(func)}, which writes what depends on records into what was computed from the "
            f"parameter. Use an operation that returns a new tensor (torch.cat, torch.where), {WAY_OUT}."
        )
    if operator_of(func) in BROADCASTING:
        aligned = {i: _aligned(leaves[i], operands, copies) for i in places}
        if all(tensor is not None for tensor in aligned.values()):
            return operands.call(func, [aligned.get(i, leaf) for i, leaf in enumerate(leaves)])
    try:
        return _one_by_one(func, operands, copies, by_row=[])
    except UnsupportedModelError:
        if writes(func) or operands.arrangement not in (ROWS, FLAT):
            raise
        # The function pairs rows with rows (DeBERTa's positions, repeated for every example's heads).
        counts = {len(leaves[i]) for i in operands.rows}
        has_rows = [i for i in places if leaves[i].dim() and len(leaves[i]) > 1 and {len(leaves[i])} == counts]
        if not has_rows:
            raise
        return _one_by_one(func, operands, copies, by_row=has_rows)


def _aligned(expression: Expression, operands: Operands, copies: Copies) -> Tensor | None:
    """Copies as they are broadcast against the tensors that have the examples; ``None``: it has a dimension of its own
    in their place."""
    largest = max((operands.leaves[i] for i in operands.rows), key=lambda tensor: int(tensor.dim()))
    if operands.arrangement in (ROWS, FLAT) and expression.dim() == largest.dim() and len(expression) != 1:
        return copies.of(expression, by_row=True) if len(expression) == len(largest) else None
    entries = len(largest) // copies.batch_size
    return spread_copies(copies.of(expression), largest.dim(), operands.arrangement, entries)


def _one_by_one(func: Any, operands: Operands, copies: Copies, by_row: Sequence[int]) -> Any:
    """The function of one example at a time, by `torch.vmap`.

    Args:
        by_row: Which of the leaves are expressions with as many rows as the tensors that have the examples.
    """
    leaves, arrangement, size = operands.leaves, operands.arrangement, copies.batch_size
    split = [*operands.rows, *operands.places]
    apart = [take_apart(leaves[i], arrangement, size) for i in operands.rows]
    apart += [
        (copies.of(leaves[i], by_row=True).unflatten(0, (size, -1)) if i in by_row else copies.of(leaves[i]), 0)
        for i in operands.places
    ]
    tensors, dims = zip(*apart, strict=True)

    def of_one(*taken: Tensor) -> Any:
        filled = list(leaves)
        for i, tensor in zip(split, taken, strict=True):
            filled[i] = tensor
        result = operands.call(func, filled)
        return taken[0] if writes(func) else result

    try:
        result = torch.vmap(of_one, dims, dims[0])(*tensors)
    except (RuntimeError, ValueError, TypeError) as error:  # an index that is out of range is the user's error
        raise operands.not_by_example(func, str(error).splitlines()[0].removeprefix("vmap: ")[:200]) from None
    if writes(func):
        return None if name_of(func) == "__setitem__" else leaves[0]

    def joined(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        together = put_together(value, arrangement)
        if together is None:
            raise operands.not_by_example(func, f"one gives a result of shape {tuple(value.shape[1:])}")
        return together

    return tree_map(joined, result)


def _linear(func: Any, operands: Operands, copies: Copies) -> Tensor | None:
    """A linear map of a parameter, or its transpose: its gradients, outer products, need not be in memory."""
    leaves = operands.leaves
    if operands.rows != [0] or len(leaves) < 2 or leaves[0].dim() < 2 or copies.is_followed_twice:
        return None
    input, weight, bias = leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None
    is_linear, is_product = func is F.linear, name_of(func) in PRODUCTS
    if not isinstance(weight, Expression) or weight.root is None or weight.dim() != 2 or not (is_linear or is_product):
        return None
    of_bias = bias.root if is_linear and isinstance(bias, Expression) else None
    if bias is not None and of_bias is None:
        return None
    plain = [leaf.as_subclass(Tensor) if isinstance(leaf, Expression) else leaf for leaf in leaves[1:]]
    if not copies.is_connected:
        plain = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in plain]
    output: Tensor = operands.call(func, [input, *plain])
    root, arrangement, seen = weight.root, operands.arrangement, input.detach()
    outputs_first = is_linear != weight.is_transposed

    def hand_over(gradient: Tensor) -> None:
        left, right = (_positions(by_example(t, arrangement, copies.batch_size)) for t in (gradient, seen))
        copies.hand_over(root, OuterProducts(left, right) if outputs_first else OuterProducts(right, left))
        if of_bias is not None:
            copies.hand_over(of_bias, Dense(sum_positions(left)))

    return _recorded(output, operands.roots, seen, copies, hand_over)


def _recorded(
    output: Tensor, roots: Sequence[str], seen: Tensor, copies: Copies, hand_over: Callable[[Tensor], None]
) -> Tensor:
    """An output whose gradient, and what was seen, give the gradients of the parameters.

    Args:
        output: What a function returned.
        roots: Names of the parameters.
        seen: What the function was applied to; it must stay as it is.
        copies: Of this forward pass.
        hand_over: Called with the gradient at the output.
    """
    output = output if output.requires_grad else copies.in_graph(output)
    copies.expect(roots)
    version, used, twice = version_of(seen), False, False

    def come_back(gradient: Tensor) -> None:
        nonlocal used, twice
        if not copies.is_listening():
            twice |= torch.is_grad_enabled()
            return
        if used or twice:
            raise UnsupportedModelError(
                f"Parameter {roots[0]!r}: more than one backward pass through one forward, {WAY_OUT}."
            )
        if version_of(seen) != version:
            raise UnsupportedModelError(
                f"Parameter {roots[0]!r}: what it was applied to was modified in place afterwards. Use an ordinary "
                "operation there."
            )
        used = True
        hand_over(gradient.detach())

    output = output.clone() if base_of(output) is not None else output  # in-place work would cut a view's hook off
    output.register_hook(come_back)
    return output


def _looked_up(func: Any, operands: Operands, copies: Copies) -> Tensor | None:
    """A table of parameters, looked up by whole numbers that are each example's (`torch.nn.functional.embedding`).

    `torch.vmap` leaves the padding row out for one example only, so every example's part of the table is taken here.
    """
    if func is not F.embedding:
        return None
    given = list(operands.leaves)
    index, table, padding, norm, _, by_frequency, sparse = given + list(_EMBEDDING[len(given) :])
    if operands.rows != [0] or not isinstance(table, Expression) or norm is not None or by_frequency or sparse:
        raise operands.not_by_example(func, "it renormalises, counts, or looks up in a table of each example's own")
    size, rows = copies.batch_size, len(table)
    own = by_example(index, operands.arrangement, size)
    is_padding = None if padding is None else own == padding % rows
    if table.root is not None and not table.is_transposed and not copies.is_followed_twice:
        plain = table.as_subclass(Tensor)
        output: Tensor = operands.call(func, [index, plain if copies.is_connected else plain.detach(), *given[2:]])
        root, arrangement = table.root, operands.arrangement

        def hand_over(gradient: Tensor) -> None:
            values = by_example(gradient, arrangement, size)
            values = values if is_padding is None else values.masked_fill(is_padding[..., None], 0)
            copies.hand_over(root, Rows(own.reshape(size, -1), values.reshape(size, -1, values.shape[-1]), rows))

        return _recorded(output, operands.roots, index, copies, hand_over)
    place = torch.arange(size, device=index.device).view(-1, *[1] * (own.dim() - 1))
    found = copies.of(table)[place, own]
    if is_padding is not None:
        found = torch.where(is_padding[..., None], found.detach(), found)
    return _as_given(found, operands.arrangement)


#: What `torch.nn.functional.embedding` takes, where it is not given.
_EMBEDDING = (None, None, None, None, 2.0, False, False)


def _as_given(by_example: Tensor, arrangement: str) -> Tensor:
    """The reverse of `lightning_dp.gradients.arrangement.by_example`."""
    if arrangement == FLAT:
        return by_example.flatten(0, 1)
    moved = by_example if arrangement == ROWS else by_example.transpose(0, 1)
    return moved.flatten(0, 1) if arrangement == FLAT_SECOND else moved


def _written_where(func: Any, operands: Operands, copies: Copies) -> Tensor | None:
    """``hidden[mask] = token``: one token for all positions that an example's mask chooses."""
    leaves = operands.leaves
    if name_of(func) != "__setitem__" or len(leaves) != 3 or not isinstance(leaves[2], Expression):
        return None
    hidden, mask, token = leaves
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or operands.rows != [0, 1]:
        return None
    rest = hidden.dim() - mask.dim()
    if hidden.shape[: mask.dim()] != mask.shape or token.dim() > rest:
        return None
    aligned = _aligned(token, operands, copies)
    if aligned is None:
        return None
    hidden.copy_(torch.where(mask.view(*mask.shape, *[1] * rest), aligned, hidden.clone()))
    return hidden


def _positions(tensor: Tensor) -> Tensor:
    """``(B, …, d)`` as ``(B, T, d)``."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)
