"""What ``item()`` gives of a number that records decide: it is computed with and logged, and decides nothing."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import functions_unwatched, tree_map

#: Holds a tensor as derived from records, in the step that runs; ``None`` between steps.
holding: ContextVar[Callable[[Tensor], None] | None] = ContextVar("holding", default=None)


def read_error() -> UnsupportedModelError:
    """What is said where records could decide on the course of the code."""
    if holding.get() is None:
        return UnsupportedModelError(
            f"What training_step read with item() is used at {here()}, outside of it: it could decide on what follows, "
            "which ε does not cover. Log it in training_step: self.log(name, loss, on_step=False, on_epoch=True) "
            "averages it over the epoch."
        )
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
            return ReadNumber(function(*map(_number, operands)))

    return method


def _reversed(function: Callable[..., Any]) -> Callable[..., ReadNumber]:
    return _computed(lambda number, other: function(other, number))


class ReadNumber(numbers.Number):
    """Stands for a number of records in Python code: nearly all that is read with ``item()`` is logged.

    Arithmetic is done on a tensor of no dimensions, in the precision of Python's numbers, so that what comes of it is
    followed like all that is computed from records, in later steps as well. Where Python would learn the number (a
    comparison, ``float()``, a format string), that is refused.

    Args:
        tensor: Of one element.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach().reshape(())
        if not (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.long()
        elif tensor.is_floating_point() and tensor.device.type != "mps":  # which has no more digits
            tensor = tensor.double()
        self._tensor = tensor

    def as_tensor(self) -> Tensor:
        """The number as a tensor, which the step that runs holds for one of records."""
        hold = holding.get()
        if hold is None:
            raise read_error()
        hold(self._tensor)
        return self._tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_unwrapped, (args, kwargs or {}))
        try:
            return func(*args, **kwargs)
        except TypeError as error:  # it takes Python's numbers only
            raise read_error() from error

    def __round__(self, digits: int | None = None) -> ReadNumber:
        with functions_unwatched():
            is_whole = not self._tensor.is_floating_point()
            return self if is_whole else ReadNumber(torch.round(self._tensor, decimals=digits or 0))

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

    __bool__ = __float__ = __int__ = __index__ = __complex__ = __hash__ = __array__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __str__ = __repr__ = __format__ = __reduce_ex__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = _refuse
    __trunc__ = __floor__ = __ceil__ = _refuse


def _number(operand: Any) -> Any:
    return operand._tensor if isinstance(operand, ReadNumber) else operand


def _unwrapped(leaf: Any) -> Any:
    return leaf.as_tensor() if isinstance(leaf, ReadNumber) else leaf


def _stacked(data: Any) -> Tensor:
    if isinstance(data, list | tuple):
        return torch.stack([_stacked(part) for part in data])
    return torch.as_tensor(_unwrapped(data))


def tensor_of(data: Any, **kwargs: Any) -> Tensor:
    """``torch.tensor(data, …)`` for a number, or lists of numbers, some of which were read.

    Args:
        data: As `torch.tensor` takes it.
        kwargs: Likewise; the default type of floating-point numbers is that of torch.
    """
    made = _stacked(data).clone()
    dtype = kwargs.get("dtype") or (torch.get_default_dtype() if made.is_floating_point() else made.dtype)
    return made.to(device=kwargs.get("device"), dtype=dtype)
