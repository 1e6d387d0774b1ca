"""Lightning's private names that the library uses, behind functions; ``tests/training/test_lightning_api.py`` checks
that each still does what is relied on. Attributes of strategies that a private strategy inherits are used directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.core import saving
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

#: Lightning's launcher that starts processes by ``multiprocessing``, not by running the same command again.
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


def batches_done(trainer: pl.Trainer) -> int:
    """Batches that were trained on: optimizer steps, but where ``training_step`` takes these itself."""
    if trainer.lightning_module is None or trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def logged_results(trainer: pl.Trainer) -> Any:
    """The collection that ``self.log`` writes to in the running loop; ``None``: no loop runs."""
    return trainer._results


@contextmanager
def detached(module: pl.LightningModule) -> Iterator[None]:
    """Within, a module belongs to no Trainer."""
    trainer, module._trainer = module._trainer, None
    try:
        yield
    finally:
        module._trainer = trainer


#: What `torch.compile` exchanges in a LightningModule, as Lightning does it.
_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step", "_compiler_ctx")


def compiled_steps(module: pl.LightningModule) -> dict[str, Any] | None:
    """What `torch.compile` has exchanged in a LightningModule, by name of the attribute; ``None``: nothing."""
    return None if module._compiler_ctx is None else {name: vars(module)[name] for name in _COMPILED}


def wrapped_sampler(sampler: Any) -> Any:
    """The user's sampler within the one that Lightning puts around it in several processes; else the sampler."""
    if type(sampler) is DistributedSamplerWrapper:
        return sampler.dataset._sampler  # type: ignore[attr-defined]
    return sampler


def weigh_logs_by(trainer: pl.Trainer, batch: Any, size: int | None = None) -> None:
    """Makes Lightning weigh the means of what is logged from now on by the size of this batch, or by this size."""
    if (results := logged_results(trainer)) is not None:
        results.batch, results.batch_size = batch, size


def intercept_logs(results: Any, log: Callable[..., None]) -> None:
    """Makes ``self.log`` call ``log(hook, name, value, …)`` instead of Lightning's own collection."""
    results.log = log


def collect_log(results: Any, *args: Any, **kwargs: Any) -> None:
    """Hands a call of ``self.log`` that was intercepted to Lightning's own collection."""
    type(results).log(results, *args, **kwargs)


def stop_intercepting(results: Any) -> None:
    """Undoes `intercept_logs`."""
    vars(results).pop("log", None)


def before_transfer(module: pl.LightningModule, batch: Any) -> Any:
    """Runs ``on_before_batch_transfer`` of the module, or data module, on a train batch; returns the batch."""
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


@contextmanager
def standing_in(strategy: Strategy, shadow: pl.LightningModule) -> Iterator[None]:
    """Within, ``strategy.lightning_module`` is ``shadow``, so that hooks that the Trainer calls reach ``shadow``."""
    module, strategy._lightning_module = strategy._lightning_module, shadow
    try:
        yield
    finally:
        strategy._lightning_module = module


def wrap_load_state(wrapper: Callable[[Any], Any]) -> None:
    """Wraps the function by which ``load_from_checkpoint`` makes modules; once: ``functools.wraps`` marks it."""
    if not hasattr(saving._load_state, "__wrapped__"):
        saving._load_state = wrapper(saving._load_state)


def sync_module_states(module: pl.LightningModule) -> None:
    """Every process gets the first one's parameters and buffers."""
    _sync_module_states(module)


def start_method_of(launcher: Any) -> str:
    """How a launcher starts processes."""
    return str(launcher._start_method)
