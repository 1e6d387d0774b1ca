"""Denoisers: what they compute, that they see nothing private, and that they live through checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import signal, stats
from torch import Tensor, nn

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BackpropClipping,
    FlatClipping,
    GaussianNoise,
    GradientEncoding,
    JamesSteinDenoiser,
    KSDenoiser,
    LowPassDenoiser,
    PerLayerClipping,
    PowerLawCodebook,
    PrivacyLedger,
    PrivacyMonitor,
    PrivateStrategy,
    StudentTNoise,
)
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism.clipping import Bounding
from lightning_dp.mechanism.denoising import Denoiser, DenoiserState, PublicNoise, kolmogorov_smirnov
from lightning_dp.mechanism.noise import Noise
from lightning_dp.mechanism.randomness import Randomness
from tests.conftest import Net, assert_close, fit, loader, trainer
from tests.steps import make_step

DENOISERS: list[Denoiser] = [
    KSDenoiser(strength=20.0, least=0.0),
    JamesSteinDenoiser(),
    LowPassDenoiser(),
    LowPassDenoiser(a=(-0.8, 0.1), b=(0.2, 0.05, 0.05)),
]


def public(scale: float, names: Mapping[str, Tensor], noise: Noise = GaussianNoise()) -> PublicNoise:
    generator = torch.Generator().manual_seed(7)

    def fresh(count: int) -> Tensor:
        drawn = torch.empty(count)
        noise.fill_(drawn, 1.0, lambda block: generator)
        return drawn

    return PublicNoise(dict.fromkeys(names, scale), noise.std(), fresh)


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1), (50, 80), (300, 20)])
def test_the_statistic_is_that_of_scipy(sizes: tuple[int, int]) -> None:
    one, other = torch.randn(sizes[0]).round(decimals=1), (0.3 + torch.randn(sizes[1])).round(decimals=1)
    expected = stats.ks_2samp(one.numpy(), other.numpy()).statistic
    assert kolmogorov_smirnov(one, other) == pytest.approx(expected)


def test_ks_scales_a_gradient_that_differs_from_noise_and_drops_noise() -> None:
    rule = KSDenoiser(strength=100.0, most=5.0, least=2.0)
    noise = {"a": 0.1 * torch.randn(20_000), "b": 0.1 * torch.randn(30_000)}
    clear = {name: value + 0.5 for name, value in noise.items()}
    faint = {name: value + 0.003 for name, value in noise.items()}
    for gradients, factor in ((noise, 0.0), (clear, 5.0)):
        found = {name: value.clone() for name, value in gradients.items()}
        assert rule.denoise(found, public(0.1, found), {}) == {}
        for name, value in found.items():
            assert torch.equal(value, gradients[name] * factor)
    found = {name: value.clone() for name, value in faint.items()}
    rule.denoise(found, public(0.1, found), {})
    flat = torch.cat([value / 0.1 for value in faint.values()])
    distance = 100 * kolmogorov_smirnov(flat, public(0.1, found).fresh(len(flat)))
    assert 0 < distance < 5 and (distance < 2) == bool((found["a"] == 0).all())


def test_james_stein_is_its_formula_and_closer_to_the_truth_than_the_noisy_gradient() -> None:
    truth = {"a": 0.02 * torch.randn(400), "b": torch.ones(100), "c": torch.tensor([1.0, 2.0])}
    rule, ratios = JamesSteinDenoiser(), []
    for _ in range(200):
        noisy = {name: value + 0.1 * torch.randn_like(value) for name, value in truth.items()}
        found = {name: value.clone() for name, value in noisy.items()}
        rule.denoise(found, public(0.1, found), {})
        for name in ("a", "b"):
            shrunk = 1 - (len(noisy[name]) - 2) * 0.01 / noisy[name].square().sum()
            assert_close(found[name], noisy[name] * shrunk.clamp(min=0), 1e-3)
        assert torch.equal(found["c"], noisy["c"])
        ratios.append(
            [((found[n] - truth[n]).square().sum() / (noisy[n] - truth[n]).square().sum()).item() for n in ("a", "b")]
        )
    faint, strong = torch.tensor(ratios).mean(0)
    assert faint < 0.2 and strong < 1.0
    with pytest.raises(ValueError, match="has none"):
        rule.check(StudentTNoise(2, 1.0))
    rule.check(StudentTNoise(2.5, 1.0))


@pytest.mark.parametrize("rule", [r for r in DENOISERS if isinstance(r, LowPassDenoiser)], ids=repr)
def test_the_low_pass_filter_is_scipys_over_its_response_to_a_constant(rule: LowPassDenoiser) -> None:
    series = torch.randn(30, 4, dtype=torch.float64)
    filtered = signal.lfilter(rule.b, [1.0, *rule.a], series.numpy(), axis=0)
    gain = signal.lfilter(rule.b, [1.0, *rule.a], [1.0] * 30)
    state: DenoiserState = {}
    for step in range(30):
        gradients = {"w": series[step].clone()}
        state = rule.denoise(gradients, public(0.1, gradients), state)
        assert_close(gradients["w"], torch.from_numpy(filtered[step]) / gain[step], 1e-9)
    constant = {"w": torch.full((3,), 2.0)}
    rule.denoise(constant, public(0.1, constant), {})
    assert_close(constant["w"], torch.full((3,), 2.0))


def test_a_parameter_that_was_frozen_or_exchanged_begins_anew() -> None:
    """Unbiased: a constant gradient stays what it is."""
    rule: LowPassDenoiser = LowPassDenoiser(b=(0.05, 0.05))
    state: DenoiserState = {}
    for number, names in enumerate([["a"], ["a", "b"], ["b"], ["a", "b"], ["a", "b"]]):
        gradients = {name: torch.ones(2 if number < 4 else 3) for name in names}
        state = rule.denoise(gradients, public(0.1, gradients), state)
        for value in gradients.values():
            assert_close(value, torch.ones_like(value))
    other = {"a": torch.ones(3)}
    LowPassDenoiser(a=(-0.5,), b=(0.5,)).denoise(other, public(0.1, other), state)  # a past of another filter
    assert_close(other["a"], torch.ones(3))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LowPassDenoiser(a=(-1.1,)), "not stable"),
        (lambda: LowPassDenoiser(a=(0.5,), b=()), "b at least one"),
        (lambda: LowPassDenoiser(a=(float("nan"),)), "finite"),
        (lambda: LowPassDenoiser(a=(), b=(1.0, -1.0)), "no low-pass filter"),
        (lambda: KSDenoiser(strength=0.0), "strength must be positive"),
        (lambda: KSDenoiser(least=6.0), "least ≤ most"),
        (lambda: KSDenoiser(most=math.inf), "least ≤ most"),
        (lambda: PrivateStrategy(denoiser="low-pass"), "denoiser must be one such as"),  # type: ignore[arg-type]
    ],
)
def test_what_filters_nothing_is_refused(make: Any, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        make()


# -- nothing private ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", DENOISERS, ids=repr)
@pytest.mark.parametrize("clipping", [FlatClipping(1.0), PerLayerClipping(1.0), GradientEncoding()], ids=repr)
def test_other_records_with_the_same_noisy_gradient_give_the_same_result(rule: Denoiser, clipping: Bounding) -> None:
    """Everything that a step holds differs (examples, their number, norms, sums), but for what was released."""

    def results(records: Tensor) -> list[Tensor]:
        model = nn.Linear(6, 4)
        nn.init.ones_(model.weight)
        bound = clipping.for_module(model)
        step = make_step(
            bound.make_engine("bookkeeping", model),
            bound,
            GaussianNoise(),
            PrivacyLedger(),
            Randomness(seed=1),
            denoiser=rule,
        )
        step.contributions.keep_norms = True
        found = []
        for number in range(4):
            step.begin(1.0, 0.1, 3.0)
            with step.engine.forward(len(records)):
                loss = model(records).pow(2).sum()
            with step.backward(1.0):
                loss.backward()
            step.contributions.hand_over()
            step.sums.collect()
            generator = torch.Generator().manual_seed(number)
            released = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
            step.sums.collect = lambda released=released: {**released, "": torch.zeros(1)}  # type: ignore[method-assign]
            step.release()
            del step.sums.collect
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found

    first, second = results(torch.randn(5, 6)), results(100 * torch.randn(9, 6))
    assert len(first) == len(second) == 8
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


class Recording(Denoiser):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.noise: list[PublicNoise] = []

    def denoise(self, gradients: Mapping[str, Tensor], noise: PublicNoise, state: DenoiserState) -> DenoiserState:
        self.seen.append({name: value.clone() for name, value in gradients.items()})
        self.noise.append(noise)
        for value in gradients.values():
            value.fill_(7.0)
        return state


@pytest.mark.parametrize("noise", [GaussianNoise(2.0), StudentTNoise(9, 2.0)], ids=repr)
def test_a_denoiser_is_given_the_noisy_gradient_and_independent_noise_of_its_scale(noise: Noise) -> None:
    class Still(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * super().training_step(batch, batch_idx)

    rule, module = Recording(), Still(nn.Sequential(nn.Linear(6, 2000), nn.Linear(2000, 3)))
    before = [p.detach().clone() for p in module.parameters()]
    clipping = FlatClipping(0.5) if isinstance(noise, GaussianNoise) else GradientEncoding(PowerLawCodebook((0.5,)))
    fit(trainer(strategy=PrivateStrategy(clipping, noise, rule), max_steps=1), module, loader(40, 8))
    for old, parameter in zip(before, module.parameters(), strict=True):
        assert_close(old - parameter.detach(), torch.full_like(old, 7.0), 1e-4)  # what it left is what is applied
    [given], [known] = rule.seen, rule.noise
    [scale] = set(known.scales.values())
    assert scale == pytest.approx(2.0 * clipping.max_norm / 8)  # type: ignore[attr-defined]
    sample = torch.cat([value.flatten() for value in given.values()]).cpu() / scale
    fresh = known.fresh(len(sample)).cpu()
    assert not torch.equal(fresh, known.fresh(len(sample)).cpu())
    assert abs((sample * fresh).mean()) < 5 * noise.std() ** 2 / len(sample) ** 0.5
    distribution = stats.norm() if isinstance(noise, GaussianNoise) else stats.t(9)
    for drawn in (sample, fresh):
        assert stats.kstest(drawn.numpy(), distribution.cdf).pvalue > 1e-6
        assert stats.kstest(drawn.numpy() * 1.5, distribution.cdf).pvalue < 1e-6
        assert stats.kstest(drawn.numpy() / 1.5, distribution.cdf).pvalue < 1e-6


# -- in training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", DENOISERS, ids=repr)
@pytest.mark.parametrize(
    "clipping",
    [
        FlatClipping(1.0),
        PerLayerClipping(1.0),
        AutomaticClipping(),
        AdaptiveClipping(),
        BackpropClipping(1.0, 0.1),
        GradientEncoding(PowerLawCodebook()),
    ],
    ids=repr,
)
def test_every_denoiser_works_with_every_bounding(rule: Denoiser, clipping: Bounding) -> None:
    """It changes what is learned, and not what it costs."""

    def trained(denoiser: Denoiser | None) -> tuple[list[Tensor], PrivacyLedger]:
        torch.manual_seed(0)
        module, strategy = Net(), PrivateStrategy(clipping, GaussianNoise(0.5), denoiser, seed=1)
        fit(trainer(strategy=strategy, max_steps=3), module, loader())
        return [p.detach() for p in module.parameters()], strategy.ledger

    (plain, ledger), (denoised, same) = trained(None), trained(rule)
    assert any(not torch.equal(one, other) for one, other in zip(plain, denoised, strict=True))
    assert all(parameter.isfinite().all() for parameter in denoised)
    assert list(ledger) == list(same)


@pytest.mark.parametrize("rule", DENOISERS, ids=repr)
def test_without_noise_there_is_nothing_to_remove(rule: Denoiser) -> None:
    module = Net()
    before = copy.deepcopy(module)
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(0.0), rule, seed=1)
    fit(trainer(strategy=strategy, max_steps=1), module, loader())
    plain = copy.deepcopy(before)
    fit(
        trainer(strategy=PrivateStrategy(FlatClipping(1.0), GaussianNoise(0.0), seed=1), max_steps=1),
        plain,
        loader(),
    )
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert_close(one.detach(), other.detach(), 1e-6)


@pytest.mark.parametrize("rule", DENOISERS, ids=repr)
def test_a_resumed_run_repeats_an_uninterrupted_one(rule: Denoiser, tmp_path: Path) -> None:
    def run(epochs: int, ckpt: Path | None = None, save: Path | None = None) -> Net:
        torch.manual_seed(0)
        module = Net()
        callbacks = [ModelCheckpoint(save, filename="last", save_top_k=-1)] if save else []
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(0.5), rule, seed=1)
        run = trainer(strategy=strategy, max_epochs=epochs, enable_checkpointing=bool(save), callbacks=callbacks)
        fit(run, module, loader(), ckpt_path=ckpt)
        return module

    whole = run(2)
    run(1, save=tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_dp"]["denoiser"]
    assert bool(state) == isinstance(rule, LowPassDenoiser)
    resumed = run(2, ckpt=tmp_path / "last.ckpt")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_denoiser_that_does_not_know_the_noise_is_refused() -> None:
    strategy = PrivateStrategy(GradientEncoding(), StudentTNoise(1.5, 1.0), JamesSteinDenoiser())
    with pytest.raises(PrivacyConfigurationError, match="JamesSteinDenoiser needs noise with a standard deviation"):
        fit(trainer(strategy=strategy), Net(), loader())


def test_the_signal_to_noise_ratio_is_that_of_the_noisy_gradient() -> None:
    def shown(denoiser: Denoiser | None) -> float:
        torch.manual_seed(0)
        strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(0.1), denoiser, seed=1)
        run = trainer(strategy=strategy, max_steps=1, callbacks=[PrivacyMonitor(1e-3)], log_every_n_steps=1)
        fit(run, Net(), loader())
        return float(run.callback_metrics["privacy/signal_to_noise"])

    assert shown(KSDenoiser()) == pytest.approx(shown(None)) != 0
