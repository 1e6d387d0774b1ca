"""Audits: their bounds hold, they find what is there, and they catch trainings that are not what they claim."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from scipy import stats
from torch import Tensor, nn

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BackpropClipping,
    DFAMixin,
    FlatClipping,
    GaussianNoise,
    GradientEncoding,
    LaplaceNoise,
    PerLayerClipping,
    PrivateStrategy,
    StudentTNoise,
    calibrate_noise,
)
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.audit.bounds import Audit, gaussian_bound, gaussian_epsilon, one_run_bound, rates_bound
from lightning_dp.audit.one_run import _label_of, _WithCanaries, audit_mechanism, audit_training
from lightning_dp.audit.step import audit_module, audit_step
from lightning_dp.cli import audit as audit_command_module
from lightning_dp.cli.command import main
from lightning_dp.mechanism.clipping import Bounding
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.noise import Noise
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.sampling import Draw, PoissonBatchSampler
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.training import users_loader as loader_module
from tests.conftest import Net, fit, loader, trainer
from tests.mechanism.test_sampling import fits_binomial

# -- bounds ------------------------------------------------------------------------------------------------------------


def by_definition(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The p-value of theorem 5.2, term by term."""
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    at_least = [sum(math.comb(r, k) * p**k * (1 - p) ** (r - k) for k in range(max(0, w), r + 1)) for w in range(v + 1)]
    alpha = max((at_least[v - i] - at_least[v]) / i for i in range(1, v + 1))
    return at_least[v] + 2 * m * delta * alpha


@pytest.mark.parametrize(("m", "r", "v"), [(50, 20, 19), (100, 60, 50), (40, 40, 38)])
@pytest.mark.parametrize("delta", [0.0, 1e-4])
def test_the_one_run_bound_is_where_the_p_value_crosses(m: int, r: int, v: int, delta: float) -> None:
    found = one_run_bound(m, r, v, delta, 0.95)
    assert found > 0.3
    assert by_definition(m, r, v, found - 1e-3, delta) <= 0.05 < by_definition(m, r, v, found + 1e-3, delta)


@pytest.mark.slow
def test_the_one_run_bound_of_randomised_response_is_rarely_above_the_truth() -> None:
    """Randomised response is the worst case: every guess is right with probability p."""
    random, epsilon = np.random.default_rng(0), 1.5
    p = 1 / (1 + math.exp(-epsilon))
    found = [one_run_bound(300, 300, int(v), 0.0) for v in random.binomial(300, p, 400)]
    assert np.mean(np.array(found) > epsilon) <= 0.05 + 3 * math.sqrt(0.05 / 400)
    assert np.mean(found) > 1.1
    assert one_run_bound(300, 300, 150, 0.0) == 0.0


def test_the_gaussian_bound_is_rarely_above_the_truth_and_close() -> None:
    random, separation = np.random.default_rng(0), 1.0
    rate = stats.norm.sf(separation / 2)
    errors = random.binomial(2000, rate, (300, 2))
    found = np.array([gaussian_bound(int(a), int(b), 2000, 1e-5) for a, b in errors])
    truth = gaussian_epsilon(separation, 1e-5)
    assert np.mean(found > truth) <= 0.05 + 3 * math.sqrt(0.05 / 300)
    assert np.mean(found) > 0.8 * truth


def test_gaussian_epsilon_is_the_accountants() -> None:
    ledger = PrivacyLedger()
    ledger.record(GaussianNoise(0.8).event(0.8))
    assert gaussian_epsilon(1 / 0.8, 1e-5) == pytest.approx(ledger.epsilon(1e-5), rel=1e-3)


def test_rates_bound() -> None:
    assert rates_bound(50, 50, 100, 0.0) == 0.0
    assert 3 < rates_bound(0, 0, 100, 0.0) < math.log(100)


# -- every mechanism, and what is wrong with it ------------------------------------------------------------------------


class Feedback(DFAMixin, Net):
    """Trained by feedback."""


