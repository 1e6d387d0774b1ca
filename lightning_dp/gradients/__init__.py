"""Per-example gradients of every layer, and the hooks and engines that obtain them. No clipping, no noise."""
