"""How much memory the tensors take that some code makes, counted rather than sampled."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_dp.torch_api import TorchDispatchMode, tree_leaves


class MadeTensors(TorchDispatchMode):
    """A context that counts the bytes of tensors that are made inside of it, while they are alive.

    What existed before (parameters, a batch) does not count, nor does what an operation uses within itself.

    Example::

        with MadeTensors() as made:
            loss = model(batch).sum()
            loss.backward()
        made.peak  # bytes

    Attributes:
        peak: The most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, None)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage not in self._known:
                self._known[storage] = None
                self._made(storage)
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self._alive -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    return [leaf.untyped_storage() for leaf in leaves]