BOUNDED: dict[str, tuple[Bounding, Noise]] = {
    "flat": (FlatClipping(0.1), GaussianNoise()),
    "per layer": (PerLayerClipping(0.1), GaussianNoise()),
    "automatic": (AutomaticClipping(), GaussianNoise()),
    "adaptive": (AdaptiveClipping(0.1), GaussianNoise()),
    "backpropagation clipping": (BackpropClipping(1.0, 1e-3), GaussianNoise()),
    "gradient encoding": (GradientEncoding(max_norm=0.1), GaussianNoise()),
    "gradient encoding, Student's t": (GradientEncoding(max_norm=0.1), StudentTNoise(9)),
    "gradient encoding, Laplace": (GradientEncoding(max_norm=0.1), LaplaceNoise()),
}
SIGNALS: dict[str, type[Net]] = {"backprop": Net, "feedback": Feedback}
#: Every bounding with every noise that it can be combined with, and every signal.
MECHANISMS = {f"{name}, {signal}": (*BOUNDED[name], SIGNALS[signal]) for name in BOUNDED for signal in SIGNALS}


def audited(name: str, trials: int = 200, multiplier: float = 0.5) -> Audit:
    clipping, noise, kind = MECHANISMS[name]
    module = kind()
    module.trainer = trainer()
    return audit_module(module, loader(), clipping, noise, multiplier=multiplier, trials=trials, confidence=0.99999)


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=[pytest.mark.slow] if m.endswith("feedback") else []) for m in MECHANISMS]
)
def test_no_mechanism_reveals_more_than_it_claims(name: str) -> None:
    found = audited(name)
    assert found.passed, found
    assert found.lower_bound > 0 or not name.startswith("flat"), "an audit that finds nothing shows nothing"


@pytest.mark.slow
def test_a_single_step_is_audited_tightly() -> None:
    found = audited("flat, backprop", trials=3000)
    assert 0.8 * found.claimed < found.lower_bound <= found.claimed


class WeakNoise(GaussianNoise):
    """Two thirds of the noise that it claims."""

    def fill_(self, out: Tensor, scale: float, generators: Any) -> None:
        super().fill_(out, scale * 2 / 3, generators)


class SmallSensitivity(FlatClipping):
    """Its sensitivity is divided by the batch size, as if a record's share of a mean were the bound."""

    def group_sensitivities(self, groups: Any, state: Any = ()) -> list[float]:
        return [self.max_norm / 5]


class Unnoised(PrivateStep):
    """The last parameter's sum gets no noise."""

    def noise_scales(self, *args: Any) -> dict[str, float]:
        scales = super().noise_scales(*args)
        return {**scales, list(scales)[-1]: 0.0}


class MeanOverTheBatch(PrivateStep):
    """Divides by the number of examples that were drawn."""

    def note_drawn(self, count: int) -> None:
        more = self.sums._divisor / count
        self.sums._divisor = float(count)
        self.sums._scales = {name: scale * more for name, scale in self.scales.items()}


def step_of(
    model: nn.Module, kind: type[PrivateStep] = PrivateStep, clipping: Any = None, noise: Any = None, seed: Any = None
) -> Callable[[], PrivateStep]:
    clipping = clipping or FlatClipping(0.1)
    engine = clipping.make_engine("bookkeeping", model)
    mechanism = Mechanism(clipping, noise or GaussianNoise())
    return lambda: kind(mechanism, engine, PrivacyLedger(), Randomness(seed))


def run_backward(model: nn.Module) -> Callable[[PrivateStep, Tensor], None]:
    def backward(step: PrivateStep, batch: Tensor) -> None:
        if isinstance(step, MeanOverTheBatch):
            step.note_drawn(len(batch))
        with step.engine.forward(len(batch)):
            loss = model(batch).pow(2).sum()
        with step.backward():
            loss.backward()

    return backward


