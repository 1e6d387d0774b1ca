"""Bounds per layer type: what a layer's gradient can amount to, by its input and the gradient at its output.

`lightning_dp.mechanism.backprop` clips what is measured here. To add a layer type, write its `LayerBound` with its
proof and register it in `bounds_by_type`; ``tests/mechanism/test_backprop.py`` checks every one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.gradients.model import trainable
from lightning_dp.gradients.precision import wide
from lightning_dp.gradients.rules.registry import rule_for
from lightning_dp.torch_api import padding_of

ConvolutionBound = Literal["window_sum", "unfolded", "raw", "raw_sum"]


CONVOLUTION_BOUNDS = ("window_sum", "unfolded", "raw", "raw_sum")


class LayerBound(ABC):
    """How the gradients of one type of layer follow from its input and the gradient at its output.

    `input_norms` and `measure` map every example to a number that scales with its input, or with its upstream gradient,
    and depends on that example alone. With these at most ``C_in`` and ``C_up``, no example's gradient exceeds
    `sensitivities`.
    """

    @abstractmethod
    def sensitivities(self, module: nn.Module, input_norm: float, upstream_norm: float) -> dict[str, float]:
        """The bound of an example's gradient, by the layer's own parameter names, trainable ones only."""

    def input_norms(self, module: nn.Module, input: Tensor) -> Tensor:
        """What is clipped to ``C_in``, shape ``(B,)``; asked for where `clips_input`."""
        raise NotImplementedError

    @abstractmethod
    def measure(self, module: nn.Module, input: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is clipped to ``C_up``, ``(B,)``, and every example's bias gradient, ``(B, p)``, where the bias is
        trained and the input is clipped."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why this module, as it is configured, has no bound; ``None`` when it has."""
        return None

    #: The dimension of the output that the bias runs along.
    bias_dimension: ClassVar[int] = -1
    #: Whether the weight's bound rests on that of the input; if not, `measure` is shown the input.
    clips_input: ClassVar[bool] = True


def norms_of(tensor: Tensor) -> Tensor:
    """Euclidean norm of every example, ``(B, ...) -> (B,)``, in float32 or wider."""
    return torch.linalg.vector_norm(wide(tensor).reshape(len(tensor), -1), dim=1)


def is_trained(module: nn.Module, name: str) -> bool:
    """Whether the module has a trainable parameter of that name."""
    parameter = getattr(module, name, None)
    return parameter is not None and parameter.requires_grad


