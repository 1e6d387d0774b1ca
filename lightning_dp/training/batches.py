"""Batches as trees: taking some of a collated batch's examples, whatever the batch is made of.

Which dimension of which part counts the examples is found once, by comparing two batches of different size
(`find_layout`), not by looking for a length that equals the batch size: a batch may have as many words as examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.torch_api import tree_leaves

_INDEX = torch.long


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


@dataclass(frozen=True)
class Rows:
    """A tensor that holds ``each`` entries for every example along a dimension, one example after another."""

    dim: int
    each: int


@dataclass(frozen=True)
class Items:
    """A list with one entry per example."""


@dataclass(frozen=True)
class Concatenated:
    """A tensor or list whose size changes with the examples, by no fixed number for each: it cannot be sliced."""


@dataclass(frozen=True)
class Shared:
    """A part that all examples share: its size is the same in both batches."""


@dataclass(frozen=True)
class Opaque:
    """An object that is neither a tensor, a container nor a plain value: whether it holds examples is not known."""


@dataclass(frozen=True)
class Parts:
    """A container, and the layouts of its parts."""

    parts: Mapping[Any, Any]


Layout = Rows | Items | Concatenated | Shared | Opaque | Parts


#: Types of values that are no container and hold no examples.
_PLAIN = str | bytes | int | float | bool | complex


def parts_of(batch: Any) -> dict[Any, Any] | None:
    """The parts of a container, by key, index or field; ``None``: ``batch`` is no container."""
    if isinstance(batch, Mapping):
        return dict(batch.items())
    if isinstance(batch, list | tuple):
        return dict(enumerate(batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in fields(batch)}
    return None


def find_layout(small: Any, size: int, large: Any, larger: int) -> Layout:
    """Finds where the examples are in a batch: a part whose size differs between the two batches has entries for them.

    Args:
        small, large: Two batches, the second of which has the examples of the first, then others of the same lengths.
        size, larger: Number of examples in ``small`` and in ``large``.

    Raises:
        TypeError: The batches differ in keys, or in the number of dimensions of a tensor.
    """
    if isinstance(small, Tensor) and isinstance(large, Tensor):
        if small.dim() != large.dim():
            raise TypeError(f"The batch holds a tensor of {small.dim()} dimensions, and for more examples another.")
        changed = [d for d in range(small.dim()) if small.shape[d] != large.shape[d]]
        if not changed:
            return Shared()
        dim = changed[0]
        each = small.shape[dim] // size
        if len(changed) == 1 and small.shape[dim] == each * size and large.shape[dim] == each * larger:
            return Rows(dim, each)
        return Concatenated()
    one, other = parts_of(small), parts_of(large)
    if one is None or other is None:
        return Shared() if small is None or isinstance(small, _PLAIN) else Opaque()
    if len(one) == size and len(other) == larger and isinstance(small, list | tuple):
        return Items()
    if one.keys() != other.keys():
        if isinstance(small, list | tuple):
            return Concatenated()
        raise TypeError("The batch has other keys when it has more examples: collate_fn must always return the same.")
    return Parts({key: find_layout(one[key], size, other[key], larger) for key in one})


def take_rows(batch: Any, layout: Layout, size: int, rows: slice | list[int]) -> Any:
    """Some examples of a batch of ``size`` examples that has this layout, as a batch of the same form.

    Raises:
        ValueError: A part cannot be sliced by example, or the batch has another form than its layout.
        TypeError: The batch holds an object of unknown type.
    """
    if isinstance(layout, Shared):
        return batch
    if isinstance(layout, Opaque):
        raise TypeError(
            f"The batch holds a {type(batch).__name__}, which cannot be sliced by example. Return tensors, lists, "
            "tuples, mappings or dataclasses from the collate function, or override `PrivateStrategy.take_examples`."
        )
    if isinstance(layout, Parts):
        own = parts_of(batch)
        if own is None or own.keys() != layout.parts.keys():
            raise ValueError("The batch has another form than when its layout was found.")
        parts = {key: take_rows(part, layout.parts[key], size, rows) for key, part in own.items()}
        return _rebuilt(batch, parts)
    if isinstance(layout, Concatenated):
        shape = tuple(batch.shape) if isinstance(batch, Tensor) else f"{len(batch)} entries"
        raise ValueError(
            f"The batch holds {shape} for {size} examples, as many for each as it says: such a batch cannot be sliced "
            "into smaller ones. Pad to one length in the collate function, leave out max_physical_batch_size, or "
            "override `PrivateStrategy.take_examples` to say how this batch is sliced."
        )
    indices = list(range(size))[rows] if isinstance(rows, slice) else rows
    if isinstance(layout, Items):
        return type(batch)(batch[i] for i in indices)
    if batch.shape[layout.dim] % size:
        raise ValueError(
            f"The batch holds a tensor of shape {tuple(batch.shape)} for {size} examples: dimension {layout.dim} "
            "counted "
            "the examples when the layout of the batch was found."
        )
    each = batch.shape[layout.dim] // size
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(size)
        return batch.narrow(layout.dim, start * each, (stop - start) * each)
    index = batch.new_tensor([i * each + k for i in indices for k in range(each)], dtype=_INDEX)
    return batch.index_select(layout.dim, index)


def holds_examples(layout: Layout) -> bool:
    """Whether some part of a batch has an entry for every example."""
    if isinstance(layout, Parts):
        return any(map(holds_examples, layout.parts.values()))
    return isinstance(layout, Rows | Items | Concatenated)


def leaves_with_layout(batch: Any, layout: Layout) -> Iterator[tuple[Any, Layout, int | None]]:
    """Every leaf of a batch, its layout and, within a list of one entry per example (`Items`), the example's index."""
    if isinstance(layout, Parts):
        for key, part in (parts_of(batch) or {}).items():
            yield from leaves_with_layout(part, layout.parts[key])
    elif isinstance(layout, Items):
        for example, item in enumerate(batch):
            for leaf in tree_leaves(item):
                yield leaf, layout, example
    elif isinstance(layout, Concatenated) and not isinstance(batch, Tensor):
        for item in tree_leaves(batch):
            yield item, layout, None
    else:
        yield batch, layout, None


#: Shapes of the parts of one example, by a number of the part.
Shapes = frozenset[tuple[int, tuple[int, ...]]]


def shapes_of_one(batch: Any, layout: Layout) -> Shapes:
    """The shapes of a batch's tensors without the dimension that counts examples."""
    numbers: dict[int, int] = {}
    found = set()
    for leaf, own, _ in leaves_with_layout(batch, layout):
        if isinstance(leaf, Tensor):
            dim = own.dim if isinstance(own, Rows) else None
            shape = tuple(size for d, size in enumerate(leaf.shape) if d != dim)
            found.add((numbers.setdefault(id(own), len(numbers)), shape))
    return frozenset(found)


def _rebuilt(original: Any, parts: dict[Any, Any]) -> Any:
    if isinstance(original, Mapping):
        return _rebuild_mapping(original, parts)
    if isinstance(original, tuple) and hasattr(original, "_fields"):
        return type(original)(*parts.values())
    if isinstance(original, list | tuple):
        return type(original)(parts.values())
    return replace(original, **parts)
