"""Wide residual networks without batch statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp, vmap

from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.rules.layers import convolution
from lightning_dp.gradients.rules.registry import register_rule
from lightning_dp.gradients.tied import Mapped


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose kernels are standardised: mean 0 and variance 1 / fan-in.

    Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization".
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardized(self.weight), self.bias)


def standardized(weight: Tensor) -> Tensor:
    """Kernels ``(C_out, C_in, *kernel)`` of mean zero and variance ``1 / (C_in · kernel size)``."""
    flat = weight.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) * _scale(flat)).view_as(weight)


def _scale(kernels: Tensor) -> Tensor:
    """What centred kernels ``(C_out, n)`` are multiplied with; also the norm of the map's derivative, per kernel."""
    return torch.rsqrt((kernels.var(1, correction=0, keepdim=True) * kernels.shape[1]).clamp(min=1e-4))


@register_rule(StandardizedConv2d)
def standardized_convolution(
    module: StandardizedConv2d, input: Tensor, grad_output: Tensor
) -> dict[str, PerExampleGradient]:
    """The chain rule: standardising does not depend on the example, so its adjoint maps every example's gradient."""
    gradients = dict(convolution(module, input, grad_output))
    if "weight" in gradients:
        weight = module.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        adjoint = vjp(standardized, weight)[1]
        gradients["weight"] = Mapped(
            gradients["weight"],
            lambda rows: vmap(adjoint)(rows.to(weight.dtype))[0].to(rows.dtype),
            float(_scale(weight.flatten(1)).max()),
            weight,
            len(grad_output),
        )
    return gradients


class WideResNet(nn.Module):
    """WRN-depth-width with weight standardisation and GroupNorm: ``(B, channels, H, W) -> (B, classes)``.

    Sources: Zagoruyko & Komodakis 2016, "Wide Residual Networks"; De et al. 2022, "Unlocking High-Accuracy
    Differentially Private Image Classification through Scale", section 3.1 (what takes the place of batch
    normalisation).

    Args:
        depth: ``6 n + 4`` for n blocks in each of the three groups.
        width: How many times 16, 32 and 64 channels the groups have.
        classes: Number of classes.
        channels: Channels of the images.
        groups: Number of groups of every GroupNorm.

    Raises:
        ValueError: ``depth`` is not ``6 n + 4``.
    """

    def __init__(self, depth: int = 16, width: int = 4, classes: int = 10, channels: int = 3, groups: int = 16) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"WideResNet: depth must be 6 n + 4 (10, 16, 22, 28, 40, …), got {depth}.")
        self.first = StandardizedConv2d(channels, 16, 3, padding=1)
        layers: list[nn.Module] = []
        size = 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                layers.append(_Block(size, outputs, 2 if group and not block else 1, groups))
                size = outputs
        self.blocks = nn.Sequential(*layers)
        self.norm, self.head = nn.GroupNorm(groups, size), nn.Linear(size, classes)
        nn.init.zeros_(self.head.weight)  # the first noisy steps then do not fight random logits

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.blocks(self.first(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Norm, ReLU, convolution, twice, beside the identity (or a 1×1 convolution of the first ReLU)."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs), nn.GroupNorm(groups, outputs)
        self.conv1 = StandardizedConv2d(inputs, outputs, 3, stride, padding=1)
        self.conv2 = StandardizedConv2d(outputs, outputs, 3, padding=1)
        changes = inputs != outputs or stride > 1
        self.shortcut = StandardizedConv2d(inputs, outputs, 1, stride) if changes else None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(inputs))
        shortcut = inputs if self.shortcut is None else self.shortcut(hidden)
        total: Tensor = shortcut + self.conv2(F.relu(self.norm2(self.conv1(hidden))))
        return total
