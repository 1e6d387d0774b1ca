"""Architectures and adapters as they are, against one example at a time."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp import FlatClipping, GaussianNoise, PrivateStrategy
from lightning_dp.training.report import BY_RULE, layer_groups
from tests.conftest import fit, trainer
from tests.training.architectures import ARCHITECTURES, METHODS, Training, records

#: Run with every change; all others with the slow tests.
QUICK = ("T5", "Swin", "DoRA", "OFT")
MODELS = {**ARCHITECTURES, **METHODS}
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def update(model: nn.Module, task: str, engine: str, double: bool) -> Tensor:
    """What one private step without noise does to the weights: a clipped sum of gradients."""
    module = Training(model)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    strategy = PrivateStrategy(FlatClipping(0.5), GaussianNoise(0.0), engine=engine, seed=1)
    run = trainer(strategy=strategy, max_steps=1, precision="64-true" if double else "32-true")
    fit(run, module, DataLoader(records(task), batch_size=8))  # type: ignore[arg-type]
    after = dict(module.named_parameters())
    return torch.cat([(after[name] - start).flatten() for name, start in before.items()])


def error_against_the_loop(make: Callable[[], nn.Module], task: str, double: bool) -> float:
    """Relative Euclidean error of the fast engine's step."""
    torch.manual_seed(0)
    model = make().double() if double else make()
    expected = update(copy.deepcopy(model), task, "per_example", double)
    found = update(model, task, "bookkeeping", double)
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_a_step_is_that_of_one_example_at_a_time(name: str) -> None:
    task, make = MODELS[name]
    assert error_against_the_loop(make, task, double=True) < 1e-6


def table() -> str:
    """The table of docs/architectures.md: runs all of them, in single precision, in about five minutes."""
    lines = ["| model | of its trained layers, others than by a rule | relative error |", "|---|---|---|"]
    for name, (task, make) in MODELS.items():
        others = [group for group in layer_groups(make()) if group.way != BY_RULE]
        kinds = ", ".join(f"`{group.kind}`" for group in others[:4]) + (", …" if len(others) > 4 else "")
        lines.append(f"| {name} | {kinds} | {error_against_the_loop(make, task, double=False):.0e} |")
    return "\n".join(lines) + "\n"


def test_the_page_names_every_model() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| ([^|]+) \|.*e[-+]0\d \|$", text, re.MULTILINE) == list(MODELS)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    head = PAGE.read_text(encoding="utf-8").split("| model |")[0]
    PAGE.write_text(head + table(), encoding="utf-8")
