"""Architectures and adapters as they are, against one example at a time."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_dp
from lightning_dp import FlatClipping, GaussianNoise, PrivateStrategy
from lightning_dp.training.report import BY_RULE, Report, layer_groups
from tests.conftest import fit, trainer
from tests.training.architectures import ARCHITECTURES, METHODS, Training, records

#: Run with every change; all others with the slow tests.
QUICK = ("T5", "DeBERTa-v2", "Swin", "DoRA", "OFT")
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


def costs(make: Callable[[], nn.Module], task: str) -> list[str]:
    """Time of a step and of one example at a time, and memory of a step, all beside the plain one: of 64 records."""
    options: dict[str, Any] = {"epsilon": None, "delta": 1e-5, "noise": 1.0, "trainer": trainer(max_epochs=4)}

    def found(engine: str) -> Report:
        data: Any = DataLoader(records(task, 128), batch_size=64)  # type: ignore[arg-type]
        torch.manual_seed(0)
        return lightning_dp.check(Training(make()), data, engine=engine, **options)

    fast, looped = found("bookkeeping"), found("per_example")
    assert fast.step_seconds and fast.plain_step_seconds and looped.step_seconds and looped.plain_step_seconds
    assert fast.step_bytes and fast.plain_step_bytes
    ratios = (
        fast.step_seconds / fast.plain_step_seconds,
        looped.step_seconds / looped.plain_step_seconds,
        fast.step_bytes / fast.plain_step_bytes,
    )
    return [f"{ratio:.1f}" for ratio in ratios]


def table() -> str:
    """The table of docs/architectures.md: runs all of them, in single precision, in about fifteen minutes."""
    lines = [
        "| model | of its trained layers, others than by a rule | relative error "
        "| time | one example at a time | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, (task, make) in MODELS.items():
        others = [group for group in layer_groups(make()) if group.way != BY_RULE]
        kinds = ", ".join(f"`{group.kind}`" for group in others[:4]) + (", …" if len(others) > 4 else "")
        error = error_against_the_loop(make, task, double=False)
        lines.append(" | ".join([f"| {name}", kinds, f"{error:.0e}", *costs(make, task)]) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def test_the_page_names_every_model() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| ([^|]+) \|.*e[-+]0\d \|", text, re.MULTILINE) == list(MODELS)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    head = PAGE.read_text(encoding="utf-8").split("| model |")[0]
    PAGE.write_text(head + table(), encoding="utf-8")
