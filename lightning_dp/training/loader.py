"""Train loaders that draw Poisson samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import (
    DataLoader,
)

from lightning_dp.mechanism.sampling import Draw, PoissonBatchSampler
from lightning_dp.training.batches import map_examples

if TYPE_CHECKING:
    pass


class _CollateOrEmpty:
    """The user's collate function; for an empty draw, a batch of zero examples in the same form."""

    def __init__(self, collate_fn: Callable[[Any], Any], dataset: Any) -> None:
        self.collate_fn, self.dataset = collate_fn, dataset

    def __call__(self, examples: Any) -> Any:
        if isinstance(examples, list) and not examples:
            template = self.collate_fn([self.dataset[0]])
            try:
                return map_examples(template, 1, lambda part: part[:0])
            except (TypeError, ValueError):
                return template  # it cannot be sliced; no training step sees the batch of an empty draw
        return self.collate_fn(examples)


class PoissonIterator(Iterator[Any]):
    """Iterates over a loader's batches, each with the draw that it was loaded for.

    The order of batches is the order of draws, so draws can be matched to batches however many workers prefetch. Of a
    sample that is loaded in parts, the first is returned, and the others are asked for by `next_part`.
    """

    def __init__(self, batches: Iterator[Any], sampler: PoissonBatchSampler) -> None:
        self._batches, self._sampler = batches, sampler
        self._draws: deque[Draw] | None = None
        #: The draw of the batch that was returned last; ``None`` before the first.
        self.draw: Draw | None = None
        self._parts_left = 0

    def __next__(self) -> Any:
        while self._parts_left:  # nobody asked for them
            self.next_part()
        batch = self._load()
        if self._draws is None:  # the sampler has begun drawing for this iterator
            self._draws = self._sampler.draws
        self.draw = self._draws.popleft()
        most = self._sampler.most
        self._parts_left = 0 if most is None else len(self._sampler.yielded(self.draw, most)) - 1
        return batch

    def next_part(self) -> Any:
        """The next part of the sample, collated; ``None``: there is none left."""
        if not self._parts_left:
            return None
        self._parts_left -= 1
        return self._load()

    def _load(self) -> Any:
        batch = next(self._batches)
        if batch is None:
            raise TypeError(
                "The collate function returned None. Whether a step happens must not depend on the data: return a "
                "batch for every draw."
            )
        return batch


@dataclass(frozen=True)
class RecordIndex:
    """Stands for a record of a data set whose ``__getitems__`` returns whole batches; `collate_items` loads it."""

    index: int


class PoissonDataLoader(DataLoader[Any]):
    """A train loader that draws Poisson batches."""

    def __init__(self, dataset: Any, batch_sampler: PoissonBatchSampler, **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
        self.poisson = batch_sampler

    @classmethod
    def replacing(cls, loader: DataLoader[Any], dataset: Any, batch_sampler: PoissonBatchSampler) -> PoissonDataLoader:
        """A Poisson loader over ``dataset``, with the same workers, collation and memory pinning as ``loader``."""
        kept = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator")
        kwargs = {name: getattr(loader, name) for name in kept}
        if loader.num_workers:
            kwargs |= {name: getattr(loader, name) for name in ("prefetch_factor", "persistent_workers")}
        kwargs["collate_fn"] = _CollateOrEmpty(loader.collate_fn, dataset)
        return cls(dataset, batch_sampler, **kwargs)

    def __iter__(self) -> PoissonIterator:  # type: ignore[override]
        return PoissonIterator(super().__iter__(), self.poisson)

    def collate_records(self, indices: list[int]) -> Any:
        """The batch that consists of these records, loaded in this process."""
        together = getattr(self.dataset, "__getitems__", None)
        records = together(indices) if together else [self.dataset[index] for index in indices]
        return self.collate_fn(records)

    def load_record(self, index: int, copies: int = 1) -> list[Any]:
        """The items of a record: loaded ``copies`` times in this process, each time augmented anew by the data set."""
        together = getattr(self.dataset, "__getitems__", None)
        items: list[Any] = []
        for _ in range(copies):
            loaded = together([index]) if together else [self.dataset[index]]
            # A data set may make whole batches: then its records have no form of their own.
            items.append(loaded[0] if type(loaded) is list and len(loaded) == 1 else RecordIndex(index))
        return items

    def collate_items(self, items: list[Any]) -> Any:
        """The batch that consists of items from `load_record`."""
        if items and isinstance(items[0], RecordIndex):
            return self.collate_records([item.index for item in items])
        return self.collate_fn(items)

    def state_dict(self) -> dict[str, Any]:
        """Empty: a resumed run draws fresh samples. The method exists so that Lightning does not warn that the loader
        cannot be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
