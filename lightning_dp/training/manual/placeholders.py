"""What stands in ``p.grad`` for a gradient that must not be seen before it has noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dp.torch_api import version_of


@dataclass
class _Placeholder:
    parameter: nn.Parameter
    tensor: Tensor
    version: int
    batch: int


class Placeholders:
    """Puts tensors of ones where autograd would leave a gradient, and knows which of them were taken away again.

    The user's own code decides when gradients are forgotten (``opt.zero_grad()``, ``net.zero_grad()``,
    ``p.grad = None``); what it does to the placeholder, it would have done to the gradient.
    """

    def __init__(self) -> None:
        self._put: dict[int, _Placeholder] = {}
        #: Whether user code wrote something else than zeros into one: it meant to change the gradient.
        self.was_written = False

    def put(self, parameter: nn.Parameter, batch: int) -> None:
        """Puts one, unless the parameter's is still there.

        Args:
            parameter: The parameter that a backward pass reached.
            batch: The number of the batch.
        """
        if not self.stands_for(parameter):
            with torch.no_grad():
                parameter.grad = torch.ones_like(parameter)
            self._put[id(parameter)] = _Placeholder(parameter, parameter.grad, version_of(parameter.grad), batch)

    def stands_for(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter's placeholder is still there: neither taken away, nor set to zero."""
        known = self._put.get(id(parameter))
        if known is None or parameter.grad is not known.tensor:
            return False
        if version_of(known.tensor) != known.version:  # it was written to: clipped, or set to zero
            known.version = version_of(known.tensor)
            if not bool(known.tensor.any()):
                return False
            self.was_written = True
        return True

    def clear(self) -> None:
        """Takes all of them away that are still there."""
        for known in self._put.values():
            if known.parameter.grad is known.tensor:
                known.parameter.grad = None
        self._put.clear()

    def batch_of(self, parameter: nn.Parameter) -> int:
        """The batch that a parameter's placeholder was put for."""
        return self._put[id(parameter)].batch
