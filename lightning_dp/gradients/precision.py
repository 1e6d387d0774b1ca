"""Precision of norms and sums: float32 or wider, whatever the model computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is when it is already that wide."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def is_asynchronous(tensor: Tensor) -> bool:
    """True on accelerators, where reading a value forces a host-device sync."""
    return tensor.device.type != "cpu"


def rounds_products(device: torch.device) -> bool:
    """Whether products of float32 may be formed from factors of fewer digits (TF32, bfloat16) on this device."""
    if _SWITCHES:
        return any(switch.fp32_precision not in ("none", "ieee") for switch in _SWITCHES[device.type != "cpu"])
    rounds = torch.get_float32_matmul_precision() != "highest"
    return rounds or (device.type == "cuda" and torch.backends.cudnn.allow_tf32)


#: What decides about that, on CPUs and elsewhere: in torch before 2.9 these switches do not exist.
_SWITCHES: list[list[Any]] = []
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    backends: Any = torch.backends
    _SWITCHES = [
        [backends.mkldnn.matmul, backends.mkldnn.conv],
        [backends.cuda.matmul, backends.cudnn.conv],
    ]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 are formed in float32, whatever is allowed for the model.

    A norm and the sum that it bounds must agree, also for gradients whose terms cancel: formed from factors of ten
    binary digits, what a record adds could be many times its norm.
    """
    if not rounds_products(device):
        yield
        return
    switches = _SWITCHES[device.type != "cpu"] if _SWITCHES else []
    kept = [switch.fp32_precision for switch in switches]
    matmul, convolution = (None, None) if switches else _old_switches()
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        if not switches:
            _set_old_switches("highest", False)
        yield
    finally:
        for switch, precision in zip(switches, kept, strict=True):
            switch.fp32_precision = precision
        if matmul is not None:
            _set_old_switches(matmul, bool(convolution))


def _old_switches() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def _set_old_switches(matmul: str, convolution: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolution
