"""What has been released, and what it costs: the ledger of private steps, ε, and noise for a target ε.

Accountants: ``"pld"`` (privacy loss distributions: tight, the default) and ``"rdp"`` (Rényi differential privacy: the
moments accountant's successor, a few per cent to 20 % above). Adjacency is ``"add_or_remove"`` one record unless said
otherwise; ``"replace_one"`` is the other. The mathematics lies in `lightning_dp.accountants`.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from lightning_dp.accountants import (
    ACCOUNTANTS,
    ADJACENCIES,
    COARSE,
    Accountant,
    Adjacency,
    check_delta,
    event_delta,
    event_epsilon,
    rough_epsilon,
)
from lightning_dp.moments import DENSITIES
from lightning_dp.noise import Magnitudes, ShiftedNoiseDpEvent

__all__ = [
    "ACCOUNTANTS",
    "ADJACENCIES",
    "Accountant",
    "Adjacency",
    "EpsilonMonitor",
    "Phase",
    "PrivacyLedger",
    "affordable_steps",
    "calibrate_noise",
    "calibrate_schedule",
    "calibrate_steps",
    "delta",
    "epsilon",
    "event_delta",
    "event_epsilon",
    "subsampled_gaussian",
]

#: The most steps that are looked for.
_MOST_STEPS = 10**9


class PrivacyLedger:
    """Every private step of a training, run-length encoded: the only record from which ε is computed.

    The stage that adds the noise appends to it, before the noisy gradient becomes visible to anything. Steps are
    grouped by the run of a process that took them, under a random name, so that ledgers that share a history can be
    merged without counting a step twice, or leaving one out.
    """

    def __init__(self) -> None:
        self._runs: dict[str, list[tuple[DpEvent, int]]] = {}
        self._current = ""

    def start_run(self, name: str | None = None) -> None:
        """What is recorded from now on belongs to a new run, of a random name unless one is given."""
        self._current = secrets.token_hex(8) if name is None else name

    @property
    def run(self) -> str:
        """The name of the run that is being recorded."""
        return self._current

    def knows(self, run: str) -> bool:
        """Whether something was recorded under this name of a run."""
        return run in self._runs

    def __len__(self) -> int:
        """Number of releases: private steps, and statistics."""
        return sum(count for run in self._runs.values() for _, count in run)

    @property
    def steps(self) -> int:
        """Number of private steps of training."""
        return len(self) - sum(count for _, count in self.statistics())

    def statistics(self) -> list[tuple[DpEvent, int]]:
        """Releases that are not steps of training, and how often they happened: unsampled ones.

        A step is Poisson-sampled, also at q = 1. What has no noise counts as a step, as there is no telling.
        """
        return [(event, count) for event, count in self if isinstance(event, GaussianDpEvent)]

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

    def epsilon(self, delta: float, accountant: Accountant = "pld", adjacency: Adjacency = "add_or_remove") -> float:
        """ε at this δ of everything recorded: 0.0 for an empty ledger, infinity when a step had no noise."""
        return event_epsilon(self.event(), delta, accountant, adjacency)

    def delta(self, epsilon: float, accountant: Accountant = "pld", adjacency: Adjacency = "add_or_remove") -> float:
        """δ at this ε of everything recorded: 0.0 for an empty ledger, 1.0 when a step had no noise."""
        return event_delta(self.event(), epsilon, accountant, adjacency)

    @classmethod
    def of(cls, schedule: Sequence[Phase]) -> PrivacyLedger:
        """The ledger of a training that follows this schedule."""
        ledger = cls()
        for phase in schedule:
            ledger.record(phase.event(), phase.steps)
        return ledger

    def copy(self) -> PrivacyLedger:
        """A ledger with the same entries."""
        ledger = PrivacyLedger()
        ledger._runs = {name: list(run) for name, run in self._runs.items()}
        ledger._current = self._current
        return ledger

    def become(self, other: PrivacyLedger) -> None:
        """Takes the entries and the current run of the other in place of one's own."""
        self._runs, self._current = other.copy()._runs, other._current

    def extend(self, other: PrivacyLedger) -> None:
        """Records the steps of the other after one's own."""
        for event, count in other:
            self.record(event, count)

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
    if isinstance(event, ShiftedNoiseDpEvent) and type(event.noise) in DENSITIES.values():
        parameters = {field.name: getattr(event.noise, field.name) for field in fields(event.noise)}  # type: ignore[arg-type]
        return {
            "type": "shifted_noise",
            "noise": next(name for name, kind in DENSITIES.items() if kind is type(event.noise)),
            "parameters": parameters,
            "scale": event.scale,
            "counts": list(event.magnitudes.counts),
            "magnitudes": [list(entry) for entry in event.magnitudes.values],
        }
    if isinstance(event, NonPrivateDpEvent):
        return {"type": "non_private"}
    raise TypeError(f"The ledger cannot store a {type(event).__name__}.")


