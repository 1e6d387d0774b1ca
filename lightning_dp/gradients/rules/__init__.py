"""Rules that give the per-example gradients of a layer from what it saw and what came back."""
