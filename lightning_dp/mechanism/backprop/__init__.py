"""Backpropagation clipping: inputs and upstream gradients of layers are clipped within the two passes."""