def audited_step(opposed: int = 0, **arguments: Any) -> Audit:
    """Of four records and one more; or of many that agree, and one against them all."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(5, 6)
    if opposed:
        model = nn.Sequential(nn.Linear(6, 2, bias=False))
        model[0].weight = nn.Parameter(torch.eye(6)[:1].repeat(2, 1))
        batch = torch.ones(opposed + 1, 6)
        batch[-1, 1:] = -1
    return audit_step(
        step_of(model, **arguments),
        run_backward(model),
        batch[:-1],
        batch,
        multiplier=1.0,
        trials=1200,
        confidence=0.999,
    )


def test_an_honest_step_passes() -> None:
    found = audited_step()
    assert found.passed and found.lower_bound > 0.4 * found.claimed, found


@pytest.mark.parametrize(
    "broken",
    [
        {"noise": WeakNoise()},
        pytest.param({"clipping": SmallSensitivity(0.1)}, marks=pytest.mark.slow),
        pytest.param({"kind": Unnoised}, marks=pytest.mark.slow),
        pytest.param({"kind": MeanOverTheBatch, "opposed": 40}, marks=pytest.mark.slow),
    ],
    ids=["2/3 of the noise", "sensitivity over the batch size", "last layer without noise", "mean over the batch"],
)
def test_broken_steps_are_caught(broken: dict[str, Any]) -> None:
    found = audited_step(**broken)
    assert not found.passed, found


def test_noise_that_repeats_is_caught() -> None:
    """A seed that is used again: the noise of one step is that of another, and can be subtracted."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(5, 6)
    make, backward = step_of(model, seed=1), run_backward(model)

    class Again(PrivateStep):
        def begin(self, *args: Any, **kwargs: Any) -> None:
            super().begin(*args, **kwargs)
            self.sums._number = 0

    make = step_of(model, kind=Again, seed=1)
    found = audit_step(make, backward, batch[:4], batch, multiplier=1.0, trials=500, confidence=0.999)
    assert not found.passed, found


# -- whole trainings ---------------------------------------------------------------------------------------------------


def audited_training(epsilon: float, records: int, root: Path, seed: int | None = None, steps: int = 10) -> Audit:
    """Of every second record a step."""
    multiplier = calibrate_noise(epsilon=epsilon, delta=1e-5, sampling_rate=0.5, steps=steps)
    return audit_mechanism(
        lambda: PrivateStrategy(FlatClipping(1.0), GaussianNoise(multiplier), seed=seed),
        records=records,
        expected_batch_size=records // 2,
        steps=steps,
        delta=1e-5,
        seed=seed,
        root=root,
    )


def test_a_training_is_audited_in_one_run(tmp_path: Path) -> None:
    found = audited_training(4.0, 6000, tmp_path)
    assert found.claimed == pytest.approx(4.0, abs=0.05)
    assert 0.5 < found.lower_bound <= found.claimed


def test_a_training_with_less_noise_than_it_claims_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = GaussianNoise.fill_
    monkeypatch.setattr(GaussianNoise, "fill_", lambda self, out, scale, streams: fill(self, out, scale / 5, streams))
    found = audited_training(1.0, 6000, tmp_path)
    assert not found.passed, found


@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0, 8.0])
def test_dp_sgd_on_as_many_records_as_mnist_has(epsilon: float, tmp_path: Path) -> None:
    """The bound is never above the claim, and at ε = 4 at least half of it."""
    found = audited_training(epsilon, 60_000, tmp_path, seed=7, steps=30)
    assert found.lower_bound <= found.claimed <= epsilon
    assert found.lower_bound >= (0.5 if epsilon == 4 else 0.3) * epsilon, found


@pytest.mark.slow
def test_wrong_labels_are_found_in_a_model_trained_with_little_noise(tmp_path: Path) -> None:
    """Black box. Against the claim of the noise that it has, and against a claim that is false."""

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 3)))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 2.0)

    def audit(strategy: Any) -> Audit:
        torch.manual_seed(0)
        training = trainer(
            strategy=strategy, max_steps=150, max_epochs=-1, default_root_dir=tmp_path / str(id(strategy))
        )
        return audit_training(Wide(), loader(300, 400), training, delta=1e-5, canaries=300, guessed=0.5, seed=0)

    honest = audit(PrivateStrategy(FlatClipping(1.0), GaussianNoise(20.0)))
    assert honest.passed and honest.claimed < 10, honest
    revealing = audit(PrivateStrategy(FlatClipping(1.0), GaussianNoise(0.05)))
    assert revealing.passed and revealing.lower_bound > 0.2, revealing


