"""Train loaders that draw Poisson samples, and data sets that they can draw from."""

from __future__ import annotations

import hashlib
import random
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_dp.mechanism.sampling import Draw, PoissonBatchSampler, size_bound
from lightning_dp.training.batches import map_examples

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin


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

    The order of batches is the order of draws, so draws can be matched to batches however many workers prefetch.
    """

    def __init__(self, batches: Iterator[Any], sampler: PoissonBatchSampler) -> None:
        self._batches, self._sampler = batches, sampler
        self._draws: deque[Draw] | None = None
        #: The draw of the batch that was returned last; ``None`` before the first.
        self.draw: Draw | None = None

    def __next__(self) -> Any:
        batch = next(self._batches)
        if self._draws is None:  # the sampler has begun drawing for this iterator
            self._draws = self._sampler.draws
        self.draw = self._draws.popleft()
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
    def replacing(cls, loader: DataLoader[Any], batch_sampler: PoissonBatchSampler) -> PoissonDataLoader:
        """A Poisson loader over the same data set, with the same workers, collation and memory pinning."""
        kept = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator")
        kwargs = {name: getattr(loader, name) for name in kept}
        if loader.num_workers:
            kwargs |= {name: getattr(loader, name) for name in ("prefetch_factor", "persistent_workers")}
        kwargs["collate_fn"] = _CollateOrEmpty(loader.collate_fn, loader.dataset)
        return cls(loader.dataset, batch_sampler, **kwargs)

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


#: Records that are looked at to tell data sets apart.
_LOOKED_AT = 4


def fingerprint(dataset: Any) -> str:
    """A hash that must be equal in all processes: of the length, the indices of subsets, and a few records.

    A record that differs from one load to the next (augmented by a generator of the data set's own) is left out.
    """
    digest = hashlib.sha256(str(len(dataset)).encode())
    part = dataset
    while isinstance(part, Subset):
        digest.update(np.asarray(part.indices, dtype=np.int64).tobytes())
        part = part.dataset
    for index in np.linspace(0, len(dataset) - 1, _LOOKED_AT).astype(int).tolist():
        first, second = (record_bytes(dataset, index) for _ in range(2))
        if first is not None and first == second:
            digest.update(first)
    return digest.hexdigest()


def _written(value: Any) -> bytes:
    """A record as bytes that are the same in every process."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return f"{value.dtype}{tuple(value.shape)}".encode() + flat.numpy().tobytes()
    if isinstance(value, Mapping):
        return b"".join(str(key).encode() + _written(part) for key, part in value.items())
    if isinstance(value, tuple | list):
        return b"".join(_written(part) for part in value)
    if isinstance(value, str | int | float | bool | None):
        return repr(value).encode()
    array = np.asarray(value)  # also images
    if array.dtype == object:
        raise TypeError("Not made of numbers.")
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()


def record_bytes(dataset: Any, index: int, seed: int | None = None) -> bytes | None:
    """A record as bytes, loaded from a random state that depends on the index alone; ``None``: it has no such form."""
    seed = index if seed is None else seed
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes milliseconds
        np.random.seed(seed)
        random.seed(seed)
        return _written(dataset[index])
    except (TypeError, ValueError, RuntimeError):  # sparse tensors, say
        return None
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def sources(dataset: Any) -> tuple[list[Any], np.ndarray]:
    """Where the records of a data set come from, through ``Subset`` and ``ConcatDataset``.

    Returns:
        The data sets at the bottom; and ``(N, 2)``: for every record, the number of its data set among them, and its
        index there.
    """
    if isinstance(dataset, Subset):
        bases, numbers = sources(dataset.dataset)
        return bases, numbers[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        all_bases: list[Any] = []
        parts = []
        for part in dataset.datasets:
            bases, numbers = sources(part)
            for base in bases:
                if not any(base is known for known in all_bases):
                    all_bases.append(base)
            places = np.array([next(i for i, b in enumerate(all_bases) if b is base) for base in bases], dtype=np.int64)
            parts.append(np.stack([places[numbers[:, 0]], numbers[:, 1]], 1))
        return all_bases, np.concatenate(parts)
    count = len(dataset)
    return [dataset], np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], 1)


def _refuse_repeated_records(dataset: Any, num_records: int) -> None:
    if isinstance(dataset, Subset | ConcatDataset):
        bases, numbers = sources(dataset)
        keys = numbers[:num_records, 0] * max(1, *map(len, bases), 1) + numbers[:num_records, 1]
        if len(np.unique(keys)) != num_records:
            raise ValueError(
                f"The train data set is a {type(dataset).__name__} that names some records several times: such a "
                "record "
                "would count several times in every bound. Name each record once; to weight records, weight their "
                "losses."
            )
    contents: list[bytes] = []
    end = time.monotonic() + _COMPARED_SECONDS
    for index in np.random.default_rng(0).permutation(num_records)[:_COMPARED_MOST].tolist():
        if len(contents) >= _COMPARED and time.monotonic() > end:
            break
        if (data := record_bytes(dataset, index)) is not None:
            contents.append(data)
    repeated = len(contents) - len(set(contents))
    if repeated > 2 and max(map(len, contents)) > _SMALL_RECORD:
        warnings.warn(
            f"lightning_dp: of {len(contents)} records that were looked at, {repeated} are copies of others. If the "
            "data set repeats records (oversampling), a record counts several times, and ε holds for each copy by "
            "itself: name each record once. (Different people's records may be equal: then nothing is wrong.)",
            stacklevel=3,
        )