def _decode(data: dict[str, Any]) -> DpEvent:
    match data["type"]:
        case "poisson":
            return PoissonSampledDpEvent(float(data["sampling_rate"]), _decode(data["event"]))
        case "gaussian":
            return GaussianDpEvent(float(data["noise_multiplier"]))
        case "shifted_noise" if data["noise"] in DENSITIES:
            entries = tuple(tuple(map(float, entry)) for entry in data["magnitudes"])
            magnitudes = Magnitudes(tuple(map(int, data["counts"])), entries)
            noise = DENSITIES[data["noise"]](**{name: float(value) for name, value in data["parameters"].items()})
            return ShiftedNoiseDpEvent(noise, float(data["scale"]), magnitudes)
        case "non_private":
            return NonPrivateDpEvent()
        case other:
            raise ValueError(f"The ledger holds an event of unknown type {other!r}; was it written by a newer version?")


def gaussian_event(noise_multiplier: float) -> DpEvent:
    """Gaussian noise on a sum, without sampling. Without noise, an event of infinite ε."""
    return GaussianDpEvent(noise_multiplier) if noise_multiplier else NonPrivateDpEvent()


def subsampled_gaussian(noise_multiplier: float, sampling_rate: float) -> DpEvent:
    """One private step: Gaussian noise on a sum over a Poisson sample. Without noise, an event of infinite ε."""
    return Phase(1, sampling_rate, noise_multiplier).event()


@dataclass(frozen=True)
class Phase:
    """Some steps of a training with the same noise multiplier and sampling rate; a schedule is a list of phases.

    Args:
        steps: Number of private steps.
        sampling_rate: Probability with which each record joins each batch.
        noise_multiplier: Scale of the noise over the sensitivity; 0 gives an event of infinite ε.
        mechanism: What noise of a multiplier costs before sampling; Gaussian noise, unless said otherwise.
    """

    steps: int
    sampling_rate: float
    noise_multiplier: float = 1.0
    mechanism: Callable[[float], DpEvent] = gaussian_event

    def event(self) -> DpEvent:
        """What one step costs."""
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be non-negative and finite, got {self.noise_multiplier}.")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must lie in (0, 1], got {self.sampling_rate}.")
        event = self.mechanism(self.noise_multiplier)
        return event if isinstance(event, NonPrivateDpEvent) else PoissonSampledDpEvent(self.sampling_rate, event)


def epsilon(
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
) -> float:
    """ε of DP-SGD: ``steps`` Poisson-subsampled Gaussian mechanisms.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity; 0 gives infinity.
        sampling_rate: Probability with which each record joins each batch.
        steps: Number of private steps.
        delta: The δ to state ε at, strictly between 0 and 1.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.
    """
    return PrivacyLedger.of([Phase(steps, sampling_rate, noise_multiplier)]).epsilon(delta, accountant, adjacency)


def delta(
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    epsilon: float,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
) -> float:
    """δ of DP-SGD at a given ε ≥ 0; the other arguments as for `epsilon`. 1.0 without noise."""
    return PrivacyLedger.of([Phase(steps, sampling_rate, noise_multiplier)]).delta(epsilon, accountant, adjacency)


def _check_target(epsilon: float, delta: float) -> None:
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    check_delta(delta)


