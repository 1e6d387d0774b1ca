"""Compiled modules train through their originals: per-example gradients do not go through `torch.compile`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_dp.torch_api import compiled_call, is_compiled, original_of, put_compiled_call
from lightning_dp.training import lightning_api


class Originals:
    """Lets the modules of a fit run uncompiled, from `use` to `restore`."""

    def __init__(self) -> None:
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self._calls: list[tuple[nn.Module, Any]] = []

    def use(self, module: pl.LightningModule) -> None:
        """Lets a module, and all in it, run uncompiled; says so where something was compiled."""
        names = []
        if (steps := lightning_api.compiled_steps(module)) is not None:
            self._attributes.append((module, steps))
            to_uncompiled(module)
            names.append(type(module).__name__)
        for name, child in module.named_modules():
            if is_compiled(child):  # its parameters keep their names
                self._attributes.append((child, {"forward": vars(child)["forward"]}))
                child.forward = original_of(child).__call__
                names.append(name)
            elif compiled_call(child) is not None:
                self._calls.append((child, compiled_call(child)))
                put_compiled_call(child, None)
                names.append(name or type(child).__name__)
        if names:
            rank_zero_info(
                f"lightning_dp: compiled modules ({', '.join(names[:4])}{', …' if len(names) > 4 else ''}) train "
                "through their originals, since per-example gradients do not go through torch.compile; afterwards they "
                "are compiled again."
            )

    def restore(self) -> None:
        """Puts back what was compiled."""
        for module, attributes in self._attributes:
            for name, value in attributes.items():
                setattr(module, name, value)
        for module, call in self._calls:
            put_compiled_call(module, call)
        self._attributes, self._calls = [], []
