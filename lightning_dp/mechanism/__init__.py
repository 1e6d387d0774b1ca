"""What is released: bounding, noise, sampling, and the private step. Knows nothing of Lightning."""
