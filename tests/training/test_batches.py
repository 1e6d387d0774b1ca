from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_dp.training.batches import Concatenated, Items, Rows, Shared, find_layout, map_examples, take_rows

Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: torch.Tensor
    note: str


def first_two(batch: Any) -> Any:
    return map_examples(batch, 4, lambda part: part[:2])


def test_all_kinds_of_batches_are_sliced() -> None:
    x = torch.arange(12).view(4, 3)
    assert torch.equal(first_two(x), x[:2])
    assert torch.equal(first_two([x, x])[1], x[:2])
    assert torch.equal(first_two(Pair(x, None)).x, x[:2])
    assert torch.equal(first_two({"a": (x,), "n": 3})["a"][0], x[:2])
    assert torch.equal(first_two(UserDict(a=x))["a"], x[:2])
    assert first_two(Record(x, "note")).note == "note"
    assert first_two(["a", "b", "c", "d"]) == ["a", "b"]
    assert first_two([x, "shared", torch.tensor(1.0)])[1:] == ["shared", torch.tensor(1.0)]


def test_a_list_with_one_entry_per_example_is_sliced_as_one() -> None:
    """Detection targets: one dictionary of differently many boxes per image."""
    targets = [{"boxes": torch.zeros(i, 4)} for i in range(4)]
    assert first_two((torch.zeros(4, 1), targets))[1] == targets[:2]


def test_four_columns_of_four_examples_are_columns() -> None:
    columns = [torch.arange(4) + i for i in range(4)]
    assert [c.tolist() for c in first_two(columns)] == [[i, i + 1] for i in range(4)]


def test_a_tuple_as_long_as_the_batch_is_still_columns() -> None:
    x = torch.arange(3)
    assert map_examples((x, x, "train"), 3, lambda part: part[:1])[2] == "train"
    assert map_examples((x, x, None), 3, lambda part: part[:1])[0].tolist() == [0]


def test_what_cannot_be_sliced_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4\), but 4 examples"):
        first_two(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="object.*take_examples"):
        first_two(object())


def collated(count: int) -> dict[str, Any]:
    """A batch whose words, images and table are as many as its examples, when there are four."""
    return {
        "ids": torch.arange(count * 4).view(count, 4),
        "time first": torch.arange(4 * count).view(4, count),
        "flattened": torch.arange(count * 3),
        "table": torch.eye(4),
        "images": [torch.full((3, 4 + i), i) for i in range(count)],
        "columns": [torch.arange(count), torch.arange(count) * 10, torch.ones(count), torch.zeros(count)],
        "targets": torch.cat([torch.full((1 + i % 3,), i) for i in range(count)]),
        "scale": torch.tensor(2.0),
        "names": [f"record {i}" for i in range(count)],
    }


def test_what_changes_with_the_number_of_examples_is_theirs() -> None:
    layout: Any = find_layout(collated(4), 4, collated(6), 6)
    assert layout.parts["ids"] == Rows(0, 1) and layout.parts["time first"] == Rows(1, 1)
    assert layout.parts["flattened"] == Rows(0, 3)
    assert layout.parts["table"] == Shared() == layout.parts["scale"]
    assert layout.parts["images"] == Items() == layout.parts["names"]
    assert layout.parts["targets"] == Concatenated()


def test_examples_are_taken_where_they_were_found_to_be() -> None:
    layout = find_layout(collated(4), 4, collated(6), 6)
    batch = collated(5)
    del batch["targets"]
    layout.parts.pop("targets")  # type: ignore[union-attr, attr-defined]
    for rows in (slice(1, 3), [1, 2]):
        part = take_rows(batch, layout, 5, rows)
        assert torch.equal(part["ids"], batch["ids"][1:3])
        assert torch.equal(part["time first"], batch["time first"][:, 1:3])
        assert torch.equal(part["flattened"], batch["flattened"][3:9])
        assert torch.equal(part["table"], torch.eye(4)), "four rows by four, whatever the batch"
        assert [len(image[0]) for image in part["images"]] == [5, 6]
        assert part["columns"][1].tolist() == [10, 20], "four columns are no four examples"
        assert part["names"] == ["record 1", "record 2"]


def test_what_cannot_be_told_apart_is_named_when_it_is_sliced() -> None:
    batch = {"targets": collated(4)["targets"]}
    layout = find_layout(batch, 4, {"targets": collated(6)["targets"]}, 6)
    with pytest.raises(ValueError, match="as many for each as it says.*take_examples"):
        take_rows(batch, layout, 4, slice(0, 2))
