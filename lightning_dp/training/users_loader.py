"""What a user's train loader says: records, batch size, steps of an epoch, weights; and which loaders are refused."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_dp.mechanism.sampling import PoissonBatchSampler, inclusion_probabilities, size_bound
from lightning_dp.training import lightning_api
from lightning_dp.training.loader import PoissonDataLoader
from lightning_dp.training.record_bytes import fingerprint, record_bytes

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin


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


def _sampler_of(loader: DataLoader[Any]) -> Any:
    """The user's sampler: of the loader, or of a plain ``BatchSampler`` that was given to it."""
    given: Any = loader.sampler
    if loader.batch_size is None and type(loader.batch_sampler) is BatchSampler:
        given = loader.batch_sampler.sampler
    return lightning_api.wrapped_sampler(given)


def dataset_of(loader: DataLoader[Any]) -> Any:
    """The data set of the records that a train loader draws from: a part of its own, with a ``SubsetRandomSampler``."""
    sampler: Any = _sampler_of(loader)
    if type(sampler) is SubsetRandomSampler:
        return Subset(loader.dataset, list(map(int, sampler.indices)))
    return loader.dataset


def weights_of(loader: DataLoader[Any]) -> np.ndarray | None:
    """The weights of a ``WeightedRandomSampler``, ``(N,)``; ``None``: all records are as likely."""
    sampler: Any = _sampler_of(loader)
    return np.asarray(sampler.weights, dtype=np.float64) if type(sampler) is WeightedRandomSampler else None


def records_and_batch_size(loader: object, public_weights: bool = False) -> tuple[int, int]:
    """Number of records and batch size of a train loader that can be Poisson-sampled.

    Args:
        loader: The user's train loader.
        public_weights: Whether the user says that weights of records do not depend on the data.

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
    _check_sampler(_sampler_of(loader), public_weights)
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        raise TypeError(
            f"The train dataloader has a custom batch sampler ({type(loader.batch_sampler).__name__}), which would be "
            "ignored. Leave it out, and give batch_size to the DataLoader instead."
        )
    batch_size = loader.batch_size
    if batch_size is None and loader.batch_sampler is not None:
        batch_size = loader.batch_sampler.batch_size
    if batch_size is None:
        raise ValueError(
            "The train dataloader has batch_size=None; give the expected batch size to the DataLoader: "
            "DataLoader(dataset, batch_size=…)."
        )
    dataset = dataset_of(loader)
    num_records = len(dataset)
    named = getattr(_sampler_of(loader), "data_source", dataset)
    if named is not dataset and isinstance(named, Sized):
        if len(named) > num_records:
            raise ValueError(
                f"The train dataloader's sampler names {len(named)} records, and its data set has {num_records}."
            )
        num_records = len(named)  # SequentialSampler(range(100)): the first hundred
    if num_records == 0:
        raise ValueError("The train data set is empty.")
    weights = weights_of(loader)
    if weights is not None and len(weights) != num_records:
        raise ValueError(
            f"The WeightedRandomSampler has {len(weights)} weights, and the train data set {num_records} records: give "
            "it one for each record, such as class_weights[labels]."
        )
    _refuse_repeated_records(dataset, num_records)
    return num_records, batch_size


def _check_sampler(sampler: Any, public_weights: bool) -> None:
    known = (RandomSampler, SubsetRandomSampler, DistributedSampler, SequentialSampler)
    if type(sampler) is WeightedRandomSampler and not public_weights:
        raise TypeError(
            "The train dataloader has a WeightedRandomSampler: weights that are counted from the records (of classes, "
            "say) say something about them, which ε does not cover; and the likeliest record pays for all. Leave the "
            "sampler out (shuffle=True) and weight the losses instead, which costs no privacy: "
            "cross_entropy(…, weight=class_weights). If the weights come from elsewhere than from these records, say "
            "so: public_weights=True."
        )
    if type(sampler) not in (*known, WeightedRandomSampler):
        raise TypeError(
            f"The train dataloader has a {type(sampler).__name__}: restricted or custom samplers give records other "
            "probabilities than the accountant assumes. Leave the sampler out (shuffle=True or False, both are "
            "replaced by Poisson sampling); to train on some records only, use torch.utils.data.Subset; to weight "
            "records, weight their losses."
        )


def steps_per_epoch(loader: Any, num_records: int, batch_size: int, accumulated: int = 1) -> int:
    """Batches of an epoch, as the loader counts them: with ``drop_last`` the last one only if it is full, and of a
    sampler with ``num_samples`` as many as that has. Any number that does not depend on the records is as private.

    Args:
        loader: The user's train loader.
        num_records: N.
        batch_size: Of all processes together.
        accumulated: Batches of a step; the last ones of an epoch may be fewer.
    """
    sampler: Any = _sampler_of(loader)
    seen = len(sampler) if type(sampler) in (RandomSampler, WeightedRandomSampler) else num_records
    drops = loader.drop_last or (loader.batch_size is None and loader.batch_sampler.drop_last)
    batches = max(1, seen // batch_size if drops else -(-seen // batch_size))
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
    num_records, batch_size = records_and_batch_size(dataloader, strategy.mechanism.public_weights)
    dataset, weights = dataset_of(dataloader), weights_of(dataloader)
    if strategy.trainer_in_fit().world_size > 1:
        strategy.agree(
            (batch_size, fingerprint(dataset), None if weights is None else zlib.crc32(weights.tobytes())),
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
    rate, keeps = min(1.0, expected / num_records), None
    if weights is not None:
        probabilities = inclusion_probabilities(weights, expected)
        rate = float(probabilities.max())
        keeps = probabilities / rate
        rank_zero_info(
            f"lightning_dp: public_weights=True: records join each batch with a probability of {rate:.3g} at most, and "
            f"{probabilities.mean():.3g} on average. ε is that of the likeliest, as if all had {rate:.3g}."
        )
    sampler = PoissonBatchSampler(
        num_records,
        rate,
        strategy.randomness,
        first_step=lambda: len(strategy.ledger),
        shard=strategy.trainer_in_fit().global_rank,
        num_shards=strategy.trainer_in_fit().world_size,
        copies=strategy.mechanism.augmentation_multiplicity,
        steps=steps_per_epoch(dataloader, num_records, expected // accumulated, accumulated),
        keeps=keeps,
        at_once=strategy.micro_batches.loaded_at_once,
    )
    if not strategy.module_in_fit().automatic_optimization:
        sampler.filled_to = size_bound(num_records, sampler.expected_size / num_records)
    return PoissonDataLoader.replacing(dataloader, dataset, sampler)
