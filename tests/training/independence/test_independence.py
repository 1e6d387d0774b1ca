"""Records do not influence one another, or training stops: every kind of interference, through the Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import FlatClipping, GaussianNoise, PrivacyConfigurationError, PrivateStrategy, UnsupportedModelError
from tests.conftest import fit, trainer
from tests.training.independence.interference import CHECKED, KINDS, NOT_SEEN, PROVEN, REFUSED, Kind

PAGE = Path(__file__).parents[3] / "docs" / "independence.md"
BEGIN, END = "<!-- kinds: begin -->", "<!-- kinds: end -->"


def train(kind: Kind, **kwargs: Any) -> PrivateStrategy:
    torch.manual_seed(0)
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), **{**kind.options, **kwargs})
    loader = DataLoader(kind.data(), batch_size=40, shuffle=True, collate_fn=kind.collate)
    fit(trainer(strategy=strategy, max_epochs=2), kind.make(), loader)
    return strategy


def outcome(kind: Kind) -> str:
    try:
        strategy = train(kind)
    except (UnsupportedModelError, PrivacyConfigurationError):
        return REFUSED
    assert strategy.findings is not None
    return strategy.findings.verdict


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_interference_is_met_as_the_table_says(name: str) -> None:
    kind = KINDS[name]
    if kind.expected == REFUSED:
        with pytest.raises((UnsupportedModelError, PrivacyConfigurationError), match=kind.says) as caught:
            train(kind)
        assert len(str(caught.value)) <= 2000
        assert "self_check" not in str(caught.value)
        assert caught.value.__cause__ is None
    else:
        found = outcome(kind)
        assert found == (PROVEN if kind.expected == NOT_SEEN else kind.expected)


#: What is a function of one record where there is one: ε is true, and nobody can tell it from what was meant.
RIGHT_ALONE = (
    "a layer on some records only (`h[mask]`)",
    "mixup within the batch",
    "the first rows only, where there are many",
    "a branch on a label that no record of the data has",
    "a factor that is read, and that no record of the data changes",
    "a divisor that is kept above 1 (`max(n, 1)`)",
    "a factor where some record has a rare number (`(x == 7.).any()`, an interval)",
    "a number that is read after many others",
    "a rare factor, where inputs and labels are views of one tensor",
    "class weights that other records change",
)

#: Seen, or not, by what the records hold that happen to be compared.
BY_CHANCE = "a factor by what one of the records holds"


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if k.expected == REFUSED and n != BY_CHANCE])
def test_one_record_at_a_time_is_no_way_around(name: str) -> None:
    """What mixes records is another loss for an engine that sees one at a time: it is refused as well, unless it was
    only the recording of layers that did not fit."""
    kind = KINDS[name]
    if name in RIGHT_ALONE:
        assert len(train(kind, engine="per_example").ledger) == 4
        return
    with pytest.raises((UnsupportedModelError, PrivacyConfigurationError)):
        train(kind, engine="per_example")


def table() -> str:
    columns = (PROVEN, CHECKED, "partly checked", REFUSED, NOT_SEEN)
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, kind in KINDS.items():
        lines.append(f"| {name} | {' | '.join('●' if kind.expected == column else '' for column in columns)} |")
    return "\n".join(lines)


def test_the_page_says_what_these_tests_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    written = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if os.environ.get("LIGHTNING_DP_WRITE_DOCS"):
        PAGE.write_text(written, encoding="utf-8")
    assert page == written


class OneLayer(LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def one_step(module: OneLayer, labels: torch.Tensor) -> PrivateStrategy:
    """Trains for a step on random inputs."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(len(labels), 4), labels)
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    fit(trainer(strategy=strategy, max_steps=1), module, DataLoader(data, 20, shuffle=True))
    return strategy


#: Not on the module, so that no copy of it counts for itself.
STEPS_RUN: list[None] = []


class ReadsOthersEveryTime(OneLayer):
    """Looks at one more number of the first record every time that the step runs."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        STEPS_RUN.append(None)
        for _ in STEPS_RUN:
            x[0, 0].item()
        return torch.nn.functional.cross_entropy(self.layer(x), y)


def test_numbers_that_could_not_be_answered_otherwise_are_named() -> None:
    """That test did not run, and nothing says that all is checked."""
    STEPS_RUN.clear()
    strategy = one_step(ReadsOthersEveryTime(2), torch.arange(80) % 2)
    assert strategy.findings is not None
    assert strategy.findings.verdict == "partly checked"
    (sentence,) = strategy.findings.unseen
    assert "test_independence.py" in sentence and "could not be compared" in sentence


class CountsClasses(OneLayer):
    """Decides on each of 20 labels, and does nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        for label in range(20):
            if (y == label).any():
                pass
        return torch.nn.functional.cross_entropy(self.layer(x), y)


def test_numbers_that_records_were_not_made_to_hold_are_counted() -> None:
    strategy = one_step(CountsClasses(20), torch.arange(80) % 20)
    assert strategy.findings is not None
    assert strategy.findings.verdict == "partly checked"
    assert any("16 of them" in sentence for sentence in strategy.findings.unseen)


class DividesByNearlyTheSize(OneLayer):
    """Every record's part in the loss changes by half a percent between batches of 9 records and of 18."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.layer(x), y, reduction="sum") / (len(x) + 0.1)


def test_a_divisor_that_differs_a_little_from_the_size_of_the_batch_is_refused() -> None:
    """Less than rounding may differ by for single records, but the same way for all of them."""
    with pytest.raises(UnsupportedModelError, match="does not explain|count for more"):
        one_step(DividesByNearlyTheSize(2), torch.arange(80) % 2)
