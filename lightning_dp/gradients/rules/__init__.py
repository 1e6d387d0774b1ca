"""Rules that give the per-example gradients of a layer from its input and the gradient at its output."""

from lightning_dp.gradients.rules import attention, bags, layers, recurrent

__all__ = ["attention", "bags", "layers", "recurrent"]
