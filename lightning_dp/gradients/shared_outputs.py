"""Outputs of layers whose input all examples share: every example has its own copy, and user code sees one.

``self.query(torch.arange(n)[None])`` has a leading dimension of 1, and people write ``.repeat(B, 1, 1)`` after it. So
that every example's gradient can be told apart, the recorder returns one copy per example instead. The functions that
spread one copy over the batch are understood here, within the forward pass: on such an output they have nothing left
to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: Outputs that have been expanded, and whether the user has taken the leading dimension of 1 away.
_EXPANDED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def note_expanded(output: Tensor) -> None:
    """Takes note that user code takes this tensor for one with a leading dimension of 1."""
    _EXPANDED[output] = False


def _spread(tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """``repeat(B, …)``."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], list | tuple | torch.Size) else args
    if kwargs or len(sizes) != tensor.dim() or sizes[0] != len(tensor):
        return None
    return tensor.repeat(1, *sizes[1:])


def _interleave(tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """``repeat_interleave(B, 0)``."""
    count, *rest = (*args, *kwargs.values()) if "repeats" not in kwargs else (kwargs["repeats"], *args)
    dim = kwargs.get("dim", rest[0] if rest else None)
    return tensor if count == len(tensor) and dim == 0 else None


def _first(tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """``squeeze(0)``, ``[0]``."""
    given = kwargs.get("dim", args[0] if args else None)
    if type(given) is not int or given != 0:
        return None
    taken = tensor.view_as(tensor)
    _EXPANDED[taken] = True
    return taken


def _put_back(tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """``unsqueeze(0)``, ``[None]``."""
    given = kwargs.get("dim", args[0] if args else 0)
    if given is not None and (type(given) is not int or given != 0):
        return None
    put = tensor.view_as(tensor)
    _EXPANDED[put] = False
    return put


def follow(args: tuple[Any, ...], result: Any) -> None:
    """What is computed from such outputs alone is one as well."""
    if not _EXPANDED or not isinstance(result, Tensor) or not result.dim():
        return
    tensors = [a for a in args if isinstance(a, Tensor) and a.dim()]
    marks = [_EXPANDED.get(t) for t in tensors]
    known = [m for m in marks if m is not None]
    like = next((t for t, m in zip(tensors, marks, strict=True) if m is not None), None)
    if like is None or len(set(known)) != 1 or result.shape[0] != like.shape[0] or result in _EXPANDED:
        return
    if all(m is not None or len(t) != len(like) for t, m in zip(tensors, marks, strict=True)):
        _EXPANDED[result] = known[0]


Understood = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor | None]


_WITH_ONE: dict[Any, Understood] = {
    Tensor.repeat: _spread,
    Tensor.repeat_interleave: _interleave,
    torch.repeat_interleave: _interleave,
    Tensor.squeeze: _first,
    torch.squeeze: _first,
    Tensor.__getitem__: _first,
}


_WITHOUT: dict[Any, Understood] = {
    Tensor.unsqueeze: _put_back,
    torch.unsqueeze: _put_back,
    Tensor.__getitem__: _put_back,
}


def understood(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a function of such an output is to return; ``None``: it is an ordinary call."""
    if not _EXPANDED or not args or not isinstance(args[0], Tensor):
        return None
    taken = _EXPANDED.get(args[0])
    if taken is None:
        return None
    known = (_WITHOUT if taken else _WITH_ONE).get(func)
    return None if known is None else known(args[0], args[1:], kwargs)
