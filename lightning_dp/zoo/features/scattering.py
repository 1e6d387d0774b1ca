"""Features that no data has shaped: the scattering transform of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scattering2D(nn.Module):
    """Scattering transform of order 2: ``(B, C, H, W) -> (B, C · K, H / 2^J, W / 2^J)``, without parameters.

    An image is convolved with wavelets of ``angles`` directions at J scales, the modulus is taken, that is convolved
    with the wavelets of larger scales, and all of it is averaged over windows of 2^J pixels: ``K = 1 + J·L +
    L²·J(J-1)/2`` numbers per channel and window, 81 for J = 2 and L = 8. Every image is transformed by itself, by
    fixed filters: nothing is revealed. Channels are in kymatio's order, and its numbers are reproduced (in the tests).

    Sources: Bruna & Mallat 2013, "Invariant Scattering Convolution Networks" (sections 2 and 3); Oyallon & Mallat 2015
    (the filters); Tramèr & Boneh 2021, "Differentially Private Learning Needs Better Features (or Much More Data)".

    Args:
        height, width: Of the images, in pixels; at least ``2^(J+1)``.
        scales: J.
        angles: L.
        standardize: Whether every one of the K features is shifted and scaled to mean 0 and variance 1 **over generated
            images** (`dead_leaves`), whose statistics are much like those of photographs: public numbers.

    Raises:
        ValueError: ``scales`` is less than 1 or too large for the images; in ``forward``, for images of another size.
    """

    def __init__(self, height: int, width: int, scales: int = 2, angles: int = 8, standardize: bool = False) -> None:
        super().__init__()
        self.height, self.width, self.scales, self.angles = height, width, scales, angles
        self.standardize = standardize
        self._statistics: tuple[Tensor, Tensor] | None = None
        step = 2**scales
        if scales < 1 or min(height, width) < 2 * step:
            raise ValueError(f"Scattering2D: images of {height} × {width} are too small for scales={scales}.")
        padded = [((size + step) // step + 1) * step for size in (height, width)]
        extra = [after - before for after, before in zip(padded, (height, width), strict=True)]
        self._padding = [extra[1] // 2, -(-extra[1] // 2), extra[0] // 2, -(-extra[0] // 2)]
        low = torch.fft.fft2(_gabor(padded, 0.8 * 2 ** (scales - 1), 0.0, 0.0, 1.0)).real
        self._register("low", low, range(scales))
        for scale in range(scales):
            waves = [
                torch.fft.fft2(
                    _morlet(
                        padded,
                        0.8 * 2**scale,
                        (angles - angles // 2 - 1 - angle) * math.pi / angles,
                        0.75 * math.pi / 2**scale,
                        4 / angles,
                    )
                ).real
                for angle in range(angles)
            ]
            self._register(f"wave{scale}", torch.stack(waves), range(max(scale, 1)))

    def _register(self, name: str, filters: Tensor, resolutions: range) -> None:
        """Keeps filters (in Fourier space) at the resolutions at which they are used."""
        for resolution in resolutions:
            self.register_buffer(f"{name}_{resolution}", _coarse_filter(filters, resolution).float(), persistent=False)

    @property
    def channels(self) -> int:
        """K, the number of features per channel of the image."""
        return 1 + self.scales * self.angles + self.angles**2 * self.scales * (self.scales - 1) // 2

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.height, self.width):
            raise ValueError(
                f"Scattering2D: made for images of {self.height} × {self.width}, got the shape {tuple(images.shape)}."
            )
        features = self._transform(images)
        if not self.standardize:
            return features.flatten(1, 2)
        if self._statistics is None:
            generated = dead_leaves(512, self.height, self.width).to(images)
            known = torch.cat([self._transform(part) for part in generated.split(64)])
            deviation, mean = torch.std_mean(known, (0, 1, 3, 4), keepdim=True)
            self._statistics = deviation[0], mean[0]
        deviation, mean = self._statistics
        return ((features - mean.to(features)) / deviation.to(features)).flatten(1, 2)

    def _transform(self, images: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C, K, H / 2^J, W / 2^J)``."""
        spectrum = torch.fft.fft2(F.pad(images, self._padding, mode="reflect"))[:, :, None]  # (B, C, 1, H, W)
        orders = [[self._averaged(spectrum, 0)], *map(list, zip(*self._paths(spectrum), strict=True))]
        return torch.cat([part for order in orders for part in order], 2)

    def _paths(self, spectrum: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every first wavelet: its average, and those of all that follow it (an empty tensor at the last scale)."""
        for scale in range(self.scales):
            first = self._modulus(spectrum, getattr(self, f"wave{scale}_0"), scale)  # (B, C, L, ...)
            averages = self._averaged(first, scale)
            for angle in range(self.angles):
                own, second = first[:, :, angle, None], []
                for larger in range(scale + 1, self.scales):
                    wave = getattr(self, f"wave{larger}_{scale}")
                    second.append(self._averaged(self._modulus(own, wave, larger - scale), larger))
                yield averages[:, :, angle, None], torch.cat(second, 2) if second else averages[:, :, :0]

    def _modulus(self, spectrum: Tensor, waves: Tensor, halvings: int) -> Tensor:
        """Spectrum of ``|x * ψ|`` at a resolution that is halved so many times."""
        return torch.fft.fft2(torch.fft.ifft2(_subsampled(spectrum * waves, halvings)).abs())

    def _averaged(self, spectrum: Tensor, resolution: int) -> Tensor:
        low = _subsampled(spectrum * getattr(self, f"low_{resolution}"), self.scales - resolution)
        return torch.fft.ifft2(low).real[..., 1:-1, 1:-1]


def _subsampled(spectrum: Tensor, halvings: int) -> Tensor:
    """Every 2^h-th sample, in Fourier space: the mean over the frequencies that become one."""
    if not halvings:
        return spectrum
    step = 2**halvings
    height, width = spectrum.shape[-2] // step, spectrum.shape[-1] // step
    return spectrum.unflatten(-1, (step, width)).mean(-2).unflatten(-2, (step, height)).mean(-3)


def _coarse_filter(filters: Tensor, resolution: int) -> Tensor:
    """A filter in Fourier space for signals at a lower resolution: high frequencies are cut off, the rest is folded."""
    if not resolution:
        return filters
    step = 2**resolution
    kept = filters.clone()
    for dimension in (-2, -1):
        size = filters.shape[dimension]
        start, length = size // (2 * step), size - size // step
        kept.narrow(dimension, start, length).zero_()
    height, width = filters.shape[-2] // step, filters.shape[-1] // step
    return kept.unflatten(-1, (step, width)).sum(-2).unflatten(-2, (step, height)).sum(-3)


def _gabor(size: list[int], sigma: float, angle: float, frequency: float, slant: float) -> Tensor:
    """A wave under an elliptic Gaussian window, periodised: complex, of this size."""
    grid = [torch.arange(-2 * n, 3 * n, dtype=torch.float64) for n in size]
    rows, columns = torch.meshgrid(*grid, indexing="ij")
    along = rows * math.cos(angle) + columns * math.sin(angle)
    across = columns * math.cos(angle) - rows * math.sin(angle)
    window = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    wave = torch.polar(window, frequency * along)
    folded = wave.unflatten(1, (5, size[1])).sum(1).unflatten(0, (5, size[0])).sum(0)
    return folded * slant / (2 * math.pi * sigma**2)


def _morlet(size: list[int], sigma: float, angle: float, frequency: float, slant: float) -> Tensor:
    """A Gabor wave from which so much of its window is taken away that it adds up to zero."""
    wave, window = (_gabor(size, sigma, angle, f, slant) for f in (frequency, 0.0))
    return wave - wave.sum() / window.sum() * window


def dead_leaves(count: int, height: int, width: int, channels: int = 3, discs: int = 200) -> Tensor:
    """Generated images ``(count, channels, height, width)`` in [-1, 1]: discs of all sizes that cover one another.

    Their edges and scales are distributed much like those of photographs, and nobody's data is in them. They are the
    same in every call. Source: Lee, Mumford & Huang 2001, "Occlusion Models for Natural Images".
    """
    generator = torch.Generator().manual_seed(0)
    plain: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, **plain)

    rows, columns = torch.meshgrid(torch.arange(height, **plain), torch.arange(width, **plain), indexing="ij")
    images = torch.zeros(count, channels, height, width, **plain)
    for _ in range(discs):
        radius = (1 - uniform(count) * (1 - height**-2)) ** -0.5  # density r⁻³ between 1 and the height
        y, x = ((2 * uniform(count) - 0.5) * size for size in (height, width))
        tint = 0.25 * torch.randn(count, channels, generator=generator, **plain)
        color = (2 * uniform(count, 1) - 1 + tint).clamp(-1, 1)
        distance = (rows - y.view(-1, 1, 1)) ** 2 + (columns - x.view(-1, 1, 1)) ** 2
        covered = distance < radius.square().view(-1, 1, 1)
        images = torch.where(covered[:, None], color[:, :, None, None], images)
    return images
