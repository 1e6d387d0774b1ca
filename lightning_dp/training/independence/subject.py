"""What is examined: a module's training step, and a few records to run it on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.torch_api import tree_leaves, tree_map
from lightning_dp.training.independence.joined import Joined
from lightning_dp.training.independence.losses import Forms
from lightning_dp.training.independence.shadow import Shadow, random_state_kept, seed_everything
from lightning_dp.training.independence.tracer import RowTracer
from lightning_dp.training.independence.watch import Place, Watch
from lightning_dp.training.manual.plan import ManualPlan
from lightning_dp.training.manual.rehearsal import parameters_of


@dataclass
class Understanding:
    """What examinations have found out about a training step, and what every later step is held to."""

    #: How the targets of every loss lie.
    losses: Forms = field(default_factory=dict)
    #: Code that was examined.
    places: set[Place] = field(default_factory=set)
    #: Layers that are functions of constants, and whose parameters are followed to where these meet records, since
    #: their outputs cannot have a copy for every example.
    followed: set[str] = field(default_factory=set)
    #: Layers, and functions of parameters, that numbers are given to that were made for the batch (codes, noise).
    made: set[Any] = field(default_factory=set)
    #: Leaves of a batch that join records, and that say where each begins.
    joined: list[Joined] = field(default_factory=list)
    #: What the optimizers are stepped with, of a step that does so itself.
    manual: ManualPlan = field(default_factory=ManualPlan)


@dataclass
class Subject:
    """A training step under examination.

    Attributes:
        module: The user's module.
        records: Loaded records, each as the ``copies`` items that the data set gave for it.
        collate: Makes a batch of items, as the loader and the precision do.
        transfer: The module's and data module's transfer hooks, and the move to the device.
        arguments: What ``training_step`` takes after the batch.
        context: The precision context of a training step.
        stand_in: Lets hooks reach a copy of the module instead of the module.
        loss_reduction: ``"mean"`` or ``"sum"``: how the loss depends on the number of records.
        copies: K, the augmentations of each record, and its rows in a batch.
        largest_batch: The most records that a forward pass is likely to have.
        needs_layers: Whether an engine records layers, whose inputs must have one entry per example.
        per_record_means: Whether batch means are understood as means over records.
        understanding: What is held in every step.
    """

    module: pl.LightningModule
    records: list[list[Any]]
    collate: Callable[[list[Any]], Any]
    transfer: Callable[[Any], Any]
    arguments: tuple[Any, ...]
    context: Callable[[], AbstractContextManager[Any]]
    stand_in: Callable[[pl.LightningModule], AbstractContextManager[Any]]
    loss_reduction: str
    copies: int
    largest_batch: int
    needs_layers: bool
    per_record_means: bool
    understanding: Understanding

    def collated(self, records: Sequence[list[Any]], seed: int = 0) -> Any:
        """The batch of these records, before it is transferred, from the same random state every time."""
        items = [fresh(item) for record in records for item in record]
        with random_state_kept():
            seed_everything(seed)
            return self.collate(items)

    def shadow(self, classify: bool = False) -> Shadow:
        """A copy of the module that can be run without side effects; arguments as of `Shadow`."""
        return Shadow(self.module, self.understanding.manual, classify)

    def optimized(self, number: int) -> list[torch.nn.Parameter]:
        """The parameters of the module's optimizer of this number."""
        found = pl.LightningModule.optimizers(self.module, use_pl_optimizer=False)
        optimizer = (found if isinstance(found, list) else [found])[number]
        return parameters_of(optimizer)

    def watch(self, rows: int, tracer: RowTracer | None = None, hold: bool = False) -> Watch:
        """What surrounds the step while it is examined.

        Args:
            rows: Number of rows of the batch.
            tracer: Examines the step: what it runs counts as understood from now on.
            hold: The step must run nothing else than what was understood.
        """
        known = self.understanding
        if tracer is None and not hold:  # a pass in eval mode, say: what it learns is thrown away
            losses = {line: list(found) for line, found in known.losses.items()}
            known = replace(known, losses=losses, places=set(known.places))
        learn = not hold
        return Watch(rows, known.losses, known.places, learn, tracer=tracer, enabled=self.per_record_means)


