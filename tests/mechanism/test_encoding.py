"""Gradient encoding: the obvious loop, what one record can add, codebooks, and training with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_dp import (
    DifferentialPrivacy,
    FlatClipping,
    FlatCodebook,
    GaussianNoise,
    GradientEncoding,
    LaplaceNoise,
    PowerLawCodebook,
    PrivacyBudget,
    PrivacyLedger,
    PrivateStrategy,
    PublicCodebook,
    RandomCodebook,
    StudentTNoise,
    learn_codebook,
    public_gradients,
)
from lightning_dp.accounting.events import Magnitudes
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism.encoding.codebooks import Codebook, staircases
from lightning_dp.mechanism.encoding.encoder import _MANTISSA, Encoder
from lightning_dp.mechanism.noise import NOISES, Noise
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.zoo import MLP, FeedbackClassifier
from tests.conftest import Net, assert_close, dataset, fit, loader, oracle_gradients, trainer
from tests.mechanism.test_backprop import MODELS
from tests.steps import make_step
from tests.tensors import DEVICE

pytestmark = pytest.mark.on_device

CODEBOOKS: list[Codebook] = [
    FlatCodebook(),
    PowerLawCodebook(),
    PowerLawCodebook((0.5,)),
    PowerLawCodebook((0.0, 3.0)),
    RandomCodebook(5),
]


def vectors(entries: Magnitudes) -> Tensor:
    """The codebook's vectors in full, ``(K, size)``."""
    return torch.tensor(entries.values, dtype=torch.float64).repeat_interleave(torch.tensor(entries.counts), 1)


def rank_class(magnitude: float) -> float:
    """What magnitudes that share a rank have in common: their leading bits."""
    mantissa, exponent = math.frexp(np.float32(magnitude))
    return math.floor(mantissa * 2 ** (_MANTISSA + 1)) * 2.0 ** (exponent - _MANTISSA - 1)


