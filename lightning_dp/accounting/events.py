"""One release as data, and what a composition of releases consists of.

An event says what a private step was, so that ε can be computed from it again: sampling, noise, what the noise hides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from lightning_dp.accounting.moments import DENSITIES, Density

Accountant = Literal["pld", "rdp"]


ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")


#: Which data sets the guarantee tells apart: one record more or less, or one record exchanged for another.
Adjacency = Literal["add_or_remove", "replace_one"]


ADJACENCIES: tuple[Adjacency, ...] = ("add_or_remove", "replace_one")


@dataclass(frozen=True)
class Magnitudes:
    """Upper limits on what one record adds to a sum: up to signs and the order of coordinates, each coordinate is at
    most that of one of K vectors. Coordinates beyond those that are listed are zero.

    Args:
        counts: Number of coordinates that share each of L magnitudes (levels), ``(L,)``.
        values: These magnitudes for each of the K vectors, in units of the sensitivity, ``(K, L)``.

    Raises:
        ValueError: The levels of a vector are not as many as there are counts.
    """

    counts: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        # Plain numbers, which can be hashed, compared and stored, whatever they were given as.
        object.__setattr__(self, "counts", tuple(map(int, self.counts)))
        object.__setattr__(self, "values", tuple(tuple(map(float, entry)) for entry in self.values))
        if any(len(entry) != len(self.counts) for entry in self.values):
            levels = [len(entry) for entry in self.values]
            raise ValueError(f"Magnitudes: there are {len(self.counts)} counts, and vectors of {levels} levels.")

    def norms(self) -> np.ndarray:
        """Euclidean norms of the K vectors."""
        return np.sqrt(np.square(self.values) @ np.array(self.counts, dtype=float))


@dataclass(frozen=True)
class ShiftedNoiseDpEvent(DpEvent):
    """Independent noise on every coordinate of a sum that one record shifts by at most these magnitudes.

    Args:
        noise: The distribution on a coordinate.
        scale: Scale of the noise over the sensitivity; ``noise`` itself has scale 1.
        magnitudes: Upper limits on what one record adds, over the sensitivity.
    """

    noise: Density
    scale: float
    magnitudes: Magnitudes

    def log_moments(self, highest: int) -> np.ndarray:
        """``log max_j Π_r M_k(q_j[r])`` for k = 0 … ``highest``: the largest moments of the likelihood ratio.

        Formal guarantee: no shift that the magnitudes allow has larger moments.
        Proof: coordinates are independent, so that moments multiply; M_k is symmetric in the shift and grows with its
        size, because ``M_k(v) = ∫ f(x - v)^k f(x)^(1-k)`` is a constant less a convolution of two functions that are
        symmetric and fall away from 0, which falls away from 0 as well (Wintner 1938). So every coordinate is worst at
        its bound.
        """
        shifts = {value / self.scale for entry in self.magnitudes.values for value in entry}
        single = {shift: self.noise.log_moments(shift, highest) for shift in shifts}
        totals = [
            np.array(self.magnitudes.counts) @ np.stack([single[value / self.scale] for value in entry])
            for entry in self.magnitudes.values
        ]
        return np.max(np.stack(totals), axis=0)


def gaussian_event(noise_multiplier: float) -> DpEvent:
    """Gaussian noise on a sum, without sampling. Without noise, an event of infinite ε."""
    return GaussianDpEvent(noise_multiplier) if noise_multiplier else NonPrivateDpEvent()


@dataclass(frozen=True)
class Phase:
    """Some steps of a training with the same noise multiplier and sampling rate; a schedule is a list of phases.

    Args:
        steps: Number of private steps.
        sampling_rate: Probability with which each record joins each batch.
        noise_multiplier: Scale of the noise over the sensitivity; 0 gives an event of infinite ε.
        mechanism: Makes the event of one release without sampling from its noise multiplier.
    """

    steps: int
    sampling_rate: float
    noise_multiplier: float = 1.0
    mechanism: Callable[[float], DpEvent] = gaussian_event

    def event(self) -> DpEvent:
        """The event of one step, Poisson-sampled unless it has no noise.

        Raises:
            ValueError: The noise multiplier or the sampling rate is out of its range.
        """
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be non-negative and finite, got {self.noise_multiplier}.")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must lie in (0, 1], got {self.sampling_rate}.")
        event = self.mechanism(self.noise_multiplier)
        return event if isinstance(event, NonPrivateDpEvent) else PoissonSampledDpEvent(self.sampling_rate, event)


def subsampled_gaussian(noise_multiplier: float, sampling_rate: float) -> DpEvent:
    """One private step: Gaussian noise on a sum over a Poisson sample. Without noise, an event of infinite ε."""
    return Phase(1, sampling_rate, noise_multiplier).event()


def encode_event(event: DpEvent) -> dict[str, Any]:
    """An event as plain data: strings, numbers, lists and dictionaries."""
    if isinstance(event, PoissonSampledDpEvent):
        return {"type": "poisson", "sampling_rate": event.sampling_probability, "event": encode_event(event.event)}
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


def decode_event(data: dict[str, Any]) -> DpEvent:
    """The event that `encode_event` described."""
    match data["type"]:
        case "poisson":
            return PoissonSampledDpEvent(float(data["sampling_rate"]), decode_event(data["event"]))
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


# -- events ------------------------------------------------------------------------------------------------------------

#: A noise multiplier, or noise that is not Gaussian.
Mechanism = float | ShiftedNoiseDpEvent


#: Sampling rate, mechanism, number of steps.
Part = tuple[float, Mechanism, int]


def parts_of_event(event: DpEvent) -> list[Part]:
    """The kinds of steps in an event, each with its number.

    All Gaussian steps of sampling rate 1 become one: squared inverse multipliers add up (Dong, Roth & Su 2022).

    Raises:
        TypeError: No accountant is known for a part of the event.
    """
    counts: dict[tuple[float, Mechanism], int] = {}
    precision = 0.0
    for rate, mechanism, count in flat_parts(event, 1):
        if rate == 1 and isinstance(mechanism, float):
            # 1/z² overflows for the tiniest z: nothing is hidden then, and the caller sees an infinite divergence.
            precision += count / mechanism / mechanism
        elif count:
            counts[rate, mechanism] = counts.get((rate, mechanism), 0) + count
    parts: list[Part] = [(rate, mechanism, count) for (rate, mechanism), count in counts.items()]
    return [*parts, (1.0, precision**-0.5 if precision < math.inf else 1e-154, 1)] if precision else parts


def flat_parts(event: DpEvent, times: int) -> Iterator[Part]:
    """Every step in an event, in order and unmerged, with its number multiplied by ``times``."""
    match event:
        case ComposedDpEvent():
            for part in event.events:
                yield from flat_parts(part, times)
        case SelfComposedDpEvent():
            yield from flat_parts(event.event, times * event.count)
        case GaussianDpEvent():
            yield 1.0, float(event.noise_multiplier), times
        case ShiftedNoiseDpEvent():
            yield 1.0, event, times
        case PoissonSampledDpEvent() if isinstance(event.event, GaussianDpEvent | ShiftedNoiseDpEvent):
            [(_, mechanism, _)] = flat_parts(event.event, 1)
            yield event.sampling_probability, mechanism, times
        case _:
            raise TypeError(f"No accountant for a {type(event).__name__}.")


def is_non_private(event: DpEvent) -> bool:
    """Whether some step of an event had no noise."""
    if isinstance(event, ComposedDpEvent):
        return any(is_non_private(part) for part in event.events)
    if isinstance(event, SelfComposedDpEvent):
        return event.count > 0 and is_non_private(event.event)
    if isinstance(event, PoissonSampledDpEvent):
        return is_non_private(event.event)
    return isinstance(event, NonPrivateDpEvent)


def has_loss_distribution(event: DpEvent) -> bool:
    """Whether privacy loss distributions are known: of Gaussian noise they are, of other noise moments only."""
    if isinstance(event, ComposedDpEvent):
        return all(has_loss_distribution(part) for part in event.events)
    if isinstance(event, SelfComposedDpEvent | PoissonSampledDpEvent):
        return has_loss_distribution(event.event)
    return not isinstance(event, ShiftedNoiseDpEvent)
