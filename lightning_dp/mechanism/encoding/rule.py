"""The bounding rule of gradient encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from lightning_dp.accounting.events import Magnitudes
from lightning_dp.gradients.engines import make_engine
from lightning_dp.mechanism.clipping import NO_STATE, Bounding, Group, State, check_positive
from lightning_dp.mechanism.encoding.codebooks import Codebook, FlatCodebook
from lightning_dp.mechanism.encoding.encoder import EncodedSum

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

    Noise is added to every coordinate of the sum, also where no example has one of its top k: the set of those
    coordinates depends on the records.

    Args:
        codebook: The public vectors.
        max_norm: Clipping norm C, in units of the gradient's Euclidean norm, over all trainable parameters jointly.
        top_k: Number of coordinates that are kept. ``None``: all.

    Raises:
        TypeError: ``codebook`` is not a `Codebook`.
        ValueError: ``max_norm`` is not positive and finite, or ``top_k`` less than 1. `for_module` raises it when
            ``top_k`` exceeds the model's trainable coordinates, or the codebook's vectors are not valid.
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

    def for_module(self, module: nn.Module) -> ModuleGradientEncoding:
        coordinates = sum(p.numel() for p in module.parameters() if p.requires_grad)
        top_k = coordinates if self.top_k is None else self.top_k
        if top_k > coordinates:
            raise ValueError(
                f"GradientEncoding: top_k={top_k} exceeds the {coordinates} trainable coordinates of the model; leave "
                "it out to keep all."
            )
        entries = self.codebook.entries(top_k)
        _check_entries(type(self.codebook).__name__, entries, top_k)
        return ModuleGradientEncoding(self.codebook, self.max_norm, self.top_k, entries)

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        return [self.max_norm]


def _check_entries(name: str, entries: Magnitudes, size: int) -> None:
    """Raises ValueError unless the vectors are as `Codebook` promises; the formal guarantee rests on that."""
    values = np.array(entries.values)
    if sum(entries.counts) != size or min(entries.counts) < 1:
        raise ValueError(f"GradientEncoding: the levels of {name} must have {size} coordinates in all.")
    descending = values.ndim == 2 and values.size and (np.diff(values, axis=1) <= 1e-12).all()
    if not descending or not (values >= 0).all() or not np.allclose(entries.norms(), 1, atol=1e-6):
        raise ValueError(f"GradientEncoding: the vectors of {name} must be descending, non-negative and of norm 1.")


@dataclass(frozen=True)
class ModuleGradientEncoding(GradientEncoding):
    """`GradientEncoding` for one module. Made by `GradientEncoding.for_module`."""

    entries: Magnitudes = field(default_factory=lambda: Magnitudes((), ()))

    def make_engine(self, name: str, module: nn.Module) -> EncodedSum:
        return EncodedSum(make_engine(name, module), self.entries, self.max_norm)

    def magnitudes(self) -> Magnitudes:
        """The codebook's vectors over their largest norm, which is the sensitivity over ``max_norm``."""
        largest = float(self.entries.norms().max())
        return Magnitudes(
            self.entries.counts, tuple(tuple(v / largest for v in entry) for entry in self.entries.values)
        )

    def group_sensitivities(self, groups: Sequence[Group], state: State = NO_STATE) -> list[float]:
        return [self.max_norm * float(self.entries.norms().max())]
