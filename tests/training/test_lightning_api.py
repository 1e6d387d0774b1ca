"""Lightning's private names do what is relied on, in the version that is installed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core import saving
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.compile import from_compiled, to_uncompiled
from torch.utils.data import WeightedRandomSampler

from lightning_dp.training import lightning_api
from tests.conftest import Net, fit, loader, trainer


class Logging(Net):
    seen: Any = None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen = dataloader_idx
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return super().training_step(batch, batch_idx)


class Looks(Callback):
    def __init__(self, look: Any) -> None:
        self.look, self.found = look, None

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.found = self.look(trainer, module)


def looked(look: Any, **kwargs: Any) -> Any:
    callback = Looks(look)
    run = trainer(callbacks=[callback], **kwargs)
    fit(run, Logging(), loader())
    return callback.found, run


def test_loaders_and_iterator_are_those_of_the_fit() -> None:
    (loaders, batch), _ = looked(
        lambda trainer, module: (lightning_api.train_loaders(trainer), type(lightning_api.train_iterator(trainer))),
    )
    assert [len(one) for one in loaders] == [5]
    assert "Iter" in batch.__name__


def test_logs_are_collected_intercepted_and_weighted() -> None:
    names: list[tuple[str, str]] = []

    def look(trainer: Any, module: Any) -> None:
        results = lightning_api.logged_results(trainer)

        def log(hook: str, name: str, *args: Any, **kwargs: Any) -> None:
            names.append((hook, name))
            lightning_api.collect_log(results, hook, name, *args, **kwargs)

        lightning_api.intercept_logs(results, log)
        lightning_api.weigh_logs_by(trainer, torch.zeros(7, 2))
        assert results.batch.shape == (7, 2)

    _, run = looked(look)
    assert names == [("training_step", "count")] * 5
    assert run.callback_metrics["count"] == 5
    results = run.fit_loop.epoch_loop._results
    lightning_api.stop_intercepting(results)
    assert "log" not in vars(results)


def test_the_hook_before_the_transfer_is_the_modules() -> None:
    (seen, batch), _ = looked(
        lambda trainer, module: (lightning_api.before_transfer(module, [1]), module.seen),
    )
    assert (seen, batch) == ([1], 0)


def test_a_shadow_stands_in_for_the_module() -> None:
    def look(trainer: Any, module: Any) -> bool:
        other = Net()
        with lightning_api.standing_in(trainer.strategy, other):
            inside = trainer.lightning_module is other
        return inside and trainer.lightning_module is module

    assert looked(look)[0] is True


def test_a_launcher_says_how_it_starts_processes() -> None:
    strategy = DDPStrategy(start_method="spawn")
    launcher = lightning_api.MultiProcessingLauncher(strategy, start_method="spawn")
    assert lightning_api.start_method_of(launcher) == "spawn"


def test_what_load_from_checkpoint_makes_modules_with_is_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(*_: Any) -> str:
        return "module"

    def wrapper(load: Any) -> Any:
        return functools.wraps(load)(lambda *args: f"wrapped {load(*args)}")

    assert hasattr(saving, "_load_state")
    monkeypatch.setattr(saving, "_load_state", plain)
    lightning_api.wrap_load_state(wrapper)
    lightning_api.wrap_load_state(wrapper)
    assert saving._load_state() == "wrapped module"


def test_a_module_is_detached_from_its_trainer_for_a_while() -> None:
    module = Net()
    run = trainer(max_steps=1)
    fit(run, module, loader())
    with lightning_api.detached(module):
        assert copy.deepcopy(module) is not None
        with pytest.raises(RuntimeError, match="not attached"):
            module.trainer  # noqa: B018
    assert module.trainer is run


def test_what_is_compiled_in_a_module_is_known() -> None:
    module = Net()
    assert lightning_api.compiled_steps(module) is None
    compiled = torch.compile(module, backend="eager")
    made = from_compiled(compiled)
    found = lightning_api.compiled_steps(made)
    assert found is not None and found["training_step"] is not type(module).training_step
    to_uncompiled(made)
    assert lightning_api.compiled_steps(made) is None


def test_the_users_sampler_is_found_within_lightnings() -> None:
    sampler = WeightedRandomSampler([1.0, 2.0], 2)
    wrapped = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)
    assert lightning_api.wrapped_sampler(wrapped) is sampler is lightning_api.wrapped_sampler(sampler)
