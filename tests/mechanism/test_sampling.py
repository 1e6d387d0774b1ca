from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from lightning_dp.mechanism.sampling import (
    Draw,
    PoissonBatchSampler,
    draw_poisson_sample,
    inclusion_probabilities,
    size_bound,
)
from lightning_dp.training.loader import PoissonDataLoader
from lightning_dp.training.record_bytes import fingerprint
from lightning_dp.training.users_loader import records_and_batch_size, steps_per_epoch
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
    return PoissonDataLoader.replacing(DataLoader(dataset, batch_size=4, **kwargs), dataset, sampler)


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
    loader = PoissonDataLoader.replacing(original, data, PoissonBatchSampler(8, 0.5, Randomness(), lambda: 0))
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
        (DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 10, 10)), "weight=class_weights.*public_weights=True"),
        (DataLoader(DATA, sampler=type("Own", (RandomSampler,), {})(DATA)), "Own.*utils.data.Subset.*their losses"),
        (DataLoader(DATA, sampler=SubsetRandomSampler([1, 1, 2])), "several times"),
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


@pytest.mark.parametrize(
    ("options", "num_records"),
    [
        ({"shuffle": True}, 10),
        ({"shuffle": False}, 10),
        ({"sampler": RandomSampler(DATA, replacement=True, num_samples=5)}, 10),
        ({"sampler": SubsetRandomSampler([7, 2, 5, 0])}, 4),
        ({"sampler": SequentialSampler(range(6))}, 6),
    ],
)
def test_ordinary_loaders_are_accepted(options: Any, num_records: int) -> None:
    assert records_and_batch_size(DataLoader(DATA, batch_size=3, **options)) == (num_records, 3)


@pytest.mark.parametrize(("drop_last", "steps"), [(True, 3), (False, 4)])
def test_a_plain_batch_sampler_says_what_a_loader_says(drop_last: bool, steps: int) -> None:
    loader = DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, drop_last))
    assert records_and_batch_size(loader) == (10, 3)
    assert steps_per_epoch(loader, 10, 3) == steps


@pytest.mark.parametrize(("weights", "says"), [([1.0] * 9, "9 weights.*10 records"), ([1.0] * 11, "11 weights")])
def test_weights_belong_to_records(weights: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        records_and_batch_size(DataLoader(DATA, sampler=WeightedRandomSampler(weights, 10)), public_weights=True)


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [math.inf, 1.0], [math.nan, 1.0], [0.0, 0.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        inclusion_probabilities(np.array(weights), 1.0)


@given(st.lists(st.floats(1e-6, 1e6) | st.just(0.0), min_size=1, max_size=30).filter(any), st.floats(0.1, 40))
def test_probabilities_follow_weights(weights: list[float], expected: float) -> None:
    found = inclusion_probabilities(np.array(weights), expected)
    positive = sum(w > 0 for w in weights)
    assert (found >= 0).all() and (found <= 1).all() and found.sum() == pytest.approx(min(expected, positive))
    assert all(p == 0 for w, p in zip(weights, found, strict=True) if w == 0)
    ratios = [p / w for w, p in zip(weights, found, strict=True) if w > 0 and p < 1]
    assert not ratios or max(ratios) <= min(ratios) * (1 + 1e-9)


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2])
def test_each_record_joins_with_its_own_probability_independently(wrong: float) -> None:
    probabilities = np.array([0.4, 0.05, 0.2, 0.2, 0.0, 0.35])
    count = 20_000
    sampler = PoissonBatchSampler(
        6, 0.4, Randomness(seed=3), lambda: 0, steps=count, keeps=np.minimum(probabilities * wrong / 0.4, 1.0)
    )
    joined = np.zeros((count, 6))
    for row, batch in zip(joined, sampler, strict=True):
        row[batch] = 1
    spread = np.sqrt(probabilities * (1 - probabilities) / count)
    right = (np.abs(joined.mean(0) - probabilities) <= 5 * spread).all()
    assert right if wrong == 1.0 else not right
    if wrong == 1.0:
        covariance = np.cov(joined.T)
        assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 5 / math.sqrt(count)
        assert sampler.expected_size == pytest.approx(probabilities.sum())


def test_a_public_size_holds_for_unequal_probabilities() -> None:
    probabilities = np.array([1.0] * 5 + [0.02] * 95)
    bound = size_bound(100, float(probabilities.mean()), 1e-3)
    sampler = PoissonBatchSampler(100, 1.0, Randomness(seed=1), lambda: 0, steps=5000, keeps=probabilities)
    sizes = [len(batch) for batch in sampler]
    assert max(sizes) <= bound < 30 and min(sizes) >= 5


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
