"""Differentially private principal components: a layer that projects records onto them, and how they are released.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", sections 4 and 5.2, after Dwork et al. 2014,
"Analyze Gauss". The release is charged to the ledger that training is charged to, before the layer holds anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

#: Records whose outer products are added up by one matrix product.
_TOGETHER = 1024


class Releaser(Protocol):
    """What a layer needs of a private strategy, to see records and to release something of them."""

    def each_record(self) -> Iterator[Any]:
        """Every record of the train set by itself, as a batch of one."""

    def release_sum(self, total: Callable[[], Tensor], noise_multiplier: float, what: str) -> Tensor:
        """The sum with noise, charged before it is returned, in every process."""

    def share(self, value: Any) -> Any:
        """The first process's value, in every process."""


class PrivateProjection(nn.Module):
    """Projects onto principal directions of the train set, released once, with noise: ``(B, *) -> (B, k)``.

    A private strategy fills the layer at the start of the first fit, before the noise of training is chosen, so that a
    budget pays for both. Checkpoints keep the directions: a resumed fit releases and charges nothing again. The layer
    has no trainable parameters. It holds one projection for all records, whatever their number.

    Formal guarantee: the release is a Gaussian mechanism of this noise multiplier, for adding or removing one record.
    Proof: a record, flattened and scaled to unit length, adds ``x xᵀ`` to a sum. Released are the diagonal and √2 times
    what is above it: as every number above the diagonal stands in the matrix twice, the Euclidean norm of these numbers
    is the Frobenius norm of the matrix, and ``‖x xᵀ‖_F = ‖x‖² ≤ 1``. Every number gets independent noise of standard
    deviation ``noise_multiplier``. Directions are computed from nothing else. Replacing a record moves the sum by no
    more than 2, in fact √2 (``‖x xᵀ - y yᵀ‖² = 2 - 2 (xᵀy)²`` for unit vectors), and is accounted for as 2.

    The mean is not subtracted: these are principal directions of second moments. Map an empty background to 0.

    Args:
        in_features: Number of features of a flattened record, d.
        components: k, the number of directions; at most d.
        noise_multiplier: Standard deviation of the noise over the sensitivity, which is 1. 0.0: no noise, infinite ε.
        equalized: Whether components are scaled to mean squares that are equal, as far as is known (see
            `principal_directions`); otherwise, the first is far larger than the rest, and most of what is clipped.

    Raises:
        ValueError: An argument is out of its range.
    """

    weight: Tensor

    def __init__(self, in_features: int, components: int, noise_multiplier: float, equalized: bool = False) -> None:
        super().__init__()
        if not 1 <= components <= in_features:
            raise ValueError(
                f"PrivateProjection: components must lie between 1 and in_features = {in_features}, got {components}."
            )
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(
                f"PrivateProjection: noise_multiplier must be non-negative and finite, got {noise_multiplier}."
            )
        self.in_features, self.components, self.noise_multiplier = in_features, components, float(noise_multiplier)
        self.equalized = equalized
        #: Whether the directions are known: they were released, or came with a checkpoint.
        self.filled = False
        self.register_buffer("weight", torch.full((components, in_features), math.nan))

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.filled:
            raise RuntimeError(
                "PrivateProjection has no directions yet. A private strategy releases them at the start of a fit "
                "(DifferentialPrivacy(…) or PrivateStrategy(…)); load a checkpoint of one, or use fill() with the "
                "second_moment() of public records."
            )
        return inputs.flatten(1).to(self.weight.dtype) @ self.weight.T

    def fill(self, moment: Tensor) -> None:
        """Takes the directions from a second moment ``(d, d)``: one with noise, or of public records."""
        self._keep(principal_directions(moment, self.components, self.equalized))

    def release(self, strategy: Releaser) -> None:
        """Releases the second moment of the train set, and fills the layer, in every process with the same numbers."""

        def total() -> Tensor:
            return upper_triangle(self._moment(strategy.each_record()))

        noisy = strategy.release_sum(total, self.noise_multiplier, f"{self.components} principal components")
        moment = symmetric(noisy, self.in_features)
        self._keep(strategy.share(principal_directions(moment, self.components, self.equalized)))

    def inputs_of(self, batch: Any) -> Tensor:
        """What the layer will see of a batch of one record: the batch, or its first entry, as it is loaded. Override it
        for other batches. Layers in front of this one are not looked at.

        Raises:
            TypeError: There is no tensor there.
        """
        inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"PrivateProjection takes the records from a batch that is a tensor, or a tuple or list that begins "
                f"with one, and found a {type(inputs).__name__}. Override PrivateProjection.inputs_of(batch)."
            )
        return inputs

    def _moment(self, records: Iterator[Any]) -> Tensor:
        """The sum over all records, which come one by one: none can influence what another one adds."""
        moment = torch.zeros(self.in_features, self.in_features, dtype=torch.float64, device="cpu")
        while rows := [self._row(batch) for batch in islice(records, _TOGETHER)]:
            moment += second_moment(torch.stack(rows))
        return moment

    def _row(self, batch: Any) -> Tensor:
        inputs = self.inputs_of(batch)
        if inputs.numel() != self.in_features:
            raise ValueError(
                f"PrivateProjection: in_features is {self.in_features}, and a record has {inputs.numel()} features."
            )
        return inputs.detach().flatten().cpu()

    def empty(self) -> None:
        """Forgets the directions."""
        self.weight.fill_(math.nan)
        self.filled = False

    def _keep(self, directions: Tensor) -> None:
        self.weight.copy_(directions)
        self.filled = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.filled = bool(self.weight.isfinite().all())

    def extra_repr(self) -> str:
        options = f"noise_multiplier={self.noise_multiplier:g}, equalized={self.equalized}"
        return f"{self.in_features}, {self.components}, {options}"