class LinearBound(LayerBound):
    """Linear maps, also over sequences: ``‖A‖_F ≤ C_in``, ``‖E‖_F ≤ C_up`` and ``‖Σ_t e_t‖ ≤ C_up``.

    Formal guarantee: weight ``C_in · C_up``, bias ``C_up``.
    Proof: ``‖EᵀA‖_F ≤ ‖E‖_F ‖A‖_F`` (Cauchy-Schwarz), jointly over all positions t; the bias gradient is ``Σ_t e_t``
    itself. Source: Stevens et al. 2022, section 3, for one position.
    """

    def sensitivities(self, module: nn.Module, input_norm: float, upstream_norm: float) -> dict[str, float]:
        bounds = {"weight": input_norm * upstream_norm, "bias": upstream_norm}
        return {name: bound for name, bound in bounds.items() if is_trained(module, name)}

    def input_norms(self, module: nn.Module, input: Tensor) -> Tensor:
        return norms_of(input)

    def measure(self, module: nn.Module, input: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        norms = norms_of(grad)
        if not is_trained(module, "bias"):
            return norms, None
        if grad.dim() == 2:
            return norms, grad
        summed = grad.sum(tuple(range(1, grad.dim() - 1)))
        return torch.maximum(norms, norms_of(summed)), summed


@dataclass(frozen=True)
class ConvolutionLayerBound(LayerBound):
    """Convolutions, with a choice of bound. ``A`` is the unfolded input, one row per output position.

    Formal guarantee: bias ``C_up``, and the weight

    - ``"window_sum"``: every window ``‖a_t‖ ≤ C_in``, ``√Σ_c (Σ_t |e_ct|)² ≤ C_up``: ``C_in · C_up``.
      Proof: row c of the gradient is ``Σ_t e_ct a_t``, of norm at most ``Σ_t |e_ct| · max_t ‖a_t‖``.
    - ``"unfolded"``: ``‖A‖_F ≤ C_in``, ``‖E‖_F ≤ C_up``: ``C_in · C_up``.
      Proof: Cauchy-Schwarz on ``EᵀA``, group by group, and again over the groups.
    - ``"raw"``: ``‖x‖ ≤ C_in``, ``‖E‖_F ≤ C_up``: ``√m · C_in · C_up`` with ``m = Π_i ⌈k_i / (s_i / gcd(s_i, d_i))⌉``
      for kernel k, stride s, dilation d. Proof: the taps of one dimension that meet a given pixel are congruent modulo
      ``s / gcd(s, d)``, so no pixel is in more than m windows and ``‖A‖_F² ≤ m ‖x‖²``; padding with zeros adds none.
    - ``"raw_sum"``: ``‖x‖ ≤ C_in``, ``√Σ_c (Σ_t |e_ct|)² ≤ C_up``: ``C_in · C_up``. Proof: as for ``"window_sum"``; no
      window's norm exceeds the whole input's, as it holds every pixel at most once.

    ``‖Σ_t e_t‖ ≤ C_up``, the bias's gradient, is enforced where the norm of E does not imply it.
    """

    kind: ConvolutionBound = "window_sum"

    bias_dimension: ClassVar[int] = 1

    def refusal(self, module: Any) -> str | None:
        if self.kind in ("raw", "raw_sum") and module.padding_mode != "zeros":
            return (
                f"padding_mode='{module.padding_mode}' repeats pixels, which convolution='{self.kind}' does not count; "
                "use convolution='window_sum' or 'unfolded', or pad with zeros"
            )
        return None

    def sensitivities(self, module: Any, input_norm: float, upstream_norm: float) -> dict[str, float]:
        geometry = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        windows = math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in geometry) if self.kind == "raw" else 1
        bounds = {"weight": math.sqrt(windows) * input_norm * upstream_norm, "bias": upstream_norm}
        return {name: bound for name, bound in bounds.items() if is_trained(module, name)}

    def input_norms(self, module: Any, input: Tensor) -> Tensor:
        if self.kind in ("raw", "raw_sum"):
            return norms_of(input)
        # What forward pads by in modes other than "zeros": module.padding may have been changed since construction.
        sides = padding_of(module)
        pads = tuple(zip(sides[-2::-2], sides[::-2], strict=True))
        if module.padding_mode == "zeros":
            pads = _zero_padding(module)
        else:
            input, pads = F.pad(input, sides, mode=module.padding_mode), ((0, 0),) * len(pads)
        squares = wide(input).square()
        if self.kind == "window_sum":
            per_group = squares.unflatten(1, (module.groups, -1)).sum(2).flatten(0, 1).unsqueeze(1)
            per_group = F.pad(per_group, [side for pair in reversed(pads) for side in pair])
            windows = _sums_over_windows(per_group, module.kernel_size, module.stride, module.dilation)
            return windows.unflatten(0, (len(input), module.groups)).flatten(1).amax(1).sqrt()
        windows = _windows_per_pixel(
            input.shape[2:], module.kernel_size, module.stride, module.dilation, pads, squares.device, squares.dtype
        )
        return squares.flatten(2).sum(1).mul_(windows).sum(1).sqrt_()  # no matrix product: those may round to TF32

    def measure(self, module: Any, input: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        flat = grad.flatten(2)
        if self.kind in ("window_sum", "raw_sum"):
            norms = norms_of(flat.abs().sum(2))
            return norms, flat.sum(2) if is_trained(module, "bias") else None
        norms = norms_of(grad)
        if not is_trained(module, "bias"):
            return norms, None
        summed = flat.sum(2)
        return torch.maximum(norms, norms_of(summed)), summed


def _zero_padding(module: Any) -> tuple[tuple[int, int], ...]:
    """Zeros before and after every dimension."""
    if module.padding == "same":
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    return tuple((pad, pad) for pad in module.padding)


def _sums_over_windows(
    values: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Sums over a convolution's windows, ``(N, 1, *space) -> (N, 1, *positions)``, one dimension after the other."""
    for dimension, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = values.unfold(dimension, apart * (size - 1) + 1, step)
        values = windows[..., ::apart].sum(-1)
    return values


@lru_cache(maxsize=256)
def _windows_per_pixel(
    space: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """How many output positions use each pixel, flattened: a product over the dimensions."""
    counts = torch.ones((), dtype=dtype)
    for n, k, s, d, (before, after) in zip(space, kernel, stride, dilation, pads, strict=True):
        line = torch.zeros(n, dtype=dtype)
        for position in range((n + before + after - d * (k - 1) - 1) // s + 1):
            for tap in range(k):
                pixel = position * s + tap * d - before
                if 0 <= pixel < n:
                    line[pixel] += 1
        counts = counts[..., None] * line
    return counts.flatten().to(device)


class GradientBound(LayerBound):
    """Layers whose per-example gradients are small enough to look at: embeddings, affine normalisation, PReLU.

    Formal guarantee: every parameter ``C_up``, whatever the input.
    Proof: the norm of the example's gradient itself, which is linear in E, is what is clipped; an input that is not
    finite, or too large to be normalised, is zero to the layer and its example left out. It is never above the
    bounds by norms alone (``√T · C_up`` or ``Σ_t ‖e_t‖`` for an embedding, ``max_c ‖x̂_c‖ · ‖E‖`` for a normalisation),
    and needs no bound on sequence lengths or pixels.
    """

    clips_input: ClassVar[bool] = False

    def sensitivities(self, module: nn.Module, input_norm: float, upstream_norm: float) -> dict[str, float]:
        return dict.fromkeys(trainable(module), upstream_norm)

    def measure(self, module: nn.Module, input: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        rule = rule_for(module)
        assert rule is not None
        squares = [gradient.squared_norms() for gradient in rule(module, input, grad).values()]
        return torch.stack(squares).amax(0).sqrt_(), None


_NORMALISATIONS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bounds_by_type(convolution: ConvolutionBound) -> dict[type[nn.Module], LayerBound]:
    """The layer types that have a proven bound."""
    return {
        nn.Linear: LinearBound(),
        **dict.fromkeys(_CONVOLUTIONS, ConvolutionLayerBound(convolution)),
        **dict.fromkeys((nn.Embedding, nn.EmbeddingBag, nn.PReLU, *_NORMALISATIONS), GradientBound()),
    }


#: Types of libraries that need not be installed, by their full names.
BOUNDS_BY_NAME: dict[str, LayerBound] = {"transformers.pytorch_utils.Conv1D": LinearBound()}
