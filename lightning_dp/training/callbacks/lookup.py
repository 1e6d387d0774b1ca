"""Functions by which callbacks find the private strategy, the budget and other callbacks of a Trainer."""

from __future__ import annotations

import math
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


def default_delta(num_records: int) -> float:
    """The δ where none is given: 1/(10·N), rounded down to a power of ten.

    Example::

        >>> default_delta(60_000), default_delta(1000)
        (1e-06, 0.0001)
    """
    return float(f"1e-{math.ceil(math.log10(10 * num_records))}")


class Delta:
    """The δ of a callback: the one that was given, or `default_delta` of the number of records.

    Args:
        callback: Its name, for messages.
        given: The δ, or ``None``.

    Raises:
        TypeError, ValueError: δ is not a number strictly between 0 and 1.
    """

    def __init__(self, callback: str, given: float | None) -> None:
        if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
            raise TypeError(f"{callback}: delta must be a number, got {given!r}.")
        if given is not None:
            check_delta_of(callback, given)
        self.given = given
        self._strategy: PrivateMixin | None = None

    def follow(self, strategy: PrivateMixin) -> None:
        """Takes the number of records from this strategy, once its train loader is known."""
        self._strategy = strategy

    @property
    def value(self) -> float:
        """δ. RuntimeError where it depends on the number of records and that is not known yet."""
        if self.given is not None:
            return self.given
        if self._strategy is None:
            raise RuntimeError("delta=None is chosen by the number of records, which is known once a fit has begun.")
        return default_delta(self._strategy.num_records)

    @property
    def reason(self) -> str:
        """Why δ is what it is, in brackets; empty where it was given."""
        return "" if self.given is not None else " (1/(10·N), rounded down to a power of ten: none was given)"


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