def calibrate_noise(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
    spent: PrivacyLedger | None = None,
    mechanism: Callable[[float], DpEvent] = gaussian_event,
) -> float:
    """The noise multiplier with which ``steps`` steps, after those in ``spent``, cost ε, or up to 0.1 % less.

    Formal guarantee: the ε of the returned multiplier is at most ``epsilon``; it has been computed.

    Args:
        epsilon, delta: The target.
        sampling_rate: Probability with which each record joins each batch.
        steps: Number of private steps.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.
        spent: What has been released before.
        mechanism: As for `Phase`: noise other than Gaussian.

    Raises:
        ValueError: No noise can meet the target, because ``spent`` exceeds it already.
    """
    [phase] = calibrate_schedule(
        [Phase(steps, sampling_rate, mechanism=mechanism)],
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
        adjacency=adjacency,
        spent=spent,
    )
    return phase.noise_multiplier


def calibrate_schedule(
    schedule: Sequence[Phase],
    *,
    epsilon: float,
    delta: float,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
    spent: PrivacyLedger | None = None,
) -> list[Phase]:
    """The schedule with all noise multipliers scaled by one factor, so that it costs ε, or usually at most 0.1 % less.

    Formal guarantee: the ε of the returned schedule, after ``spent``, is at most ``epsilon``; it has been computed.

    Args:
        schedule: Phases whose noise multipliers are in the wanted proportion to each other, and positive.
        epsilon: The target, positive.
        delta: The δ of the target.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.
        spent: What has been released before.

    Raises:
        ValueError: No noise can meet the target, because ``spent`` exceeds it already, or it is too small for any.
    """
    _check_target(epsilon, delta)
    if not schedule:
        raise ValueError("schedule must hold at least one Phase.")
    for phase in schedule:
        if phase.steps < 1:
            raise ValueError(f"steps must be at least 1, got {phase.steps}.")
        if not 0 < phase.noise_multiplier < math.inf:
            raise ValueError(
                f"A schedule's noise_multiplier must be positive and finite, got {phase.noise_multiplier}."
            )
        phase.event()  # checks the rate
    spent = spent or PrivacyLedger()

    def scaled(scale: float) -> list[Phase]:
        return [replace(phase, noise_multiplier=scale * phase.noise_multiplier) for phase in schedule]

    def cost(scale: float, exact: bool = True) -> float:
        ledger = spent.copy()
        ledger.extend(PrivacyLedger.of(scaled(scale)))
        if exact:
            return ledger.epsilon(delta, accountant, adjacency)
        return rough_epsilon(ledger.event(), delta, adjacency)

    if math.isinf(epsilon):
        return scaled(0.0)
    return scaled(_smallest_scale(cost, epsilon, delta))


def _smallest_scale(cost: Callable[..., float], epsilon: float, delta: float) -> float:
    """About the smallest scale of the noise (to 0.1 % of ε) with a cost of at most ε; its cost has been computed."""
    # A bracket by the fast accountant, then a few evaluations of the tight one.
    high = _smallest_power(lambda scale: cost(scale, exact=False) <= epsilon, start=1.0, end=2.0**20)
    high_cost = cost(high)
    while high_cost > epsilon:
        if high > 2**20:
            raise ValueError(
                f"No noise keeps ε within {epsilon} at δ = {delta}: the budget is spent already, or too small."
            )
        high *= 1.05
        high_cost = cost(high)
    low, low_cost = high, high_cost
    while low_cost <= epsilon:
        high, high_cost = low, low_cost
        if high < 2**-20:
            return high
        low /= 1.3
        low_cost = cost(low)
    while high_cost < 0.999 * epsilon and high - low > 1e-6 * high:
        if math.isinf(low_cost) or high_cost == 0:
            middle = (low + high) / 2
        else:  # ε falls about like a power of the multiplier: interpolate, and aim a little below the target
            slope = math.log(high_cost / low_cost) / math.log(high / low)
            middle = high * (0.9995 * epsilon / high_cost) ** (1 / slope) if slope else (low + high) / 2
            margin = 0.02 * (high - low)
            middle = min(max(middle, low + margin), high - margin)
        middle_cost = cost(middle)
        if middle_cost <= epsilon:
            high, high_cost = middle, middle_cost
        else:
            low, low_cost = middle, middle_cost
    assert high_cost <= epsilon
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