def second_moment(records: Tensor) -> Tensor:
    """``Σ x xᵀ`` over records ``(n, *)``, flattened and scaled to unit length: ``(d, d)``, in double precision.

    Formal guarantee: one record more or less moves it by at most 1 in Frobenius norm, up to the rounding of double
    precision. Proof: ``‖x xᵀ‖_F = ‖x‖² ≤ 1``; a record that is zero, or not finite, adds nothing.
    """
    rows = records.detach().flatten(1).cpu().double()
    # By the largest magnitude first: squares of huge or tiny numbers would be infinite or zero.
    peaks = rows.abs().amax(1, keepdim=True)
    usable = peaks.isfinite() & (peaks > 0)
    rows = torch.where(usable, rows / peaks.where(usable, torch.ones_like(peaks)), torch.zeros_like(rows))
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1)  # at least 1, or the row is zero
    return rows.T @ rows


def upper_triangle(matrix: Tensor) -> Tensor:
    """A symmetric matrix ``(d, d)`` as ``(d (d + 1) / 2,)`` numbers whose Euclidean norm is its Frobenius norm."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns] * _weights(rows, columns)


def symmetric(triangle: Tensor, size: int) -> Tensor:
    """The matrix ``(size, size)`` that `upper_triangle` was taken of."""
    rows, columns = torch.triu_indices(size, size)
    matrix = triangle.new_zeros(size, size)
    matrix[rows, columns] = matrix[columns, rows] = triangle / _weights(rows, columns)
    return matrix


def _weights(rows: Tensor, columns: Tensor) -> Tensor:
    return (1.0 + (rows != columns).double()).sqrt()


def principal_directions(moment: Tensor, components: int, equalized: bool = False) -> Tensor:
    """The eigenvectors ``(k, d)`` of the largest eigenvalues of a symmetric matrix, the largest first.

    Args:
        moment: A second moment, with or without noise, ``(d, d)``.
        components: k.
        equalized: Whether they are scaled by ``√(mean(λ) / λ_i)``, so that components have the same mean square, and
            the mean square of all together stays as it is. Eigenvalues count as at least a thousandth of the largest:
            noise can make them zero, or negative.
    """
    values, vectors = torch.linalg.eigh(moment)
    values, directions = values[-components:].flip(0), vectors[:, -components:].flip(1).T
    if not equalized:
        return directions
    values = values.clamp_min(max(1e-3 * values[0].item(), torch.finfo(values.dtype).tiny))
    return directions * (values.mean() / values).sqrt()[:, None]


def unfilled(modules: Iterable[nn.Module]) -> list[PrivateProjection]:
    """The projections that are yet to be released."""
    return [module for module in modules if isinstance(module, PrivateProjection) and not module.filled]
