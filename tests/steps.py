"""Private steps for tests, of an engine and the stages of a mechanism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.gradients.engine import Engine
from lightning_dp.mechanism.clipping import Bounding
from lightning_dp.mechanism.denoising import Denoiser
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.noise import Noise
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.mechanism.sums import Wire


def make_step(
    engine: Engine,
    clipping: Bounding,
    noise: Noise,
    ledger: PrivacyLedger,
    randomness: Randomness,
    add_up: Callable[[Any], Any] | None = None,
    charge: Callable[[Any, Any], None] = lambda event, at_most: None,
    denoiser: Denoiser | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> PrivateStep:
    """A step whose rule is that of the engine's module already."""
    mechanism = Mechanism(clipping, noise, denoiser)
    return PrivateStep(mechanism, engine, ledger, randomness, Wire(rank, world_size, add_up), charge)
