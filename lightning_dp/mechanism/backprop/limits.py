"""What each layer is clipped to, and which layers are clipped together since they share a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_dp.mechanism.backprop.layer_bounds import LayerBound


@dataclass(frozen=True)
class Limit:
    """The bound of one layer, with its numbers; ``input_norm`` is ``None`` where the input is not clipped."""

    bound: LayerBound
    input_norm: float | None
    upstream_norm: float


def components_of_ties(own: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, int]:
    """Layers that share parameters, directly or through others, have the same number."""
    number = {name: index for index, name in enumerate(own)}
    users: dict[int, str] = {}
    for name, parameters in own.items():
        for parameter in parameters.values():
            first = users.setdefault(id(parameter), name)
            old, new = number[name], number[first]
            number = {n: new if c == old else c for n, c in number.items()}
    return number
