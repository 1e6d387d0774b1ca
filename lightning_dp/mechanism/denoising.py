"""Denoisers: what is done to the noisy gradient before the optimizer sees it.

A denoiser is given the noisy gradient, what is public about its noise, and its own state, which came from those alone.
Whatever it computes is post-processing, and free (Dwork & Roth 2014, proposition 2.1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dp.mechanism.noise import Noise
from lightning_dp.torch_api import scale_

#: What a denoiser remembers: plain data and tensors, which may be saved and shown.
DenoiserState = dict[str, Any]


#: Steps over which `LowPassDenoiser` checks that its response to a constant stays positive.
_LOOK_AHEAD = 1000


@dataclass(frozen=True)
class PublicNoise:
    """What anybody may know of the noise on a gradient.

    Args:
        scales: Scale of the noise on every coordinate of a parameter, by its name.
        std: Standard deviation of noise of scale 1; infinity when there is none.
        fresh: A further draw of noise, of scale 1, independent of that on the gradient: ``fresh(count)``.
    """

    scales: Mapping[str, float]
    std: float
    fresh: Callable[[int], Tensor]


class Denoiser(ABC):
    """Post-processing of noisy gradients."""

    def check(self, noise: Noise) -> None:
        """Raises ValueError when the denoiser does not support this noise."""
        return

    @abstractmethod
    def denoise(self, gradients: Mapping[str, Tensor], noise: PublicNoise, state: DenoiserState) -> DenoiserState:
        """Changes the noisy gradients in place, and returns the state for the next step.

        Args:
            gradients: By parameter name, in float32 or wider.
            noise: What is known of the noise.
            state: As returned after the step before; empty before the first.
        """


@dataclass(frozen=True)
class KSDenoiser(Denoiser):
    """Scales the gradient by how much it differs from noise alone, and drops it when it does not.

    ``d = strength · KS(fresh noise, noisy gradient)``, the two-sample Kolmogorov-Smirnov statistic over all
    coordinates, each in units of its noise; the gradient is multiplied by ``min(d, most)``, or by 0 when d < ``least``.
    Source: Nasr, Shokri & Houmansadr 2020, section 4, with the authors' values as defaults. They were chosen for about
    30 000 coordinates: under noise alone the statistic is about ``1.2/√n``.

    Args:
        strength: s of the paper.
        most: The largest factor.
        least: The smallest d with which a gradient is used.
    """

    strength: float = 500.0
    most: float = 5.0
    least: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf or not 0 <= self.least <= self.most < math.inf:
            raise ValueError(
                "KSDenoiser: strength must be positive and 0 ≤ least ≤ most, all finite, got "
                f"strength={self.strength}, least={self.least}, most={self.most}."
            )

    def denoise(self, gradients: Mapping[str, Tensor], noise: PublicNoise, state: DenoiserState) -> DenoiserState:
        if not all(noise.scales[name] for name in gradients):
            return state  # without noise, there is nothing to compare with
        flat = torch.cat([gradient.flatten() / noise.scales[name] for name, gradient in gradients.items()])
        distance = self.strength * kolmogorov_smirnov(flat, noise.fresh(len(flat)))
        factor = 0.0 if distance < self.least else min(distance, self.most)
        scale_(list(gradients.values()), factor)
        return state


def kolmogorov_smirnov(first: Tensor, second: Tensor) -> float:
    """The largest distance of two samples' empirical distribution functions."""
    first, second = first.sort()[0], second.to(first).sort()[0]
    points = torch.cat([first, second])
    below = [torch.searchsorted(sample, points, right=True).double() / len(sample) for sample in (first, second)]
    return float((below[0] - below[1]).abs().max())


@dataclass(frozen=True)
class JamesSteinDenoiser(Denoiser):
    """Shrinks every parameter's gradient by the fraction of its square that is noise.

    ``g · max(0, 1 - (n - 2) σ² / ‖g‖²)`` for n coordinates with noise of standard deviation σ, which is known: under
    Gaussian noise the expected squared error is below that of g, for any true gradient and n > 2. Source: James & Stein
    1961; positive part: Baranchik 1964. Parameters of one or two coordinates are left alone.
    """

    def check(self, noise: Noise) -> None:
        if math.isinf(noise.std()):
            raise ValueError(f"JamesSteinDenoiser needs noise with a standard deviation, and {noise} has none.")

    def denoise(self, gradients: Mapping[str, Tensor], noise: PublicNoise, state: DenoiserState) -> DenoiserState:
        for name, gradient in gradients.items():
            expected = max(gradient.numel() - 2, 0) * (noise.scales[name] * noise.std) ** 2
            square = torch.linalg.vector_norm(gradient).square_()
            gradient.mul_((1 - expected / square).clamp_(min=0) if expected else 1.0)
        return state


