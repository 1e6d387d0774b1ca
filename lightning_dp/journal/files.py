"""File helpers of the journal: locks, syncing of directories, relative paths, the identifier of a boot."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_dp.errors import JournalError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: no lock; two processes in one directory are then the user's care
    fcntl = None


#: Seconds to wait for a lock: a process that has just been killed may still hold it.
_LOCK_SECONDS = 1.0


OWN_DIRECTORY = (
    "Give this training a directory of its own (a logger with a new version, or Trainer(default_root_dir=…))"
)


def boot_identifier() -> str | None:
    """Linux's identifier of the current boot; ``None`` on other systems."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


#: Windows would otherwise write two characters at the end of a line.
_BINARY = getattr(os, "O_BINARY", 0)


def relative_path(path: str | Path, folder: str | Path) -> str:
    """The path as seen from a folder; the path itself where there is no way (other drives)."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return str(path)


def open_locked(path: Path, create: bool, holder: Callable[[Path], str]) -> int:
    """A file descriptor for appending, under a lock that excludes other processes where the system has such locks.

    The lock ends with the process, however it ends; a forked child gives it up (`_abandon_in_child` of the writer).

    Args:
        path: The file; its directory is made.
        create: Whether a missing file is made.
        holder: Says for a message which process holds the lock.

    Raises:
        JournalError: The file cannot be written, or another process has it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | _BINARY | (os.O_CREAT if create else 0), 0o666)
    except OSError as error:
        raise JournalError(
            f"The privacy journal {path} cannot be written: {error.strerror or error}. Give the Trainer a "
            "default_root_dir (or its logger a save_dir) that can, or train with journal=False: then the steps that a "
            "crash loses are not charged when training is resumed."
        ) from error
    if fcntl is None:
        return fd
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError as error:
            if time.monotonic() < end:
                time.sleep(0.02)
                continue
            os.close(fd)
            raise JournalError(
                f"Another process{holder(path)} is training in {path.parent}, and one journal cannot serve two. "
                f"{OWN_DIRECTORY}, or wait for the other to end."
            ) from error
        except OSError as error:
            rank_zero_warn(f"{path.parent} has no locks ({error.strerror}): let only one process train there.")
            return fd


def sync_directory(directory: Path) -> None:
    """Makes a new file's name durable, where directories can be synced."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(fd)
    os.close(fd)
