"""What every operation does to owners, by kind of operation."""

from lightning_dp.training.independence.rules import elementwise, indexing, linear, losses, moves, probe, reductions

__all__ = ["elementwise", "indexing", "linear", "losses", "moves", "probe", "reductions"]
