"""Means over the batch, understood as means over records: against the loop over records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp import UnsupportedModelError
from lightning_dp.errors import FormChanged
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.losses import Forms, PerRecordMeans
from lightning_dp.training.independence.tracer import RowTracer


def understood(
    loss: Any, logits: Tensor, targets: Tensor, records: int, forms: Forms | None = None, again: bool = False
) -> Tensor:
    """The loss as it is understood, while it is examined or, with ``forms``, afterwards."""
    if forms and not again:
        with PerRecordMeans(records, forms):
            return loss(logits, targets)
    tracer = RowTracer(records)
    for tensor in (logits, targets):
        tracer.own(tensor, owners.rows(len(tensor), tensor.dim(), records))
    found: Forms = {} if forms is None else forms
    with tracer, PerRecordMeans(records, found, tracer):
        return loss(logits, targets)


def by_record(logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """``logits (B, T, C)``, ``targets (B, T)``: the mean over records of each record's own mean."""
    own = []
    for scores, labels in zip(logits, targets, strict=True):
        losses = F.cross_entropy(scores, labels, reduction="none")
        weights = torch.ones(len(labels)) if weight is None else (weight / weight.mean())[labels.clamp(min=0)]
        counted = (labels != -100).float()
        own.append((losses * weights * counted).sum() / counted.sum().clamp(min=1))
    return torch.stack(own).mean()


@settings(max_examples=50, deadline=None)
@given(
    records=st.integers(2, 6),
    steps=st.integers(1, 5),
    weighted=st.booleans(),
    layout=st.sampled_from(["flattened", "time first", "channels"]),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_it_is_the_mean_over_records_of_their_own_means(
    records: int, steps: int, weighted: bool, layout: str, ignored: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(records, steps, 3, generator=generator)
    targets = torch.randint(3, (records, steps), generator=generator)
    targets[torch.rand(records, steps, generator=generator) < ignored] = -100
    weight = torch.tensor([1.0, 5.0, 20.0]) if weighted else None

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        if layout == "channels":
            return F.cross_entropy(scores.transpose(1, 2), labels, weight)
        if layout == "time first":
            scores, labels = scores.transpose(0, 1), labels.transpose(0, 1)
        return F.nll_loss(scores.reshape(-1, 3).log_softmax(1), labels.reshape(-1), weight=weight)

    forms: Forms = {}
    expected = by_record(logits, targets, weight)
    torch.testing.assert_close(understood(loss, logits, targets, records, forms), expected)
    torch.testing.assert_close(understood(loss, logits, targets, records, forms), expected)


def test_one_record_moves_the_sum_by_its_own_term_only() -> None:
    logits, targets = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    forms: Forms = {}

    def total(scores: Tensor, labels: Tensor) -> Tensor:
        def loss(s: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(s.view(-1, 5), y.view(-1), weight=torch.tensor([1.0, 9, 1, 1, 30]))

        return understood(loss, scores, labels, len(scores), forms) * len(scores)

    before = total(logits, targets)
    for last in (torch.full((3,), -100), torch.full((3,), 4)):
        labels = torch.cat([targets[:3], last[None]])
        torch.testing.assert_close(
            total(logits, labels) - total(logits[3:], labels[3:]), before - total(logits[3:], targets[3:])
        )


def test_a_record_by_itself_is_left_alone() -> None:
    logits, targets = torch.randn(4, 3), torch.randint(3, (4,))

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(scores[i : i + 1], labels[i : i + 1]) for i in range(4)]).mean()

    torch.testing.assert_close(understood(loss, logits, targets, 4), F.cross_entropy(logits, targets))


def test_other_reductions_are_left_alone() -> None:
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, -100, 2])
    for reduction in ("sum", "none"):
        found = understood(lambda s, y, r=reduction: F.cross_entropy(s, y, reduction=r), logits, targets, 4)
        torch.testing.assert_close(found, F.cross_entropy(logits, targets, reduction=reduction))


def test_an_arrangement_that_changes_from_step_to_step_is_refused() -> None:
    forms: Forms = {}
    logits, targets = torch.randn(4, 3, 5), torch.randint(5, (4, 3))

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores.reshape(-1, 5), labels.reshape(-1))

    def time_first(scores: Tensor, labels: Tensor) -> Tensor:
        return loss(scores.transpose(0, 1), labels.T)

    understood(loss, logits, targets, 4, forms)
    assert list(forms.values()) == [["records first"]]
    with pytest.raises(UnsupportedModelError, match="in lines of their own"):
        understood(time_first, logits, targets, 4, forms, again=True)


@pytest.mark.parametrize("forms", [None, {}])
def test_what_is_left_alone_is_refused_where_it_depends_on_the_batch(forms: Any) -> None:
    """Without per_record_means, or where nobody has examined the step."""
    logits, targets = torch.randn(4, 3), torch.randint(3, (4,))

    def loss(labels: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.cross_entropy(logits, labels, weight)

    if forms is not None:
        tracer = RowTracer(4)
        tracer.own(targets, owners.rows(4, 1, 4))
        with tracer, PerRecordMeans(4, forms, tracer, enabled=False):
            loss(targets)
    with PerRecordMeans(4, forms, enabled=False):
        plain = loss(targets)
    torch.testing.assert_close(plain, F.cross_entropy(logits, targets))
    ignoring = torch.tensor([0, 1, -100, 2])
    for labels, weight in ((ignoring, None), (targets, torch.ones(3))):
        with PerRecordMeans(4, forms, enabled=False), pytest.raises(UnsupportedModelError, match="of several records"):
            loss(labels, weight)


def test_a_loss_that_nobody_examined_stops_the_step() -> None:
    logits, targets = torch.randn(4, 3), torch.randint(3, (4,))
    with PerRecordMeans(4, {}), pytest.raises(FormChanged, match="A loss was not computed when"):
        F.cross_entropy(logits, targets)
