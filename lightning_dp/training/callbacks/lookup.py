"""Functions by which callbacks find the private strategy, the budget and other callbacks of a Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.training.strategy import PrivateMixin


def private_strategy(trainer: pl.Trainer, callback: str) -> PrivateMixin:
    """The Trainer's strategy, if it is private.

    Raises:
        PrivacyConfigurationError: The strategy is not private.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, PrivateMixin):
        raise PrivacyConfigurationError(
            f"{callback} found a Trainer that trains without privacy. Pass strategy=PrivateStrategy(…) to the Trainer, "
            "or use the callback DifferentialPrivacy(epsilon=…, delta=…) alone."
        )
    return strategy


def check_delta_of(callback: str, delta: float) -> None:
    """Raises ValueError unless 0 < δ < 1; ``callback`` is the name that the message begins with."""
    if not 0 < delta < 1:
        raise ValueError(f"{callback}: delta must lie strictly between 0 and 1, got {delta}.")


def trainer_callbacks(trainer: pl.Trainer) -> list[Callback]:
    """The Trainer's callbacks."""
    callbacks: list[Callback] = trainer_setting(trainer, "callbacks")
    return callbacks


def trainer_setting(trainer: pl.Trainer, name: str) -> Any:
    """An attribute that the Trainer's type does not declare."""
    return getattr(trainer, name)


def target_of_budget(trainer: pl.Trainer) -> float | None:
    """ε of the Trainer's budget, if it has one."""
    return next((target for target in map(target_epsilon_of, trainer_callbacks(trainer)) if target), None)


def target_epsilon_of(callback: Callback) -> float | None:
    """The ε that a callback keeps a training within, if it does."""
    return getattr(callback, "target_epsilon", None)
