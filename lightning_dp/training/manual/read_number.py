"""What ``item()`` gives of a number that records decide: it is computed with and logged, and decides nothing."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import functions_unwatched, tree_map


def read_error() -> UnsupportedModelError:
    """What is said where records could decide on the course of the code."""
    return UnsupportedModelError(
        f"training_step reads what records hold at {here()} (if, float(), a format string, a mask as an index): with "
        "manual optimization, it could decide whether a step is taken, which ε does not cover. Log the tensor, or what "
        "item() gives, with self.log, and use torch.where instead of a mask."
    )


def _refuse(number: ReadNumber, *args: Any, **kwargs: Any) -> NoReturn:
    raise read_error()


def _computed(function: Callable[..., Any]) -> Callable[..., ReadNumber]:
    def method(*operands: Any) -> ReadNumber:
        if any(isinstance(operand, Tensor) for operand in operands):
            return NotImplemented  # the tensor's own operation does it
        with functions_unwatched():
            return ReadNumber(function(*map(_unwrapped, operands)))

    return method


def _reversed(function: Callable[..., Any]) -> Callable[..., ReadNumber]:
    return _computed(lambda number, other: function(other, number))


class ReadNumber(numbers.Number):
    """Stands for a number of records in Python code: nearly all that is read with ``item()`` is logged.

    Arithmetic is done on a tensor of no dimensions, so that what comes of it is followed like all that is computed from
    records. Where Python would learn the number (a comparison, ``float()``, a format string), that is refused.

    Args:
        tensor: Of one element.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().reshape(())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*unwrapped(args), **unwrapped(kwargs or {}))
        except TypeError as error:  # it takes Python's numbers only
            raise read_error() from error

    def __round__(self, digits: int | None = None) -> ReadNumber:
        with functions_unwatched():
            return ReadNumber(torch.round(self.tensor, decimals=digits or 0))

    __add__ = _computed(operator.add)
    __radd__ = _reversed(operator.add)
    __sub__ = _computed(operator.sub)
    __rsub__ = _reversed(operator.sub)
    __mul__ = _computed(operator.mul)
    __rmul__ = _reversed(operator.mul)
    __truediv__ = _computed(operator.truediv)
    __rtruediv__ = _reversed(operator.truediv)
    __pow__ = _computed(operator.pow)
    __rpow__ = _reversed(operator.pow)
    __neg__ = _computed(operator.neg)
    __pos__ = _computed(operator.pos)
    __abs__ = _computed(operator.abs)

    __bool__ = __float__ = __int__ = __index__ = __complex__ = __hash__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __str__ = __repr__ = __format__ = __reduce_ex__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __trunc__ = __floor__ = __ceil__ = _refuse


def _unwrapped(leaf: Any) -> Any:
    return leaf.tensor if isinstance(leaf, ReadNumber) else leaf


def unwrapped(arguments: Any) -> Any:
    """Arguments of a function of torch, with tensors in the place of numbers that were read."""
    return tree_map(_unwrapped, arguments)