@dataclass(frozen=True)
class LowPassDenoiser(Denoiser):
    """A linear recursive (ARMA) filter over time: gradients change slowly from step to step, noise does not.

    ``m_t = Σ_{τ≥0} b_τ g_{t-τ} - Σ_{τ≥1} a_τ m_{t-τ}``, and the same filter of the constant 1, c_t; the optimizer gets
    ``m_t / c_t``, which is unbiased from the start. The default is an exponential average over about 10 steps. Use it
    with plain SGD: momentum is such a filter itself.
    Source: Zhang et al. 2024, "DOPPLER: Differentially Private Optimizers with Low-pass Filter for Privacy Noise
    Reduction".

    Args:
        a: Coefficients ``a_1, a_2, …`` of past outputs; the filter must be stable.
        b: Coefficients ``b_0, b_1, …`` of this and past gradients.

    Raises:
        ValueError: The filter is not stable, or its response to a constant is not positive at some step.
    """

    a: tuple[float, ...] = (-0.9,)
    b: tuple[float, ...] = (0.1,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", tuple(self.a))
        object.__setattr__(self, "b", tuple(self.b))
        if not np.isfinite([*self.a, *self.b]).all() or not self.b:
            raise ValueError(f"LowPassDenoiser: a and b must be finite, b at least one, got a={self.a}, b={self.b}.")
        if self.a and np.abs(np.roots([1.0, *self.a])).max() >= 1:
            raise ValueError(f"LowPassDenoiser: a={self.a} is not stable: a pole lies outside the unit circle.")
        gains: list[float] = []
        for step in range(_LOOK_AHEAD):
            gains.insert(0, self._gain(step, gains))
            if gains[0] <= 1e-6:
                raise ValueError(
                    f"LowPassDenoiser: a={self.a}, b={self.b} suppresses what does not change (its response to a "
                    f"constant is {gains[0]:.2g} at step {step}): this is no low-pass filter."
                )
            del gains[max(len(self.a), 1) :]

    def _gain(self, step: int, past: list[float]) -> float:
        """c_t, the filter's response to the constant 1 at this step; ``past``: the responses before, latest first."""
        recursive = sum(a * gain for a, gain in zip(self.a, past, strict=False))
        return sum(self.b[: step + 1]) - recursive

    def denoise(self, gradients: Mapping[str, Tensor], noise: PublicNoise, state: DenoiserState) -> DenoiserState:
        filter = [list(self.a), list(self.b)]
        past = state["past"] if state.get("filter") == filter else {}
        return {
            "filter": filter,
            "past": {name: self._filter(gradient, past.get(name, {})) for name, gradient in gradients.items()},
        }

    def _filter(self, gradient: Tensor, past: dict[str, Any]) -> dict[str, Any]:
        """Filters one parameter's gradient in place, and returns its past for the next step.

        A parameter that was frozen, or exchanged for one of another shape, begins anew.
        """
        inputs, outputs, gains = (past.get(key, []) for key in ("inputs", "outputs", "gains"))
        step = past.get("step", 0)
        if any(before.shape != gradient.shape for before in (*inputs, *outputs)):
            step, inputs, outputs, gains = 0, [], [], []
        gain = self._gain(step, gains)
        filtered = gradient * self.b[0]
        for coefficient, before in zip(self.b[1:], inputs, strict=False):
            filtered.add_(before.to(gradient), alpha=coefficient)
        for coefficient, before in zip(self.a, outputs, strict=False):
            filtered.sub_(before.to(gradient), alpha=coefficient)
        kept = [gradient.clone()] if self.b[1:] else []
        torch.div(filtered, gain, out=gradient)
        return {
            "step": step + 1,
            "inputs": [*kept, *inputs][: len(self.b) - 1],
            "outputs": [filtered, *outputs][: len(self.a)],
            "gains": [gain, *gains][: len(self.a)],
        }
