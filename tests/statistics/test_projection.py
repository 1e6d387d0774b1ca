"""Private principal components: what one record moves, what the noise is, and that the ledger knows first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import (
    DifferentialPrivacy,
    FlatClipping,
    GaussianNoise,
    PrivacyBudget,
    PrivacyLedger,
    PrivacyMonitor,
    PrivateProjection,
    PrivateStrategy,
    card_of_run,
    render_card,
)
from lightning_dp.accounting.cost import event_epsilon
from lightning_dp.accounting.events import subsampled_gaussian
from lightning_dp.errors import JournalError, PrivacyConfigurationError, PrivacyLimitReached
from lightning_dp.journal.contents import JOURNAL_NAME, JournalContents
from lightning_dp.journal.writer import PrivacyJournal
from lightning_dp.statistics import projection as pca
from lightning_dp.statistics.projection import principal_directions, second_moment, symmetric, upper_triangle
from lightning_dp.training.release import Releases
from tests.conftest import Net, dataset, fit, loader, trainer
from tests.mechanism.test_noise import is_gaussian_of_std

DELTA = 1e-3


class Projected(Net):
    """A linear classifier on projected records."""

    def __init__(self, noise_multiplier: float = 2.0, features: int = 6, components: int = 3) -> None:
        super().__init__(nn.Sequential(PrivateProjection(features, components, noise_multiplier), nn.Linear(3, 3)))

    @property
    def projection(self) -> PrivateProjection:
        layer = self.net[0]  # type: ignore[index]
        assert isinstance(layer, PrivateProjection)
        return layer

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.net(batch[0]).isfinite().all()


def private(**kwargs: Any) -> PrivateStrategy:
    return PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0), self_check=False, **kwargs)


def random_loader(size: int, features: int, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.randn(size, features), torch.randint(3, (size,))), batch_size=batch_size, shuffle=True
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every second moment that directions are computed from."""
    moments: list[Tensor] = []

    def watch(moment: Tensor, *args: Any) -> Tensor:
        moments.append(moment)
        return principal_directions(moment, *args)

    monkeypatch.setattr(pca, "principal_directions", watch)
    return moments


# -- what one record moves ---------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, 5e-324, -1e-200, 1e200, -1.7e308, math.inf, math.nan]))


@given(st.integers(0, 3), st.lists(NUMBERS, min_size=5, max_size=5), st.sampled_from([torch.float32, torch.float64]))
def test_one_record_moves_the_sum_by_at_most_one(others: int, extra: list[float], dtype: torch.dtype) -> None:
    records = torch.randn(others, 5, dtype=dtype)
    record = torch.tensor([extra], dtype=dtype)
    without, with_it = (upper_triangle(second_moment(part)) for part in (records, torch.cat([records, record])))
    assert (with_it - without).norm() <= 1 + 1e-12
    usable = bool(record.isfinite().all()) and bool(record.any())
    assert (with_it - without).norm() == pytest.approx(float(usable), abs=1e-12), "and no less than it could"


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=8))
def test_replacing_a_record_moves_the_sum_by_less_than_the_two_it_is_accounted_for(numbers: list[float]) -> None:
    one, other = torch.tensor(numbers).view(2, 1, 4)
    assert (second_moment(one) - second_moment(other)).norm() <= math.sqrt(2) + 1e-12


def test_the_triangle_has_the_norm_of_the_matrix_and_gives_it_back() -> None:
    matrix = torch.randn(7, 7).double()
    matrix = matrix + matrix.T
    assert upper_triangle(matrix).norm() == pytest.approx(matrix.norm().item(), rel=1e-12)
    assert torch.allclose(symmetric(upper_triangle(matrix), 7), matrix, rtol=1e-12)


