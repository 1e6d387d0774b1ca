"""What has been released, and what it costs: the ledger of private steps, ε, and noise for a target ε.

dp-accounting does the mathematics. Accountants: ``"pld"`` (privacy loss distributions: tight, the default) and
``"rdp"`` (Rényi differential privacy: the moments accountant's successor, a few per cent to 20 % above). Adjacency is
add-or-remove-one-record unless said otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")


class PrivacyLedger:
    """Every private step of a training run, run-length encoded: the only record from which ε is computed.

    The stage that adds the noise appends to it, before the noisy gradient becomes visible to anything.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[DpEvent, int]] = []

    def __len__(self) -> int:
        """Number of private steps."""
        return sum(count for _, count in self._runs)

    def __iter__(self) -> Iterator[tuple[DpEvent, int]]:
        """Pairs of an event and how often it happened in a row."""
        return iter(self._runs)

    def record(self, event: DpEvent, count: int = 1) -> None:
        """Appends ``count`` private steps."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}.")
        if count == 0:
            return
        if self._runs and self._runs[-1][0] == event:
            count += self._runs.pop()[1]
        self._runs.append((event, count))

    def event(self) -> DpEvent:
        """All steps as one event."""
        return ComposedDpEvent([SelfComposedDpEvent(event, count) for event, count in self._runs])

    def epsilon(
        self,
        delta: float,
        accountant: Accountant = "pld",
        neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> float:
        """ε at this δ of everything recorded: 0.0 for an empty ledger, infinity when a step had no noise."""
        return event_epsilon(self.event(), delta, accountant, neighboring_relation) if self._runs else 0.0

    def copy(self) -> PrivacyLedger:
        """A ledger with the same entries."""
        ledger = PrivacyLedger()
        ledger._runs = list(self._runs)
        return ledger

    def extends(self, other: PrivacyLedger) -> bool:
        """Whether this ledger begins with all the steps of the other, in their order."""
        remaining = list(reversed(self._runs))
        for event, count in other:
            while count:
                if not remaining or remaining[-1][0] != event:
                    return False
                own, available = remaining.pop()
                used = min(count, available)
                count -= used
                if available > used:
                    remaining.append((own, available - used))
        return True

    def include(self, other: PrivacyLedger) -> None:
        """Makes this ledger account for the steps of the other as well, counting a common beginning once."""
        if self.extends(other):
            return
        own = self.copy()
        self._runs = list(other._runs)
        if not other.extends(own):
            for event, count in own:
                self.record(event, count)

    def state_dict(self) -> dict[str, Any]:
        """Plain data: lists, dictionaries, strings and numbers."""
        return {"runs": [{"event": _encode(event), "count": count} for event, count in self._runs]}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PrivacyLedger:
        """The ledger that `state_dict` described."""
        ledger = cls()
        for run in state["runs"]:
            ledger.record(_decode(run["event"]), int(run["count"]))
        return ledger


def _encode(event: DpEvent) -> dict[str, Any]:
    if isinstance(event, PoissonSampledDpEvent):
        return {"type": "poisson", "sampling_rate": event.sampling_probability, "event": _encode(event.event)}
    if isinstance(event, GaussianDpEvent):
        return {"type": "gaussian", "noise_multiplier": event.noise_multiplier}
    if isinstance(event, NonPrivateDpEvent):
        return {"type": "non_private"}
    raise TypeError(f"The ledger cannot store a {type(event).__name__}.")


def _decode(data: dict[str, Any]) -> DpEvent:
    match data["type"]:
        case "poisson":
            return PoissonSampledDpEvent(float(data["sampling_rate"]), _decode(data["event"]))
        case "gaussian":
            return GaussianDpEvent(float(data["noise_multiplier"]))
        case "non_private":
            return NonPrivateDpEvent()
        case other:
            raise ValueError(f"The ledger holds an event of unknown type {other!r}; was it written by a newer version?")


def subsampled_gaussian(noise_multiplier: float, sampling_rate: float) -> DpEvent:
    """One private step: Gaussian noise on a sum over a Poisson sample. Without noise, an event of infinite ε."""
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be non-negative and finite, got {noise_multiplier}.")
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate must lie in (0, 1], got {sampling_rate}.")
    if noise_multiplier == 0:
        return NonPrivateDpEvent()
    return PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1, got {delta}.")


def event_epsilon(
    event: DpEvent,
    delta: float,
    accountant: Accountant = "pld",
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> float:
    """ε at this δ of any event, by either accountant."""
    _check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {ACCOUNTANTS}, got {accountant!r}.")
    if _is_non_private(event):
        return math.inf
    with _quiet():
        if accountant == "rdp":
            return float(RdpAccountant(neighboring_relation=neighboring_relation).compose(event).get_epsilon(delta))
        rough = RdpAccountant(_FEW_ORDERS, neighboring_relation).compose(event).get_epsilon(delta)
        # The grid of privacy losses must reach beyond ε: coarser, still pessimistic, where ε is large.
        interval = 1e-4 * max(1.0, rough / 100) if math.isfinite(rough) else 1.0
        return float(PLDAccountant(neighboring_relation, interval).compose(event).get_epsilon(delta))


#: Rényi orders that are enough to know the size of ε.
_FEW_ORDERS = (2, 3, 4, 6, 8, 12, 16, 32, 64, 256)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without dp-accounting's warnings about Rényi orders that it leaves out, which only makes ε larger."""
    logger = logging.getLogger("absl")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _is_non_private(event: DpEvent) -> bool:
    if isinstance(event, ComposedDpEvent):
        return any(_is_non_private(part) for part in event.events)
    if isinstance(event, SelfComposedDpEvent):
        return event.count > 0 and _is_non_private(event.event)
    if isinstance(event, PoissonSampledDpEvent):
        return _is_non_private(event.event)
    return isinstance(event, NonPrivateDpEvent)


