"""What is known of the functions that parameters are used in, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_dp.gradients.arrangement import FLAT, ROWS, SECOND

#: What a tensor is that parameters are used beside, if it has no examples: the same for all; the loss of the batch.
CONSTANT, TOTAL = "constant", "total"
#: Functions that a penalty on parameters joins the loss by.
ADDING = frozenset(("add", "iadd", "radd", "sub", "isub", "rsub"))
#: Functions that spread one copy over the batch.
SPREADING = frozenset(("expand", "expand_as", "repeat", "broadcast_to", "tile"))
#: Functions that take nothing but a type or a device of their other arguments.
LIKE = frozenset(("to", "type_as"))
#: Functions that give the transpose of a matrix; and the product of two.
TRANSPOSING, PRODUCTS = frozenset(("t", "T", "mT")), frozenset(("matmul", "__matmul__", "mm"))
#: Functions whose arguments are broadcast, or have the examples in front in any case.
BROADCASTING = frozenset(
    ("add", "iadd", "radd", "sub", "isub", "rsub", "mul", "imul", "rmul", "multiply", "div", "idiv", "truediv",
     "itruediv", "rtruediv", "true_divide", "divide", "where", "maximum", "minimum", "pow", "rpow",
     "scaled_dot_product_attention")
)  # fmt: skip
#: Attributes and methods of a parameter that are not about its numbers.
_OF_PARAMETER = frozenset(
    ("grad", "grad_fn", "data", "requires_grad", "requires_grad_", "is_leaf", "register_hook",
     "register_post_accumulate_grad_hook")
)  # fmt: skip


def name_of(func: Any) -> str:
    """``"add"`` of `torch.add` and of ``Tensor.add``; ``"T"`` of a property."""
    name = str(getattr(func, "__name__", func))
    return str(getattr(getattr(func, "__self__", None), "__name__", name)) if name == "__get__" else name


def operator_of(func: Any) -> str:
    """``"add"`` of ``Tensor.add_``, ``Tensor.__add__`` and `torch.add`."""
    return name_of(func).strip("_")


def writes(func: Any) -> bool:
    """Whether a function writes into its first argument."""
    name = name_of(func)
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def is_of_parameter(func: Any) -> bool:
    """Whether a function reads or sets what a parameter has beside its numbers: its gradient, say."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(getattr(func, "__self__", None), "__name__", "") in _OF_PARAMETER
    return name in _OF_PARAMETER


def sets_data(func: Any) -> bool:
    """Whether a function is an assignment to ``parameter.data``."""
    return getattr(func, "__name__", "") == "__set__" and getattr(func.__self__, "__name__", "") == "data"


def can_spread(func: Any, arrangement: str, first: Any, result: Any, batch_size: int) -> bool:
    """Whether a result can be copies of an expression, one per example, that lie so.

    `ROWS`: the leading dimension is new, or was 1; `SECOND`: the second; `FLAT`: all is repeated, as often as there are
    examples.
    """
    if not (isinstance(first, Tensor) and isinstance(result, Tensor) and result.dim() and result.requires_grad):
        return False
    if arrangement == FLAT:
        is_whole = first.dim() == result.dim() > 1 and first.shape[1:] == result.shape[1:]
        return name_of(func) == "repeat" and is_whole and len(result) == batch_size * len(first)
    place = {ROWS: 0, SECOND: 1}.get(arrangement, result.dim())
    if place >= result.dim() or result.shape[place] != batch_size:
        return False
    own = place - (result.dim() - first.dim())  # the dimension of the expression that stands there
    return own < 0 or first.shape[own] == 1


def spread_by(func: Any, first: Any, result: Any, batch_size: int) -> str:
    """How a result holds copies of an expression, one per example; `CONSTANT`: it does not."""
    return next((a for a in (ROWS, SECOND, FLAT) if can_spread(func, a, first, result, batch_size)), CONSTANT)
