"""The callback that writes the privacy card."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.reporting import dashboards
from lightning_dp.reporting.card import privacy_card, write_card
from lightning_dp.training.callbacks.budget import PrivacyBudget
from lightning_dp.training.callbacks.lookup import Delta, trainer_callbacks
from lightning_dp.training.callbacks.monitor import SHOWN, PrivacyMonitor
from lightning_dp.training.strategy import PrivateMixin


class PrivacyCard(Callback):
    """Writes a privacy card when training ends, also by Ctrl-C or an error: ``privacy_card.md`` and ``.json``.

    The card states ε and δ, what they mean, how they come about, and what they do not cover; it names the metrics that
    were logged without noise.

    Args:
        path: The directory for the two files. ``None``: that of the run, where the journal is.
        delta: The δ at which ε is stated. ``None``: that of the Trainer's `PrivacyBudget` or `PrivacyMonitor`.

    Raises:
        ValueError: δ is not strictly between 0 and 1.
        PrivacyConfigurationError: At the start of a fit: the strategy is not private, there is no δ, or the directory
            cannot be written to.
    """

    def __init__(self, path: str | None = None, delta: float | None = None) -> None:
        self.path, self._delta = path, Delta("PrivacyCard", delta)
        #: The callback that δ is taken from.
        self._of: PrivacyBudget | PrivacyMonitor | None = None
        #: Where the card was written; empty before.
        self.markdown_path, self.json_path = "", ""
        self._target_epsilon: float | None = None
        self._training_metrics: set[str] = set()
        self._validation_metrics: set[str] = set()
        self._before_validation: set[str] = set()
        self._started = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._started = False
        strategy = _private_strategy(trainer)
        self._target_epsilon = getattr(strategy.budget, "epsilon", None)
        if self._delta.given is None:
            self._find_delta(trainer)

    def _find_delta(self, trainer: pl.Trainer) -> None:
        for callback in trainer_callbacks(trainer):
            if isinstance(callback, PrivacyBudget | PrivacyMonitor):
                self._of = callback
                return
        if self._of is None:
            raise PrivacyConfigurationError(
                "PrivacyCard needs a δ to state ε at: PrivacyCard(delta=…), or a PrivacyMonitor or PrivacyBudget "
                "beside it."
            )

    def follow(self, callback: PrivacyBudget | PrivacyMonitor) -> None:
        """Takes δ from a callback that the Trainer does not know."""
        self._of = callback

    @property
    def delta(self) -> float:
        """δ. RuntimeError before it is known."""
        return self._delta.value if self._of is None else self._of.delta

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes sure that the card can be written, before there is anything to write."""
        strategy = _private_strategy(trainer)
        self._started = not getattr(trainer, "fast_dev_run", False)
        self._target_epsilon = getattr(strategy.budget, "epsilon", None)
        if not self._started:
            return
        directory = self._directory(trainer)
        try:
            get_filesystem(directory).makedirs(directory, exist_ok=True)
            writable = "://" in directory or os.access(directory, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise PrivacyConfigurationError(
                f"PrivacyCard cannot write to {directory}. Give PrivacyCard(path=…) a directory that it can write to, "
                "or card=False to DifferentialPrivacy."
            )
        if strategy.journal is not None:  # what earlier runs of this training logged
            self._training_metrics |= set(strategy.journal.contents.notes.get("training_metrics", ()))
            self._validation_metrics |= set(strategy.journal.contents.notes.get("validation_metrics", ()))
        self._note(strategy, delta=self.delta, target_epsilon=self._target_epsilon)

    def _directory(self, trainer: pl.Trainer) -> str:
        return _private_strategy(trainer).books.run_directory if self.path is None else self.path

    def _note(self, strategy: PrivateMixin, **facts: Any) -> None:
        if strategy.journal is not None:
            strategy.journal.note(**facts)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before_validation = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._started and not trainer.sanity_checking:
            self._training_metrics |= self._before_validation - self._validation_metrics
            self._validation_metrics |= set(trainer.callback_metrics) - self._training_metrics

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._started:
            self._look_at_metrics(trainer)

    def _look_at_metrics(self, trainer: pl.Trainer) -> None:
        before = len(self._training_metrics) + len(self._validation_metrics)
        self._training_metrics |= set(trainer.callback_metrics) - self._validation_metrics
        if len(self._training_metrics) + len(self._validation_metrics) != before:
            training, validation = self._metrics()
            self._note(_private_strategy(trainer), training_metrics=training, validation_metrics=validation)

    def _metrics(self) -> tuple[list[str], list[str]]:
        def named(metrics: set[str]) -> list[str]:
            return sorted(name for name in metrics if not name.startswith("privacy/") and name != SHOWN)

        return named(self._training_metrics), named(self._validation_metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._started:
            self._look_at_metrics(trainer)
            self._write(trainer, "finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not self._started or not len(_private_strategy(trainer).ledger):
            return  # no step was taken: there is nothing to state
        try:
            self._look_at_metrics(trainer)
            self._write(trainer, f"interrupted by {type(exception).__name__}")
        except Exception as error:  # what went wrong first is what the user must see
            rank_zero_warn(f"PrivacyCard could not write a card: {error}")

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, status: str) -> None:
        self._started = False
        strategy = _private_strategy(trainer)
        training, validation = self._metrics()
        card = privacy_card(
            strategy.ledger,
            delta=self.delta,
            configuration=strategy.public_configuration(),
            steps_in_model=trainer.global_step,
            training_metrics=training,
            validation_metrics=validation,
            target_epsilon=self._target_epsilon,
            status=status,
        )
        self.markdown_path, self.json_path = write_card(card, self._directory(trainer))
        if "://" not in self.markdown_path:
            try:
                dashboards.log_card(trainer.loggers, self.markdown_path)
            except Exception as error:  # a dashboard out of reach does not undo a training that is done
                rank_zero_warn(f"PrivacyCard: the card is at {self.markdown_path}, and could not be uploaded: {error}")
        rank_zero_info(f"PrivacyCard: {card['statement']} {self.markdown_path}")


def _private_strategy(trainer: pl.Trainer) -> PrivateMixin:
    if not isinstance(trainer.strategy, PrivateMixin):
        raise PrivacyConfigurationError(
            "PrivacyCard found a Trainer that trains without privacy. Pass strategy=PrivateStrategy(…) to the Trainer, "
            "or use the callback DifferentialPrivacy(epsilon=…, delta=…) alone, which writes a card as well."
        )
    return trainer.strategy
