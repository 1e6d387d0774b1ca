from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.sampling import Draw, PoissonBatchSampler, draw_poisson_sample
from lightning_dp.training.loader import PoissonDataLoader, fingerprint, records_and_batch_size
from lightning_dp.zoo.data import TensorTable


def draws(num_records: int, rate: float, count: int) -> list[np.ndarray]:
    randomness = Randomness(seed=11)
    return [draw_poisson_sample(num_records, rate, randomness.numpy("sampling", step)) for step in range(count)]


def fits_binomial(sizes: np.ndarray, num_records: int, rate: float) -> bool:
    observed = np.bincount(sizes, minlength=num_records + 1)
    expected = len(sizes) * stats.binom.pmf(np.arange(num_records + 1), num_records, rate)
    common = expected >= 5
    pooled = [[*counts[common], counts[~common].sum()] for counts in (observed, expected)]
    return bool(stats.chisquare(*pooled).pvalue > 1e-6)


def test_batch_sizes_are_binomial_and_nothing_else() -> None:
    sizes = np.array([len(sample) for sample in draws(200, 0.1, 4000)])
    assert fits_binomial(sizes, 200, 0.1)
    assert not fits_binomial(np.full(4000, 20), 200, 0.1), "a constant batch size must be rejected"
    assert not fits_binomial(np.random.default_rng(0).poisson(20, 4000), 200, 0.13)


def test_every_record_is_included_with_the_sampling_rate_independently_of_the_others() -> None:
    samples = draws(50, 0.3, 6000)
    member = np.zeros((6000, 50), dtype=np.int64)
    for row, sample in zip(member, samples, strict=True):
        assert len(set(sample.tolist())) == len(sample)
        row[sample] = 1
    counts = member.sum(0)
    assert stats.chisquare(counts, counts.mean().repeat(50)).pvalue > 1e-6
    assert stats.binomtest(int(counts.sum()), 6000 * 50, 0.3).pvalue > 1e-6
    covariance = np.cov(member.T)[np.triu_indices(50, 1)]
    # Poisson inclusion: no covariance. A fixed batch size would give every pair -q(1-q)/(N-1) = -0.0043.
    standard_error = 0.21 / np.sqrt(6000) / np.sqrt(len(covariance))
    assert abs(covariance.mean()) < 5 * standard_error < 0.0043 / 2


def test_consecutive_batches_are_independent() -> None:
    samples = draws(50, 0.3, 3000)
    overlap = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(samples[::2], samples[1::2], strict=True)]
    assert stats.ttest_1samp(overlap, 50 * 0.09).pvalue > 1e-6


def test_empty_draws_happen_as_often_as_they_should() -> None:
    empty = sum(len(sample) == 0 for sample in draws(20, 0.05, 3000))
    assert stats.binomtest(empty, 3000, 0.95**20).pvalue > 1e-6


def test_drawing_costs_the_batch_and_not_the_data_set() -> None:
    generator = Randomness(seed=1).numpy("sampling", 0)
    tracemalloc.start()
    sample = draw_poisson_sample(10**9, 1e-6, generator)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 700 < len(sample) < 1300
    assert peak < 5e6, "memory grows with the data set"


@pytest.mark.parametrize("num_shards", [2, 3, 5])
def test_ranks_share_one_global_sample(num_shards: int) -> None:
    def sampler(shard: int, shards: int) -> list[list[int]]:
        return list(PoissonBatchSampler(103, 0.2, Randomness(seed=4), lambda: 7, shard, shards))

    whole = sampler(0, 1)
    shares = [sampler(shard, num_shards) for shard in range(num_shards)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert sorted(sum(parts, [])) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("num_records", "batch_size", "batches"), [(100, 10, 10), (101, 10, 11), (49, 1, 49), (7, 7, 1)]
)
def test_an_epoch_has_as_many_steps_as_people_expect(num_records: int, batch_size: int, batches: int) -> None:
    sampler = PoissonBatchSampler(num_records, batch_size / num_records, Randomness(), lambda: 0)
    assert len(sampler) == batches == len(list(sampler))