def calibrate_steps(
    *,
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling_rate: float,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
    spent: PrivacyLedger | None = None,
) -> int:
    """The most steps, after those in ``spent``, with which ε stays within the target: 0 when not one does.

    Formal guarantee: the ε of the returned number of steps is at most ``epsilon``, unless ``spent`` exceeds it
    already; it has been computed. At most 10⁹ steps are looked for.
    """
    _check_target(epsilon, delta)
    return affordable_steps(
        spent or PrivacyLedger(),
        subsampled_gaussian(noise_multiplier, sampling_rate),
        epsilon=epsilon,
        delta=delta,
        at_most=_MOST_STEPS,
        accountant=accountant,
        adjacency=adjacency,
    )


def affordable_steps(
    spent: PrivacyLedger,
    event: DpEvent,
    *,
    epsilon: float,
    delta: float,
    at_most: int,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
) -> int:
    """How many more steps of this event fit into the budget: the largest ``n ≤ at_most`` with total ε ≤ ``epsilon``."""

    def cost(steps: int, exact: bool) -> float:
        ledger = spent.copy()
        ledger.record(event, steps)
        if exact:
            return ledger.epsilon(delta, accountant, adjacency)
        return rough_epsilon(ledger.event(), delta, adjacency)

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


class EpsilonMonitor:
    """ε of a growing ledger at little cost, for display while training runs.

    Formal guarantee: a value is never below the true ε. Proof: it is an upper bound (on a coarser grid, see
    `event_epsilon`) on ε of the ledger or of the ledger with some more steps of its last kind; ε grows with every step.
    It is at most 1 % above: the further steps raise ε by half a per cent, which is checked, and the coarser grid by
    less than that, which is measured by the tests rather than proven.

    Cost: an evaluation, of some milliseconds, per half a per cent of ε and never more than one per call, but for a
    misjudged look ahead; their number grows with the logarithm of the number of steps.

    Args:
        delta: The δ at which ε is stated.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.
    """

    _TOLERANCE, _AIM = 1.005, 1.0045

    def __init__(self, delta: float, accountant: Accountant = "pld", adjacency: Adjacency = "add_or_remove") -> None:
        check_delta(delta)
        self.delta, self.accountant, self.adjacency = delta, accountant, adjacency
        #: How often ε has been computed.
        self.evaluations = 0
        self._before: list[tuple[DpEvent, int]] = []
        self._last: DpEvent | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        #: The value serves for these numbers of steps of the last kind; it is ε of the last of them.
        self._from, self._until, self._value = 0, 0, 0.0
        #: d log ε / d log steps, as last seen.
        self._slope = 1.0

    def bound(self, ledger: PrivacyLedger) -> float:
        """An upper bound on ε of the ledger, within 1 % of it."""
        entries = list(ledger)
        if not entries:
            return 0.0
        *before, (event, steps) = entries
        if event != self._last or before != self._before:
            self._last, self._before = event, before
            self._start_anew()
        if not self._from <= steps <= self._until:
            self._advance(steps)
        return self._value

    def _advance(self, steps: int) -> None:
        """Computes a value for this number of steps, and for as many more as it serves for."""
        known, at = self._value, self._until
        if at == 0 or steps < at:
            known, reach = 0.0, steps
        else:
            reach = math.floor(at * (self._AIM ** (1 / self._slope) if known else 2.0))
        until = max(steps, reach)
        value = self._evaluate(until)
        if until > steps and value > self._TOLERANCE * known:
            until, value = steps, self._evaluate(steps)
        # ε of every number of steps beyond ``at`` is at least what is known of ``at``.
        self._from = at + 1 if at and steps > at and value <= self._TOLERANCE * known else steps
        if 0 < known < value < math.inf and until > at > 0:
            self._slope = max(0.1, math.log(value / known) / math.log(until / at))
        self._until, self._value = until, value

    def _evaluate(self, steps: int) -> float:
        assert self._last is not None
        self.evaluations += 1
        parts = [SelfComposedDpEvent(event, count) for event, count in [*self._before, (self._last, steps)]]
        return event_epsilon(ComposedDpEvent(parts), self.delta, self.accountant, self.adjacency, COARSE)