def by_the_definition(row: Tensor, entries: Magnitudes, max_norm: float) -> list[Tensor]:
    """One example at a time: sort, keep the first k, scale, clamp to a vector; for every vector that is nearest.

    Magnitudes whose leading bits agree, or that are below 2^-16 of the largest, have the rank of the last of them.
    """
    codebook, row = vectors(entries), row.double()
    size = codebook.shape[1]
    order = sorted(range(len(row)), key=lambda c: -abs(float(row[c])))
    top = rank_class(abs(float(row[order[0]])))
    classes = [max(rank_class(abs(float(row[c]))), top * (1 + 2**-_MANTISSA) * 2**-16) for c in order]
    last = {value: rank for rank, value in enumerate(classes)}
    ranks = {c: last[value] for c, value in zip(order, classes, strict=True) if last[value] < size}
    kept = row[list(ranks)]
    factor = min(1.0, max_norm / float(kept.norm())) if len(kept) and kept.any() else 1.0
    inner = torch.stack([codebook[:, rank] * row[c].abs() for c, rank in ranks.items()]).sum(0) if ranks else None
    results = []
    for j, vector in enumerate(codebook):
        if inner is not None and inner[j] < inner.max() * 0.99:
            continue
        encoded = torch.zeros_like(row)
        for c, rank in ranks.items():
            encoded[c] = row[c].sign() * min(float(row[c].abs()) * factor, max_norm * float(vector[rank]))
        results.append(encoded)
    return results


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    coordinates=st.integers(1, 90),
    kept=st.floats(0.01, 1.0),
    max_norm=st.sampled_from([0.01, 1.0, 30.0]),
    heaviness=st.sampled_from([0.0, 1.0, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_encoding_equals_the_obvious_loop(
    codebook: Codebook,
    seed: int,
    coordinates: int,
    kept: float,
    max_norm: float,
    heaviness: float,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, coordinates, generator=generator, dtype=dtype, device="cpu").to(DEVICE)
    rows = rows.sign() * rows.abs() ** heaviness
    rows[0] = 0
    rows[1, ::2] = rows[1, 0].clone()  # ties
    entries = codebook.entries(max(1, int(kept * coordinates)))
    encoded = rows.clone()
    Encoder(entries, max_norm, coordinates)(encoded)
    for row, found in zip(rows, encoded, strict=True):
        expected = by_the_definition(row, entries, max_norm)
        assert any(torch.allclose(found.double(), option, rtol=1e-5, atol=0) for option in expected)


def test_ranks_that_are_shared_change_little() -> None:
    """Against the exact ranks of the paper's definition."""
    rows = torch.randn(20, 30_000) ** 3
    entries = PowerLawCodebook((0.6,)).entries(20_000)
    encoded = rows.clone()
    norms, factors = Encoder(entries, 1.0, 30_000)(encoded)
    top, order = rows.abs().topk(20_000, dim=1)
    exact = torch.minimum(top * factors[:, None], vectors(entries).float())
    expected = torch.zeros_like(rows).scatter(1, order, exact) * rows.sign()
    assert ((encoded - expected).norm(dim=1) < 0.05 * expected.norm(dim=1)).all()
    assert_close(norms, top.norm(dim=1), 1e-3)


def is_within(added: Tensor, entries: Magnitudes, max_norm: float, tolerance: float = 1e-6) -> bool:
    """Whether a vector is, up to signs and order, under one of the codebook's, and zero beyond."""
    codebook = vectors(entries) * max_norm
    sizes = added.double().abs().sort(descending=True)[0]
    size = codebook.shape[1]
    if (sizes[size:] > tolerance * max_norm).any():
        return False
    return bool((sizes[:size] <= codebook * (1 + tolerance) + tolerance * max_norm).all(1).any())


ADVERSARIAL = {
    "zeros": lambda d: torch.zeros(d),
    "equal": lambda d: torch.full((d,), 3.0),
    "spike": lambda d: torch.nn.functional.one_hot(torch.tensor(d // 2), d) * -1e20,
    "tiny": lambda d: torch.full((d,), 1e-42),
    "huge and tiny": lambda d: torch.logspace(-40, 18, d),
    "normal": lambda d: torch.randn(d),
    "nearly equal": lambda d: 1 + 1e-7 * torch.randn(d),
    "powers of two": lambda d: 2.0 ** -torch.arange(d, dtype=torch.float32).clamp(max=120),
}


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=repr)
@pytest.mark.parametrize("kept", [1.0, 0.3])
@pytest.mark.parametrize("row", ADVERSARIAL)
def test_no_row_exceeds_the_codebook(codebook: Codebook, kept: float, row: str) -> None:
    entries = codebook.entries(int(200 * kept))
    encoded = ADVERSARIAL[row](200).float()[None]
    Encoder(entries, 0.7, 200)(encoded)
    assert is_within(encoded[0], entries, 0.7)
    assert encoded.norm() <= 0.7 * (1 + 1e-6)


# -- through the private step ------------------------------------------------------------------------------------------


def released(
    rule: GradientEncoding, model: nn.Module, inputs: Tensor, micro: int | None = None, engine: str = "bookkeeping"
) -> Tensor:
    """What a private step releases without noise, times the divisor, for a loss that is a mean over the examples."""
    bound = rule.for_module(model)
    step = make_step(bound.make_engine(engine, model), bound, GaussianNoise(0.0), PrivacyLedger(), Randomness())
    step.begin(0.0, 0.5, 1.0)
    for part in inputs.split(micro or len(inputs)) if len(inputs) else ():
        with step.engine.forward(len(part)):
            loss = model(part).pow(2).flatten(1).sum(1).mean()
        with step.backward(len(part)):
            loss.backward()
    step.release()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])  # type: ignore[union-attr]
    model.zero_grad()
    return found


ENCODABLE = {name: model for name, model in MODELS.items() if name != "bias only"}


@pytest.mark.parametrize("codebook", [FlatCodebook(), PowerLawCodebook(), RandomCodebook(3)], ids=repr)
@pytest.mark.parametrize("name", ENCODABLE)
def test_a_record_more_adds_one_vector_of_the_codebook_at_most(name: str, codebook: Codebook) -> None:
    make, shape = ENCODABLE[name]
    model = make().double()
    coordinates = sum(p.numel() for p in model.parameters())
    others = torch.randn(4, *shape, dtype=torch.float64)
    rule = GradientEncoding(codebook, 0.3, top_k=max(1, coordinates // 2))
    bound, before = rule.for_module(model), released(rule, model, others)
    sizes = []
    for scale in (0.0, 1e-3, 1.0, 1e3, 1e8, math.inf):
        record = torch.randn(1, *shape, dtype=torch.float64) * scale
        added = released(rule, model, torch.cat([record, others])) - before
        assert is_within(added, bound.entries, 0.3)
        sizes.append(added.norm().item())
        # the same through what the accountant sees: magnitudes over the sensitivity
        [sensitivity] = bound.group_sensitivities([()])
        assert is_within(added, bound.magnitudes(), sensitivity)
    assert max(sizes) > 0.1, "nothing came near the bound: the test could not fail"


def test_the_black_box_test_rejects_a_bound_that_is_too_small() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    rule = GradientEncoding(FlatCodebook(), 0.3)
    others, record = torch.randn(4, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64) * 50
    added = released(rule, model, torch.cat([record, others])) - released(rule, model, others)
    entries = rule.for_module(model).entries
    assert is_within(added, entries, 0.3) and not is_within(added, entries, 0.2)


@pytest.mark.parametrize("name", ENCODABLE)
def test_the_sum_equals_that_of_single_examples_by_autograd(name: str) -> None:
    make, shape = ENCODABLE[name]
    model = make().double()
    inputs = torch.randn(5, *shape, dtype=torch.float64)
    rule = GradientEncoding(PowerLawCodebook((0.7,)), 0.3)
    rows = oracle_gradients(model, lambda i: model(inputs[i : i + 1]).pow(2).sum(), 5)
    flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
    entries = rule.for_module(model).entries
    expected = torch.stack([by_the_definition(row, entries, 0.3)[0] for row in flat]).sum(0)
    for micro in (None, 1, 2):
        assert_close(released(rule, model, inputs, micro), expected, 1e-5)
    assert_close(released(rule, model, inputs, 1, "per_example"), expected, 1e-5)


def test_memory_is_that_of_a_few_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many examples a micro-batch has, and however many micro-batches there are."""
    model, seen = nn.Linear(60, 50), []
    monkeypatch.setattr("lightning_dp.mechanism.encoding.encoder._ENCODED", 9000)
    monkeypatch.setattr("lightning_dp.mechanism.encoding.encoder._MATERIALISED", 10_000)
    bound = GradientEncoding(PowerLawCodebook()).for_module(model)
    engine = bound.make_engine("bookkeeping", model)
    encode = engine._encode
    engine._encode = lambda rows: (seen.append(len(rows)), encode(rows))[1]  # type: ignore[assignment]
    inputs = torch.randn(10, 60)
    for part in inputs.split(5):
        with engine.forward(len(part)):
            loss = model(part).sum()
        with engine.backward():
            loss.backward()
    assert seen == [2, 1, 2, 2, 1, 2]
    sums, factor = engine.take()
    assert factor == 1 and {name: s.shape for name, s in sums.items()} == {"weight": (50, 60), "bias": (50,)}
    assert engine.take() == ({}, 1.0)


def test_gradients_that_are_not_finite_count_nothing() -> None:
    model = nn.Linear(6, 5)
    inputs = torch.randn(4, 6)
    rule = GradientEncoding(PowerLawCodebook())
    bad = inputs.clone()
    bad[1, 2] = math.nan
    assert_close(released(rule, model, bad), released(rule, model, inputs[[0, 2, 3]]))
    bound = rule.for_module(model)
    step = make_step(
        bound.make_engine("bookkeeping", model),
        bound,
        GaussianNoise(0.0),
        PrivacyLedger(),
        Randomness(),
        lambda t: None,
    )
    step.contributions.keep_norms = True
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(4):
        loss = model(bad).pow(2).sum()
    with step.backward(1.0):
        loss.backward()
    assert step.nonfinite_examples == 1
    assert step.contributions.norms[0].shape == step.contributions.weights[0].shape == (4, 1)
    assert (step.contributions.norms[0][[0, 2, 3]] > 0).all() and step.contributions.norms[0][1] == 0


# -- codebooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=repr)
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 1000, 250_000])
def test_codebooks_are_descending_and_of_norm_one(codebook: Codebook, size: int) -> None:
    entries = codebook.entries(size)
    assert sum(entries.counts) == size and min(entries.counts) >= 1 and len(entries.counts) <= 32
    np.testing.assert_allclose(entries.norms(), 1, rtol=1e-9)
    assert (np.diff(entries.values, axis=1) <= 1e-12).all() and (np.array(entries.values) >= 0).all()
    assert codebook.entries(size) == entries, "the same in every run"


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300).filter(lambda values: max(values) > 1e-3))
def test_staircases_keep_norm_and_order(values: list[float]) -> None:
    vector = np.sort(values)[::-1]
    found = staircases([vector])
    assert found.norms()[0] == pytest.approx(1)
    full = vectors(found)[0].cpu().numpy()
    assert (np.diff(full) <= 1e-12).all()
    assert full @ vector / np.linalg.norm(vector) > 0.7


def test_a_codebook_is_learned_from_public_gradients(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    spiky = torch.randn(40, 500, generator=generator, device="cpu") ** 5
    flat = torch.rand(40, 500, generator=generator, device="cpu") + 5
    codebook = learn_codebook(torch.cat([spiky, flat]), tmp_path / "book", size=2)
    assert codebook == PublicCodebook(str(tmp_path / "book.npz"))
    assert learn_codebook(spiky, tmp_path / "book_0.5", size=1).path == str(tmp_path / "book_0.5.npz")
    entries = codebook.entries(500)
    peaks = sorted(entry[0] for entry in entries.values)
    assert peaks[0] < 0.07 and peaks[1] > 0.3
    with pytest.raises(ValueError, match="vectors of 500 coordinates, and 400 are encoded"):
        codebook.entries(400)
    with pytest.raises(FileNotFoundError, match="learn_codebook writes one"):
        PublicCodebook("nowhere.npz").entries(3)
    with pytest.raises(ValueError, match="of which 1 are zero"):
        learn_codebook(torch.cat([torch.zeros(1, 5), torch.ones(1, 5)]), tmp_path / "book", size=2)


def test_public_gradients_are_those_of_single_examples() -> None:
    module = Net()
    inputs, labels = dataset(7).tensors
    found = public_gradients(module, [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])])
    rows = oracle_gradients(module, lambda i: module.training_step((inputs[i : i + 1], labels[i : i + 1]), 0), 7)
    assert_close(found, torch.cat([row.flatten(1) for row in rows.values()], 1))
    assert all(p.grad is None for p in module.parameters())

    class InDictionary(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx)}

    other = InDictionary(module.net)
    assert_close(public_gradients(other, [(inputs, labels)]), found)


class Wrong(Codebook):
    def __init__(self, counts: tuple[int, ...], values: tuple[tuple[float, ...], ...]) -> None:
        self.found = Magnitudes(counts, values)

    def entries(self, size: int) -> Magnitudes:
        return self.found


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GradientEncoding(max_norm=0.0), "max_norm must be positive"),
        (lambda: GradientEncoding(top_k=0), "top_k must be at least 1"),
        (lambda: GradientEncoding("flat"), "codebook must be one such as"),  # type: ignore[arg-type]
        (lambda: GradientEncoding(top_k=100).for_module(nn.Linear(3, 3)), "top_k=100 exceeds the 12 trainable"),
        (lambda: PowerLawCodebook((-1.0,)), "non-negative"),
        (lambda: PowerLawCodebook(()), "non-negative"),
        (lambda: RandomCodebook(0), "size must be at least 1"),
        (lambda: RandomCodebook(2, (2.0, 1.0)), "ascending"),
        (lambda: RandomCodebook(2, (1.0,)), "two non-negative"),  # type: ignore[arg-type]
        (lambda: learn_codebook(torch.ones(5), "book"), "one row each"),
        (lambda: GradientEncoding(Wrong((12,), ((1.0,),))).for_module(nn.Linear(3, 3)), "of norm 1"),
        (lambda: GradientEncoding(Wrong((6, 6), ((0.1, 0.4),))).for_module(nn.Linear(3, 3)), "descending"),
        (lambda: GradientEncoding(Wrong((1,), ((1.0,),))).for_module(nn.Linear(3, 3)), "must have 12 coordinates"),
    ],
)
def test_codebooks_and_bounds_that_bound_nothing_are_refused(make: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        make()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.trains
@pytest.mark.parametrize("noise", [GaussianNoise(), StudentTNoise(9), StudentTNoise(3), LaplaceNoise()], ids=repr)
def test_a_budget_chooses_the_scale_and_is_kept(noise: Noise, tmp_path: Path) -> None:
    strategy = PrivateStrategy(GradientEncoding(PowerLawCodebook()), noise)
    run = trainer(strategy=strategy, callbacks=[PrivacyBudget(2.0, 1e-3)], max_steps=20, max_epochs=-1)
    fit(run, Net(), loader())
    assert strategy.noise_multiplier is not None and len(strategy.ledger) == 20
    spent = strategy.ledger.epsilon(1e-3)
    assert 1.99 < spent <= 2.0
    # what the ledger holds survives a checkpoint
    run.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["lightning_dp"]["ledger"]
    assert PrivacyLedger.from_state_dict(state).epsilon(1e-3) == spent


@pytest.mark.trains
def test_a_budget_stops_training_of_which_the_scale_was_given() -> None:
    strategy = PrivateStrategy(GradientEncoding(), StudentTNoise(9, 1.2))
    fit(trainer(strategy=strategy, callbacks=[PrivacyBudget(3.0, 1e-3)], max_epochs=1000), Net(), loader())
    assert 0 < len(strategy.ledger) < 5000
    assert strategy.ledger.epsilon(1e-3) <= 3.0
    more = strategy.ledger.copy()
    [(event, _)] = more
    more.record(event)
    assert more.epsilon(1e-3) > 3.0


@pytest.mark.trains
@pytest.mark.parametrize("noise", [StudentTNoise(9, 1.0), LaplaceNoise(1.0)], ids=repr)
def test_noise_that_needs_coordinates_is_refused_without(noise: Noise) -> None:
    with pytest.raises(PrivacyConfigurationError, match="FlatClipping with .*Use clipping=GradientEncoding"):
        fit(trainer(strategy=PrivateStrategy(FlatClipping(1.0), noise)), Net(), loader())


class StopAt(Callback):
    """Interrupts a training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


class EndlessDensity:
    def log_moments(self, shift: float, highest: int) -> np.ndarray:
        return np.full(highest + 1, np.inf)


class Endless(StudentTNoise):
    def density(self) -> EndlessDensity:
        return EndlessDensity()


@pytest.mark.trains
def test_noise_without_moments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(strategy=PrivateStrategy(GradientEncoding(), Endless(9, 1.0)))
    with pytest.raises(PrivacyConfigurationError, match="Endless has no entry in"):
        fit(run, Net(), loader())
    monkeypatch.setitem(NOISES, "endless", Endless)
    with pytest.raises(PrivacyConfigurationError, match="no finite moment"):
        fit(run, Net(), loader())


def test_a_resumed_run_with_other_noise_chooses_its_scale_anew(tmp_path: Path) -> None:
    def run(noise: Noise, steps: int, ckpt: Path | None = None) -> PrivateStrategy:
        strategy = PrivateStrategy(GradientEncoding(), noise, journal=False)
        budget = PrivacyBudget(2.0, 1e-3)
        fit(
            trainer(
                strategy=strategy,
                callbacks=[budget, StopAt(steps), ModelCheckpoint(tmp_path, filename="last", save_last=False)],
                enable_checkpointing=True,
                max_epochs=4,
            ),
            Net(),
            loader(),
            ckpt_path=ckpt,
        )
        assert strategy.ledger.epsilon(1e-3) <= 2.0
        return strategy

    first = run(StudentTNoise(9), 5)
    assert run(StudentTNoise(9), 20, tmp_path / "last.ckpt").noise_multiplier == first.noise_multiplier
    other = run(StudentTNoise(3), 20, tmp_path / "last.ckpt")
    assert other.noise_multiplier != first.noise_multiplier and len(other.ledger) == 20


@pytest.mark.trains
@pytest.mark.parametrize("noise", [StudentTNoise(9, 2.0), LaplaceNoise(2.0)], ids=repr)
def test_the_noise_of_a_step_has_the_scale_of_the_ledger(noise: Noise) -> None:
    """Through the Trainer, on gradients that are zero: scale times sensitivity, over q·N; and no other."""
    from scipy import stats

    class Still(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * super().training_step(batch, batch_idx)

    module = Still(nn.Sequential(nn.Linear(6, 3000), nn.Linear(3000, 3)))
    before = [p.detach().clone() for p in module.parameters()]
    strategy = PrivateStrategy(GradientEncoding(PowerLawCodebook(), 0.5), noise)
    fit(trainer(strategy=strategy, max_steps=1), module, loader(size=40, batch_size=8))
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, module.parameters(), strict=True)]).numpy()
    [(event, count)] = strategy.ledger
    assert count == 1 and event.event.scale == 2.0
    unit = 2.0 * 0.5 / 8
    distribution = stats.t(noise.df, scale=unit) if isinstance(noise, StudentTNoise) else stats.laplace(scale=unit)
    assert stats.kstest(moved, distribution.cdf).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(moved * wrong, distribution.cdf).pvalue < 1e-6


@pytest.mark.trains
@pytest.mark.slow
def test_it_learns_also_by_feedback_alignment_and_in_one_callback() -> None:
    module = FeedbackClassifier(MLP([6, 16, 3]), classes=3, learning_rate=0.05)
    privacy = DifferentialPrivacy(
        None, 1e-3, clipping=GradientEncoding(RandomCodebook(2), 1.0), noise=StudentTNoise(9, 0.01), journal=False
    )
    run = trainer(callbacks=[privacy], max_epochs=40)
    inputs, labels = dataset(200).tensors
    labels = inputs[:, :3].argmax(1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=40, shuffle=True)
    fit(run, module, data)
    assert (module(inputs).argmax(1) == labels).float().mean() > 0.85
