"""A recorded `torch.nn.functional.linear`, of layers that are made of linear maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.gradients.layer_call import LayerCall, no_batch
from lightning_dp.gradients.rules.composite import linear_map
from lightning_dp.torch_api import version_of


class RecordedLinear:
    """A recorded `torch.nn.functional.linear`, of layers that are made of linear maps.

    Inputs have time in front of the batch: ``(T, B, d)`` or ``(T · B, d)``.

    Args:
        name, module: The layer.
        batch_size: Number of examples.
        record: Keeps a call, given its output and what brings that into the order ``(B, T, …)``.
        is_recording: Whether calls are recorded now.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        batch_size: int,
        record: Callable[[LayerCall, Tensor, Callable[[Tensor], Tensor]], Tensor],
        is_recording: Callable[[], bool],
    ) -> None:
        self._name, self._module, self._batch_size = name, module, batch_size
        self._record, self._is_recording = record, is_recording

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(input, weight, bias)
        if not self._is_recording():
            return output
        self._check(input)
        linear = linear_map(self._module, weight, bias)
        call = LayerCall(self._arrange(input.detach()), version_of(input), linear=linear)
        return self._record(call, output, self._arrange)

    def over_time(
        self, steps: int, like: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The same map at so many time steps, one after another, recorded as one call.

        Returns:
            The map of one step's input ``(B, d)``; to be called exactly ``steps`` times.
        """
        if not self._is_recording():
            return lambda input: F.linear(input, weight, bias)
        self._check(like[None])
        call = LayerCall(like.new_empty(0), 0, linear=linear_map(self._module, weight, bias))
        # The gradient at what is added at every step is that at the map's output.
        added = like.new_zeros(steps, self._batch_size, len(weight)) if bias is None else bias
        added = added.expand(steps, self._batch_size, len(weight)).clone()
        each = iter(self._record(call, added, self._arrange).unbind(0))
        inputs: list[Tensor] = []

        def one_step(input: Tensor) -> Tensor:
            inputs.append(input.detach())
            if len(inputs) == steps:
                call.input = torch.stack(inputs, 1)
                call.version = version_of(call.input)
            return torch.addmm(next(each), input, weight.T)

        return one_step

    def _arrange(self, tensor: Tensor) -> Tensor:
        by_time = tensor.unflatten(0, (-1, self._batch_size)) if tensor.dim() == 2 else tensor
        return by_time.transpose(0, 1)

    def _check(self, input: Tensor) -> None:
        size = self._batch_size
        if (input.dim() == 3 and input.shape[1] != size) or (input.dim() == 2 and len(input) % size):
            raise no_batch(self._name, self._module, input, size)
