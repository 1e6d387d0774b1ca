"""Rules that give the per-example gradients of a layer from its input and the gradient at its output."""

from lightning_dp.gradients.rules import attention, layers, recurrent

__all__ = ["attention", "layers", "recurrent"]
