"""Gradient encoding: every example's gradient is brought under one of a few public vectors, coordinate for coordinate.

Source: Nasr, Shokri & Houmansadr 2020, "Improving Deep Learning with Differential Privacy using Gradient Encoding and
Denoising". What a record adds is then bounded on every coordinate, so that noise other than Gaussian can be accounted
for (`lightning_dp.mechanism.noise`).

Vectors of a codebook are staircases: a few levels, the same ranks for all. Whatever the number of coordinates, an
assignment costs one product with the sums of the levels, and accounting one integral per level.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dp.accounting.events import Magnitudes
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.torch_api import tree_leaves

#: The most levels of a staircase.
LEVELS = 32


# -- codebooks ---------------------------------------------------------------------------------------------------------


class Codebook(ABC):
    """Public, descending, non-negative vectors of norm 1.

    They may come from constants, seeds and public data, never from the gradients of private records: the accountant
    takes the vectors as known to everybody.
    """

    @abstractmethod
    def entries(self, size: int) -> Magnitudes:
        """The vectors for ``size`` coordinates, as staircases."""


@dataclass(frozen=True)
class FlatCodebook(Codebook):
    """One vector, with the same magnitude on every coordinate: each is clipped by itself."""

    def entries(self, size: int) -> Magnitudes:
        return Magnitudes((size,), ((1 / math.sqrt(size),),))


@dataclass(frozen=True)
class PowerLawCodebook(Codebook):
    """Magnitudes that fall with a power of the rank, ``q_j[r] ∝ r^(-exponent_j)``.

    Args:
        exponents: One vector for each; 0 is flat, and the larger, the nearer to a single spike.
    """

    exponents: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponents", tuple(self.exponents))
        if not self.exponents or not all(0 <= exponent < math.inf for exponent in self.exponents):
            raise ValueError(f"PowerLawCodebook: exponents must be non-negative numbers, got {self.exponents}.")

    def entries(self, size: int) -> Magnitudes:
        ranks = np.arange(1, size + 1, dtype=float)
        return staircases([ranks**-exponent for exponent in self.exponents])


@dataclass(frozen=True)
class RandomCodebook(Codebook):
    """Sorted magnitudes of random vectors, ``q_j = sort(|z|^(shape_j))`` with z from N(0, I): at shape 1 those of a
    Gaussian vector, at 0 a flat one, and the larger the shape, the fewer coordinates stand out.

    Args:
        size: Number of vectors.
        shapes: Least and largest shape; the vectors' are spread evenly between the two.
        seed: Of the vectors. It is public.
    """

    size: int = 8
    shapes: tuple[float, float] = (0.5, 3.0)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", tuple(self.shapes))
        if self.size < 1 or len(self.shapes) != 2 or not 0 <= self.shapes[0] <= self.shapes[1] < math.inf:
            raise ValueError(
                "RandomCodebook: size must be at least 1 and shapes two non-negative numbers in ascending order, got "
                f"size={self.size}, shapes={self.shapes}."
            )

    def entries(self, size: int) -> Magnitudes:
        generator = np.random.default_rng(self.seed)
        shapes = np.linspace(*self.shapes, self.size)
        return staircases([-np.sort(-(np.abs(generator.standard_normal(size)) ** shape)) for shape in shapes])


@dataclass(frozen=True)
class PublicCodebook(Codebook):
    """Vectors that `learn_codebook` found in gradients of public data.

    Args:
        path: The file that it wrote. It is read when training starts: a missing file is a ``FileNotFoundError`` then,
            and vectors of another length are a ``ValueError``.
    """

    path: str

    def entries(self, size: int) -> Magnitudes:
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"PublicCodebook: there is no file {self.path!r}; learn_codebook writes one.")
        with np.load(self.path, allow_pickle=False) as file:
            counts, values = file["counts"], file["values"]
        if counts.sum() != size:
            raise ValueError(
                f"PublicCodebook: {self.path} holds vectors of {counts.sum()} coordinates, and {size} are encoded: "
                "learn the codebook with the same network and the same top_k."
            )
        return Magnitudes(tuple(counts.tolist()), tuple(map(tuple, values.tolist())))


def learn_codebook(gradients: Tensor, path: str | os.PathLike[str], size: int = 8, seed: int = 0) -> PublicCodebook:
    """Clusters the sorted magnitudes of public gradients by cosine (spherical k-means) and saves the centres.

    Args:
        gradients: Per-example gradients of **public** data, ``(n, d)`` (see `public_gradients`), restricted to their
            top-k coordinates where the encoding is: pass the k largest magnitudes.
        path: Where the codebook is written; ``.npz`` is added where it is missing.
        size: Number of vectors.
        seed: Of the choice of the first centres.

    Returns:
        The codebook that reads the file.

    Raises:
        ValueError: The gradients are not a matrix, or fewer than vectors, or some are zero or not finite.
    """
    if gradients.dim() != 2:
        raise ValueError(f"learn_codebook: gradients must be (n, d), one row each, got {tuple(gradients.shape)}.")
    shapes = -np.sort(-np.abs(gradients.double().cpu().numpy()), axis=1)
    norms = np.linalg.norm(shapes, axis=1, keepdims=True)
    if len(shapes) < size or not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError(
            f"learn_codebook: needs at least size={size} finite gradients that are not zero, got {len(shapes)}, of "
            f"which {int((norms == 0).sum())} are zero and {int((~np.isfinite(norms)).sum())} not finite."
        )
    shapes /= norms
    centres = shapes[np.random.default_rng(seed).choice(len(shapes), size, replace=False)]
    for _ in range(50):
        nearest = (shapes @ centres.T).argmax(1)
        moved = np.stack([shapes[nearest == j].sum(0) if (nearest == j).any() else centres[j] for j in range(size)])
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        if np.allclose(moved, centres, atol=1e-9):
            break
        centres = moved
    found = staircases(list(centres))
    name = os.fspath(path)
    name = name if name.endswith(".npz") else f"{name}.npz"
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    np.savez(name, counts=np.array(found.counts), values=np.array(found.values))
    return PublicCodebook(name)


def public_gradients(module: Any, batches: Iterable[Any]) -> Tensor:
    """Per-example gradients ``(n, d)`` of a LightningModule's ``training_step`` on batches of **public** data.

    Columns are the trainable parameters' coordinates, in the order of ``named_parameters``.

    Args:
        module: The LightningModule; its loss is a mean over the examples, and ``training_step`` must not log.
        batches: What a train loader would yield, with the examples along the first dimension of its tensors.
    """
    engine, rows = BookKeeping(module), []
    for index, batch in enumerate(batches):
        size = len(next(part for part in tree_leaves(batch) if isinstance(part, Tensor)))
        with engine.forward(size):
            output = module.training_step(batch, index)
        with engine.backward():
            (output["loss"] if isinstance(output, dict) else output).backward()
        gradients = engine.gradients()
        parts = [
            gradients[name].materialise().flatten(1) * size
            if name in gradients
            else torch.zeros(size, parameter.numel(), device=parameter.device)
            for name, parameter in engine.parameters.items()
        ]
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def staircases(vectors: Sequence[np.ndarray]) -> Magnitudes:
    """Staircases of norm 1 that stand for descending vectors of one length: at every level the root mean square."""
    size = len(vectors[0])
    edges = np.unique(np.round(np.geomspace(1, size, LEVELS)).astype(int)) if size > LEVELS else np.arange(1, size + 1)
    counts = np.diff(edges, prepend=0)
    values = []
    for vector in vectors:
        vector = vector / np.linalg.norm(vector)
        levels = np.sqrt(np.add.reduceat(np.square(vector), edges - counts) / counts)
        values.append(tuple(levels.tolist()))
    return Magnitudes(tuple(counts.tolist()), tuple(values))
