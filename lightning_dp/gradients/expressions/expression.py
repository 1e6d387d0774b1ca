"""A tensor that was computed from parameters alone, and what it is used with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.arrangement import ROWS
from lightning_dp.gradients.expressions.functions import name_of
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import modes_disabled, subclasses_unwatched, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from lightning_dp.gradients.expressions.following import Expressions

WAY_OUT = "or use engine='per_example', which is slow but takes any code"


class Expression(Tensor):
    """A function of trainable parameters and constants alone."""

    #: Follows it.
    expressions: Expressions
    #: Names of the parameters that it was computed from.
    roots: tuple[str, ...]
    #: The parameter that this is, or the transpose of; ``None``: something else.
    root: str | None
    is_transposed: bool
    #: Copies for every example, once it has met records: of all of it (``False``), or of the row that is the example's.
    copies: dict[bool, Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with subclasses_unwatched():
            leaves, structure = tree_flatten((args, kwargs or {}))
            expressions = next(leaf.expressions for leaf in leaves if isinstance(leaf, Expression))
            return expressions.apply(func, leaves, structure)


def expression_of(
    value: Tensor,
    expressions: Expressions,
    roots: tuple[str, ...],
    root: str | None = None,
    is_transposed: bool = False,
) -> Expression:
    """A tensor as an expression of these parameters."""
    with modes_disabled():  # a mode would have made a tensor of it already
        expression = value.as_subclass(Expression)
    return describe(expression, expressions, roots, root, is_transposed)


def describe(
    expression: Tensor, expressions: Expressions, roots: tuple[str, ...], root: str | None = None,
    is_transposed: bool = False,
) -> Expression:  # fmt: skip
    """Turns a tensor into an expression of these parameters, in place."""
    if not isinstance(expression, Expression):
        expression.__class__ = Expression
    assert isinstance(expression, Expression)
    expression.expressions, expression.roots, expression.copies = expressions, roots, {}
    expression.root, expression.is_transposed = root, is_transposed
    return expression


@dataclass
class Operands:
    """What a function is called with.

    Attributes:
        leaves, structure: Its arguments, as `tree_flatten` gives them.
        roots: Names of the parameters among them, or that they were computed from.
        rows: Which of the leaves have entries of every example.
        arrangement: How these lie in them (`lightning_dp.gradients.arrangement`).
        is_total: Whether the loss of the batch is among them.
    """

    leaves: list[Any]
    structure: Any
    roots: tuple[str, ...]
    rows: list[int] = field(default_factory=list)
    arrangement: str = ROWS
    is_total: bool = False

    @property
    def places(self) -> list[int]:
        """Which of the leaves are expressions."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Expression)]

    def call(self, func: Any, leaves: Sequence[Any] | None = None) -> Any:
        """What the function returns of the arguments, or of other leaves in their places."""
        args, kwargs = tree_unflatten(list(self.leaves if leaves is None else leaves), self.structure)
        return func(*args, **kwargs)

    def used_in(self, func: Any) -> str:
        """The beginning of a message: which parameter is used where."""
        return f"Parameter {self.roots[0]!r} is used in {name_of(func)} at {here()}"

    def not_by_example(self, func: Any, why: str) -> UnsupportedModelError:
        """The error for a function that cannot be applied to one example at a time."""
        return UnsupportedModelError(
            f"{self.used_in(func)}, which cannot be applied to one example at a time: {why}. Let examples be the "
            f"leading dimension there, {WAY_OUT}."
        )