def test_a_record_is_loaded_alone_and_adds_the_same_whatever_its_scale(seen: list[Tensor]) -> None:
    records, sizes = torch.randn(12, 6), []

    def collate(examples: list[Any]) -> Any:
        sizes.append(len(examples))
        return torch.utils.data.default_collate(examples)

    for scale in (1.0, 1e20):
        table = TensorDataset(records * torch.tensor([scale, *[1.0] * 11])[:, None], torch.zeros(12, dtype=torch.long))
        module = Projected(0.0)
        training = trainer(strategy=private(), limit_train_batches=1)
        sizes.clear()
        fit(training, module, DataLoader(table, batch_size=4, collate_fn=collate))
        assert sizes[:12] == [1] * 12
    assert torch.allclose(seen[0], seen[1], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_records_that_are_not_finite_add_nothing(bad: float, seen: list[Tensor]) -> None:
    records = torch.randn(10, 6)
    records[3, 2] = bad
    table = TensorDataset(records, torch.zeros(10, dtype=torch.long))
    fit(trainer(strategy=private()), Projected(0.0), DataLoader(table, batch_size=4))
    assert torch.allclose(seen[0], second_moment(records[torch.arange(10) != 3]))


# -- what is released --------------------------------------------------------------------------------------------------


def test_without_noise_directions_are_those_of_numpy() -> None:
    module = Projected(0.0)
    training = trainer(strategy=private())
    fit(training, module, loader())
    rows = dataset().tensors[0].double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    assert np.all(np.diff(values[-4:]) > 0.1), "the directions are well defined"
    expected = vectors[:, ::-1][:, :3].T
    cosines = np.abs(np.sum(module.projection.weight.numpy() * expected, axis=1))
    assert cosines == pytest.approx(np.ones(3), abs=1e-5)
    strategy: Any = training.strategy
    assert next(iter(strategy.ledger))[0] == NonPrivateDpEvent()
    assert strategy.ledger.epsilon(DELTA) == math.inf
    inputs = torch.randn(5, 2, 3)
    assert torch.allclose(module.projection(inputs), inputs.flatten(1) @ module.projection.weight.T)


def test_equalized_components_have_the_same_mean_square_and_the_same_in_all() -> None:
    records = torch.randn(50, 6).double() * torch.tensor([1, 2, 3, 4, 5, 6])
    rows = records / records.norm(dim=1, keepdim=True)
    plain, equal = (rows @ principal_directions(second_moment(records), 4, equalized).T for equalized in (False, True))
    squares = equal.square().mean(0)
    assert torch.allclose(squares, squares.mean().expand(4), rtol=1e-9)
    assert equal.square().sum() == pytest.approx(plain.square().sum().item(), rel=1e-9)
    cosines = torch.cosine_similarity(plain, equal, dim=0)
    assert torch.allclose(cosines, torch.ones_like(cosines))


@pytest.mark.parametrize("moment", [torch.zeros(4, 4), -torch.eye(4), torch.diag(torch.tensor([1.0, -1, -2, 0]))])
def test_eigenvalues_that_are_noise_give_bounded_directions(moment: Tensor) -> None:
    directions = principal_directions(moment.double(), 4, equalized=True)
    assert directions.isfinite().all() and directions.norm() < 4 * 1000**0.5


@pytest.mark.parametrize("options", [{}, {"secure_rng": True}, {"seed": 3}], ids=str)
def test_the_noise_is_what_the_ledger_claims(options: dict[str, Any], seen: list[Tensor]) -> None:
    data = random_loader(40, 150)
    training = trainer(strategy=private(**options), limit_train_batches=1)
    fit(training, Projected(3.0, features=150), data)
    exact = second_moment(data.dataset.tensors[0])  # type: ignore[attr-defined]
    noise = upper_triangle(seen[0] - exact)
    strategy: Any = training.strategy
    [(event, count)] = strategy.ledger.statistics()
    assert count == 1 and isinstance(event, GaussianDpEvent)
    assert is_gaussian_of_std(noise, event.noise_multiplier)
    assert not is_gaussian_of_std(noise * 2 / 3, event.noise_multiplier)
    assert not is_gaussian_of_std(noise * 3 / 2, event.noise_multiplier)


def test_the_noise_is_a_secret_unless_a_seed_is_given(seen: list[Tensor]) -> None:
    for seed in (None, None, 3, 3, 4):
        pl.seed_everything(1)
        fit(trainer(strategy=private(seed=seed), limit_train_batches=1), Projected(), loader())
    assert torch.equal(seen[2], seen[3])
    for one, other in ((0, 1), (0, 2), (2, 4)):
        assert (upper_triangle(seen[one] - seen[other])).abs().min() > 1e-9


def test_fewer_records_than_components_give_orthonormal_directions() -> None:
    for multiplier in (0.0, 2.0):
        module = Projected(multiplier)
        fit(trainer(strategy=private()), module, random_loader(2, 6))
        assert torch.allclose(module.projection.weight @ module.projection.weight.T, torch.eye(3), atol=1e-5)


def test_every_projection_is_released_and_charged_by_itself(seen: list[Tensor]) -> None:
    strategy, module = private(), Projected(2.0)
    module.other = PrivateProjection(6, 2, 3.0)
    fit(trainer(strategy=strategy), module, loader())
    assert strategy.ledger.statistics() == [(GaussianDpEvent(2.0), 1), (GaussianDpEvent(3.0), 1)]
    assert len(seen) == 2 and module.other.is_released


def test_directions_are_known_when_validation_is_tried_out() -> None:
    fit(trainer(strategy=private(), num_sanity_val_steps=2), Projected(), loader(), loader())


def test_public_records_fill_the_layer_and_nothing_is_charged() -> None:
    module = Projected()
    module.projection.fill(second_moment(torch.randn(30, 6)))
    before, training = module.projection.weight.clone(), trainer(strategy=private())
    fit(training, module, loader())
    strategy: Any = training.strategy
    assert strategy.ledger.statistics() == [] and len(strategy.ledger) == 5
    assert torch.equal(module.projection.weight, before)


# -- the ledger --------------------------------------------------------------------------------------------------------


def crash(*args: Any) -> None:
    raise OSError("gone")


def test_a_crash_before_the_noise_charges_and_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, strategy = Projected(), private()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(Releases, "_add_noise_", crash)
        fit(trainer(strategy=strategy, default_root_dir=tmp_path), module, loader())
    assert list(strategy.ledger) == [(GaussianDpEvent(2.0), 1)]
    assert list(JournalContents(tmp_path / JOURNAL_NAME).ledger()) == [(GaussianDpEvent(2.0), 1)]
    assert not module.projection.is_released and module.projection.weight.isnan().all()
    again = private()
    fit(trainer(strategy=again, default_root_dir=tmp_path), module, loader())
    assert module.projection.is_released
    assert sum(count for _, count in again.ledger.statistics()) == 2, "both were charged"
    assert again.ledger.steps == 5


def test_what_the_journal_cannot_keep_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise JournalError("the disk is full")

    monkeypatch.setattr(PrivacyJournal, "charge", refuse)
    module, strategy = Projected(), private()
    with pytest.raises(JournalError, match="full"):
        fit(trainer(strategy=strategy), module, loader())
    assert not module.projection.is_released and not len(strategy.ledger)


def test_a_resumed_fit_charges_nothing_again(tmp_path: Path) -> None:
    first, module = trainer(strategy=private(), default_root_dir=tmp_path), Projected()
    fit(first, module, loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed, again = private(), Projected()
    fit(trainer(strategy=resumed, max_epochs=2, default_root_dir=tmp_path), again, loader(),
        ckpt_path=tmp_path / "one.ckpt")  # fmt: skip
    assert list(resumed.ledger) == [(GaussianDpEvent(2.0), 1), (subsampled_gaussian(2.0, 0.2), 10)]
    assert torch.equal(again.projection.weight, module.projection.weight)
    loaded = Projected.load_from_checkpoint(tmp_path / "one.ckpt")
    assert loaded.projection.is_released


def test_a_resumed_fit_under_a_seed_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def start(epochs: int, **kwargs: Any) -> tuple[pl.Trainer, Projected]:
        torch.manual_seed(0)
        module, training = Projected(), trainer(strategy=private(seed=5), max_epochs=epochs)
        fit(training, module, loader(), **kwargs)
        return training, module

    _, whole = start(2)
    half, _ = start(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = start(2, ckpt_path=tmp_path / "half.ckpt")
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert not isinstance(one, Tensor) or torch.equal(one, other)


def test_the_ledger_tells_statistics_from_steps_and_keeps_both() -> None:
    ledger = PrivacyLedger()
    ledger.start_run("a")
    ledger.record(GaussianDpEvent(2.0))
    ledger.record(subsampled_gaussian(1.0, 1.0), 3)
    ledger = PrivacyLedger.from_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert (len(ledger), ledger.steps, ledger.statistics()) == (4, 3, [(GaussianDpEvent(2.0), 1)])


def test_replacing_a_record_costs_what_half_the_noise_does() -> None:
    ledger = PrivacyLedger()
    ledger.record(GaussianDpEvent(2.0))
    halved = event_epsilon(GaussianDpEvent(1.0), DELTA)
    assert ledger.epsilon(DELTA, adjacency="replace_one") == pytest.approx(halved, rel=1e-3)


# -- the budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.0, 4.0])
def test_a_budget_pays_for_both(target: float) -> None:
    multipliers = []
    for module in (Projected(5.0), Net()):
        training = trainer(callbacks=[DifferentialPrivacy(target, DELTA, self_check=False)], max_epochs=2)
        fit(training, module, loader())
        strategy: Any = training.strategy
        assert strategy.ledger.steps == 10
        assert 0.99 * target <= strategy.ledger.epsilon(DELTA) <= target
        multipliers.append(strategy.noise_multiplier)
    assert multipliers[0] > multipliers[1]


def test_a_budget_stops_earlier_for_what_was_released(caplog: pytest.LogCaptureFixture) -> None:
    taken = {}
    for module in (Projected(2.0), Net()):
        strategy = private()
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            fit(trainer(strategy=strategy, callbacks=[PrivacyBudget(3.0, DELTA)], max_epochs=-1), module, loader())
        event = subsampled_gaussian(2.0, 0.2)
        longer = strategy.ledger.copy()
        longer.record(event)
        assert strategy.ledger.epsilon(DELTA) <= 3.0 < longer.epsilon(DELTA)
        taken[type(module)] = strategy.ledger.steps
    assert 0 < taken[Projected] < taken[Net]
    assert f"stopping after {taken[Projected]} private steps" in caplog.text


class ReleaseLater(Callback):
    """Releases a statistic when the budget has already said how many steps it has room for."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            trainer.strategy.release_sum(lambda: torch.zeros(3), 2.0, "three numbers")


def test_a_release_during_training_leaves_room_for_fewer_steps() -> None:
    strategy = private()
    callbacks = [PrivacyBudget(3.0, DELTA), ReleaseLater()]
    fit(trainer(strategy=strategy, callbacks=callbacks, max_epochs=-1), Net(), loader())
    assert strategy.ledger.statistics() == [(GaussianDpEvent(2.0), 1)]
    assert 2.0 < strategy.ledger.epsilon(DELTA) <= 3.0


def test_what_the_budget_has_no_room_for_is_not_released() -> None:
    module, strategy = Projected(0.5), private()
    with pytest.raises(PrivacyLimitReached, match=r"no room for the release of 3 principal components.*Give it more"):
        fit(trainer(strategy=strategy, callbacks=[PrivacyBudget(1.0, DELTA)]), module, loader())
    assert not module.projection.is_released and not len(strategy.ledger)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_card_states_the_release_and_counts_steps_alone(tmp_path: Path) -> None:
    callbacks = [DifferentialPrivacy(4.0, DELTA, self_check=False)]
    fit(trainer(callbacks=callbacks, default_root_dir=tmp_path, max_epochs=2), Projected(), loader())
    written = json.loads((tmp_path / "privacy_card.json").read_text())
    for card in (written, card_of_run(tmp_path)):
        assert card["steps"] == {**card["steps"], "total": 10, "in_model": 10, "lost_or_elsewhere": 0}
        assert card["statistics"] == [{"event": "Gaussian mechanism of noise multiplier 2", "times": 1}]
        assert len(card["steps"]["by_mechanism"]) == 1 and "Poisson" in card["steps"]["by_mechanism"][0]["event"]
        assert card["mechanism"]["noise"]["multiplier"] > 0.1
        assert card["epsilon"] == written["epsilon"]
        text = render_card(card)
        assert "| Gaussian mechanism of noise multiplier 2 | 1 |" in text and "10 private steps: 10 in" in text
        assert "private steps and statistics" in text


def test_a_line_says_what_the_release_costs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(trainer(strategy=private(), callbacks=[PrivacyBudget(9.0, DELTA), PrivacyMonitor(DELTA)]), Projected(),
            loader())  # fmt: skip
    alone = event_epsilon(GaussianDpEvent(2.0), DELTA)
    assert f"3 principal components released with noise multiplier 2: ε = {alone:.4g} at δ = 0.001" in caplog.text
    assert "adding up 40 records" in caplog.text


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 7, 1.0), "components must lie between 1 and in_features = 6, got 7"),
        ((6, 0, 1.0), "components must lie between"),
        ((6, 3, -1.0), "noise_multiplier must be non-negative and finite, got -1"),
        ((6, 3, math.inf), "noise_multiplier"),
        ((6, 3, math.nan), "noise_multiplier"),
    ],
)
def test_impossible_projections_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivateProjection(*arguments)


def test_training_without_privacy_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"no directions yet.*DifferentialPrivacy"):
        fit(trainer(), Projected(), loader())


def test_records_of_another_size_are_refused_before_anything_is_charged() -> None:
    strategy = private()
    with pytest.raises(ValueError, match="in_features is 5, and a record has 6 features"):
        fit(trainer(strategy=strategy), Projected(features=5), loader())
    assert not len(strategy.ledger)


class OfMappings(PrivateProjection):
    def inputs_of(self, batch: Any) -> Tensor:
        inputs: Tensor = batch["inputs"]
        return inputs


def test_batches_of_another_form_are_refused_unless_the_layer_knows_them() -> None:
    layer = PrivateProjection(6, 3, 1.0)
    with pytest.raises(TypeError, match=r"found a dict. Override PrivateProjection.inputs_of"):
        layer.inputs_of({"inputs": torch.zeros(1, 6)})
    assert torch.equal(layer.inputs_of(torch.ones(1, 6)), torch.ones(1, 6))
    assert OfMappings(6, 3, 1.0).inputs_of({"inputs": torch.zeros(1, 6)}).shape == (1, 6)


def test_a_release_outside_a_fit_is_refused(tmp_path: Path) -> None:
    private = PrivateStrategy(noise=GaussianNoise(1.0))
    fitted = trainer(strategy=private, max_steps=1, default_root_dir=tmp_path)
    fit(fitted, Net(), loader())
    before = len(private.ledger)
    with pytest.raises(PrivacyConfigurationError, match="open during a fit"):
        private.release_sum(lambda: torch.zeros(3), 1.0, "zeros")
    assert len(private.ledger) == before


def projected() -> Net:
    return Net(nn.Sequential(PrivateProjection(6, 4, 2.0), nn.Linear(4, 3)))


def test_nothing_is_left_of_what_a_trial_run_released() -> None:
    module = projected()
    fit(trainer(strategy=PrivateStrategy(noise=GaussianNoise(1.0)), fast_dev_run=True), module, loader())
    assert not module.net[0].is_released
    private = PrivateStrategy(noise=GaussianNoise(1.0))
    fit(trainer(strategy=private, max_steps=2), module, loader())
    assert module.net[0].is_released
    assert len(private.ledger.statistics()) == 1


def test_copies_of_a_module_that_were_made_before_the_release_are_refused() -> None:
    private = PrivateStrategy(noise=GaussianNoise(1.0))
    with pytest.raises(PrivacyConfigurationError, match="EMAWeightAveraging copied the module"):
        fit(trainer(strategy=private, callbacks=[EMAWeightAveraging()]), projected(), loader())
    assert len(private.ledger) == 0


def test_a_checkpoint_without_directions_is_not_resumed_with_others(tmp_path: Path) -> None:
    module = projected()
    first = trainer(strategy=PrivateStrategy(noise=GaussianNoise(1.0)), max_steps=2)
    fit(first, module, loader())
    module.net[0].reset()
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = PrivateStrategy(noise=GaussianNoise(1.0))
    with pytest.raises(PrivacyConfigurationError, match="holds a statistic that was released"):
        fit(trainer(strategy=again, max_steps=4), projected(), loader(), ckpt_path=tmp_path / "last.ckpt")
