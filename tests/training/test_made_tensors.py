"""Bytes of the tensors that some code makes."""

from __future__ import annotations

import torch
from torch import nn

from lightning_dp.training.made_tensors import MadeTensors


def test_what_is_alive_at_once_counts() -> None:
    before = torch.zeros(50)
    with MadeTensors() as made:
        one = before + 1  # 200 bytes
        two = one * 2  # 400
        part = one[:10]
        del one  # the part keeps it
        assert made.peak == 400
        del part
        three = two.double()  # 200 + 400
        assert made.peak == 600
        del two, three
        torch.zeros(10)
    assert made.peak == 600


def test_what_was_there_before_does_not_count() -> None:
    before, other = torch.zeros(50), torch.zeros(50)
    with MadeTensors() as made:
        before.add_(other)
        before[3:].mul_(2)
    assert made.peak == 0


def test_a_layers_saved_inputs_and_gradients_count() -> None:
    layer, batch = nn.Linear(100, 30), torch.randn(20, 100)
    with MadeTensors() as made:
        layer(batch).relu().sum().backward()
    # At the end of the backward pass: the gradients, and what they are made from (20 x 30).
    weights = 4 * (100 * 30 + 30)
    assert weights <= made.peak <= weights + 3 * 4 * 20 * 30 + 8
