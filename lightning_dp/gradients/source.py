"""Where in the user's code something happened: the line that a message names."""

from __future__ import annotations

import os
import sys
import sysconfig
from types import FrameType

OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


ZOO = os.path.join(OWN, "zoo")


_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")})


def _package(frame: FrameType) -> str:
    """The top package of a frame's module."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def here() -> str:
    """The innermost line that is the user's own; where a library did it for them, the library's line as well."""
    frame: FrameType | None = sys._getframe(1)
    library = ""
    while frame is not None:
        path = frame.f_code.co_filename
        package = _package(frame)
        plumbing = package in ("torch", "lightning", "pytorch_lightning", "contextlib") or path.startswith((OWN, "<"))
        if not plumbing:
            if not path.startswith(_LIBRARIES):
                return _line(frame) + (f" (within {library})" if library else "")
            library = library or f"{package}: {_line(frame)}"
        frame = frame.f_back
    return library or "an operation outside of Python code"


#: What every operation passes through.
_PLUMBING = frozenset(("__torch_function__", "__torch_dispatch__", "follow", "read"))


def is_own_work() -> bool:
    """Whether the operation at hand is part of an examination, rather than of the step that is examined."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        own = frame.f_code.co_filename.startswith(OWN) and not frame.f_code.co_filename.startswith(ZOO)
        if (own and frame.f_code.co_name not in _PLUMBING) or (not own and _package(frame) != "torch"):
            return own
        frame = frame.f_back
    return False


def is_library(line: str) -> bool:
    """Whether a line from `here` is a library's rather than the user's own."""
    return "(within " in line or ": " in line


def _line(frame: FrameType) -> str:
    folder, name = os.path.split(frame.f_code.co_filename)
    return f"{os.path.basename(folder)}/{name}:{frame.f_lineno}" if folder else f"{name}:{frame.f_lineno}"
