"""Batches that join the entries of records, and tensors that say where each record's begin (bags with offsets).

Where a record's entries begin depends on the lengths of earlier records. It says nothing of a record that its own
entries do not, as long as it is used for nothing but telling them apart: the tracer lets it be used for that alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.training.batches import Concatenated, Layout, Rows, leaves_with_layout

if TYPE_CHECKING:
    from lightning_dp.training.independence.subject import Subject


@dataclass(frozen=True)
class Joined:
    """Some leaves of a batch, by their places among `outer_leaves`.

    Attributes:
        entries: Tensors in which the records' entries follow one another.
        beginnings: Tensors that count where each record's begin, ``(B,)``, and where the last one's end, ``(B + 1,)``.
    """

    entries: frozenset[int]
    beginnings: frozenset[int]

    def bounds(self, leaves: list[Any], records: int) -> list[int] | None:
        """Where the records' entries begin, and the last one's end; ``None``: this batch does not say so."""
        lengths = {len(leaves[place]) for place in self.entries}
        found = {tuple(leaves[place].tolist()) for place in self.beginnings}
        if len(lengths) != 1:
            return None
        [end] = lengths
        bounds = {given if len(given) > records else (*given, end) for given in found}
        if len(bounds) != 1:
            return None
        [given] = bounds
        whole = len(given) == records + 1 and given[0] == 0 and given[-1] == end
        return list(given) if whole and all(a <= b for a, b in pairwise(given)) else None


def find_joined(subject: Subject, layout: Layout) -> list[Joined]:
    """Finds such leaves, from batches of the first record, of the first two, and so on; they are kept in mind.

    Args:
        subject: The step and the records, of which a batch has one row each.
        layout: Where the records are in such a batch.
    """
    known = subject.understanding.joined
    count = len(subject.records)
    if known or subject.copies > 1 or count < 2 or not any(map(_may_join, _leaf_layouts(layout))):
        return known

    def leaves(records: list[list[Any]]) -> list[Any]:
        return [leaf for _, leaf in outer_leaves(subject.transfer(subject.collated(records)), layout)]

    try:
        growing = [leaves(subject.records[: n + 1]) for n in range(count)]
        alone = [leaves([record]) for record in subject.records]
    except Exception:  # the user's code may take no batch of one: what is not found is refused where it matters
        return known
    whole = growing[-1]
    if any(len(found) != len(whole) for found in (*growing, *alone)):
        return known
    counted: dict[tuple[int, ...], set[int]] = {}
    for place, entries in enumerate(whole):
        parts = [found[place] for found in growing]
        if all(_begins(part, entries) for part in parts):
            bounds = (0, *map(len, parts))
            if list(bounds) != list(range(count + 1)):
                counted.setdefault(bounds, set()).add(place)
    for bounds, entries_at in counted.items():
        # A record by itself begins at 0: a label that happens to be such a number does not.
        singly = [(0, end - start) for start, end in pairwise(bounds)]
        beginnings = {
            place
            for place, leaf in enumerate(whole)
            if _says(leaf, bounds) and all(_says(a[place], b) for a, b in zip(alone, singly, strict=True))
        } - entries_at
        if beginnings:
            known.append(Joined(frozenset(entries_at), frozenset(beginnings)))
    return known


def check_joined(known: list[Joined], batch: Any, layout: Layout, records: int) -> None:
    """Holds a batch to what was found on others: tensors whose records begin where the same offsets say.

    Raises:
        UnsupportedModelError: They do not, in this batch.
    """
    leaves = [leaf for _, leaf in outer_leaves(batch, layout)]
    for joined in known:
        if joined.bounds(leaves, records) is None:
            raise UnsupportedModelError(
                "In this batch, tensors that join the records' entries are not as long as one another, or their "
                "offsets differ, and were so where they were examined: which entries are a record's cannot be told. "
                "Let collate_fn join columns of equal lengths, or give each column offsets of its own."
            )


def outer_leaves(batch: Any, layout: Layout) -> list[tuple[int, Any]]:
    """Leaves of a batch that are not in a list with one entry per example, each with its place among all."""
    leaves = enumerate(leaves_with_layout(batch, layout))
    return [(place, leaf) for place, (leaf, _, example) in leaves if example is None]


def _begins(part: Any, whole: Any) -> bool:
    both = isinstance(part, Tensor) and isinstance(whole, Tensor)
    return both and part.dim() > 0 and part.dim() == whole.dim() and torch.equal(part, whole[: len(part)])


def _may_join(where: Layout) -> bool:
    # By chance, the lengths of a few records may add up to a multiple of their number.
    return isinstance(where, Concatenated) or (isinstance(where, Rows) and where.dim == 0 and where.each > 1)


def _leaf_layouts(layout: Any) -> Iterator[Layout]:
    parts = getattr(layout, "parts", None)
    if parts is None:
        yield layout
    else:
        for part in parts.values():
            yield from _leaf_layouts(part)


def _says(leaf: Any, bounds: tuple[int, ...]) -> bool:
    if not isinstance(leaf, Tensor) or leaf.dim() != 1 or leaf.is_floating_point() or leaf.is_complex():
        return False
    return tuple(leaf.tolist()) in (bounds, bounds[:-1])
