from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_dp.batches import map_examples

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