def fresh(item: Any) -> Any:
    """A copy of a loaded item, which collation may change."""
    if isinstance(item, Tensor):
        return item.detach().clone()
    if type(item) in (tuple, list):
        return type(item)(fresh(part) for part in item)
    if type(item) is dict:
        return {key: fresh(part) for key, part in item.items()}
    return item if isinstance(item, int | float | str | bytes | None) else copy.deepcopy(item)


def loss_of(output: Any) -> Tensor:
    """The loss in what ``training_step`` returned: a number, or one number per example."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise PrivacyConfigurationError(
            "training_step returned no loss. Whether a step happens must not depend on the data: return a loss for "
            "every batch."
        )
    return loss


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """The loss as one number: a vector of losses, one per example, becomes its ``"mean"`` or ``"sum"``."""
    if loss.dim() == 0:
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


#: Records that are loaded to choose from: at least, at most, and seconds after which no more than needed are loaded.
_LOOKED_AT, _LOOKED_AT_MOST, _SECONDS = 32, 2048, 0.1


def choose_records(load: Callable[[int], list[Any]], count: int, wanted: int, seed: int = 0) -> list[list[Any]]:
    """Loads records that differ: the longest, the shortest, the largest values, each label that occurs; then any.

    Args:
        load: Loads a record: its items.
        count: N, the number of records.
        wanted: How many to choose.
    """
    order = np.random.default_rng(seed).permutation(count)[:_LOOKED_AT_MOST]
    end = time.monotonic() + _SECONDS
    loaded: list[list[Any]] = []
    for index in order:
        if len(loaded) >= max(_LOOKED_AT, wanted) and time.monotonic() > end:
            break
        loaded.append(load(int(index)))
    signs = [_signature(record[0]) for record in loaded]
    chosen: list[int] = []

    def take(index: int) -> None:
        if index not in chosen and len(chosen) < wanted:
            chosen.append(index)

    seen: set[Any] = set()
    sizes, scales = [s[1] for s in signs], [s[2] for s in signs]
    for extreme in (sizes.index(max(sizes)), sizes.index(min(sizes)), scales.index(max(scales))):
        take(extreme)
    for index, (labels, _, _) in enumerate(signs):
        if not labels <= seen:
            seen |= labels
            take(index)
    for index in range(len(loaded)):
        take(index)
    # Neither half should hold all that is special.
    return [loaded[i] for i in [*chosen[0::2], *chosen[1::2]]]


def record_size(record: list[Any]) -> int:
    """How many numbers and characters a record holds: the longest pads the others."""
    return _signature(record[0])[1]


#: An integer tensor of at most so many entries is taken for labels.
_FEW = 32


def _signature(record: Any) -> tuple[set[Any], int, float]:
    """A record's labels, by leaf; how many numbers and characters it holds; its largest finite absolute value."""
    labels: set[Any] = set()
    size, scale = 0, 0.0
    plain = type(record) in (tuple, list) and all(isinstance(part, Tensor | int | float) for part in record)
    for place, leaf in enumerate(record if plain else tree_leaves(record)):
        if isinstance(leaf, str | bytes | list):
            size += len(leaf)
        elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
            labels |= {(place, leaf)} if isinstance(leaf, int) else {(place, math.isnan(leaf))}
        elif isinstance(leaf, Tensor | np.ndarray):
            tensor = torch.as_tensor(leaf)
            count = tensor.numel()
            size += count
            if not tensor.is_floating_point():
                if count == 1:
                    labels.add((place, tensor.item()))
                elif count <= _FEW:
                    labels.update((place, value) for value in tensor.flatten().tolist())
            elif count:
                largest = tensor.abs().max().item()
                labels.add((place, math.isnan(largest)))
                scale = max(scale, largest) if math.isfinite(largest) else scale
    return labels, size, scale


def stand_in(record: list[Any], kind: str) -> list[Any]:
    """A record whose floating-point tensors and arrays hold extreme numbers, all else unchanged.

    Args:
        record: Its items.
        kind: ``"zeros"``, ``"large"``, ``"small"`` (huge, negative) or ``"nan"``.
    """

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating):
            return changed(torch.from_numpy(leaf.copy())).numpy()
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if kind == "zeros":
            return torch.zeros_like(leaf)
        if kind == "small":
            return -1e4 * leaf.abs() - 1e3
        return leaf * 1e4 + 1e3 if kind == "large" else torch.full_like(leaf, math.nan)

    return [tree_map(changed, item) for item in record]
