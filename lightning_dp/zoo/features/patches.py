"""Features of small patches, and features equalized by what is known of generated images: no data has shaped them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_dp.zoo.features.scattering import dead_leaves

#: Generated images whose features are computed at once: few, so that what lies between stays in a processor's cache.
_AT_ONCE = 32


class PatchFeatures(nn.Module):
    """How strongly patches of an image resemble fixed patterns: ``(B, C, H, W) -> (B, 2 · filters, cells, cells)``.

    Every patch is shifted and scaled to mean 0 and variance 1, and whitened by the covariance of patches of generated
    images (`dead_leaves`). The patterns are such patches themselves. What a whitened patch has in common with a
    pattern's direction, or with its opposite, beyond a threshold, is averaged over the patches of a cell; features are
    the square roots of these averages. Every image is transformed by itself, by filters that depend on no data.

    Source: Coates, Lee & Ng 2011, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning", where
    patterns and covariance are those of the train set, and Coates & Ng 2011, "The Importance of Encoding Versus
    Training with Sparse Coding and Vector Quantization" (random patches, soft threshold).

    Args:
        filters: Number of patterns.
        channels: C, of the images.
        size: Height and width of a patch, in pixels.
        cells: Into how many rows, and columns, an image is divided.
        threshold: Below which a resemblance counts as none.

    Raises:
        ValueError: An argument is out of its range; in ``forward``, for images with another number of channels, or too
            small for the cells.
    """

    def __init__(
        self, filters: int = 256, channels: int = 3, size: int = 6, cells: int = 4, threshold: float = 0.25
    ) -> None:
        super().__init__()
        if filters < 1 or channels < 1 or size < 2 or cells < 1 or not 0 <= threshold < math.inf:
            raise ValueError(
                "PatchFeatures: filters, channels and cells must be at least 1, size at least 2, and threshold "
                f"non-negative; got {filters}, {channels}, {cells}, {size} and {threshold}."
            )
        self.filters, self.channels, self.size, self.cells = filters, channels, size, cells
        self.threshold = threshold
        self._kernels: Tensor | None = None

    def _patterns(self) -> Tensor:
        """Kernels ``(filters, C, size, size)`` that whiten a patch and multiply it with a pattern."""
        generator = torch.Generator().manual_seed(0)
        images = dead_leaves(1000, 5 * self.size, 5 * self.size, self.channels)
        patches = F.unfold(images, self.size, stride=self.size // 2).transpose(1, 2).flatten(0, 1)
        patches = patches - patches.mean(1, keepdim=True)
        order = torch.randperm(len(patches), generator=generator, device="cpu")
        patches = patches[order]
        patches = patches[patches.square().mean(1) > _SMOOTH]  # elsewhere, a patch is a single colour
        patches = patches / (patches.square().mean(1, keepdim=True) + _SMOOTH).sqrt()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        whitening = vectors * (values.clamp_min(0) + 1e-2 * values.mean()).rsqrt() @ vectors.T
        patterns = F.normalize(patches[: self.filters] @ whitening) @ whitening
        # Without their mean, so that they do not see that of a patch.
        return (patterns - patterns.mean(1, keepdim=True)).unflatten(1, (self.channels, self.size, self.size))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        _check_images(self, images)
        if images.shape[1] != self.channels or min(images.shape[2:]) - self.size + 1 < self.cells:
            raise ValueError(
                f"PatchFeatures: made for images (B, {self.channels}, H, W) with at least {self.cells} positions of "
                f"patches of {self.size} pixels in height and width, got {tuple(images.shape)}: see channels, size and "
                "cells."
            )
        if self._kernels is None:
            with _exactly(images.device):
                self._kernels = self._patterns()
        kernels = self._kernels.to(images)
        average = torch.full_like(kernels[:1], 1 / kernels[0].numel())
        variance = F.conv2d(images.square(), average) - F.conv2d(images, average).square()
        likeness = F.conv2d(images, kernels).mul_((variance.clamp_min(0) + _SMOOTH).rsqrt())
        parts = [F.adaptive_avg_pool2d((likeness - self.threshold).relu_(), self.cells)]
        parts.append(F.adaptive_avg_pool2d(likeness.neg_().sub_(self.threshold).relu_(), self.cells))
        return torch.cat(parts, 1).sqrt_()


#: Added to the variance of a patch, so that noise in a smooth one is not taken for a pattern. Pixels are in [-1, 1].
_SMOOTH = 0.02


class EqualizedFeatures(nn.Module):
    """Several features of an image and its mirror image, equalized: ``(B, C, H, W) -> (B, d)``,
    ``d = cells · ⌈cells/2⌉ · ΣC'``.

    Every part is averaged over the image and its mirror image, and over cells, and the left half of the cells is kept
    (the right half is what mirrored filters would give on the left). Features are scaled to variance 1 over generated
    images (`dead_leaves`), and those of a part divided by the root of their number, so that all parts count alike. With
    the mean m and the covariance Σ of these scaled features x over the same images, the output is
    ``(x - m) (Σ + λ/10⁴)^(-power/2)``, where λ is the largest eigenvalue of Σ.

    In features as they are, a few directions (contrast, brightness) carry nearly all variance, and a linear layer
    learns nothing else before noise has grown; at a power of 1, all directions that generated images vary in are
    equally large. Everything is computed image by image, or from generated images: nothing is revealed. Every machine
    computes the same, up to rounding: the root is symmetric.

    Args:
        parts: Modules ``(B, C, H, W) -> (B, C', H', W')`` that treat every image by itself, such as `Scattering2D` and
            `PatchFeatures`.
        power: 0: scaled only. 1: whitened.
        cells: Over how many rows, and columns, of an image the parts are averaged.
        generated: Number of images that m and Σ are computed from, at the first call: more than d.

    Raises:
        ValueError: An argument is out of its range; in ``forward``, for inputs that are not images or not of the first
            call's size, or if ``generated`` is at most d.
    """

    def __init__(self, parts: Sequence[nn.Module], power: float = 0.7, cells: int = 4, generated: int = 8000) -> None:
        super().__init__()
        if not parts or not 0 <= power <= 1 or cells < 1 or generated < 2:
            raise ValueError(
                "EqualizedFeatures: at least one part, a power between 0 and 1, at least 1 for cells and 2 for "
                f"generated; got {len(parts)}, {power}, {cells} and {generated}."
            )
        self.parts = nn.ModuleList(parts)
        self.power, self.cells, self.generated = power, cells, generated
        self._map: tuple[Tensor, Tensor] | None = None
        self._shape: tuple[int, ...] = ()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        _check_images(self, images)
        if self._map is None:
            with _exactly(images.device):
                self._map = self._equalizing(images)
            self._shape = tuple(images.shape[1:])
        if images.shape[1:] != self._shape:
            raise ValueError(
                f"EqualizedFeatures: equalized for images of shape {self._shape}, got {tuple(images.shape[1:])}."
            )
        if self._map[0].device != images.device:
            self._map = self._map[0].to(images.device), self._map[1].to(images.device)
        mean, matrix = (part.to(images.dtype) for part in self._map)
        return (torch.cat(self._features(images), 1) - mean) @ matrix

    def _features(self, images: Tensor) -> list[Tensor]:
        """Of every part: ``(B, d')``."""
        views = images, images.flip(-1)
        half = (self.cells + 1) // 2
        averages = [
            torch.stack([F.adaptive_avg_pool2d(part(view), self.cells) for view in views]).mean(0)
            for part in self.parts
        ]
        return [features[..., :half].flatten(1) for features in averages]

    def _equalizing(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """m and the matrix that equalizes, for images like these, in single precision."""
        channels, height, width = like.shape[1:]
        images = dead_leaves(self.generated, height, width, channels).split(_AT_ONCE)
        shown = tqdm(images, "features of generated images", leave=False, disable=None)
        parts = [self._features(part.to(like.device, torch.float32)) for part in shown]
        columns = [torch.cat(part) for part in zip(*parts, strict=True)]
        known = torch.cat(columns, 1)
        if known.shape[0] <= known.shape[1]:
            raise ValueError(
                f"EqualizedFeatures: generated={self.generated} images do not determine the covariance of "
                f"{known.shape[1]} features; some directions would be magnified at random. Generate more."
            )
        scale = torch.cat([len(part[0]) ** -0.5 / part.std(0).clamp_min(1e-3 * part.std()) for part in columns])
        scale = scale.where(scale.isfinite(), torch.zeros_like(scale))  # a part that is constant
        mean = known.mean(0)
        known = (known - mean) * scale
        values, vectors = torch.linalg.eigh(known.T @ known / len(known))
        powers = (values.clamp_min(0) + 1e-4 * values[-1]) ** (-self.power / 2)
        return mean, scale[:, None] * (vectors * powers) @ vectors.T


def _exactly(device: torch.device) -> torch.autocast:
    """Turns autocast off: what is kept from the first call must not depend on the precision in which it ran."""
    return torch.autocast(device.type, enabled=False)


def _check_images(features: nn.Module, images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"{type(features).__name__} takes images (B, C, H, W) of floating point numbers in [-1, 1], got "
            f"{images.dtype} of shape {tuple(images.shape)}."
        )
