"""Gradient encoding: every example's gradient is brought under one of a few public vectors, coordinate for coordinate.

Source: Nasr, Shokri & Houmansadr 2020, "Improving Deep Learning with Differential Privacy using Gradient Encoding and
Denoising". What a record adds is then bounded on every coordinate, so that noise other than Gaussian can be accounted
for (`lightning_dp.noise`).

Vectors of a codebook are staircases: a few levels, the same ranks for all. Whatever the number of coordinates, an
assignment costs one product with the sums of the levels, and accounting one integral per level.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.accounting.events import Magnitudes
from lightning_dp.clipping import NO_STATE, Bounding, Group, State, check_positive, scale_down
from lightning_dp.engines import BookKeeping, PerExampleEngine, SummingEngine, make_engine
from lightning_dp.gradients import PerExampleGradient, full_precision

#: The most levels of a staircase.
LEVELS = 32

#: Magnitudes share a rank when they agree in sign, exponent and this many bits of the mantissa: within 0.4 %.
_MANTISSA = 8
#: Of these ranks there are so many: 16 octaves below an example's largest magnitude; what is smaller shares the last.
_BUCKETS = 16 * 2**_MANTISSA

#: Coordinates that are encoded at once, which stay in a core's cache, and that are materialised at once.
_ENCODED, _MATERIALISED = 2**17, 2**22


# -- codebooks ---------------------------------------------------------------------------------------------------------


class Codebook(ABC):
    """Public, descending, non-negative vectors of norm 1.

    They may come from constants, seeds and public data, never from the gradients of private records: an encoded
    gradient says which vector was nearest.
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
        path: The file that it wrote.
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
    """Clusters the shapes of public gradients by cosine (spherical k-means) and saves the centres.

    Args:
        gradients: Per-example gradients of **public** data, ``(n, d)`` (see `public_gradients`), restricted to their
            top-k coordinates where the encoding is: pass the k largest magnitudes.
        path: Where the codebook is written; ``.npz`` is added where it is missing.
        size: Number of vectors.
        seed: Of the first centres.

    Raises:
        ValueError: There are fewer gradients than vectors, or some are zero or not finite.
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

    Args:
        module: The LightningModule; its loss is a mean over the examples, and ``training_step`` must not log.
        batches: What a train loader would yield, with the examples along the first dimension of its tensors.
    """
    engine, rows = BookKeeping(module), []
    for index, batch in enumerate(batches):
        size = len(next(part for part in torch.utils._pytree.tree_leaves(batch) if isinstance(part, Tensor)))
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


