"""Refuses decisions by numbers without noise: by monitored metrics of the train set, and by the training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.torch_api import tree_leaves
from lightning_dp.training import lightning_api
from lightning_dp.training.spent import DataMark

_WAYS_OUT = (
    "Monitor a metric of validation records that are not trained on, or what has noise (privacy/epsilon); a schedule "
    "by "
    "steps or epochs needs no metric."
)


def monitors(trainer: pl.Trainer) -> Iterator[tuple[str, str]]:
    """Pairs of a scheduler's or callback's type name and the metric that it decides by."""
    for config in trainer.strategy.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor is not None:
            yield type(config.scheduler).__name__, config.monitor
    for callback in getattr(trainer, "callbacks"):  # noqa: B009  (the Trainer's type does not declare it)
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            yield type(callback).__name__, monitor


def check_monitors(trainer: pl.Trainer, logged: set[str]) -> None:
    """Refuses decisions by a metric that training_step logs.

    Args:
        trainer: The Trainer.
        logged: Names of metrics that depend on the records that training_step sees.

    Raises:
        PrivacyConfigurationError: A scheduler or callback monitors one of them.
    """
    names = {shown for name in logged for shown in _shown_as(name)}
    for who, monitor in monitors(trainer):
        if monitor in names:
            raise _steered(who, monitor, "training_step")


class Logs:
    """Intercepts ``self.log`` during training.

    A monitored metric that another hook than ``training_step`` logs is refused as soon as it is logged; so is one that
    ``training_step`` begins to log after it was examined. (``privacy/`` metrics come from the ledger.)
    When a step is run again, because it ran code that had to be examined first, its first calls of ``self.log`` are not
    repeated: with ``sync_dist=True``, a second call in one process alone would deadlock.

    Args:
        trainer: The Trainer.
        examined: Returns the names of the metrics that ``training_step`` logged when it was examined.
    """

    def __init__(self, trainer: pl.Trainer, examined: Callable[[], set[str]]) -> None:
        self._trainer, self._examined = trainer, examined
        self._results = lightning_api.logged_results(trainer)
        self._made = self._known = 0
        if self._results is not None:
            lightning_api.intercept_logs(self._results, self._log)

    def begin(self) -> None:
        """Starts to count the calls of ``self.log`` in a new step."""
        self._made = self._known = 0

    def again(self) -> None:
        """The step is run again: skips as many calls of ``self.log`` as it has made already."""
        self._known, self._made = max(self._known, self._made), 0

    def close(self) -> None:
        """Stops intercepting ``self.log``."""
        if self._results is not None:
            lightning_api.stop_intercepting(self._results)

    def _log(self, fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        if fx == "training_step":
            self._made += 1
            if self._made <= self._known:
                return
        examined = fx == "training_step" and name in self._examined()
        if not examined and not name.startswith("privacy/"):
            for who, monitor in monitors(self._trainer):
                if monitor in _shown_as(name):
                    raise _steered(who, monitor, fx)
        lightning_api.collect_log(self._results, fx, name, *args, **kwargs)


def _shown_as(name: str) -> tuple[str, str, str]:
    """The names that Lightning gives to a metric of this name."""
    return name, f"{name}_step", f"{name}_epoch"


def logged_of_records(trainer: pl.Trainer, names: set[str]) -> list[Any]:
    """What the Trainer knows of metrics that depend on records.

    Args:
        trainer: The Trainer.
        names: As ``training_step`` logs them.
    """
    shown = {form for name in names for form in _shown_as(name)}
    known = (trainer.callback_metrics, trainer.logged_metrics)
    return [value for metrics in known for name, value in metrics.items() if name in shown]


def _steered(who: str, monitor: str, hook: str) -> PrivacyConfigurationError:
    return PrivacyConfigurationError(
        f"{who} monitors '{monitor}', which {hook} logs: it is computed from the train set without noise, and what it "
        f"decides would reach the model uncounted. {_WAYS_OUT} (A public number is logged by training_step, in every "
        "step: that is examined.)"
    )


def check_validation(trainer: pl.Trainer, train: DataLoader[Any] | None) -> None:
    """Where the validation set holds records of the train set, refuses decisions by its metrics, or else warns.

    Raises:
        PrivacyConfigurationError: A scheduler or callback monitors another metric than ``privacy/…``.
    """
    loaders = [x for x in tree_leaves(trainer.val_dataloaders) if isinstance(x, DataLoader)]
    if train is None or not any(_share_records(train.dataset, loader.dataset) for loader in loaders):
        return
    for who, monitor in monitors(trainer):
        if not monitor.startswith("privacy/"):
            raise PrivacyConfigurationError(
                f"{who} monitors '{monitor}', and the validation set holds records of the train set: the metric is "
                f"computed from them without noise, and what it decides would reach the model uncounted. {_WAYS_OUT}"
            )
    rank_zero_warn(
        "lightning_dp: the validation set holds records of the train set. Its metrics are computed from them without "
        "noise: whoever sees them learns more than ε says."
    )


def _share_records(one: Any, other: Any) -> bool:
    """Whether two data sets take some record from the same object."""
    try:
        marks = [DataMark.of(dataset, len(dataset), look=False) for dataset in (one, other)]
    except TypeError:  # a stream has no length
        return False
    return marks[0].shares_objects_with(marks[1])


def warn(trainer: pl.Trainer) -> None:
    """Warns of callbacks and options that are allowed, but have an effect on privacy or noise that users overlook."""
    for callback in getattr(trainer, "callbacks"):  # noqa: B009
        if type(callback).__name__ == "ThroughputMonitor":
            rank_zero_warn(
                "lightning_dp: ThroughputMonitor logs the exact size of every batch, which depends on the records that "
                "were drawn: do not publish these logs."
            )
        if isinstance(callback, LearningRateFinder):
            rank_zero_warn(
                "lightning_dp: LearningRateFinder chooses by losses of the train set without noise: ε does not cover "
                "its choice. Search on public data."
            )
    clip = trainer.gradient_clip_val
    if clip:
        rank_zero_info(
            f"lightning_dp: gradient_clip_val={clip:g} rescales the noisy gradient, which is private already: it "
            "changes "
            "how far a step goes, and nothing about ε. What one record adds is bounded by the clipping rule."
        )


class HiddenLoss:
    """Returned by the optimizer's closure instead of the loss, which has no noise: any use of it raises."""

    def _refuse(self, *args: Any) -> NoReturn:
        raise PrivacyConfigurationError(
            "The optimizer reads the loss that its closure returns (a Polyak step, a line search): it is computed from "
            "the train set without noise. Use an optimizer that looks at gradients only (SGD, Adam, …)."
        )

    __float__ = __int__ = __bool__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __neg__ = __abs__ = item = _refuse
