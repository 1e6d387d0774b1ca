"""Which tensors of a training step were computed from its batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.source import OWN, is_own_work
from lightning_dp.torch_api import SILENT_READS, TorchDispatchMode, operation_name, storage_id, tree_leaves, writes
from lightning_dp.training.manual.read_number import ReadNumber, holding, read_error, tensor_of

#: Operations whose result depends on the shape of what they are given, and on none of its numbers.
_OF_THE_SHAPE = frozenset(
    (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    )
)


#: Functions that read their argument to see whether it is in range.
_CHECKED = frozenset(("one_hot",))


#: Operations by which numbers become Python's, or the size of a tensor.
_READS = frozenset(
    (
        *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "_is_all_true", "_is_any_true"),
        *("nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "unique_dim_consecutive"),
        *("bincount", "tensor_split", "repeat_interleave", "_pack_padded_sequence"),
    )
)


class DerivedFromRecords(TorchDispatchMode):
    """Follows what is computed from records, memory by memory: what is not held is public.

    Formal guarantee: a tensor that `holds` denies has numbers that do not depend on those of the batch, or of earlier
    ones without noise. Proof: by induction over the operations of the step, from the batch and from what metrics have
    kept. What is computed from such tensors alone, on code whose course no record decides, is such a tensor; all
    others, and all memory that is written with one, are held; and what would let a record decide on the course of the
    code, or on a shape, is refused. Nothing else is kept of a batch: the examination refuses that.
    """

    def __init__(self) -> None:
        super().__init__()
        #: Storages that hold something derived; they are kept, so that no other gets their number.
        self._storages: dict[int, Any] = {}
        #: Whether a function runs that reads its arguments to check them, and for nothing else.
        self._checks_only = False
        #: What an operation raised, which the step's own code may have ignored.
        self.failure: Exception | None = None

    def mark(self, batch: Any) -> None:
        """Says that the tensors of a batch are records.

        Raises:
            UnsupportedModelError: It holds something else, which could not be followed.
        """
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
            elif leaf is not None:
                raise UnsupportedModelError(
                    f"The batch holds a {type(leaf).__name__}, and with manual optimization what is made of it could "
                    "not be told from what is public. Let the collate function return tensors, in tuples, lists or "
                    "dictionaries."
                )

    def mark_metrics(self, kept: Iterable[Tensor]) -> None:
        """Says that what metrics have kept of earlier batches comes of records."""
        for tensor in kept:
            self._hold(tensor)

    @contextmanager
    def functions(self) -> Iterator[None]:
        """To be entered beside this mode."""
        token = holding.set(self._hold)
        try:
            with _Functions(self):
                yield
        finally:
            holding.reset(token)

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor may depend on records."""
        return isinstance(tensor, Tensor) and bool(tensor.numel()) and storage_id(tensor) in self._storages

    def _hold(self, tensor: Tensor) -> None:
        if tensor.numel():
            self._storages[storage_id(tensor)] = tensor.untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        name = operation_name(func)
        if not any(map(self.holds, given)) or name in _OF_THE_SHAPE:
            return func(*args, **kwargs)
        reads = name in _READS or (name == "index" and _has_mask(args))
        if reads and not self._checks_only and not _is_check():
            raise read_error()
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            self.failure = error
            raise
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        if writes(func):
            for leaf in given:
                if isinstance(leaf, Tensor):
                    self._hold(leaf)
        return result


class _Functions(TorchFunctionMode):
    """Knows which functions read records only to check them, and what ``item()`` gives of them."""

    def __init__(self, derived: DerivedFromRecords) -> None:
        super().__init__()
        self._derived = derived

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        silent = (args[1:], kwargs) if name == "tensor_split" else args[:1] if name in SILENT_READS else ()
        if any(map(self._derived.holds, tree_leaves(silent))) and not is_own_work():
            raise read_error()  # no operation shows it
        if name == "item" and self._derived.holds(args[0]) and args[0].numel() == 1 and not _is_check():
            return ReadNumber(args[0])
        if name in ("tensor", "as_tensor") and any(isinstance(leaf, ReadNumber) for leaf in tree_leaves(args[:1])):
            return tensor_of(args[0], **(kwargs or {}))  # as self.log does
        if name not in _CHECKED:
            return func(*args, **(kwargs or {}))
        before, self._derived._checks_only = self._derived._checks_only, True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._derived._checks_only = before


def _is_check() -> bool:
    """Whether a library reads numbers for a check of arguments, or for a metric, which no step depends on."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        if "/torch/distributions/" in path or "/torchmetrics/" in path:
            return True
        if "/torch/" not in path and not path.startswith(OWN):
            return False
        frame = frame.f_back
    return False


def _has_mask(args: Any) -> bool:
    """Whether an index is a mask, so that the shape of what it takes depends on the mask's numbers."""
    indices = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor)]
    return any(not (index.is_floating_point() or index.is_complex()) and index.element_size() == 1 for index in indices)
