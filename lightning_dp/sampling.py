"""The Poisson sampler under its former name: it lies in `lightning_dp.mechanism.sampling`."""

from lightning_dp.mechanism.sampling import PoissonBatchSampler, draw_poisson_sample

__all__ = ["PoissonBatchSampler", "draw_poisson_sample"]
