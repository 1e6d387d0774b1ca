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
    ("grad", "data", "requires_grad", "requires_grad_", "is_leaf", "register_hook",
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


def spread_by(func: Any, first: Any, result: Any, batch_size: int) -> str:
    """How the examples can lie in a result that holds copies of an expression, one per example; or `CONSTANT`.

    `ROWS`: its leading dimension is new, or was 1; `SECOND`: its second was 1; `FLAT`: all of it is repeated, as often
    as there are examples.
    """
    if not (isinstance(first, Tensor) and isinstance(result, Tensor) and result.dim() and result.requires_grad):
        return CONSTANT
    is_one = first.dim() + 1 == result.dim() or (first.dim() == result.dim() and len(first) == 1)
    if is_one and len(result) == batch_size:
        return ROWS
    if first.dim() != result.dim() or first.dim() < 2:
        return CONSTANT
    if first.shape[1] == 1 and result.shape[1] == batch_size > 1:
        is_rest_unchanged = first.shape[0] == result.shape[0] and first.shape[2:] == result.shape[2:]
        return SECOND if is_rest_unchanged else CONSTANT
    is_whole = first.shape[1:] == result.shape[1:] and len(result) == batch_size * len(first)
    return FLAT if name_of(func) == "repeat" and is_whole else CONSTANT
