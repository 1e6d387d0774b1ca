"""``precision="16-mixed"``: losses are scaled by a constant, in the place of Lightning's scaler.

A ``GradScaler`` looks for gradients that overflow in float16, skips the optimizer's step and changes its scale: whether
a step happens would depend on the records, without noise. Here every record's loss is scaled by one public constant
before the backward pass, and its gradient is scaled back in float32 before it is bounded: the bounded gradient is the
same number. A record whose gradient overflows adds nothing, and is counted; no step is skipped.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info

#: What every record's loss is multiplied by: float16 holds from 6e-8 to 65504, and error signals of a record lie mostly
#: between 1e-10 and 60.
SCALE = 1024.0


class HalfPrecision:
    """The scale of losses in a fit with float16, and Lightning's scaler until its end."""

    def __init__(self) -> None:
        self._plugin: MixedPrecision | None = None
        self._scaler: Any = None

    def use(self, plugin: Any) -> None:
        """Takes the scaler of a ``MixedPrecision`` plugin away, if it has one; only once a fit."""
        if self._plugin is None and isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            self._plugin, self._scaler = plugin, plugin.scaler
            plugin.scaler = None
            rank_zero_info(
                f"lightning_dp: precision='16-mixed': each record's loss is scaled by {SCALE:g}, a constant, instead "
                "of by a GradScaler. What overflows adds nothing, and is counted; no step is skipped."
            )

    def restore(self) -> None:
        """Gives it back."""
        if self._plugin is not None:
            self._plugin.scaler = self._scaler
        self._plugin = self._scaler = None

    @property
    def is_used(self) -> bool:
        """Whether losses are scaled."""
        return self._plugin is not None

    def factor(self, examples: int) -> float:
        """What a loss is multiplied by.

        Args:
            examples: Number of examples that it is the mean of; 1 for a sum.
        """
        return SCALE * examples if self.is_used else 1.0
