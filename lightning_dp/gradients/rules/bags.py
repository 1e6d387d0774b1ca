"""Embedding bags: of rows ``(B, T)``, or joined to one vector with offsets that say where each bag begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.linear import Rows
from lightning_dp.gradients.rules.registry import Arguments, register_by_example, register_rule

#: Entry of a padded bag that no index has.
NOTHING = -1


@register_rule(nn.EmbeddingBag, with_arguments=True)
def embedding_bag(
    module: nn.EmbeddingBag, input: Tensor, grad_output: Tensor, arguments: Arguments | None = None
) -> dict[str, PerExampleGradient]:
    """Row ``x_t`` of the table receives ``e``: times its weight, over the size of a bag that is averaged, or where it
    holds the bag's maximum. ``input`` is ``(B, T)``; padding counts for nothing."""
    weights = bag_arguments(module, *arguments).get("per_sample_weights") if arguments else None
    inside = (input != NOTHING) & (input != (NOTHING if module.padding_idx is None else module.padding_idx))
    index = input.clamp(min=0)
    values = (grad_output[:, None] * inside[..., None]).to(grad_output.dtype)
    if module.mode == "mean":
        values = values / inside.sum(1).clamp(min=1)[:, None, None]
    elif module.mode == "max":
        rows = module.weight.detach()[index].masked_fill(~inside[..., None], -torch.inf)
        top = rows.argmax(1, keepdim=True)
        values = values * torch.zeros_like(values).scatter_(1, top, 1.0)
    elif weights is not None:
        values = values * weights.detach().expand(input.shape)[..., None]
    return {"weight": Rows(index, values, len(module.weight))}


@register_by_example(nn.EmbeddingBag)
def padded(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int) -> Arguments:
    """Bags that are joined, with offsets, as ``(B, T)``: entries beyond a bag's end are `NOTHING`, with weight 0.

    Raises:
        UnsupportedModelError: There is not one bag for every example, or some entry is in none.
    """
    given = bag_arguments(module, args, kwargs)
    input, offsets = given["input"], given.get("offsets")
    if offsets is None:
        return args, kwargs
    places = places_of(input, offsets, batch_size, module.include_last_offset)
    index, weights = _at(places, input, NOTHING), given.get("per_sample_weights")
    return (index,), {} if weights is None else {"per_sample_weights": _at(places, weights, 0)}


def _at(places: Tensor, joined: Tensor, elsewhere: int) -> Tensor:
    """The entries at these places, and another one where the place is -1."""
    return torch.cat([joined.detach(), joined.new_tensor([elsewhere])])[places]


def places_of(input: Tensor, offsets: Tensor, batch_size: int, include_last_offset: bool = False) -> Tensor:
    """Where the entries of every bag are in the vector that joins them: ``(B, T)``, -1 beyond a bag's end.

    Args:
        input: The vector, ``(N,)``.
        offsets: Where each bag begins, ``(B,)``; with ``include_last_offset``, and where the last ends, ``(B + 1,)``.
        batch_size: B.

    Raises:
        UnsupportedModelError: There is not one bag for every example, or some entry is in none.
    """
    starts = offsets.detach()
    ends = starts[1:] if include_last_offset else torch.cat([starts[1:], starts.new_tensor([len(input)])])
    starts = starts[: len(ends)]
    lengths = ends - starts
    whole = len(starts) == batch_size and bool((lengths >= 0).all() & (starts[0] == 0) & (ends[-1] == len(input)))
    if not whole:
        raise UnsupportedModelError(
            f"EmbeddingBag was called with {len(starts)} offsets for {batch_size} examples, or with some that leave "
            "entries out: which bag is a record's cannot be told. Give offsets that begin with 0, do not fall, and "
            "make one bag for every record; or pad the bags in the collate function to (B, T), with padding_idx, and "
            "leave offsets out."
        )
    steps = torch.arange(max(1, int(lengths.max())), device=starts.device)
    return torch.where(steps < lengths[:, None], starts[:, None] + steps, -1)


def bag_arguments(module: nn.EmbeddingBag, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by name."""
    return dict(inspect.signature(nn.EmbeddingBag.forward).bind(module, *args, **kwargs).arguments)
