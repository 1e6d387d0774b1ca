"""What has been released, and what it costs: the ledger of private steps, ε, and noise for a target ε.

dp-accounting does the mathematics. Accountants: ``"pld"`` (privacy loss distributions: tight, the default) and
``"rdp"`` (Rényi differential privacy: the moments accountant's successor, a few per cent to 20 % above). Adjacency is
add-or-remove-one-record unless said otherwise.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism, identity
from dp_accounting.rdp import RdpAccountant

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")


class PrivacyLedger:
    """Every private step of a training, run-length encoded: the only record from which ε is computed.

    The stage that adds the noise appends to it, before the noisy gradient becomes visible to anything. Steps are
    grouped by the run of a process that took them, under a random name, so that ledgers that share a history can be
    merged without counting a step twice, or leaving one out.
    """

    def __init__(self) -> None:
        self._runs: dict[str, list[tuple[DpEvent, int]]] = {}
        self._current = ""

    def start_run(self) -> None:
        """What is recorded from now on belongs to a new run."""
        self._current = secrets.token_hex(8)

    @property
    def run(self) -> str:
        """The name of the run that is being recorded."""
        return self._current

    def __len__(self) -> int:
        """Number of private steps."""
        return sum(count for run in self._runs.values() for _, count in run)

    def __iter__(self) -> Iterator[tuple[DpEvent, int]]:
        """Pairs of an event and how often it happened in a row."""
        steps = (entry for run in self._runs.values() for entry in run)
        for event, entries in itertools.groupby(steps, key=lambda entry: entry[0]):
            yield event, sum(count for _, count in entries)

    def record(self, event: DpEvent, count: int = 1) -> None:
        """Appends ``count`` private steps."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}.")
        if count == 0:
            return
        run = self._runs.setdefault(self._current, [])
        if run and run[-1][0] == event:
            count += run.pop()[1]
        run.append((event, count))

    def event(self) -> DpEvent:
        """All steps as one event; the same mechanism in different runs is composed as one."""
        counts: dict[DpEvent, int] = {}
        for event, count in self:
            counts[event] = counts.get(event, 0) + count
        return ComposedDpEvent([SelfComposedDpEvent(event, count) for event, count in counts.items()])

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """ε at this δ of everything recorded: 0.0 for an empty ledger, infinity when a step had no noise."""
        return event_epsilon(self.event(), delta, accountant) if self._runs else 0.0

    def copy(self) -> PrivacyLedger:
        """A ledger with the same entries."""
        ledger = PrivacyLedger()
        ledger._runs = {name: list(run) for name, run in self._runs.items()}
        ledger._current = self._current
        return ledger

    def include(self, other: PrivacyLedger) -> None:
        """Makes this ledger account for the steps of the other as well, counting common ones once.

        Both may hold the beginning of the same run: one process recorded it, so the longer one contains the shorter.
        """
        merged = {name: list(run) for name, run in other._runs.items()}
        for name, run in self._runs.items():
            if sum(count for _, count in run) >= sum(count for _, count in merged.get(name, [])):
                merged[name] = run
        self._runs = merged

    def state_dict(self) -> dict[str, Any]:
        """Plain data: lists, dictionaries, strings and numbers."""
        return {
            "runs": [
                {"name": name, "steps": [{"event": _encode(event), "count": count} for event, count in run]}
                for name, run in self._runs.items()
            ]
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PrivacyLedger:
        """The ledger that `state_dict` described."""
        ledger = cls()
        for run in state["runs"]:
            ledger._current = str(run["name"])
            for entry in run["steps"]:
                ledger.record(_decode(entry["event"]), int(entry["count"]))
        ledger.start_run()
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


def event_epsilon(event: DpEvent, delta: float, accountant: Accountant = "pld") -> float:
    """ε at this δ of any event, by either accountant."""
    _check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {ACCOUNTANTS}, got {accountant!r}.")
    if _is_non_private(event):
        return math.inf
    if accountant == "rdp":
        with _quiet():
            return float(RdpAccountant().compose(event).get_epsilon(delta))
    rough = _rough_epsilon(event, delta)
    if rough > _MEANINGLESS_EPSILON:
        return rough
    # The grid of privacy losses must reach beyond ε: coarser, still pessimistic, where ε is large.
    interval = 1e-4 * 2 ** max(0, math.ceil(math.log2(rough / 100))) if rough > 0 else 1e-4
    loss: Any = identity(interval)
    for part in event.events if isinstance(event, ComposedDpEvent) else [event]:
        single, count = (part.event, part.count) if isinstance(part, SelfComposedDpEvent) else (part, 1)
        loss = loss.compose(_single_loss_distribution(single, interval).self_compose(count))
    return float(loss.get_epsilon_for_delta(delta))


@lru_cache(maxsize=16)
def _single_loss_distribution(event: DpEvent, interval: float) -> Any:
    """The privacy loss distribution of one step, pessimistic: most of the cost of ε, and the same for all steps."""
    rate = 1.0
    if isinstance(event, PoissonSampledDpEvent):
        rate, event = event.sampling_probability, event.event
    if not isinstance(event, GaussianDpEvent):
        raise TypeError(f"No privacy loss distribution for a {type(event).__name__}.")
    return from_gaussian_mechanism(event.noise_multiplier, value_discretization_interval=interval, sampling_prob=rate)


#: Beyond this, ε is stated by Rényi differential privacy (an upper bound as well): the tight computation costs memory
#: in proportion to ε, and says no more about privacy.
_MEANINGLESS_EPSILON = 1000.0

#: Rényi orders that are enough to know the size of ε.
_FEW_ORDERS = (1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128, 256)


def _rough_epsilon(event: DpEvent, delta: float) -> float:
    """An upper bound on ε in about a millisecond."""
    if _is_non_private(event):
        return math.inf
    with _quiet():
        return float(RdpAccountant(_FEW_ORDERS).compose(event).get_epsilon(delta))


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
    """The noise multiplier with which ``steps`` steps, after those in ``spent``, cost ε, or up to 0.1 % less.

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

    def cost(multiplier: float, exact: bool = True) -> float:
        ledger = spent.copy()
        ledger.record(subsampled_gaussian(multiplier, sampling_rate), steps)
        return ledger.epsilon(delta, accountant) if exact else _rough_epsilon(ledger.event(), delta)

    # A bracket by the fast accountant, then a few evaluations of the tight one.
    high = _smallest_power(lambda multiplier: cost(multiplier, exact=False) <= epsilon, start=1.0, end=2.0**20)
    high_cost = cost(high)
    while high_cost > epsilon:
        if high > 2**20:
            raise ValueError(f"No noise keeps ε within {epsilon} at δ = {delta}: the budget is spent already.")
        high *= 1.05
        high_cost = cost(high)
    low, low_cost = high, high_cost
    while low_cost <= epsilon:
        high, high_cost = low, low_cost
        if high < 2**-10:
            return high
        low /= 1.3
        low_cost = cost(low)
    while high_cost < 0.999 * epsilon and high - low > 1e-6 * high:
        if math.isinf(low_cost) or high_cost == 0:
            middle = (low + high) / 2
        else:  # ε falls about like a power of the multiplier: interpolate, and aim a little below the target
            slope = math.log(high_cost / low_cost) / math.log(high / low)
            middle = high * (0.9995 * epsilon / high_cost) ** (1 / slope)
            margin = 0.02 * (high - low)
            middle = min(max(middle, low + margin), high - margin)
        middle_cost = cost(middle)
        if middle_cost <= epsilon:
            high, high_cost = middle, middle_cost
        else:
            low, low_cost = middle, middle_cost
    return high


def _smallest_power(holds: Callable[[float], bool], start: float, end: float) -> float:
    """About the smallest number (to 2 %) from which a predicate holds; beyond ``end`` when there is none."""
    high = start
    while not holds(high):
        high *= 2
        if high > end:
            return high
    low = high / 2
    while holds(low) and low > 1 / end:
        low, high = low / 2, low
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def affordable_steps(
    spent: PrivacyLedger, event: DpEvent, *, epsilon: float, delta: float, at_most: int, accountant: Accountant = "pld"
) -> int:
    """How many more steps of this event fit into the budget: the largest ``n ≤ at_most`` with total ε ≤ ``epsilon``."""

    def cost(steps: int, exact: bool) -> float:
        ledger = spent.copy()
        ledger.record(event, steps)
        if len(ledger) == 0:
            return 0.0
        return ledger.epsilon(delta, accountant) if exact else _rough_epsilon(ledger.event(), delta)

    def largest(fits: Callable[[int], bool], start: int, growth: float) -> int:
        """The largest n in [0, at_most] that fits, searched from ``start`` upwards and downwards."""
        low, high = 0, max(start, 1)
        while high < at_most and fits(high):
            low, high = high, math.ceil(high * growth)
        if high >= at_most:
            if fits(at_most):
                return at_most
            high = at_most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    if at_most <= 0:
        return 0
    if at_most < 10**6 and cost(at_most, exact=True) <= epsilon:
        return at_most
    rough = largest(lambda steps: cost(steps, exact=False) <= epsilon, start=1, growth=2.0)
    return largest(lambda steps: cost(steps, exact=True) <= epsilon, start=rough, growth=1.1)
