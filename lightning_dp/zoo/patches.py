"""Features of small patches, and features equalized by what is known of generated images: no data has shaped them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_dp.zoo.scattering import dead_leaves

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
    """

    def __init__(
        self, filters: int = 256, channels: int = 3, size: int = 6, cells: int = 4, threshold: float = 0.25
    ) -> None:
        super().__init__()
        self.filters, self.channels, self.size, self.cells = filters, channels, size, cells
        self.threshold = threshold
        self._kernels: Tensor | None = None

    def _patterns(self) -> Tensor:
        """Kernels ``(filters, C, size, size)`` that whiten a patch and multiply it with a pattern."""
        generator = torch.Generator().manual_seed(0)
        images = dead_leaves(1000, 5 * self.size, 5 * self.size, self.channels)
        patches = F.unfold(images, self.size, stride=self.size // 2).transpose(1, 2).flatten(0, 1)
        patches = patches - patches.mean(1, keepdim=True)
        patches = patches[patches.square().mean(1) > _SMOOTH]  # elsewhere, a patch is a single colour
        patches = patches[torch.randperm(len(patches), generator=generator)]
        patches = patches / (patches.square().mean(1, keepdim=True) + _SMOOTH).sqrt()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        whitening = vectors * (values.clamp_min(0) + 1e-2 * values.mean()).rsqrt() @ vectors.T
        patterns = F.normalize(patches[: self.filters] @ whitening) @ whitening
        # Without their mean, so that they do not see that of a patch.
        return (patterns - patterns.mean(1, keepdim=True)).unflatten(1, (self.channels, self.size, self.size))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self._kernels is None:
            self._kernels = self._patterns()
        kernels = self._kernels = self._kernels.to(images)
        average = torch.full_like(kernels[:1], 1 / kernels[0].numel())
        variance = F.conv2d(images.square(), average) - F.conv2d(images, average).square()
        likeness = F.conv2d(images, kernels).mul_((variance.clamp_min(0) + _SMOOTH).rsqrt())
        parts = [F.adaptive_avg_pool2d((likeness - self.threshold).relu_(), self.cells)]
        parts.append(F.adaptive_avg_pool2d(likeness.neg_().sub_(self.threshold).relu_(), self.cells))
        return torch.cat(parts, 1).sqrt_()


#: Added to the variance of a patch, so that noise in a smooth one is not taken for a pattern. Pixels are in [-1, 1].
_SMOOTH = 0.02


class EqualizedFeatures(nn.Module):
    """Several features of an image and its mirror image, equalized: ``(B, C, H, W) -> (B, d)``.

    Every part is averaged over the image and its mirror image, and over cells; as the result is symmetric, its left
    half is kept. With the mean m and the covariance Σ of that over generated images (`dead_leaves`), what comes out is
    ``(x - m) Σ^(-power/2)``. In features as they are, a few directions (contrast, brightness) carry nearly all
    variance, and a linear layer learns nothing else before noise has grown; at a power of 1, directions that are
    little more than rounding are as large as all others. Everything is computed image by image, or from generated
    images: nothing is revealed. It is the same on every machine, up to rounding: the root is symmetric.

    Args:
        parts: Modules ``(B, C, H, W) -> (B, C', H', W')`` that treat every image by itself, such as `Scattering2D` and
            `PatchFeatures`. All parts count alike: every feature is scaled to variance 1 over generated images, and a
            part by the root of its number of features.
        power: 0: not equalized. 1: whitened.
        cells: Over how many rows, and columns, of an image the parts are averaged.
        generated: Number of images that m and Σ are computed from, at the first call.
    """

    def __init__(self, parts: Sequence[nn.Module], power: float = 0.7, cells: int = 4, generated: int = 8000) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.power, self.cells, self.generated = power, cells, generated
        self._map: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self._map is None:
            self._map = self._equalizing(images)
        mean, matrix = self._map = self._map[0].to(images), self._map[1].to(images)
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
        """m and the matrix that equalizes, for images like these."""
        channels, height, width = like.shape[1:]
        images = dead_leaves(self.generated, height, width, channels).split(_AT_ONCE)
        shown = tqdm(images, "features of generated images", leave=False, disable=None)
        columns = [torch.cat(part) for part in zip(*(self._features(part.to(like)) for part in shown), strict=True)]
        scales = [len(part[0]) ** -0.5 / part.std(0).clamp_min(1e-3 * part.std()) for part in columns]
        known, scale = torch.cat(columns, 1), torch.cat(scales)
        mean = known.mean(0)
        known = (known - mean) * scale
        values, vectors = torch.linalg.eigh(known.T @ known / len(known))
        powers = (values.clamp_min(0) + 1e-4 * values[-1]) ** (-self.power / 2)
        return mean, scale[:, None] * (vectors * powers) @ vectors.T