#: Records that are compared with one another: the least number, the most, and the seconds after which no more than the
#: least are loaded; records of up to `_SMALL_RECORD` bytes may be equal by chance.
_COMPARED, _COMPARED_MOST, _COMPARED_SECONDS, _SMALL_RECORD = 48, 2048, 0.1, 32


def records_and_batch_size(loader: object) -> tuple[int, int]:
    """Number of records and batch size of a train loader that can be Poisson-sampled.

    Raises:
        TypeError, ValueError: The loader cannot be Poisson-sampled; the message says why and what to use instead.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"The train dataloader is a {type(loader).__name__}; private training draws its own Poisson batches and "
            "needs a torch.utils.data.DataLoader over a data set with a length."
        )
    if type(loader).__iter__ is not DataLoader.__iter__ and not isinstance(loader, PoissonDataLoader):
        raise TypeError(
            f"The train dataloader is a {type(loader).__name__}, whose own __iter__ would be replaced. Use a plain "
            "torch.utils.data.DataLoader, and do in the data set or the collate function what it does."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            "The train data set is an IterableDataset: records that come in a stream cannot be Poisson-sampled, and "
            "the privacy of any other order is not accounted for. Use a map-style data set (with __getitem__ and "
            "__len__)."
        )
    sampler: Any = loader.sampler
    plain_random = type(sampler) is RandomSampler and not sampler.replacement
    distributed = type(sampler) is DistributedSampler
    if not (plain_random or distributed or type(sampler) is SequentialSampler):
        raise TypeError(
            f"The train dataloader has a {type(sampler).__name__}: weighted, restricted or custom samplers give "
            "records other probabilities than the accountant assumes. Leave the sampler out (shuffle=True or False, "
            "both are replaced by Poisson sampling); to train on some records only, use torch.utils.data.Subset; to "
            "weight records, weight their losses."
        )
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        raise TypeError(
            f"The train dataloader has a custom batch sampler ({type(loader.batch_sampler).__name__}), which would be "
            "ignored. Leave it out, and give batch_size to the DataLoader instead."
        )
    if loader.batch_size is None:
        raise ValueError(
            "The train dataloader has batch_size=None; give the expected batch size to the DataLoader: "
            "DataLoader(dataset, batch_size=…), without batch_sampler, which cannot be given beside it."
        )
    num_records = len(loader.dataset)  # type: ignore[arg-type]
    named = getattr(sampler, "data_source", loader.dataset)
    if named is not loader.dataset and isinstance(named, Sized):
        if len(named) > num_records:
            raise ValueError(
                f"The train dataloader's sampler names {len(named)} records, and its data set has {num_records}."
            )
        num_records = len(named)  # SequentialSampler(range(100)): the first hundred
    if num_records == 0:
        raise ValueError("The train data set is empty.")
    _refuse_repeated_records(loader.dataset, num_records)
    return num_records, loader.batch_size


def steps_per_epoch(loader: Any, num_records: int, batch_size: int, accumulated: int = 1) -> int:
    """Batches of an epoch, as the loader counts them: with ``drop_last`` the last one only if it is full, and of a
    ``RandomSampler(num_samples=…)`` as many as that has. Any number that does not depend on the records is as private.

    Args:
        loader: The user's train loader.
        num_records: N.
        batch_size: Of all processes together.
        accumulated: Batches of a step; the last ones of an epoch may be fewer.
    """
    seen = len(loader.sampler) if type(loader.sampler) is RandomSampler else num_records
    batches = max(1, seen // batch_size if loader.drop_last else -(-seen // batch_size))
    return -(-batches // accumulated)


def poisson_loader(strategy: PrivateMixin, dataloader: Any) -> PoissonDataLoader:
    """A loader over the same data set that yields this process's share of every Poisson sample.

    Args:
        strategy: Supplies randomness, ledger and processes.
        dataloader: The user's train loader; its batch size times the number of processes is the expected batch size.

    Raises:
        PrivacyConfigurationError: The processes have different train sets, or batch sizes.
        TypeError, ValueError: The loader cannot be Poisson-sampled.
    """
    num_records, batch_size = records_and_batch_size(dataloader)
    if strategy.trainer_in_fit().world_size > 1:
        dataset = dataloader.dataset
        strategy.agree(
            (batch_size, fingerprint(dataset)),
            "The processes have different train sets, or batch sizes: record i of one is not record i of another, "
            "and a record could count several times. Load the same records in the same order everywhere: give "
            "random_split a generator with a fixed seed; sort what is listed from folders.",
        )
    accumulated = strategy.accumulation.factor
    expected = batch_size * accumulated * strategy.trainer_in_fit().world_size
    strategy.micro_batches.most_at_once = batch_size if accumulated > 1 else None
    if expected > num_records:
        rank_zero_warn(
            f"The expected batch size ({expected}) exceeds the {num_records} records of the train set; every "
            "record will be in every batch (sampling rate 1), without amplification by sampling."
        )
    rate = min(1.0, expected / num_records)
    by_hand = not strategy.module_in_fit().automatic_optimization
    sampler = PoissonBatchSampler(
        num_records,
        rate,
        strategy.randomness,
        first_step=lambda: len(strategy.ledger),
        shard=strategy.trainer_in_fit().global_rank,
        num_shards=strategy.trainer_in_fit().world_size,
        copies=strategy.mechanism.augmentation_multiplicity,
        steps=steps_per_epoch(dataloader, num_records, expected // accumulated, accumulated),
        filled_to=size_bound(num_records, rate) if by_hand else None,
    )
    return PoissonDataLoader.replacing(dataloader, sampler)
