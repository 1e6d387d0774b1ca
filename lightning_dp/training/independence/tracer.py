"""The row tracer: follows who owns every number through the operations of a training step.

A `RowTracer` is a `TorchDispatchMode`, so it sees every operation that PyTorch runs, of
the user's code and of libraries. Owners are kept per storage and not per tensor: views need no rule, and writes through
a view reach everything that shares its memory. What each operation does to owners is in
`lightning_dp.training.independence.operations`; operations that are not listed there are probed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.source import here, is_own_work
from lightning_dp.torch_api import TorchDispatchMode, modes_disabled, silently_read, storage_id, tree_leaves
from lightning_dp.training.independence import operations
from lightning_dp.training.independence.owners import MIXED, PUBLIC, RANDOM, State, compress, constant, reduce


@dataclass(frozen=True, eq=False)
class Read:
    """A tensor's values that became Python objects or a NumPy array.

    Attributes:
        shape: Of the tensor that was read.
        owner: Whose they are; ``None``: they are public.
        line: Where.
    """

    shape: torch.Size
    owner: Tensor | None = None
    line: str = ""

    def of(self, record: int) -> Tensor | None:
        """Which of the values are one record's; ``None``: none is."""
        return self._where(lambda owner: owner == record)

    def of_several(self) -> Tensor | None:
        """Which of the values depend on several records; ``None``: none does."""
        return self._where(lambda owner: owner < RANDOM)

    def _where(self, is_wanted: Callable[[Tensor], Tensor]) -> Tensor | None:
        if self.owner is None:
            return None
        wanted = is_wanted(self.owner)
        return wanted.expand(self.shape) if bool(wanted.any()) else None


Geometry = tuple[tuple[int, ...], tuple[int, ...], int, int]