def epsilon(
    *, noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: Accountant = "pld"
) -> float:
    """ε of DP-SGD: ``steps`` Poisson-subsampled Gaussian mechanisms.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity; 0 gives infinity.
        sampling_rate: Probability with which each record joins each batch.
        steps: Number of private steps.
        delta: The δ to state ε at, strictly between 0 and 1.
        accountant: ``"pld"`` or ``"rdp"``.
    """
    _check_delta(delta)
    ledger = PrivacyLedger()
    ledger.record(subsampled_gaussian(noise_multiplier, sampling_rate), steps)
    return ledger.epsilon(delta, accountant)


def calibrate_noise(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    accountant: Accountant = "pld",
    spent: PrivacyLedger | None = None,
) -> float:
    """The smallest noise multiplier (to 0.1 %) with which ``steps`` steps, after those in ``spent``, cost at most ε.

    Formal guarantee: the ε of the returned multiplier is at most ``epsilon``; it has been computed.

    Raises:
        ValueError: No noise can meet the target, because ``spent`` exceeds it already.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    _check_delta(delta)
    if math.isinf(epsilon):
        return 0.0
    spent = spent or PrivacyLedger()

    def affordable(multiplier: float) -> bool:
        ledger = spent.copy()
        ledger.record(subsampled_gaussian(multiplier, sampling_rate), steps)
        return ledger.epsilon(delta, accountant) <= epsilon

    high = 1.0
    while not affordable(high):
        high *= 2
        if high > 2**20:
            raise ValueError(f"No noise keeps ε within {epsilon} at δ = {delta}: the budget is spent already.")
    low = high / 2
    while affordable(low):
        low, high = low / 2, low
        if high < 2**-8:
            return high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if affordable(middle) else (middle, high)
    return high


def affordable_steps(
    spent: PrivacyLedger, event: DpEvent, *, epsilon: float, delta: float, at_most: int, accountant: Accountant = "pld"
) -> int:
    """How many more steps of this event fit into the budget: the largest ``n ≤ at_most`` with total ε ≤ ``epsilon``."""

    def fits(steps: int) -> bool:
        ledger = spent.copy()
        ledger.record(event, steps)
        return ledger.epsilon(delta, accountant) <= epsilon

    return _largest(fits, at_most)


def _largest(fits: Callable[[int], bool], at_most: int) -> int:
    """The largest n in [0, at_most] with fits(n), for a predicate that holds up to some n; 0 when none does."""
    if at_most <= 0 or fits(at_most):
        return max(at_most, 0)
    low, high = 0, 1
    while high < at_most and fits(high):
        low, high = high, 2 * high
    high = min(high, at_most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


