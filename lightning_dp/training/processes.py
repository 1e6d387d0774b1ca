"""The collectives of a private strategy, for a single process; `lightning_dp.training.distributed` overrides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import Tensor


class OneProcess(Strategy):
    """A strategy of one process."""

    def share(self, value: Any) -> Any:
        """The first process's value, in every process."""
        return value

    def agree(self, value: Any, problem: str) -> None:
        """Compares a value over all processes.

        Raises:
            PrivacyConfigurationError: In every process, with the message ``problem``: the values differ.
        """

    def on_first_process(self, action: Callable[[], None]) -> None:
        """Runs an action in the first process; an exception there raises in every process."""
        action()

    def add_up(self, tensor: Tensor) -> Callable[[], None]:
        """Starts to add up a tensor over all processes, in place; returns a function that waits for the total."""
        return lambda: None
