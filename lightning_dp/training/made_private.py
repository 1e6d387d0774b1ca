"""Makes a strategy private that the Trainer has built already."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.training.strategy import PrivateMixin

#: Mixins that make the Lightning strategies in their `supported` private.
MIXINS: list[Any] = [PrivateMixin]


def make_private(strategy: Strategy, **configuration: Any) -> PrivateMixin:
    """Makes a strategy that the Trainer has already built private, in place, by exchanging its class.

    Args:
        strategy: The strategy; one that is private already is returned as it is.
        configuration: Arguments of `PrivateMixin.configure_privacy`.

    Raises:
        PrivacyConfigurationError: The strategy is none that a mixin supports, or comes from ``pytorch_lightning``.
        TypeError, ValueError: From `configure_privacy`; the strategy is then what it was.
    """
    if isinstance(strategy, PrivateMixin):
        return strategy
    mixin = next((mixin for mixin in MIXINS if type(strategy) in mixin.supported), None)
    if mixin is None and type(strategy).__module__.startswith("pytorch_lightning"):
        raise PrivacyConfigurationError(
            "This Trainer comes from the package pytorch_lightning, which lightning_dp does not know. Import the same "
            "names from lightning: `import lightning as L` and L.Trainer (pip install lightning)."
        )
    if mixin is None:
        raise PrivacyConfigurationError(
            f"Private training does not know how {type(strategy).__name__} computes and exchanges gradients. Use one "
            "device (Trainer(devices=1)), or strategy='ddp'."
        )
    before: Any = type(strategy)
    strategy.__class__ = type(f"Private{before.__name__}", (mixin, before), {})
    assert isinstance(strategy, PrivateMixin)
    try:
        strategy.configure_privacy(**configuration)
    except BaseException:  # what is only half private would fail again when it is torn down
        strategy.__class__ = before
        raise
    strategy.made_private = True
    return strategy