def test_the_command_audits_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).parents[2] / "recipes" / "digits" / "dp_sgd.yaml")
    options = ["--canaries", "50", "--trials", "50", "--confidence", "0.9999", "--out", str(tmp_path)]
    overridden = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.max_epochs=1"]
    main(["audit", "--config", recipe, *options, *overridden, "--trainer.enable_progress_bar=false"])
    output = capsys.readouterr().out
    for attack in ("wrong labels", "Dirac canaries", "one step"):
        assert f"{attack}: ε ≥" in output
    found = json.loads((tmp_path / "audit.json").read_text())
    assert len(found) == 3 and all(audit["passed"] for audit in found)
    assert (tmp_path / "audit.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        main(["audit", "--config", recipe, "--confidence", "1.5"])


def test_the_command_runs_the_attacks_that_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(Path(__file__).parents[2] / "recipes" / "digits" / "dp_sgd.yaml")
    monkeypatch.setattr(audit_command_module, "audit_training", lambda *args, **kwargs: pytest.fail("it trains"))
    overridden = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    few = ["--trials", "50", "--confidence", "0.9999", "--out", str(tmp_path)]  # one in 20 would fail by chance at 95 %
    main(["audit", "--config", recipe, "--attacks", "step", *few, *overridden])
    assert "one step: ε ≥" in (output := capsys.readouterr().out) and "wrong labels" not in output
    assert len(json.loads((tmp_path / "audit.json").read_text())) == 1
    private = "--trainer.callbacks=[]"
    with pytest.raises(SystemExit, match="states no δ"):
        main(["audit", "--config", recipe, "--attacks", "step", private, *overridden])


def test_records_get_other_labels() -> None:
    pairs = [(torch.full((2,), float(i)), i % 3) for i in range(6)]
    added = _WithCanaries(pairs, np.array([4, 1]), np.array([0, 2]))
    assert len(added) == 8
    assert [label for _, label in added.__getitems__([0, 6, 7])] == [0, 0, 2]
    assert torch.equal(added[6][0], pairs[4][0]) and added[6][1] == 0
    named = _WithCanaries([{"x": 1.0, "label": 2}], np.array([0]), np.array([1]))
    assert named[1] == {"x": 1.0, "label": 1} and named[0]["label"] == 2
    with pytest.raises(ValueError, match="finds none"):
        _label_of(torch.zeros(3))


# -- what checks catch -------------------------------------------------------------------------------------------------


class Shuffled(PoissonBatchSampler):
    """Goes through a shuffled data set, and says that it drew Poisson samples."""

    def __iter__(self) -> Any:
        self.draws = deque()
        size = round(self.sampling_rate * self.num_records)
        order = self._randomness.numpy("sampling", self._first_step()).permutation(self.num_records)
        for start in range(0, self.num_records, size):
            batch = order[start : start + size].tolist()
            self.draws.append(Draw(list(batch), len(batch)))
            yield batch


@pytest.mark.parametrize(("kind", "honest"), [(PoissonBatchSampler, True), (Shuffled, False)])
def test_shuffled_sampling_is_caught(kind: type[PoissonBatchSampler], honest: bool, tmp_path: Path) -> None:
    """By the sizes of batches that arrive in training."""
    sizes: list[int] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            sizes.append(len(batch[0]))

    with patch.object(loader_module, "PoissonBatchSampler", kind):
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), self_check=False)
        fit(trainer(strategy=strategy, max_epochs=60, callbacks=[Watch()]), Net(), loader(40, 8))
    assert fits_binomial(np.array(sizes), 40, 0.2) == honest


class Remembers(PrivateStrategy):
    """Saves where its noise comes from."""

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        generator = self.randomness.torch("noise", len(self.ledger), torch.device("cpu"))
        super().save_checkpoint({**checkpoint, "state": generator.get_state()}, *args, **kwargs)


def generator_states(value: Any) -> int:
    """Tensors in a checkpoint that a generator of torch's would accept as its state."""
    if isinstance(value, dict):
        return sum(map(generator_states, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(generator_states, value))
    return int(isinstance(value, Tensor) and value.dtype == torch.uint8 and len(value) >= 16)


@pytest.mark.parametrize(("kind", "honest"), [(PrivateStrategy, True), (Remembers, False)])
def test_generator_states_in_a_checkpoint_are_caught(kind: Any, honest: bool, tmp_path: Path) -> None:
    run = trainer(strategy=kind(FlatClipping(1.0), GaussianNoise(1.0)), max_steps=1)
    fit(run, Net(), loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert (generator_states(torch.load(tmp_path / "run.ckpt")) == 0) == honest