def poisson_loader(dataset: Any, rate: float, **kwargs: Any) -> PoissonDataLoader:
    sampler = PoissonBatchSampler(len(dataset), rate, Randomness(seed=2), lambda: 0)
    return PoissonDataLoader.replacing(DataLoader(dataset, batch_size=4, **kwargs), sampler)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_iterator_knows_the_size_of_every_batch_it_delivers(workers: int) -> None:
    data = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40))
    loader = poisson_loader(data, 0.05, num_workers=workers)
    iterator, sizes = iter(loader), []
    for inputs, labels in iterator:
        assert len(inputs) == len(labels) == iterator.draw.size
        assert inputs.shape[1:] == (1,)
        sizes.append(len(inputs))
        if len(sizes) == 3:
            next(iter(loader))  # somebody else looks at a batch
    assert 0 in sizes
    assert len(set(sizes)) > 2


def test_an_empty_draw_has_the_form_of_a_batch() -> None:
    data = [{"x": torch.ones(3), "name": "a", "y": 1} for _ in range(9)]
    batch = poisson_loader(data, 0.5).collate_fn([])
    assert batch["x"].shape == (0, 3) and batch["y"].shape == (0,) and batch["name"] == []


def test_the_users_collation_and_workers_are_kept() -> None:
    data = TensorDataset(torch.arange(8.0))
    original = DataLoader(data, batch_size=4, collate_fn=len, num_workers=1, persistent_workers=True, prefetch_factor=3)
    loader = PoissonDataLoader.replacing(original, PoissonBatchSampler(8, 0.5, Randomness(), lambda: 0))
    assert loader.num_workers == 1 and loader.persistent_workers and loader.prefetch_factor == 3
    assert loader.collate_fn([1, 2]) == 2


class Mine(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(5))


