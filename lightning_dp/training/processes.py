"""What a strategy asks of other processes, of which there are none here: see `lightning_dp.training.distributed`."""

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
        """Raises, in every process, if they have different values.

        Raises:
            PrivacyConfigurationError: With what is the ``problem`` then.
        """

    def on_first_process(self, action: Callable[[], None]) -> None:
        """Does something in the first process; an error there is one in every process."""
        action()

    def add_up(self, tensor: Tensor) -> Callable[[], None]:
        """Starts to add up a tensor over all processes, in place; returns a function that waits for the total."""
        return lambda: None
