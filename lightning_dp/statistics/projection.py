"""Differentially private principal components: a layer that projects records onto them, and how they are released.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", sections 4 and 5.2, after Dwork et al. 2014,
"Analyze Gauss". The release is charged to the ledger that training is charged to, before the layer holds anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.statistics.base import PrivateStatistic, Releaser, unit_rows


class PrivateProjection(PrivateStatistic):
    """Projects onto principal directions of the train set, released once, with noise: ``(B, *) -> (B, k)``.

    How and when the layer is filled: see `PrivateStatistic`.

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
        equalized: Whether components are scaled to equal mean squares, as estimated by the noisy eigenvalues (see
            `principal_directions`); otherwise the first is far larger than the rest, and dominates clipped gradients.

    Raises:
        ValueError: An argument is out of its range.
        RuntimeError: In ``forward``, if the directions have not been released.
    """

    buffer_name, label = "weight", "directions"
    weight: Tensor

    def __init__(self, in_features: int, components: int, noise_multiplier: float, equalized: bool = False) -> None:
        if not 1 <= components <= in_features:
            raise ValueError(
                f"PrivateProjection: components must lie between 1 and in_features = {in_features}, got {components}."
            )
        super().__init__(in_features, noise_multiplier, (components, in_features))
        self.components, self.equalized = components, equalized

    def forward(self, inputs: Tensor) -> Tensor:
        directions = self.value()
        return inputs.flatten(1).to(directions.dtype) @ directions.T

    def fill(self, moment: Tensor) -> None:
        """Sets the directions from a second moment ``(d, d)``, a noisy one or of public records. Nothing is charged.

        Raises:
            ValueError: Directions of another shape, or not finite.
        """
        self.set_value(principal_directions(moment, self.components, self.equalized))

    def release(self, strategy: Releaser) -> None:
        """Releases the second moment of the train set, and fills the layer, in every process with the same numbers."""

        def total() -> Tensor:
            return upper_triangle(self.add_up(strategy.each_record(), lambda rows: rows.T @ rows))

        noisy = strategy.release_sum(total, self.noise_multiplier, f"{self.components} principal components")
        moment = symmetric(noisy, self.in_features)
        self.set_value(strategy.share(principal_directions(moment, self.components, self.equalized)))

    def extra_repr(self) -> str:
        options = f"noise_multiplier={self.noise_multiplier:g}, equalized={self.equalized}"
        return f"{self.in_features}, {self.components}, {options}"


def second_moment(records: Tensor) -> Tensor:
    """``Σ x xᵀ`` over records ``(n, *)``, flattened and scaled to unit length: ``(d, d)``, in double precision.

    Formal guarantee: one record more or less moves it by at most 1 in Frobenius norm, up to the rounding of double
    precision. Proof: ``‖x xᵀ‖_F = ‖x‖² ≤ 1``; a record that is zero, or not finite, adds nothing.
    """
    rows = unit_rows(records)
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
