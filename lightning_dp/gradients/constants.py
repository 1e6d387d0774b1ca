"""Parameters are constants while their own layer runs, so that autograd forms no gradient of the batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_dp.torch_api import functions_unwatched, put_parameter


class Constants:
    """Lets parameters be constants while their own layer's forward runs."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._depth = {id(p): 0 for p in parameters}
        #: Parameters whose layer's forward was entered, and whether they required grad then: user code may freeze a
        #: layer for a while (``toggle_optimizer``).
        self._inside: dict[int, tuple[nn.Parameter, bool]] = {}
        #: Layers whose parameters are exchanged for tensors at this moment.
        self._exchanged: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def of_layer(self, module: nn.Module, parameters: Iterable[nn.Parameter], exchanged: bool = False) -> list[Any]:
        """Registers the hooks; returns their handles.

        Args:
            module: The layer.
            parameters: Those that it uses.
            exchanged: Let tensors stand for them, in the same memory: autograd keeps a parameter that it will need in a
                backward pass as the parameter itself, which requires grad again by then.
        """
        own = [p for p in parameters if id(p) in self._depth]
        names = {name: p for name, p in module.named_parameters(recurse=False) if any(p is o for o in own)}

        def enter(module: nn.Module, args: Any) -> None:
            with functions_unwatched():
                constant()
                if exchanged:
                    self._exchanged[module] = names
                    for name, parameter in names.items():
                        put_parameter(module, name, parameter.detach())

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            with functions_unwatched():
                for name, parameter in self._exchanged.pop(module, {}).items():
                    put_parameter(module, name, parameter)
                trained()

        def constant() -> None:
            for parameter in own:
                if not self._depth[id(parameter)]:
                    self._inside[id(parameter)] = parameter, parameter.requires_grad
                self._depth[id(parameter)] += 1
                parameter.requires_grad_(False)

        def trained() -> None:
            for parameter in own:
                self._depth[id(parameter)] -= 1
                if not self._depth[id(parameter)]:
                    parameter.requires_grad_(self._inside.pop(id(parameter))[1])

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, prepend=True)]

    def restore(self) -> None:
        """Puts the parameters back, and makes them require grad again, after an error within a layer's forward."""
        for module, names in self._exchanged.items():
            for name, parameter in names.items():
                put_parameter(module, name, parameter)
        for parameter, required in self._inside.values():
            parameter.requires_grad_(required)

    def are_trained(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether one of a layer's parameters requires grad, apart from what this object does."""
        return any(self._inside.get(id(p), (p, p.requires_grad))[1] for p in parameters)