def _geometry(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.element_size()


@dataclass(eq=False)
class _Cell:
    """One storage: the owners of what was written to it, in the geometry in which that was written."""

    storage: Any
    geometry: Geometry
    state: State
    #: Owners of every element of the storage, once somebody looks at it in another geometry.
    full: Tensor | None = None
    views: dict[Geometry, State] = field(default_factory=dict)

    def elements(self) -> Tensor:
        """One owner per element of the storage."""
        if self.full is None:
            shape, stride, offset, size = self.geometry
            self.full = torch.full((self.storage.nbytes() // size,), PUBLIC, dtype=self.state.owner.dtype)
            self.full.as_strided(shape, stride, offset).copy_(self.state.owner.expand(shape))
        return self.full

    def read(self, geometry: Geometry) -> State:
        if geometry == self.geometry:
            return self.state
        if geometry not in self.views:
            shape, stride, offset, size = geometry
            full, own = self.elements(), self.geometry[3]
            if size < own:  # real numbers within complex ones
                full = full.repeat_interleave(own // size)
            elif size > own:  # complex numbers made of real ones
                count = size // own
                full = reduce(full[: len(full) // count * count].view(-1, count), [1], linear=False, keepdim=False)
            state = self.state.with_owner(full.as_strided(shape, stride, offset))
            why = state.why or (f"numbers of several records read as one at {here()}" if state.is_mixed else "")
            self.views[geometry] = replace(state, why=why)
        return self.views[geometry]

    def write(self, geometry: Geometry, state: State) -> None:
        shape, stride, offset, size = geometry
        whole = geometry == self.geometry
        if not whole and size == self.geometry[3]:
            full = self.elements()
            full.as_strided(shape, stride, offset).copy_(state.owner.expand(shape))
            old = self.state
            terms = state.terms if old.terms is None else old.terms
            why = state.why or old.why
            own_shape, own_stride, own_offset, _ = self.geometry
            owner = compress(full.as_strided(own_shape, own_stride, own_offset))
            packed = all(s.packed for s in (old, state) if s.ragged) and (old.ragged or state.ragged)
            reordered = old.reordered or state.reordered
            state = State(owner, old.ragged or state.ragged, why, terms, packed, reordered)
        elif not whole:
            state = State(constant(MIXED, len(self.geometry[0])), why=state.why or "a write in another data type")
            self.full = None
        else:
            self.full = None
        self.state, self.views = state, {}


class RowTracer(TorchDispatchMode):
    """Knows, of every tensor, which record each of its numbers depends on.

    Args:
        examples: B, the number of records in the batch that is passed through.
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples = examples
        #: Lines where a value that depends on records was read, and what read it: a decision may depend on it.
        self.decisions: dict[str, str] = {}
        #: Lines where nobody could tell whether a record's place in the batch matters.
        self.places: dict[str, str] = {}
        #: Values that became Python's, in order, public ones as well.
        self.reads: list[Read] = []
        #: The batch's own numbers, by place among its leaves; and numbers that they were compared with.
        self.labels: dict[int, Tensor] = {}
        self.constants: set[tuple[int, float]] = set()
        #: Whether random numbers were drawn.
        self.drew = False
        self.operations = 0
        #: Whether the batch holds what cannot be followed (strings), of which tensors may be made.
        self.opaque = False
        #: What hooks of gradients do that mixes records.
        self.gradient_problems: list[str] = []
        self._cells: dict[int, _Cell] = {}
        self._probes: dict[Any, Any] = {}

    # -- states ----------------------------------------------------------------------------------------------------

    def state(self, tensor: Any) -> State | None:
        """What is known of a tensor; ``None``: it is public."""
        cell = self._cells.get(_key(tensor)) if isinstance(tensor, Tensor) else None
        if cell is None or not tensor.numel():
            return None
        return cell.state if _is_sparse(tensor) else cell.read(_geometry(tensor))

    def set(self, tensor: Tensor, state: State) -> None:
        """Says what is known of a tensor in memory of its own; forgets what was known of that memory."""
        if _is_sparse(tensor):
            self._cells[_key(tensor)] = _Cell(tensor, ((), (), 0, 1), state)
        elif tensor.numel():
            storage = tensor.untyped_storage()
            self._cells[storage._cdata] = _Cell(storage, _geometry(tensor), state)

    def own(self, tensor: Tensor, owner: Tensor, ragged: bool = False) -> None:
        """Says who owns the numbers of an input, which may share its memory with other inputs."""
        self.write(tensor, State(compress(owner.expand(tensor.shape)), ragged))

    def write(self, tensor: Tensor, state: State) -> None:
        """Says what has been written into a tensor, or into the part of one that it shows."""
        if not tensor.numel():
            return
        cell = self._cells.get(_key(tensor))
        if cell is not None:
            cell.write(_geometry(tensor), state)
            return
        storage, geometry = tensor.untyped_storage(), _geometry(tensor)
        count = storage.nbytes() // tensor.element_size()
        if count == tensor.numel():
            self._cells[storage._cdata] = _Cell(storage, geometry, state)
        else:  # a part of a public tensor
            flat: Geometry = ((count,), (1,), 0, tensor.element_size())
            cell = _Cell(storage, flat, State(constant(PUBLIC, 1), state.ragged, state.why, state.terms))
            cell.write(geometry, state)
            self._cells[storage._cdata] = cell

    # -- notes -----------------------------------------------------------------------------------------------------

    def decide(self, what: str) -> None:
        """Notes that something may be decided by what records hold."""
        self.decisions.setdefault(here(), what)

    def read(self, tensor: Tensor) -> None:
        """Notes that a tensor's values become Python's."""
        if is_own_work():
            return
        state = self.state(tensor)
        known = state is not None and not state.is_public
        self.reads.append(Read(tensor.shape, state.owner if state and known else None, here() if known else ""))

    def compared(self, name: str, tensor: Tensor, value: Any) -> None:
        """Notes what the batch's own numbers are compared with: a record may hold that, or something beside it."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return
        for place, label in self.labels.items():
            same_memory = _key(label) == _key(tensor)
            if not same_memory and (label.numel() != tensor.numel() or not _same_values(label, tensor)):
                continue
            if label.is_floating_point():
                near = [value, value + max(1e-3, abs(value) / 20), value - max(1e-3, abs(value) / 20)]
            elif label.device.type == "cpu" or name in ("eq", "ne", "isin"):
                near = [int(value)] if name in ("eq", "ne", "isin") else [int(value) + i for i in (-1, 0, 1)]
            else:  # an index that is out of range ends a program on such a device
                least, most = int(label.min()), int(label.max())
                near = [n for n in (int(value) - 1, int(value), int(value) + 1) if least <= n <= most]
            self.constants |= {(place, float(n)) for n in near}

    def check_hook(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> None:
        """Looks at what a hook makes of a tensor's gradient, in which every number is of its owner in the tensor.

        That the gradient of a sum over records has the owners of the tensor itself is what the trace of the forward
        shows. The hook must leave it so.
        """
        state = self.state(tensor)
        if state is None or state.is_public:
            return
        with modes_disabled():
            gradient = torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self.set(gradient, replace(state, terms=None))
        changed = hook(gradient)
        changed = gradient if changed is None else changed  # it may have written into it
        after = self.state(changed) if isinstance(changed, Tensor) else None
        if after is None or after.is_public:
            return
        same = tensor.shape == changed.shape and bool(
            ((after.owner == state.owner) | (after.owner == PUBLIC) | (after.owner == RANDOM)).all()
        )
        if not same:
            why = after.why or f"a hook on a gradient moves numbers between records at {here()}"
            self.gradient_problems.append(why)

    def doubt_place(self, what: str) -> None:
        """Notes that nobody could tell whether a record's place in the batch matters."""
        self.places.setdefault(here(), what)

    def mixed(self, dims: int, what: str) -> State:
        """The state of a result that depends on several records."""
        return State(constant(MIXED, dims), why=f"{what} at {here()}")

    def probes(self) -> dict[Any, Any]:
        """Owners that probing has found so far, by the key of the call (``rules.probe``)."""
        return self._probes

    # -- every operation -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        self.drew |= torch.Tag.nondeterministic_seeded in func.tags
        return operations.follow(self, func, args, kwargs)


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided


def _key(tensor: Tensor) -> int:
    return -id(tensor) if _is_sparse(tensor) else storage_id(tensor)


def _same_values(one: Tensor, other: Tensor) -> bool:
    return bool((one.flatten() == other.detach().flatten().to(one.device)).all())


class Reads(TorchFunctionMode):
    """Notes the ways in which a tensor's values become Python's or NumPy's without an operation."""

    def __init__(self, tracer: RowTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "register_hook" and len(args) > 1:
            self._tracer.check_hook(args[0], args[1])
        if name == "tensor_split" and tensors_in(kwargs):
            raise UnsupportedModelError(f"Give tensor_split its indices by position, at {here()}: (x, indices).")
        place = silently_read(func, args)
        if place is not None:
            self._tracer.read(args[place])
            if self._tracer.state(args[place]) is not None:
                self._tracer.decide(f"{name}()")
        return func(*args, **(kwargs or {}))


def tensors_in(tree: Any) -> Sequence[Tensor]:
    """The tensors of a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
