"""Rules that give the per-example gradients of a layer from its input and the gradient at its output."""
