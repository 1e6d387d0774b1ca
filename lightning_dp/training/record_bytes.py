"""Records as bytes, by which data sets and records are told apart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

#: Records that are looked at to tell data sets apart.
_LOOKED_AT = 4


def fingerprint(dataset: Any) -> str:
    """A hash that must be equal in all processes: of the length, the indices of subsets, and a few records.

    A record that differs from one load to the next (augmented by a generator of the data set's own) is left out.
    """
    digest = hashlib.sha256(str(len(dataset)).encode())
    part = dataset
    while isinstance(part, Subset):
        digest.update(np.asarray(part.indices, dtype=np.int64).tobytes())
        part = part.dataset
    for index in np.linspace(0, len(dataset) - 1, _LOOKED_AT).astype(int).tolist():
        first, second = (record_bytes(dataset, index) for _ in range(2))
        if first is not None and first == second:
            digest.update(first)
    return digest.hexdigest()


def _written(value: Any) -> bytes:
    """A record as bytes that are the same in every process."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return f"{value.dtype}{tuple(value.shape)}".encode() + flat.numpy().tobytes()
    if isinstance(value, Mapping):
        return b"".join(str(key).encode() + _written(part) for key, part in value.items())
    if isinstance(value, tuple | list):
        return b"".join(_written(part) for part in value)
    if isinstance(value, str | int | float | bool | None):
        return repr(value).encode()
    array = np.asarray(value)  # also images
    if array.dtype == object:
        raise TypeError("Not made of numbers.")
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()


def record_bytes(dataset: Any, index: int, seed: int | None = None) -> bytes | None:
    """A record as bytes, loaded from a random state that depends on the index alone; ``None``: it has no such form."""
    seed = index if seed is None else seed
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes milliseconds
        np.random.seed(seed)
        random.seed(seed)
        return _written(dataset[index])
    except (TypeError, ValueError, RuntimeError):  # sparse tensors, say
        return None
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
