"""Batches as trees: taking some of a collated batch's examples, whatever the batch is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def map_examples(batch: Any, size: int, take: Callable[[Any], Any]) -> Any:
    """Applies ``take`` to every part of a batch that holds one entry per example.

    Tensors whose leading dimension is ``size`` and lists of strings or other plain objects of that length are such
    parts; tensors without dimensions, numbers, strings and None are shared by all examples and kept as they are.

    Args:
        batch: What the collate function returned: tensors in tuples, lists, mappings, named tuples or dataclasses.
        size: Number of examples in the batch.
        take: Maps a tensor or list of ``size`` entries to one that holds the entries wanted, by slicing.

    Raises:
        ValueError: A tensor's leading dimension is not ``size``.
        TypeError: The batch holds something that cannot be taken apart.
    """
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            return batch
        if batch.shape[0] != size:
            raise ValueError(
                f"The batch holds a tensor of shape {tuple(batch.shape)}, but {size} examples were drawn: the leading "
                "dimension of every tensor must be the batch. Change the collate function, or override "
                "`PrivateStrategy.take_examples` to say how this batch is sliced."
            )
        return take(batch)
    if batch is None or isinstance(batch, str | bytes | int | float | bool):
        return batch
    if isinstance(batch, Mapping):
        parts = {key: map_examples(value, size, take) for key, value in batch.items()}
        return _rebuild_mapping(batch, parts)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_examples(value, size, take) for value in batch))
    if isinstance(batch, list | tuple):
        has_column = any(isinstance(item, Tensor) and _holds_examples(item, size) for item in batch)
        if len(batch) == size and not has_column and not all(_holds_examples(item, size) for item in batch):
            return take(batch)
        return type(batch)(map_examples(value, size, take) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: map_examples(getattr(batch, f.name), size, take) for f in fields(batch)})
    raise TypeError(
        f"The batch holds a {type(batch).__name__}, which cannot be sliced by example. Return tensors, lists, tuples, "
        "mappings or dataclasses from the collate function, or override `PrivateStrategy.take_examples`."
    )


def _holds_examples(item: Any, size: int) -> bool:
    """Whether an item of a list has one entry per example itself: a column, rather than one example's entry."""
    if isinstance(item, Tensor):
        return item.dim() > 0 and item.shape[0] == size
    if isinstance(item, Mapping):
        return bool(item) and all(_holds_examples(value, size) for value in item.values())
    if isinstance(item, list | tuple):
        return bool(item) and (len(item) == size or all(_holds_examples(value, size) for value in item))
    return is_dataclass(item)


def _rebuild_mapping(original: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return parts
    try:
        return type(original)(parts)  # type: ignore[call-arg]
    except TypeError:
        return parts
