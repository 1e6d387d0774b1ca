"""Every private name of Lightning that is used: a function each, which ``tests/training/test_lightning_api.py``
holds to what Lightning does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

#: What starts processes by ``multiprocessing``, rather than by the same command once more.
MultiProcessingLauncher = _MultiProcessingLauncher


def train_loaders(trainer: pl.Trainer) -> list[Any]:
    """The train loaders of a fit, whatever collection they came in."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    return list(combined.flattened)


def train_iterator(trainer: pl.Trainer) -> Any:
    """The iterator that train batches are taken from, of a fit with one train loader."""
    combined: Any = trainer.fit_loop._combined_loader
    return combined._iterator.iterators[0]


def logged_results(trainer: pl.Trainer) -> Any:
    """What collects ``self.log`` of the loop that runs; ``None``: no loop does."""
    return trainer._results


def weigh_logs_by(trainer: pl.Trainer, batch: Any) -> None:
    """Means of what is logged from now on are weighted by the size of this batch."""
    if (results := logged_results(trainer)) is not None:
        results.batch, results.batch_size = batch, None


def intercept_logs(results: Any, log: Callable[..., None]) -> None:
    """``self.log`` reaches ``log(hook, name, value, …)`` in place of Lightning's own collection."""
    results.log = log


def collect_log(results: Any, *args: Any, **kwargs: Any) -> None:
    """Collects as Lightning itself does."""
    type(results).log(results, *args, **kwargs)


def stop_intercepting(results: Any) -> None:
    """Undoes `intercept_logs`."""
    vars(results).pop("log", None)


def before_transfer(module: pl.LightningModule, batch: Any) -> Any:
    """The module's, or data module's, hook before a train batch is brought to the device."""
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


@contextmanager
def standing_in(strategy: Strategy, shadow: pl.LightningModule) -> Iterator[None]:
    """Hooks that the Trainer calls reach another module inside."""
    module, strategy._lightning_module = strategy._lightning_module, shadow
    try:
        yield
    finally:
        strategy._lightning_module = module


def sync_module_states(module: pl.LightningModule) -> None:
    """Every process gets the first one's parameters and buffers."""
    _sync_module_states(module)


def start_method_of(launcher: Any) -> str:
    """How a launcher starts processes."""
    return str(launcher._start_method)