# -- the rule ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientEncoding(Bounding):
    """Keeps the ``top_k`` largest coordinates of every example's gradient, scales them to a norm of at most
    ``max_norm``, and reduces each to the magnitude that the codebook's nearest vector has at its rank.

    Formal guarantee: what one record adds is, up to signs and the order of coordinates, at most ``max_norm`` times one
    of the codebook's vectors, coordinate for coordinate; its norm is at most ``max_norm``.
    Proof: the coordinate of rank r becomes ``sign · min(|g_(r)|, max_norm · q_j[r])``, j chosen from record i alone,
    ``‖q_j‖ ≤ 1``. Magnitudes that share a rank (within 0.4 %) get the bound of the last of them.
    Source: Nasr, Shokri & Houmansadr 2020, section 3.

    Noise lies on every coordinate of the sum, also where no example's top k lie: which they are would tell of the
    records.

    Args:
        codebook: The public vectors.
        max_norm: Clipping norm C, in units of the gradient's Euclidean norm, over all trainable parameters jointly.
        top_k: Number of coordinates that are kept. ``None``: all.
    """

    codebook: Codebook = FlatCodebook()
    max_norm: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_positive("GradientEncoding", max_norm=self.max_norm)
        if not isinstance(self.codebook, Codebook):
            raise TypeError(f"GradientEncoding: codebook must be one such as FlatCodebook(), got {self.codebook!r}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"GradientEncoding: top_k must be at least 1, got {self.top_k}.")

    def bind(self, module: nn.Module) -> BoundGradientEncoding:
        coordinates = sum(p.numel() for p in module.parameters() if p.requires_grad)
        top_k = coordinates if self.top_k is None else self.top_k
        if top_k > coordinates:
            raise ValueError(
                f"GradientEncoding: top_k={top_k} exceeds the {coordinates} trainable coordinates of the model; leave "
                "it out to keep all."
            )
        entries = self.codebook.entries(top_k)
        _check_entries(type(self.codebook).__name__, entries, top_k)
        return BoundGradientEncoding(self.codebook, self.max_norm, self.top_k, entries)

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        return [self.max_norm]


def _check_entries(name: str, entries: Magnitudes, size: int) -> None:
    """Refuses what is no codebook: a bound would be wrong."""
    values = np.array(entries.values)
    if sum(entries.counts) != size or min(entries.counts) < 1:
        raise ValueError(f"GradientEncoding: the levels of {name} must have {size} coordinates in all.")
    descending = values.ndim == 2 and values.size and (np.diff(values, axis=1) <= 1e-12).all()
    if not descending or not (values >= 0).all() or not np.allclose(entries.norms(), 1, atol=1e-6):
        raise ValueError(f"GradientEncoding: the vectors of {name} must be descending, non-negative and of norm 1.")


@dataclass(frozen=True)
class BoundGradientEncoding(GradientEncoding):
    """`GradientEncoding` for one module. Made by `GradientEncoding.bind`."""

    entries: Magnitudes = field(default_factory=lambda: Magnitudes((), ()))

    def make_engine(self, name: str, module: nn.Module) -> EncodedSum:
        return EncodedSum(make_engine(name, module), self)

    def magnitudes(self) -> Magnitudes:
        """The codebook's vectors over their largest norm, which is the sensitivity over ``max_norm``."""
        largest = float(self.entries.norms().max())
        return Magnitudes(
            self.entries.counts, tuple(tuple(v / largest for v in entry) for entry in self.entries.values)
        )

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        return [self.max_norm * float(self.entries.norms().max())]


# -- the sum -----------------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes rows of gradients.

    Args:
        entries: The codebook's vectors.
        max_norm: Clipping norm C.
        coordinates: d, the length of a row; those of ranks beyond the codebook's become 0.
    """

    def __init__(self, entries: Magnitudes, max_norm: float, coordinates: int) -> None:
        self.max_norm = max_norm
        self.everything = sum(entries.counts) == coordinates
        self._last_ranks = torch.tensor(entries.counts).cumsum(0)
        self._values = torch.tensor(entries.values, dtype=torch.float64)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes rows ``(B, d)`` in place; returns the norms ``(B,)`` of their top k, as they were, and the factors
        that these were scaled by."""
        if self.everything and len(self._last_ranks) == len(self._values) == 1:  # a flat codebook: no ranks
            norms = torch.linalg.vector_norm(rows, dim=1)
            factors = scale_down(norms, self.max_norm)
            limit = self.max_norm * float(self._values)
            rows.mul_(factors[:, None]).clamp_(-limit, limit)
            return norms, factors
        magnitudes = rows.abs()
        buckets, lowest = _buckets(magnitudes)
        counts = torch.bincount(buckets, minlength=len(rows) * _BUCKETS).view(-1, _BUCKETS)
        # The last rank of a bucket decides about all that share it.
        last_ranks = counts.flip(1).cumsum(1).flip(1)
        levels = torch.searchsorted(self._last_ranks.to(rows.device), last_ranks)  # L: beyond the codebook's ranks
        chosen = self._nearest(levels, counts, lowest)
        bounds = self._values.new_zeros(len(self._values), self._values.shape[1] + 1)
        bounds[:, :-1] = self._values * self.max_norm
        table = bounds.to(rows)[chosen].gather(1, levels)
        if self.everything:
            norms = torch.linalg.vector_norm(rows, dim=1)
        else:
            is_kept = (levels < len(self._last_ranks)).to(rows.dtype)
            kept = magnitudes * is_kept.flatten().index_select(0, buckets).view_as(rows)
            norms = torch.linalg.vector_norm(kept, dim=1)
        factors = scale_down(norms, self.max_norm)
        limits = table.flatten().index_select(0, buckets).view_as(rows)
        torch.clamp(rows.mul_(factors[:, None]), -limits, limits, out=rows)
        return norms, factors

    def _nearest(self, levels: Tensor, counts: Tensor, lowest: Tensor) -> Tensor:
        """Index ``(B,)`` of the vector of largest cosine with the sorted magnitudes, up to the width of a bucket."""
        if len(self._values) == 1:
            return torch.zeros(len(levels), dtype=torch.long, device=levels.device)
        sums = torch.zeros(len(levels), len(self._last_ranks) + 1, dtype=lowest.dtype, device=levels.device)
        sums.scatter_add_(1, levels, counts * lowest)
        return (sums[:, :-1] @ self._values.T.to(sums)).argmax(1)


def _buckets(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """The bucket of every magnitude, flat, ``(B·d,)``, with `_BUCKETS` numbers for each row; and the least magnitude
    ``(B, _BUCKETS)`` of every bucket.

    A larger magnitude never has a lower bucket: the bits of non-negative floating-point numbers are in their order.
    """
    keys = magnitudes.float().view(torch.int32) >> (23 - _MANTISSA)
    offset = keys.amax(1, keepdim=True) - (_BUCKETS - 1)
    lowest = (torch.arange(_BUCKETS, device=keys.device, dtype=torch.int32) + offset).clamp_(min=0)
    buckets = keys.sub_(offset).clamp_(min=0)
    if len(buckets) > 1:
        buckets += torch.arange(0, len(buckets) * _BUCKETS, _BUCKETS, device=keys.device, dtype=torch.int32)[:, None]
    return buckets.flatten(), (lowest << (23 - _MANTISSA)).view(torch.float32)


class EncodedSum(SummingEngine):
    """Sums of encoded per-example gradients, a micro-batch at a time.

    The gradients of a few examples are materialised at once, of one when the model is large.

    Args:
        engine: Supplies the gradients.
        rule: What they are encoded by.
    """

    def __init__(self, engine: PerExampleEngine, rule: BoundGradientEncoding) -> None:
        self.engine, self.parameters, self.max_examples = engine, engine.parameters, engine.max_examples
        self._encode = Encoder(rule.entries, rule.max_norm, sum(p.numel() for p in self.parameters.values()))
        engine.expects_norms = False
        self._total: Tensor | None = None
        self._batch_size = self._bad = 0

    def reset(self) -> None:
        self._total = None

    def take(self) -> tuple[dict[str, Tensor], float]:
        total, self._total = self._total, None
        if total is None:
            return {}, 1.0
        parts = total.split([p.numel() for p in self.parameters.values()])
        return {name: part.view_as(p) for part, (name, p) in zip(parts, self.parameters.items(), strict=True)}, 1.0

    def nonfinite(self) -> int:
        return self._bad

    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        self._batch_size = batch_size
        self.engine.forms = self.forms
        return self.engine.forward(batch_size)

    @contextmanager
    def backward(self, scale: float = 1.0) -> Iterator[None]:
        self._bad, self.norms, self.factors = 0, None, None
        with self.engine.backward(scale):
            yield
        gradients = self.engine.gradients()
        if gradients:
            with full_precision(next(iter(self.parameters.values())).device):
                self._add(gradients, scale)

    def _add(self, gradients: dict[str, PerExampleGradient], scale: float) -> None:
        count = self._batch_size
        sizes = [p.numel() for p in self.parameters.values()]
        some = max(1, _MATERIALISED // sum(sizes))
        measured = []
        dtype = max((p.dtype for p in self.parameters.values()), key=lambda dtype: dtype.itemsize)
        like = next(iter(self.parameters.values()))
        rows = like.new_empty(min(some, count), sum(sizes), dtype=torch.promote_types(dtype, torch.float32))
        for start in range(0, count, some):
            part = rows[: count - start]
            for name, column in zip(self.parameters, part.split(sizes, 1), strict=True):
                if name in gradients:
                    gradients[name].part(start, start + some).write_(column, scale)
                else:
                    column.zero_()
            for few in part.split(max(1, _ENCODED // max(sum(sizes), _BUCKETS))):
                bad = ~torch.linalg.vector_norm(few, dim=1).isfinite()
                if bad.any():
                    self._bad += int(bad.sum())
                    few.masked_fill_(bad[:, None], 0)
                norms, factors = self._encode(few)
                measured.append(torch.stack([norms / scale, factors]))
            self._total = part.sum(0) if self._total is None else self._total.add_(part.sum(0))
        if self.keep_norms:
            self.norms, self.factors = torch.cat(measured, 1)[..., None].unbind(0)