DATA = TensorDataset(torch.arange(10.0))


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        ([1, 2, 3], "needs a torch.utils.data.DataLoader"),
        (DataLoader(Stream()), "IterableDataset"),
        (DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 10, 10)), "weight their losses"),
        (DataLoader(DATA, sampler=SubsetRandomSampler([1, 2])), "utils.data.Subset"),
        (DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), "RandomSampler"),
        (DataLoader(DATA, batch_sampler=type("Mine", (BatchSampler,), {})(SequentialSampler(DATA), 2, False)), "Mine"),
        (Mine(DATA), "own __iter__"),
        (DataLoader(Subset(DATA, [1, 1, 2])), "several times"),
        (DataLoader(DATA, batch_size=None), "batch_size=None"),
        (DataLoader(TensorDataset(torch.zeros(0))), "empty"),
    ],
)
def test_loaders_that_cannot_be_poisson_sampled_are_refused(loader: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        records_and_batch_size(loader)


@pytest.mark.parametrize("shuffle", [True, False])
def test_ordinary_loaders_are_accepted(shuffle: bool) -> None:
    assert records_and_batch_size(DataLoader(DATA, batch_size=3, shuffle=shuffle)) == (10, 3)


def test_a_batch_of_none_is_refused() -> None:
    loader = poisson_loader(DATA, 0.9, collate_fn=lambda examples: None)
    with pytest.raises(TypeError, match="must not depend on the data"):
        next(iter(loader))


class Augmented(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Records that are other ones every time, by their own random numbers; or by torch's."""

    def __init__(self, own: bool) -> None:
        self.own = own

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        noise = np.random.default_rng().random(3) if self.own else torch.rand(3).numpy()
        return {"image": noise + index, "label": index, "text": ["a", None]}


def test_fingerprints_tell_train_sets_apart() -> None:
    torch.manual_seed(5)
    rows = torch.arange(40.0).view(20, 2)
    plain = TensorDataset(rows, rows[:, 0].long())
    known = fingerprint(plain)
    assert fingerprint(TensorDataset(rows.clone(), rows[:, 0].long())) == known
    assert fingerprint(TensorDataset(rows.flip(0), rows[:, 0].long())) != known
    assert fingerprint(TensorDataset(rows.double(), rows[:, 0].long())) != known
    assert fingerprint(TensorDataset(rows[:19], rows[:19, 0].long())) != known
    some = Subset(plain, [3, 1, 2])
    assert fingerprint(some) == fingerprint(Subset(plain, [3, 1, 2])) != fingerprint(Subset(plain, [3, 2, 1]))
    assert fingerprint(Augmented(True)) == fingerprint(Augmented(True))
    state = torch.get_rng_state()
    assert fingerprint(Augmented(False)) == fingerprint(Augmented(False)) != fingerprint(Augmented(True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"sampling_rate must lie in \(0, 1\], got"):
        PoissonBatchSampler(10, rate, Randomness(), lambda: 0)


def test_records_are_collated_as_the_loader_would() -> None:
    data = TensorDataset(torch.arange(12.0).view(6, 2))
    loader = poisson_loader(data, 0.5)
    [found] = loader.collate_records([4, 1])
    assert torch.equal(found, data.tensors[0][[4, 1]])
    together = poisson_loader(TensorTable(*data.tensors), 0.5, collate_fn=lambda batch: batch)
    assert torch.equal(together.collate_records([4, 1])[0], data.tensors[0][[4, 1]])


def test_a_sampler_without_shards_draws_the_whole_sample() -> None:
    alone = PoissonBatchSampler(103, 0.2, Randomness(seed=4), lambda: 7)
    sharded = PoissonBatchSampler(103, 0.2, Randomness(seed=4), lambda: 7, shard=0, num_shards=1)
    assert list(alone) == list(sharded)
    copied = PoissonBatchSampler(103, 0.2, Randomness(seed=4), lambda: 7, copies=3)
    for once, thrice in zip(alone, copied, strict=True):
        assert thrice == [index for index in once for _ in range(3)]
        assert copied.draws.popleft() == Draw(once, len(once))


def twice(data: Any) -> Subset[Any]:
    return Subset(data, [*range(len(data)), *range(len(data))])


@pytest.mark.parametrize(
    "repeated",
    [
        twice,
        lambda data: ConcatDataset([data, data]),
        lambda data: ConcatDataset([Subset(data, range(5)), Subset(data, range(4, 9))]),
        lambda data: Subset(twice(data), range(15)),
        lambda data: random_split(twice(data), [1.0])[0],
    ],
)
def test_a_record_that_is_named_twice_is_found_wherever_it_hides(repeated: Any) -> None:
    data = TensorDataset(torch.arange(10.0)[:, None])
    with pytest.raises(ValueError, match="names some records several times"):
        records_and_batch_size(DataLoader(repeated(data), batch_size=2))


@pytest.mark.parametrize(
    "parts",
    [
        lambda data: Subset(data, range(0, 10, 2)),
        lambda data: ConcatDataset([Subset(data, range(5)), Subset(data, range(5, 10))]),
        lambda data: random_split(data, [0.5, 0.5])[0],
        lambda data: ConcatDataset([data, TensorDataset(torch.arange(10.0)[:, None])]),
    ],
)
def test_parts_that_name_every_record_once_are_fine(parts: Any) -> None:
    data = TensorDataset(torch.arange(10.0)[:, None])
    count, _ = records_and_batch_size(DataLoader(parts(data), batch_size=2))
    assert count == len(parts(data))


def test_a_data_set_of_ones_own_that_repeats_is_warned_about() -> None:
    class Repeated(TensorDataset):
        def __len__(self) -> int:
            return 5 * super().__len__()

        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index % super().__len__())

    with pytest.warns(UserWarning, match="are copies of others"):
        records_and_batch_size(DataLoader(Repeated(torch.randn(40, 20)), batch_size=8))


@pytest.mark.parametrize(
    "sampler", [SequentialSampler(range(4)), RandomSampler(range(4))], ids=["in order", "shuffled"]
)
def test_a_sampler_of_the_first_records_means_those(sampler: Any) -> None:
    loader = DataLoader(TensorDataset(torch.arange(10.0)[:, None]), batch_size=2, sampler=sampler)
    assert records_and_batch_size(loader) == (4, 2)
    with pytest.raises(ValueError, match="names 11 records, and its data set has 10"):
        records_and_batch_size(DataLoader(loader.dataset, sampler=SequentialSampler(range(11))))
