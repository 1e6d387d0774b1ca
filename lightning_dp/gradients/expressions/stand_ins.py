"""What stands where a module has parameters, while these are followed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_dp.gradients.expressions.expression import Expression
from lightning_dp.gradients.model import OPAQUE
from lightning_dp.torch_api import forward_pre_hooks, own_tensors, put_parameter

#: A module that holds a parameter, the name of its attribute, and the parameter's.
Holder = tuple[nn.Module, str, str]


class StandIns:
    """Puts expressions where a module has parameters, and parameters back where a layer's rule sees to them.

    Args:
        module: The module.
        names: Names of the parameters.
        layers: The layers that have rules, by name.
        is_without_records: Whether a layer's call, of this number and with this input, is one of constants alone: then
            the layer's parameters are followed in it.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Collection[str],
        layers: Mapping[str, nn.Module],
        is_without_records: Callable[[str, int, Any], bool],
    ) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if name in names}
        self._holders = _holders(module, self.parameters)
        held = {holder for holder, _, _ in self._holders}
        #: Layers with rules that hold such parameters.
        self.layers = {name: layer for name, layer in layers.items() if layer in held}
        self._parametrizations = [m for m in module.modules() if isinstance(m, ParametrizationList)] if names else []
        self._normalised = [m for m in module.modules() if _is_spectrally_normalised(m)] if names else []
        self._is_without_records = is_without_records
        #: How often layers were called in this pass.
        self.calls: dict[str, int] = {}
        #: Layers whose last call was one of constants alone.
        self.without_records: set[str] = set()
        #: How many parametrizations are being computed: functions of parameters, and of state that no record reaches.
        self.parametrizing = 0

    @contextmanager
    def in_place(self, expressions: Mapping[str, Expression], within: Mapping[str, Tensor]) -> Iterator[None]:
        """Lets expressions stand for parameters inside; within calls of layers that have rules, other tensors do."""
        self.calls = {}
        self.without_records.clear()
        handles: list[Any] = []
        try:
            _put(expressions, self._holders)
            for name, layer in self.layers.items():
                handles += self._around(name, layer, expressions, within)
            for parametrization in self._parametrizations:
                handles.append(parametrization.register_forward_pre_hook(self._enter_parametrization))
                handles.append(parametrization.register_forward_hook(self._leave_parametrization))
            for layer in self._normalised:  # around its own hook, which sees no record
                handles.append(layer.register_forward_pre_hook(self._enter_parametrization, prepend=True))
                handles.append(layer.register_forward_pre_hook(self._leave_normalisation))
            yield
        finally:
            self.parametrizing = 0
            _put(self.parameters, self._holders)
            for handle in handles:
                handle.remove()

    def _around(
        self, name: str, layer: nn.Module, expressions: Mapping[str, Expression], within: Mapping[str, Tensor]
    ) -> list[Any]:
        """Hooks that leave a layer's parameters to its rule while it is called."""
        parts = set(layer.modules()) if isinstance(layer, OPAQUE) else {layer}
        holders = [holder for holder in self._holders if holder[0] in parts]

        def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = args[0] if args else next(iter(kwargs.values()), None)
            index = self.calls.get(name, 0)
            self.calls[name] = index + 1
            self.without_records.discard(name)
            if isinstance(input, Expression) or self._is_without_records(name, index, input):
                self.without_records.add(name)
            else:
                _put(within, holders)

        def leave(layer: nn.Module, args: Any, output: Any) -> None:
            if name not in self.without_records:
                _put(expressions, holders)

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.register_forward_hook(leave, prepend=True),
        ]

    def _enter_parametrization(self, module: nn.Module, args: Any) -> None:
        self.parametrizing += 1

    def _leave_normalisation(self, module: nn.Module, args: Any) -> None:
        self.parametrizing -= 1

    def _leave_parametrization(self, module: nn.Module, args: Any, output: Any) -> None:
        self.parametrizing -= 1


def _is_spectrally_normalised(module: nn.Module) -> bool:
    """Whether `torch.nn.utils.spectral_norm` is all that is called before a module's forward."""
    hooks = forward_pre_hooks(module)
    return bool(hooks) and all(isinstance(hook, SpectralNorm) for hook in hooks)


def _put(tensors: Mapping[str, Tensor], holders: Sequence[Holder]) -> None:
    for module, attribute, name in holders:
        if name in tensors:
            put_parameter(module, attribute, tensors[name])


def _holders(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Holder]:
    """The modules that hold these parameters."""
    names = {id(p): name for name, p in parameters.items()}
    return [
        (holder, attribute, names[id(tensor)])
        for holder in module.modules()
        for attribute, tensor in own_tensors(holder)
        if id(tensor) in names
    ]
