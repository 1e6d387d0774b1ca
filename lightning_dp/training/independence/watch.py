"""What surrounds every training step: it rewrites batch means, and stops at code that was not examined.

The tracer examines the operations that a step runs. Another step may take another branch: a term that starts in a later
epoch, a head for rare records. `Watch` sees every PyTorch function that a step calls and the line that calls it, and
stops at the first that was not there when the step was examined.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from lightning_dp.errors import FormChanged
from lightning_dp.gradients.shared_outputs import follow, understood
from lightning_dp.gradients.source import OWN, ZOO, here
from lightning_dp.training.independence.losses import Forms, PerRecordMeans

#: A function, the code and the place in it that call it, and its boolean arguments. A line may hold several.
Place = tuple[Any, CodeType, int, tuple[bool, ...]]


_WRAPPERS = (
    "torch/overrides.py",
    "torch/autograd/function.py",
    "torch/nn/functional.py",
    "torch/functional.py",
    "torch/_tensor.py",
)


#: Calls from here are not held: attention is one function when it is traced, and several when it is recorded.
_RECORDED = "torch/nn/modules/activation.py"


#: Functions of PyTorch and Lightning that do other things each time, and none of them to records: which parameters are
#: trained for a while, and which have a gradient.
_BOOKKEEPING = frozenset(
    (
        ("lightning/pytorch/core/module.py", "toggle_optimizer"),
        ("lightning/pytorch/core/module.py", "untoggle_optimizer"),
        ("lightning/pytorch/plugins/precision/precision.py", "post_backward"),
        ("torch/optim/optimizer.py", "zero_grad"),
        ("torch/nn/modules/module.py", "zero_grad"),
    )
)


def _caller() -> FrameType:
    """The frame that called a PyTorch function, seen from `Watch.__torch_function__`."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    return frame


def _is_logging(frame: FrameType | None) -> bool:
    """Whether ``self.log`` is at work, which an examination leaves out."""
    while frame is not None:
        if frame.f_code.co_name in ("log", "log_dict") and "lightning" in str(frame.f_globals.get("__name__")):
            return True
        frame = frame.f_back
    return False


def _is_bookkeeping(frame: FrameType) -> bool:
    return any(frame.f_code.co_name == name and frame.f_code.co_filename.endswith(path) for path, name in _BOOKKEEPING)


class Watch(PerRecordMeans):
    """Raises `FormChanged` at code that was not examined; with ``learn``, takes note of it instead.

    Args:
        rows, forms, tracer, enabled: As for `PerRecordMeans`.
        known: The places that were examined.
        learn: The step is being examined.
    """

    def __init__(self, rows: int, forms: Forms, known: set[Place], learn: bool = False, **kwargs: Any) -> None:
        super().__init__(rows, forms, **kwargs)
        self._known, self._learn = known, learn

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "__get__":  # shape, dtype, device
            return func(*args, **(kwargs or {}))
        frame = _caller()
        path = frame.f_code.co_filename
        own = path.startswith(OWN) and not path.startswith(ZOO)  # what records, and what examines
        if own or path.endswith(_RECORDED) or _is_bookkeeping(frame):
            return super().__torch_function__(func, types, args, kwargs)
        switches = [a for a in args if a is True or a is False]
        if kwargs:
            switches += [a for a in kwargs.values() if a is True or a is False]
        place = (func, frame.f_code, frame.f_lasti, tuple(switches))
        if place not in self._known:
            if not self._learn and not _is_logging(frame):
                raise FormChanged(f"training_step runs code that it did not run when it was examined: {here()}.")
            self._known.add(place)
        spread = understood(func, args, kwargs or {})
        if spread is not None:
            return spread
        result = super().__torch_function__(func, types, args, kwargs)
        follow(args, result)
        return result


#: What surrounds a training step of so many rows.
MakeWatch = Callable[[int], Watch]
