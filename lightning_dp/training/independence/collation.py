"""Collation must treat every record by itself: its rows of a batch are the same, whichever others are in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.training.batches import Concatenated, Layout, Rows, find_layout, leaves_with_layout, parts_of
from lightning_dp.training.independence.joined import Joined, find_joined, outer_leaves
from lightning_dp.training.independence.shadow import AlignedRandomness, random_state_kept
from lightning_dp.training.independence.subject import Subject


def check_collation(subject: Subject, seed: int = 0) -> list[str]:
    """A record's own rows of a batch must be the same, whichever records are in it besides.

    Returns:
        What could not be looked at, in sentences.

    Raises:
        PrivacyConfigurationError: Collation, or a transfer hook, mixes records or drops some, or the batch changes its
            form with their number.
    """
    records = subject.records
    rows = len(records) * subject.copies
    half = len(records) // 2
    with random_state_kept():
        batches = []
        unaligned = False
        first, second = records[:half], records[half:]
        companies = [records, [*first, *(first * 2)[: len(second)]], [*second[:half], *second]]
        for company in [*companies, [*records, *records[:3]]]:
            count = len(company) * subject.copies
            aligned = AlignedRandomness(count, seed)
            with aligned:
                batches.append(subject.transfer(subject.collated(company, seed)))
            unaligned |= aligned.unaligned
        whole, *exchanged, larger = batches
        _check_count(whole, rows)
        try:
            layout = find_layout(whole, rows, larger, rows + 3 * subject.copies)
        except TypeError as error:
            raise PrivacyConfigurationError(str(error)) from None
        joined = find_joined(subject, layout)
        kept = [slice(0, half * subject.copies), slice(half * subject.copies, rows)]
        for batch, own in zip(exchanged, kept, strict=True):
            if not _same_rows(whole, batch, layout, rows, own, joined):
                if _in_some_order(subject, whole, layout, rows):
                    return ["collation puts records into an order of its own: places were not compared"]
                if unaligned:
                    return ["collation draws random numbers that depend on the whole batch: rows were not compared"]
                if _counts_beginnings(whole, layout, rows):
                    raise PrivacyConfigurationError(
                        "collate_fn joins the records and counts where each begins (offsets of an EmbeddingBag): what "
                        "belongs to a record depends on the lengths of others. Pad the records to (B, T) with "
                        "pad_sequence(…, batch_first=True, padding_value=padding_idx), give padding_idx to the "
                        "EmbeddingBag, and leave offsets out."
                    )
                raise PrivacyConfigurationError(
                    "Exchanging some records of a batch changed the rows of others: collate_fn or a transfer hook "
                    "(on_after_batch_transfer) mixes records (mixup, normalising by the batch) or sorts them anew. "
                    "Let it treat every record by itself; mix or normalise in the data set, by public numbers."
                )
    return []


def _counts_beginnings(batch: Any, layout: Layout, rows: int) -> bool:
    """Whether a tensor of the batch counts up from 0, to below the length of another that joins the records."""
    leaves = [(leaf, where) for leaf, where, _ in leaves_with_layout(batch, layout) if isinstance(leaf, Tensor)]
    joined = [len(leaf) for leaf, where in leaves if isinstance(where, Concatenated)]
    return any(
        isinstance(where, Rows) and leaf.shape == (rows,) and not leaf.is_floating_point() and leaf[0] == 0
        and bool((leaf.diff() >= 0).all()) and int(leaf[-1]) <= max(joined, default=-1)
        for leaf, where in leaves
    )  # fmt: skip


def _check_count(batch: Any, rows: int) -> None:
    """A collate function that drops records is told so first."""
    lengths = _lengths(batch)
    if lengths and rows > max(lengths):
        raise PrivacyConfigurationError(
            f"collate_fn made a batch of at most {max(lengths)} rows of {rows} records: it drops some (None, say). How "
            "many are left would depend on the data. Leave such records out of the data set instead: "
            "torch.utils.data.Subset(dataset, [i for i in range(len(dataset)) if is_good(dataset[i])])."
        )


def _lengths(batch: Any) -> set[int]:
    """How long the parts of a batch are, wherever they count."""
    if isinstance(batch, Tensor):
        return set(batch.shape)
    parts = parts_of(batch)
    return set() if parts is None else {len(parts)}.union(*map(_lengths, parts.values()))


def _rows_of(batch: Any, layout: Layout, rows: int, own: slice, joined: Sequence[Joined] = ()) -> list[Any]:
    found: list[Any] = []
    leaves = list(leaves_with_layout(batch, layout))
    outer = outer_leaves(batch, layout)
    elsewhere: set[int] = set()
    for group in joined:
        bounds = group.bounds([leaf for _, leaf in outer], rows)
        elsewhere |= {outer[place][0] for place in group.entries | group.beginnings}
        if bounds is None:
            found.append(None)
            continue
        start, stop, _ = own.indices(rows)
        found.append(torch.tensor(bounds[start : stop + 1]).diff())
        found += [outer[place][1][bounds[start] : bounds[stop]] for place in sorted(group.entries)]
    for place, (leaf, where, example) in enumerate(leaves):
        if place in elsewhere:
            continue
        if isinstance(where, Rows) and isinstance(leaf, Tensor):
            each = leaf.shape[where.dim] // rows
            start, stop, _ = own.indices(rows)
            found.append(leaf.narrow(where.dim, start * each, (stop - start) * each))
        elif example is not None and example in range(*own.indices(rows)):
            found.append(leaf)
        elif isinstance(where, Concatenated):
            found.append(None)
    return found


def _same_rows(one: Any, other: Any, layout: Layout, rows: int, own: slice, joined: Sequence[Joined]) -> bool:
    found = [_rows_of(batch, layout, rows, own, joined) for batch in (one, other)]
    return len(found[0]) == len(found[1]) and all(map(_same_leaf, *found))


def _same_leaf(one: Any, other: Any) -> bool:
    """Equal as far as both are long: padding may go on."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return isinstance(one, Tensor) == isinstance(other, Tensor)
    if one.dim() != other.dim():
        return False
    common = tuple(slice(0, min(a, b)) for a, b in zip(one.shape, other.shape, strict=True))
    a, b = one[common], other[common]
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _in_some_order(subject: Subject, whole: Any, layout: Layout, rows: int) -> bool:
    """Whether the rows are those of single records, in an order that collation chose (by length, say)."""
    left = list(range(rows))
    for record in subject.records:
        alone = subject.transfer(subject.collated([record]))
        own = _rows_of(alone, layout, subject.copies, slice(0, 1))
        place = next(
            (r for r in left if all(map(_same_leaf, own, _rows_of(whole, layout, rows, slice(r, r + 1))))), None
        )
        if place is None:
            return False
        left.remove(place)
    return True


def check_copies_stay_together(subject: Subject) -> None:
    """The augmentations of a record must stay side by side.

    Raises:
        PrivacyConfigurationError: Collation or transfer moves rows, so that they cannot be told from another record's.
    """
    try:
        unseen = check_collation(subject)
    except PrivacyConfigurationError as error:
        raise PrivacyConfigurationError(
            f"augmentation_multiplicity={subject.copies}: exchanging some records of a batch changed the rows of "
            "others, so that the augmentations of a record cannot be told from those of another. Collate and transfer "
            f"must keep the order of rows (no sorting by length), and treat each by itself. ({error})"
        ) from None
    if any("order of its own" in sentence for sentence in unseen):
        raise PrivacyConfigurationError(
            f"augmentation_multiplicity={subject.copies}: exchanging some records of a batch changed the rows of "
            "others: collation sorts them, so that the augmentations of a record cannot be told from those of another."
        )
