"""Accumulation of gradients as Lightning has it: one logical batch of k times the loader's size.

A union of k Poisson samples is none, so k batches are not accumulated. One sample is drawn of k times the expected
size instead, and no more than the loader's batch size pass through the model at once. Optimizer steps per epoch,
``global_step``, schedules and ``max_steps`` are those of Lightning; batches are counted by the logical ones.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

#: Settings that count the loader's batches, where they are whole numbers.
_COUNTS_OF_BATCHES = ("limit_train_batches", "val_check_interval")


class Accumulation:
    """``accumulate_grad_batches`` of a Trainer, taken over for the time of a fit."""

    def __init__(self) -> None:
        #: k, the loader's batches in a logical batch.
        self.factor = 1
        self._before: dict[str, Any] = {}
        self._trainer: Any = None

    def take_over(self, trainer: Any) -> None:
        """Sets ``accumulate_grad_batches`` to 1, and counts batches by the logical ones; only once a fit."""
        factor = trainer.accumulate_grad_batches
        if self._before or factor == 1:
            return
        self.factor, self._trainer = factor, trainer
        self._before = {"accumulate_grad_batches": factor}
        trainer.accumulate_grad_batches = 1
        for name in _COUNTS_OF_BATCHES:
            value = getattr(trainer, name)
            if isinstance(value, int) and value > 1 and not trainer.fast_dev_run:
                self._before[name] = value
                setattr(trainer, name, -(-value // factor))
        rank_zero_info(
            f"lightning_dp: accumulate_grad_batches={factor}: each step draws one sample of {factor} times the "
            "loader's batch size, of which at most max_physical_batch_size (by default the loader's batch size) pass "
            "through the model at once."
        )

    def restore(self) -> None:
        """Gives the Trainer its settings back."""
        for name, value in self._before.items():
            setattr(self._trainer, name, value)
        self._before, self.factor, self._trainer = {}, 1, None
