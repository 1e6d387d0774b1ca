"""Noise, schedules and numbers of steps for a target ε."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dp_accounting import DpEvent

from lightning_dp.accounting.cost import check_delta, event_epsilon, rough_epsilon
from lightning_dp.accounting.events import Accountant, Adjacency, Phase, gaussian_event, subsampled_gaussian
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.pld import COARSE, FINE

#: The most steps that are looked for.
_MOST_STEPS = 10**9


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
    """The noise multiplier with which ``steps`` steps, after those in ``spent``, cost ε, or usually up to 0.1 % less.

    Formal guarantee: the ε of the returned multiplier is at most ``epsilon``; it has been computed.

    Args:
        epsilon, delta: The target.
        sampling_rate: Probability with which each record joins each batch.
        steps: Number of private steps.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.
        spent: What has been released before.
        mechanism: As for `Phase`: noise other than Gaussian.

    Returns:
        The multiplier; 0.0 for an infinite ``epsilon``.

    Raises:
        ValueError: An argument is out of its range, or no noise can meet the target: ``spent`` exceeds it already, or
            it is too small.
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


def rough_noise(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    mechanism: Callable[[float], DpEvent] = gaussian_event,
) -> float:
    """What `calibrate_noise` returns, or somewhat more (often a tenth), by few Rényi orders: to compare plans by, fast.

    Args:
        epsilon, delta, sampling_rate, steps, mechanism: As for `calibrate_noise`.
    """

    def fits(multiplier: float) -> bool:
        ledger = PrivacyLedger.of([Phase(steps, sampling_rate, multiplier, mechanism)])
        return rough_epsilon(ledger.event(), delta) <= epsilon

    return _smallest_power(fits, start=1.0, end=2.0**20)


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
        ValueError: The schedule is empty, an argument is out of its range, or no noise can meet the target: ``spent``
            exceeds it already, or it is too small.
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

    def event(scale: float) -> DpEvent:
        ledger = spent.copy()
        ledger.extend(PrivacyLedger.of(scaled(scale)))
        return ledger.event()

    def on_grid(resolution: float) -> Callable[[float], float]:
        return lambda scale: event_epsilon(event(scale), delta, accountant, adjacency, resolution)

    if math.isinf(epsilon):
        return scaled(0.0)
    # Each is a bound, tighter and slower than the one before: it has little left to look for.
    scale = _smallest_power(lambda scale: rough_epsilon(event(scale), delta, adjacency) <= epsilon, 1.0, 2.0**20)
    if accountant == "pld":
        scale = _smallest_from(scale, on_grid(COARSE), epsilon, delta, step=1.3)
    scale = _smallest_from(scale, on_grid(FINE), epsilon, delta, step=1.3 if accountant == "rdp" else 1.01)
    return scaled(float(scale))


def _smallest_from(start: float, cost: Callable[[float], float], epsilon: float, delta: float, step: float) -> float:
    """About the smallest scale of the noise (to 0.1 % of ε) with a cost of at most ε; its cost has been computed.

    Args:
        start: Where it is looked for first.
        step: By what factor the scale goes down until it costs too much.
    """
    high, high_cost = start, cost(start)
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
        low /= step
        low_cost = cost(low)
        step = min(step**2, 1.3)
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

    Args:
        epsilon, delta: The target.
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        sampling_rate, accountant, adjacency, spent: As for `calibrate_noise`.

    Raises:
        ValueError: An argument is out of its range.
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
