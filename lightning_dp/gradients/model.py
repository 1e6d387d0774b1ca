"""Which layer of a module holds which parameter."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Layers that use the parameters of their children without calling the children.
OPAQUE: tuple[type[nn.Module], ...] = (nn.MultiheadAttention,)


def trainable(module: nn.Module) -> list[str]:
    """Names of the parameters that the module itself uses (not its children, unless it hides them) and that require a
    gradient."""
    opaque = isinstance(module, OPAQUE)
    own = [(name, p) for name, p in module.named_parameters(recurse=opaque) if p.requires_grad]
    if opaque or not own or not any(True for _ in module.children()):
        return [name for name, _ in own]
    # A name for a parameter that a child holds (Opacus's recurrent layers keep PyTorch's names): the child uses it.
    of_children = {id(p) for child in module.children() for p in child.parameters()}
    return [name for name, p in own if id(p) not in of_children]


def layers_with_parameters(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold parameters of their own, trainable or not, by name."""
    hidden = {id(child) for opaque in module.modules() if isinstance(opaque, OPAQUE) for child in opaque.modules()} - {
        id(child) for child in module.modules() if isinstance(child, OPAQUE)
    }
    return {
        name: m
        for name, m in module.named_modules()
        if id(m) not in hidden and any(True for _ in m.parameters(recurse=isinstance(m, OPAQUE)))
    }


def trained_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that use trainable parameters, by name."""
    return {name: m for name, m in layers_with_parameters(module).items() if trainable(m)}


def getattr_path(module: nn.Module, path: str) -> Any:
    """The attribute of a module, or of its children, at a dotted path."""
    for part in path.split("."):
        module = getattr(module, part)
    return module
