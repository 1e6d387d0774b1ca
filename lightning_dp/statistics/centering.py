"""Differentially private centering: a layer that subtracts the train set's mean, and how that mean is released."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_dp.statistics.base import PrivateStatistic, Releaser, unit_rows


class PrivateCentering(PrivateStatistic):
    """Scales records to unit length, subtracts the train set's mean, and scales again: ``(B, *) -> (B, d)``.

    What all records have in common is then no longer the largest part of every gradient: a linear layer behind this one
    learns in fewer steps, and so with less noise. The mean is released once, with noise; see `PrivateStatistic`. It
    costs little: its noise is averaged over all records.

    Formal guarantee: the release is a Gaussian mechanism of this noise multiplier, for adding or removing one record.
    Proof: a record, flattened and scaled to unit length, is added to a sum, which it moves by at most 1 in Euclidean
    norm. Every number of the sum gets independent noise of standard deviation ``noise_multiplier``. The mean is that
    sum over N, which is public, and is computed from nothing else. Replacing a record moves the sum by at most 2, and
    is accounted for as that.

    (``forward`` divides by at least 1e-6, in the layer's precision; the release scales every finite record that is not
    zero to unit length.)

    Args:
        in_features: Number of features of a flattened record, d.
        noise_multiplier: Standard deviation of the noise over the sensitivity, which is 1; the mean's noise has a norm
            of about ``noise_multiplier · √d / N``. 0.0: no noise, infinite ε.

    Raises:
        ValueError: An argument is out of its range; in ``forward``, for records of another size.
        RuntimeError: In ``forward``, if the mean has not been released.
    """

    buffer_name, label = "mean", "means"
    mean: Tensor

    def __init__(self, in_features: int, noise_multiplier: float) -> None:
        super().__init__(in_features, noise_multiplier, (in_features,))

    def forward(self, inputs: Tensor) -> Tensor:
        mean = self.value()
        rows = inputs.flatten(1).to(mean.dtype)
        if rows.shape[1] != self.in_features:
            raise ValueError(
                f"PrivateCentering: in_features is {self.in_features}, and a record has {rows.shape[1]} features. "
                "(Of several views of an image, as flips=True gives them together with features, it takes one.)"
            )
        # Not so small a number as the default: gradients of records without features would overflow.
        return F.normalize(F.normalize(rows, eps=1e-6) - mean, eps=1e-6)

    def fill(self, records: Tensor) -> None:
        """Sets the mean to that of public records ``(n, *)``, each scaled to unit length. Nothing is charged.

        Raises:
            ValueError: There is no record, or the shape does not fit.
        """
        if records.dim() < 2 or not len(records):
            raise ValueError(f"PrivateCentering.fill takes records (n, *), and was given {tuple(records.shape)}.")
        self.set_value(unit_rows(records).mean(0))

    def release(self, strategy: Releaser) -> None:
        """Releases the mean of the train set, and fills the layer, in every process with the same numbers."""

        def total() -> Tensor:
            return self.add_up(strategy.each_record(), lambda rows: rows.sum(0))

        noisy = strategy.release_sum(total, self.noise_multiplier, f"the mean of {self.in_features} features")
        self.set_value(strategy.share(noisy / strategy.num_records))

    def extra_repr(self) -> str:
        return f"{self.in_features}, noise_multiplier={self.noise_multiplier:g}"
