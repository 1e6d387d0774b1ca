"""Which record each number of a batch belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.torch_api import tree_leaves
from lightning_dp.training.batches import (
    Concatenated,
    Items,
    Layout,
    Opaque,
    Rows,
    Shared,
    find_layout,
    holds_examples,
    leaves_with_layout,
    parts_of,
)
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.findings import Findings
from lightning_dp.training.independence.joined import find_joined, outer_leaves
from lightning_dp.training.independence.owners import State
from lightning_dp.training.independence.subject import Subject
from lightning_dp.training.independence.tracer import RowTracer

#: Mixtures that exist before the step begins: they reach a step on a single record as well.
OF_METRIC = "the state of a metric, which earlier records have left"


OF_COLLATION = "what collate_fn computes from the whole batch"


#: What offsets hold: see `lightning_dp.training.independence.joined`.
OF_LENGTHS = "where records begin in a tensor that joins them, which depends on the lengths of earlier ones"


class BatchOwners:
    """Tells a tracer which numbers of a batch belong to which record.

    Args:
        subject: The step and the records.
        tracer: What is told.
        found: What could not be followed is noted here.
        rows: Number of rows of the batch.
        drawn: Whether the batch was drawn for a step, rather than made of the subject's records.
    """

    def __init__(self, subject: Subject, tracer: RowTracer, found: Findings, rows: int, drawn: bool) -> None:
        self._subject, self._tracer, self._found, self._drawn = subject, tracer, found, drawn
        self._rows, self._records = rows, rows // subject.copies
        self._layout: Layout | None = None

    def find_layout(self, batch: Any) -> Layout:
        """Finds where the examples are, from this batch and one with three records repeated: no length changes."""
        records = self._subject.records
        more = [*records, *records[:3]]
        large = self._subject.collated(more)
        copies = self._subject.copies
        return find_layout(batch, self._rows, large, len(more) * copies)

    def own(self, batch: Any, layout: Layout) -> None:
        """Tells the tracer which numbers of the batch are whose."""
        opaque = []
        if not holds_examples(layout):
            self._refuse_opaque(batch)
        other = self._of_others() if not self._drawn else None
        elsewhere = list(leaves_with_layout(other, layout)) if other is not None else []
        joined = self._own_joined(batch, layout)
        for place, (leaf, where, example) in enumerate(leaves_with_layout(batch, layout)):
            if place in joined:
                continue
            if isinstance(where, Shared):
                same = place >= len(elsewhere) or same_values(leaf, elsewhere[place][0])
                if not same and isinstance(leaf, Tensor):
                    why = OF_COLLATION
                    self._tracer.write(leaf, State(owners.constant(owners.MIXED, leaf.dim()), why=why))
                elif not same:
                    self._found.decisions["collate_fn"] = f"a {type(leaf).__name__} that depends on the whole batch"
                continue
            if isinstance(where, Opaque) or not isinstance(leaf, Tensor):
                opaque.append(type(leaf).__name__)
            elif isinstance(where, Items) and example is not None:
                record = example // self._subject.copies
                self._tracer.own(leaf, owners.constant(record, leaf.dim()))
            elif isinstance(where, Rows):
                self._tracer.own(leaf, owners.rows(leaf.shape[where.dim], leaf.dim(), self._records, where.dim))
            elif isinstance(where, Concatenated):
                self._own_concatenated(leaf)
        kinds = sorted(set(opaque) - {"int", "float", "bool", "NoneType"})
        if kinds:
            self._tracer.opaque = True
            self._found.unseen.append(
                f"what the step does with {', '.join(kinds)} objects in the batch is not followed"
            )

    def note_labels(self, batch: Any, layout: Layout) -> None:
        """Tells the tracer which tensors hold the records' own numbers."""
        try:
            leaves = list(leaves_with_layout(batch, layout))
        except (KeyError, TypeError, AttributeError):  # a transfer hook made another batch of it
            return
        for place, (leaf, where, _) in enumerate(leaves):
            if isinstance(where, Rows) and isinstance(leaf, Tensor) and leaf.numel() and not leaf.is_complex():
                self._tracer.labels[place] = leaf

    def _own_joined(self, batch: Any, layout: Layout) -> set[int]:
        """Tells the tracer of leaves that join records, and of those that say where each begins: their places."""
        outer = outer_leaves(batch, layout)
        leaves = [leaf for _, leaf in outer]
        done: set[int] = set()
        for number, joined in enumerate(find_joined(self._subject, layout), start=1):
            bounds = joined.bounds(leaves, self._records)
            if bounds is None:
                continue
            owner = torch.arange(self._records, dtype=owners.DTYPE).repeat_interleave(torch.tensor(bounds).diff())
            for place in joined.entries:
                leaf = leaves[place]
                along = owner.view([-1] + [1] * (leaf.dim() - 1))
                self._tracer.write(leaf, State(along, ragged=True, joined=number))
            for place in joined.beginnings:
                counted = State(owners.constant(owners.MIXED, 1), why=OF_LENGTHS, joined=-number)
                self._tracer.write(leaves[place], counted)
            done |= {outer[place][0] for place in joined.entries | joined.beginnings}
        return done

    def _of_others(self) -> Any:
        """A batch of as many records, all of the second half."""
        records = self._subject.records
        others = records[max(1, len(records) // 2) :] or records
        return self._subject.collated([others[i % len(others)] for i in range(len(records))])

    def _refuse_opaque(self, batch: Any) -> None:
        """A batch in which no entry can be told to be one record's."""
        raise UnsupportedModelError(
            f"The batch ({type(batch).__name__}) holds nothing of which one entry belongs to one record: records "
            "cannot "
            "be told apart. Return tensors, lists, tuples, mappings or dataclasses from the collate function, with one "
            "entry per record."
        )

    def _own_concatenated(self, leaf: Tensor) -> None:
        """Records follow one another, with as many entries as each has: found by leaving some out."""
        subject = self._subject
        bounds = [0]
        if not self._drawn:
            for count in range(1, self._records + 1):
                part = subject.collated(subject.records[:count])
                found = [x for x in _tensors_of(part) if x.dtype == leaf.dtype and x.dim() == leaf.dim()]
                fitting = [len(x) for x in found if x.dim() and torch.equal(x, leaf[: len(x)])]
                if not fitting:
                    break
                bounds.append(max(fitting))
        if len(bounds) != self._records + 1 or bounds[-1] != len(leaf):
            self._tracer.own(leaf, owners.constant(owners.MIXED, leaf.dim()))
            return
        owner = torch.cat(
            [
                torch.full((b - a,), i, dtype=owners.DTYPE)
                for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
            ]
        )
        self._tracer.own(leaf, owner.view([-1] + [1] * (leaf.dim() - 1)), ragged=True)


def _tensors_of(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = parts_of(tree)
    if parts is None:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [tensor for part in parts.values() for tensor in _tensors_of(part)]


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def same_values(one: Any, other: Any) -> bool:
    """Whether two kept things are equal, NaN to NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return False
        same = one.detach() == other.detach()
        if one.is_floating_point() and other.is_floating_point():
            same |= one.isnan() & other.isnan()
        return bool(same.all())
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    if type(one) is not type(other):
        return False
    return bool(one == other) or one != one
