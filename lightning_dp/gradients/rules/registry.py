"""The registry of layer rules, by type or by full name, and of refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from lightning_dp.gradients.base import PerExampleGradient

Rule = Callable[..., Mapping[str, PerExampleGradient]]


#: All arguments of a layer's call, by position and by name.
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


Refusal = Callable[[Any], str | None]


#: From a layer, the arguments of a call and the number of examples to arguments that have one entry per example.
ByExample = Callable[[Any, tuple[Any, ...], dict[str, Any], int], Arguments]


Entry = TypeVar("Entry")


RULES: dict[type[nn.Module], Rule] = {}


_RULES_BY_NAME: dict[str, Rule] = {}


_WITH_ARGUMENTS: set[Rule] = set()


_REFUSALS: dict[type[nn.Module], Refusal] = {}


_BY_EXAMPLE: dict[type[nn.Module], ByExample] = {}


def register_rule(*types: type[nn.Module], with_arguments: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule for these module types (exactly these: a subclass may compute something else).

    Args:
        types: The module types.
        with_arguments: Whether the rule also takes all arguments of the call (`Arguments`), not the first alone.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(types, rule))
        if with_arguments:
            _WITH_ARGUMENTS.add(rule)
        return rule

    return register


def register_rule_by_name(name: str) -> Callable[[Rule], Rule]:
    """Registers a rule for a type of a library that need not be installed, by its full name."""

    def register(rule: Rule) -> Rule:
        _RULES_BY_NAME[name] = rule
        return rule

    return register


def register_refusal(*types: type[nn.Module]) -> Callable[[Refusal], Refusal]:
    """Registers why some configurations of these module types cannot be trained privately."""

    def register(refusal: Refusal) -> Refusal:
        _REFUSALS.update(dict.fromkeys(types, refusal))
        return refusal

    return register


def register_by_example(*types: type[nn.Module]) -> Callable[[ByExample], ByExample]:
    """Registers how calls of these module types that join examples are brought into one entry per example."""

    def register(function: ByExample) -> ByExample:
        _BY_EXAMPLE.update(dict.fromkeys(types, function))
        return function

    return register


def arguments_by_example(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int
) -> Arguments:
    """The arguments of a layer's call, as its rule takes them: with one entry per example."""
    function = registered_for(module, _BY_EXAMPLE, {})
    return (args, kwargs) if function is None else function(module, args, kwargs, batch_size)


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of this module's type; see `registered_for`."""
    return registered_for(module, RULES, _RULES_BY_NAME)


def takes_arguments(rule: Rule) -> bool:
    """Whether a rule takes all arguments of a call."""
    return rule in _WITH_ARGUMENTS


def registered_for(
    module: nn.Module, registry: Mapping[type[nn.Module], Entry], by_name: Mapping[str, Entry]
) -> Entry | None:
    """What is registered for this module's type.

    A subclass that keeps its parent's ``forward`` (a renamed `Linear`, say) has its parent's entry; one that overrides
    it has none, for nobody knows what it computes.
    """
    for cls in type(module).__mro__:
        if cls in registry:
            return registry[cls] if _computes_the_same(type(module), cls) else None
    return by_name.get(f"{type(module).__module__}.{type(module).__qualname__}")


def _computes_the_same(cls: type[nn.Module], parent: type[nn.Module]) -> bool:
    return cls.forward is parent.forward and getattr(cls, "_conv_forward", 0) is getattr(parent, "_conv_forward", 0)


def refusal_for(module: nn.Module) -> str | None:
    """Why this module, as it is configured, cannot be trained privately; ``None`` when it can."""
    for cls in type(module).__mro__:
        if cls in _REFUSALS:
            return _REFUSALS[cls](module)
    return None


def registered_types() -> list[type[nn.Module]]:
    """The module types that have a rule."""
    return list(RULES)
