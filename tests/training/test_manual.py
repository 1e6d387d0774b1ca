"""Manual optimization: optimizers are stepped with what the loop over records gives, or with what no record reaches."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BackpropClipping,
    FlatClipping,
    GaussianNoise,
    LaplaceNoise,
    PerLayerClipping,
    PrivateStrategy,
)
from lightning_dp.errors import PrivacyConfigurationError, PrivacyLimitReached, UnsupportedModelError
from lightning_dp.mechanism import sampling
from lightning_dp.mechanism.sampling import Draw, size_bound
from lightning_dp.training.callbacks.budget import PrivacyBudget
from lightning_dp.training.manual.derived import DerivedFromRecords
from lightning_dp.training.manual.steps import ManualSteps

N, D, Z = 24, 3, 2


def records(count: int = N) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(3))


class Gan(L.LightningModule):
    """Codes are the same in every row, so that a loop over records can repeat them."""

    norm: Callable[[], nn.Module] = nn.Identity

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(Z, 4), type(self).norm(), nn.Tanh(), nn.Linear(4, D))
        self.discriminator = nn.Sequential(nn.Linear(D, 5), nn.LeakyReLU(0.2), nn.Linear(5, 1))
        self.rows: list[int] = []

    def codes(self, count: int) -> Tensor:
        return torch.full((count, Z), 0.3)

    def real_loss(self, x: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(x)).mean()

    def fake_loss(self, count: int) -> Tensor:
        return F.softplus(self.discriminator(self.generator(self.codes(count)).detach())).mean()

    def generator_loss(self, count: int) -> Tensor:
        return F.softplus(-self.discriminator(self.generator(self.codes(count)))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        self.step_discriminator(opt_d, x)
        self.step_generator(opt_g, len(x))

    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.zero_grad()
        self.manual_backward(self.real_loss(x) + self.fake_loss(len(x)))
        opt.step()

    def step_generator(self, opt: Any, count: int) -> None:
        opt.zero_grad()
        self.manual_backward(self.generator_loss(count))
        opt.step()

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.SGD(self.generator.parameters(), 1.0),
            torch.optim.SGD(self.discriminator.parameters(), 1.0),
        )


class Toggled(Gan):
    """Optimizers are toggled, and gradients forgotten after the step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        self.toggle_optimizer(opt_d)
        self.manual_backward(self.real_loss(x) + self.fake_loss(len(x)))
        opt_d.step()
        opt_d.zero_grad()
        self.untoggle_optimizer(opt_d)
        self.toggle_optimizer(opt_g)
        self.manual_backward(self.generator_loss(len(x)))
        opt_g.step()
        opt_g.zero_grad()
        self.untoggle_optimizer(opt_g)


class InParts(Gan):
    """Two backward passes are one step's; the fakes are not detached."""

    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        self.discriminator.zero_grad()
        self.manual_backward(self.real_loss(x))
        self.manual_backward(F.softplus(self.discriminator(self.generator(self.codes(len(x))))).mean())
        opt.step()


class Retained(Gan):
    """Two backward passes through one forward."""

    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        loss = self.real_loss(x)
        opt.zero_grad()
        self.manual_backward(0.25 * loss, retain_graph=True)
        self.manual_backward(0.75 * loss + self.fake_loss(len(x)))
        opt.step()


class ReadToLog(Gan):
    """As most GANs do: numbers are read with item(), computed with, and logged."""

    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.zero_grad()
        real, fake = self.real_loss(x), self.fake_loss(len(x))
        self.manual_backward(real + fake)
        opt.step()
        read = (real.item() + fake.item()) / 2
        self.log_dict({"loss": (real + fake).detach() / 2, "read": read, "rounded": round(read * 100.0, 2)})


class SeldomNormalised(Gan):
    """The generator normalises its batch, and is stepped on some batches only: not on the first, which is examined."""

    norm = staticmethod(lambda: nn.BatchNorm1d(4))

    def codes(self, count: int) -> Tensor:
        return torch.randn(count, Z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        self.step_discriminator(opt_d, x)
        if batch_idx % 2:
            self.step_generator(opt_g, len(x))


class InTurns(Gan):
    """The generator is stepped on some batches, and the discriminator on the others."""

    first = 0

    def codes(self, count: int) -> Tensor:
        return torch.randn(count, Z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        if batch_idx % 3 == type(self).first:
            self.step_generator(opt_g, len(x))
        else:
            self.step_discriminator(opt_d, x)


class GeneratorLater(InTurns):
    first = 1


class KeepsInItsTurn(InTurns):
    """What the generator's turn keeps of records would reach its next steps without noise."""

    def step_generator(self, opt: Any, count: int) -> None:
        opt.zero_grad()
        scale = getattr(self, "kept", torch.ones(()))
        self.manual_backward(self.generator_loss(count) * scale)
        opt.step()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if batch_idx % 3 == type(self).first:
            self.kept = batch[0].mean()


class KeepsLater(KeepsInItsTurn):
    first = 1


class Closures(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        def closure() -> Tensor:
            loss = self.real_loss(x) + self.fake_loss(len(x))
            opt.zero_grad(set_to_none=False)
            self.manual_backward(loss)
            return loss

        with opt.toggle_model():
            opt.step(closure)


class Clipped(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.zero_grad()
        self.manual_backward(self.real_loss(x) + self.fake_loss(len(x)))
        self.clip_gradients(opt, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        opt.step()


class GeneratorFirst(Gan):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        self.step_generator(opt_g, len(x))
        self.step_discriminator(opt_d, x)


def fit(
    module: L.LightningModule,
    data: Tensor | None = None,
    batch_size: int = 8,
    steps: float = 1,
    callbacks: Any = (),
    epochs: int = 1,
    clipping: Any = None,
    noise: Any = 0.0,
    collate: Any = None,
    **options: Any,
) -> PrivateStrategy:
    strategy = PrivateStrategy(
        clipping or FlatClipping(0.7), GaussianNoise(noise) if isinstance(noise, float) else noise, seed=5,
        journal=False, **options,
    )  # fmt: skip
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", max_epochs=epochs, limit_train_batches=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(records() if data is None else data), batch_size, collate_fn=collate))
    return strategy


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The records of every batch."""
    found: list[list[int]] = []
    run = ManualSteps._run

    def noted(self: ManualSteps, batch: Any, draw: Draw, *rest: Any) -> Any:
        found.append(draw.records)
        return run(self, batch, draw, *rest)

    monkeypatch.setattr(ManualSteps, "_run", noted)
    return found


def loop(module: Gan, drawn: list[int], bound: float, batch_size: int) -> dict[str, Tensor]:
    """The discriminator after a step of the loop over the drawn records."""
    net = copy.deepcopy(module.discriminator)
    total = [torch.zeros_like(p) for p in net.parameters()]
    fake = module.generator(module.codes(1)).detach()
    for record in drawn:
        loss = F.softplus(-net(records()[record : record + 1])).sum() + F.softplus(net(fake)).sum()
        gradient = torch.autograd.grad(loss, list(net.parameters()))
        norm = torch.stack([g.norm() for g in gradient]).norm()
        for part, g in zip(total, gradient, strict=True):
            part += g * min(1.0, bound / norm.item())
    return {
        name: (p - part / batch_size).detach() for (name, p), part in zip(net.named_parameters(), total, strict=True)
    }


@pytest.mark.parametrize("kind", [Gan, Toggled, InParts, Retained, Closures, Clipped, ReadToLog, GeneratorFirst])
@pytest.mark.parametrize("batch_size", [1, 8, N])
def test_a_step_is_that_of_the_loop_over_records(kind: type[Gan], batch_size: int, draws: list[list[int]]) -> None:
    module, before = kind(), kind()
    if kind is GeneratorFirst:
        loss = before.generator_loss(1)
        before.zero_grad()
        loss.backward()
        torch.optim.SGD(before.generator.parameters(), 1.0).step()
        before.zero_grad()
    fit(module, batch_size=batch_size)
    assert len(draws) == 1
    expected = loop(before, draws[0], 0.7, batch_size)
    for name, parameter in module.discriminator.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Gan, Toggled, InParts, Closures, Clipped, ReadToLog])
def test_an_optimizer_without_records_is_stepped_as_without_privacy(kind: type[Gan]) -> None:
    module, before = kind(), kind()
    fit(module, noise=0.0)
    before.discriminator.load_state_dict(module.discriminator.state_dict())
    before.generator_loss(1).backward()
    for (name, found), expected in zip(module.generator.named_parameters(), before.generator.parameters(), strict=True):
        torch.testing.assert_close(found, expected - expected.grad, msg=name)


def test_a_generator_that_is_stepped_later_is_found_public_then() -> None:
    strategy = fit(SeldomNormalised(), steps=4)
    plan = strategy.examiner.understanding.manual
    assert (plan.private, plan.public) == ({1}, {0}) and strategy.ledger.steps == 3


@pytest.mark.parametrize("kind", [InTurns, GeneratorLater])
def test_optimizers_that_are_stepped_in_turns_are_told_apart(kind: type[Gan]) -> None:
    module = kind()
    strategy = fit(module, steps=6, batch_size=4, noise=1e4)
    plan = strategy.examiner.understanding.manual
    assert (plan.private, plan.public) == ({1}, {0}) and strategy.ledger.steps == 6
    assert min(float(p.abs().max()) for p in module.discriminator.parameters()) > 100


def test_a_step_that_never_meets_records_is_refused_at_the_start() -> None:
    class Never(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.step_generator(self.optimizers()[0], len(batch[0]))

    with pytest.raises(PrivacyConfigurationError, match="nothing to train privately"):
        fit(Never(), steps=2)


def test_numbers_that_are_read_to_be_logged_are_logged() -> None:
    strategy = fit(ReadToLog())
    logged = strategy.trainer_in_fit().callback_metrics
    assert logged["read"] == pytest.approx(float(logged["loss"])) and float(logged["loss"]) > 0.1
    assert logged["rounded"] == pytest.approx(100 * float(logged["loss"]), abs=0.01)
    assert {type(value) for value in logged.values()} == {Tensor}


def test_no_noise_reaches_it_and_all_of_it_reaches_the_other() -> None:
    module, before = GeneratorFirst(), GeneratorFirst()
    fit(module, noise=1e6)
    before.generator_loss(1).backward()
    for found, expected in zip(module.generator.parameters(), before.generator.parameters(), strict=True):
        torch.testing.assert_close(found, expected - expected.grad)
    assert min(float(p.abs().max()) for p in module.discriminator.parameters()) > 100


@pytest.mark.parametrize("kind", [Gan, InParts, Retained])
@pytest.mark.parametrize("clipping", [FlatClipping(0.7), PerLayerClipping(0.7), AutomaticClipping()])
def test_one_record_moves_the_step_by_no_more_than_its_bound(kind: type[Gan], clipping: Any) -> None:
    found = []
    for scale in (1.0, 1000.0):
        data = records()
        data[7] *= scale
        module = kind()
        fit(module, data, batch_size=N, clipping=clipping)
        found.append(torch.cat([p.flatten() for p in module.discriminator.parameters()]))
    moved = float((found[0] - found[1]).norm()) * N
    assert moved <= 2 * (1.0 if isinstance(clipping, AutomaticClipping) else 0.7) * (1 + 1e-4)
    assert moved > 0.01


class Autoencoder(L.LightningModule):
    """An encoder and a decoder with an optimizer each, and losses of one forward, as a VAE-GAN has them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(D, Z), nn.Sequential(nn.Tanh(), nn.Linear(Z, D))

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.encoder(x)
        likeness = (self.decoder(codes) - x).square().sum(1).mean()
        return likeness + codes.square().sum(1).mean(), likeness

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt_e, opt_d = self.optimizers()
        of_encoder, of_decoder = self.losses(batch[0])
        opt_e.zero_grad()
        self.manual_backward(of_encoder, retain_graph=True)
        opt_d.zero_grad()  # the first loss is the encoder's alone
        self.manual_backward(of_decoder)
        opt_e.step()
        opt_d.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 1.0) for part in (self.encoder, self.decoder)]


def test_losses_of_one_forward_are_each_optimizers_own(draws: list[list[int]]) -> None:
    module, before = Autoencoder(), Autoencoder()
    strategy = fit(module)
    assert strategy.examiner.understanding.manual.private == {0, 1}
    for part, trained in ((before.encoder, module.encoder), (before.decoder, module.decoder)):
        parameters = list(part.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        for record in draws[0]:
            of_encoder, of_decoder = before.losses(records()[record : record + 1])
            # As autograd adds up: both losses reach the encoder.
            loss = of_encoder + of_decoder if part is before.encoder else of_decoder
            gradient = torch.autograd.grad(loss, parameters)
            norm = torch.stack([g.norm() for g in gradient]).norm()
            for sum_, g in zip(total, gradient, strict=True):
                sum_ += g * min(1.0, 0.7 / norm.item())
        for found, p, sum_ in zip(trained.parameters(), parameters, total, strict=True):
            torch.testing.assert_close(found, p - sum_ / 8, rtol=2e-5, atol=1e-6)


class Twice(Gan):
    """Two steps of the discriminator on a batch, of a loss without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Linear(D, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        _, opt = self.optimizers()
        for _ in range(2):
            opt.zero_grad()
            self.manual_backward(0 * self.discriminator(x).mean())
            opt.step()


class Gradients(L.Callback):
    """Keeps the gradients that the discriminator is stepped with."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        own = list(module.discriminator.parameters())
        if optimizer.param_groups[0]["params"][0] is own[0]:
            self.found.append(torch.cat([p.grad.flatten() for p in own]))


def has_std(sample: Tensor, std: float) -> bool:
    """Whether normal numbers have this standard deviation, within five standard errors."""
    return abs(float(sample.std()) / std - 1) < 5 / math.sqrt(2 * sample.numel())


def test_releases_of_one_batch_share_its_noise_and_are_charged_once() -> None:
    gradients = Gradients()
    strategy = fit(Twice(), steps=1.0, epochs=80, noise=1.5, callbacks=[gradients])
    assert strategy.examiner.understanding.manual.releases == 2
    assert len(strategy.ledger) == 80 * math.ceil(N / 8)
    noise = torch.stack(gradients.found)
    assert len(noise) == 2 * len(strategy.ledger) == len({tuple(row.tolist()) for row in noise})
    std = 1.5 * math.sqrt(2) * 0.7 / 8
    assert has_std(noise, std) and not has_std(noise, 2 / 3 * std) and not has_std(noise, 3 / 2 * std)
    one, other = noise[0::2].flatten(), noise[1::2].flatten()
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / math.sqrt(len(one))


class Counted(Gan):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.rows.append(len(batch[0]))
        super().training_step(batch, batch_idx)


class WithoutGenerator(Counted):
    def step_generator(self, opt: Any, count: int) -> None:
        pass


def test_where_an_optimizer_meets_no_record_the_batch_has_a_public_size(draws: list[list[int]]) -> None:
    module = Counted()
    fit(module, steps=3)
    assert module.rows == [size_bound(N, 8 / N)] * 3
    assert len({len(draw) for draw in draws}) > 1


def test_a_sample_that_is_empty_is_a_release_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "draw_poisson_sample", lambda *_: np.zeros(0, dtype=int))
    for kind in (Gan, WithoutGenerator):
        module, before = kind(), kind()
        fit(module)
        for found, expected in zip(module.discriminator.parameters(), before.discriminator.parameters(), strict=True):
            assert torch.equal(found, expected)
        noisy = kind()
        fit(noisy, noise=1.0)
        assert not torch.equal(noisy.discriminator[0].weight, before.discriminator[0].weight)


class Conditional(Gan):
    """The generator is told what the records hold."""

    def generator_loss(self, x: Any) -> Tensor:
        return F.softplus(-self.discriminator(self.generator(x[:, :Z]))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        self.step_discriminator(opt_d, x)
        opt_g.zero_grad()
        self.manual_backward(self.generator_loss(x))
        opt_g.step()


def test_an_optimizer_that_is_told_of_records_is_private() -> None:
    module, before = Conditional(), Conditional()
    strategy = fit(module, noise=1e6)
    assert strategy.examiner.understanding.manual.private == {0, 1}
    assert strategy.examiner.understanding.manual.releases == 2
    for found, expected in zip(module.parameters(), before.parameters(), strict=True):
        assert float((found - expected).abs().max()) > 100


class Later(Gan):
    """The generator is stepped on some batches only."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        self.step_discriminator(opt_d, x)
        if batch_idx % 3 == 2:
            self.step_generator(opt_g, len(x))


def test_code_that_comes_later_is_examined_when_it_comes() -> None:
    module, before = Later(), Later()
    strategy = fit(module, steps=1.0, epochs=3)
    assert strategy.examiner.understanding.manual.public == {0}
    assert len(strategy.ledger) == 9
    assert not torch.equal(module.generator[0].weight, before.generator[0].weight)


class NormalisedFakes(Gan):
    norm = lambda: nn.BatchNorm1d(4)  # noqa: E731


def test_a_generator_may_normalise_its_fakes() -> None:
    module = NormalisedFakes()
    module.codes = lambda count: torch.randn(count, Z)  # type: ignore[method-assign]
    assert fit(module).examiner.understanding.manual.public == {0}


class NormalisedRecords(Gan):
    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))


class Read(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        loss = self.real_loss(x)
        opt.zero_grad()
        self.manual_backward(loss)
        if loss.item() > 0.1:
            opt.step()


class Formatted(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        super().step_discriminator(opt, x)
        if f"{self.real_loss(x).item():.1f}" == "0.0":
            opt.step()


class Rounded(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        super().step_discriminator(opt, x)
        for _ in range(int(self.real_loss(x).item() + 0.5)):
            opt.step()


class ByMetric(Gan):
    """Trains the discriminator while it is not too good, as what a metric has kept of earlier batches says."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MeanMetric()

    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.zero_grad()
        self.manual_backward(self.real_loss(x) + self.fake_loss(len(x)))
        if not self.accuracy.update_called or float(self.accuracy.compute()) < 0.8:
            opt.step()
        self.accuracy.update((self.discriminator(x) > 0).float())


class ByLogged(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.zero_grad()
        loss = self.real_loss(x) + self.fake_loss(len(x))
        self.manual_backward(loss)
        if self.trainer.callback_metrics.get("loss", 1.0) > 0.1:
            opt.step()
        self.log("loss", loss)


NUMBERS: list[Any] = []


class ByEarlierNumber(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.zero_grad()
        loss = self.real_loss(x) + self.fake_loss(len(x))
        self.manual_backward(loss)
        if not NUMBERS or float(torch.ones(()) * NUMBERS[-1]) > 0.1:
            opt.step()
        NUMBERS.append(loss.item())


class OutsideOfTheStep(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        super().step_discriminator(opt, x)
        NUMBERS.append(self.real_loss(x).item())

    def on_train_epoch_end(self) -> None:
        numbers = [number for number in NUMBERS if not isinstance(number, float)]
        self.log("mean", sum(numbers) / len(numbers))


class Scaled(Gan):
    """The generator's loss is multiplied by a number of records."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        self.step_discriminator(opt_d, x)
        weight = self.real_loss(x).item()
        opt_g.zero_grad()
        self.manual_backward(self.generator_loss(len(x)) * weight)
        opt_g.step()


class Masked(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.zero_grad()
        self.manual_backward(self.discriminator(x[x[:, 0] > 0]).sum() / len(x))
        opt.step()


class PastLightning(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.zero_grad()
        self.real_loss(x).backward()
        opt.step()


class Raw(Gan):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        _, opt_d = self.optimizers(use_pl_optimizer=False)
        self.step_discriminator(opt_d, x)


class OverBatches(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        self.manual_backward(self.real_loss(x))
        if self.calls % 2 == 0:
            opt.step()
            opt.zero_grad()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.calls = batch_idx
        super().training_step(batch, batch_idx)


class BatchLoss(Gan):
    def real_loss(self, x: Tensor) -> Tensor:
        scores = self.discriminator(x)
        return F.softplus(-(scores - scores.mean())).mean()


class Kept(Gan):
    def real_loss(self, x: Tensor) -> Tensor:
        self.last = x
        return super().real_loss(x)


class ByHand(Gan):
    """A gradient that is written by hand, from the second epoch on."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        _, opt = self.optimizers()
        opt.zero_grad()
        self.discriminator[0].weight.grad = batch[0].mean(0).expand(5, D).clone() if self.current_epoch else None
        opt.step()


class Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fake: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return fake.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.saved_tensors[0], None


class ThroughBackward(Gan):
    """Records reach the generator in the backward pass alone."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        opt_g, opt_d = self.optimizers()
        self.step_discriminator(opt_d, x)
        opt_g.zero_grad()
        fake = Multiplied.apply(self.generator(self.codes(len(x))), x)
        self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
        opt_g.step()


class InTheHook(Gan):
    def real_loss(self, x: Tensor) -> Tensor:
        self.shown = super().real_loss(x)
        return self.shown

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.shown.item() > 1e9:
            optimizer.param_groups[0]["lr"] = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        del self.shown


class Swallowed(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        try:
            F.embedding(torch.where(x[:, 0] > -9, 0, 9).long(), torch.zeros(2, 1))
            (x[:, 0] * torch.zeros(len(x) + 1)) if self.current_epoch else None
        except (IndexError, RuntimeError):
            return
        super().step_discriminator(opt, x)


class Written(Gan):
    """In the second epoch, records are written into what the module keeps."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        source = batch[0] if self.current_epoch else self.codes(len(batch[0]))
        with torch.no_grad():
            self.discriminator[0].bias.add_(source.mean())


class Listed(Gan):
    """The same line reads codes in the first epoch, and records in the second."""

    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        super().step_discriminator(opt, x)
        source = x if self.current_epoch else self.codes(len(x))
        self.largest = None if source.tolist() else 0


class Forgetful(Gan):
    """Code that first runs in the second epoch, in a function of a well-known name."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.trainer.current_epoch:
            self.scores = self.scores - self.scores.mean()

    def real_loss(self, x: Tensor) -> Tensor:
        self.scores = self.discriminator(x)
        self.zero_grad()
        loss = F.softplus(-self.scores).mean()
        del self.scores
        return loss


class OwnBackward(Gan):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class Hooked(Gan):
    def __init__(self) -> None:
        super().__init__()
        self.generator[0].weight.register_hook(lambda gradient: gradient)


class Plateau(Gan):
    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return list(optimizers), [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[0])]


class Nothing(Gan):
    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (NormalisedRecords, "discriminator.*BatchNorm|[Bb]atch.?[Nn]orm"),
        (Read, "reads what records hold.*if"),
        (Formatted, "reads what records hold.*format string"),
        (ByMetric, "reads what records hold.*test_manual"),
        (ByLogged, "reads what records hold.*test_manual"),
        (ByEarlierNumber, "reads what records hold.*test_manual"),
        (OutsideOfTheStep, "used at .*test_manual.*outside of it.*on_epoch=True"),
        (KeepsInItsTurn, "kept"),
        (KeepsLater, "kept"),
        (Scaled, "no record reaches its loss: a number that item"),
        (Rounded, "reads what records hold"),
        (Masked, "torch.where"),
        (PastLightning, "Call self.manual_backward"),
        (Raw, "without use_pl_optimizer=False"),
        (OverBatches, "gradients of several batches.*zero_grad"),
        (BatchLoss, "not a sum over records"),
        (Kept, "'last'"),
        (Nothing, "nothing to train privately"),
        (ByHand, "goes past the bound"),
        (ThroughBackward, "goes past the bound"),
        (InTheHook, "reads what records hold"),
        (Swallowed, "An operation on records failed|exchanging some examples of the batch"),
        (Written, "writes what it computes from records into .'discriminator.0.bias'"),
        (Listed, "reads what records hold"),
        (Forgetful, "not a sum over records"),
        (OwnBackward, "backward of the module's own"),
        (Hooked, "gradient hooks"),
        (Plateau, "ReduceLROnPlateau"),
    ],
)
def test_what_cannot_be_bounded_is_refused(kind: type[Gan], says: str) -> None:
    with pytest.raises((UnsupportedModelError, PrivacyConfigurationError), match=f"(?s){says}"):
        fit(kind(), steps=3, epochs=2)


class Clamped(Gan):
    """WGAN's weights, and D's second step after them."""

    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        super().step_discriminator(opt, x)
        with torch.no_grad():
            for parameter in self.discriminator.parameters():
                parameter.clamp_(-0.5, 0.5)


class Conditioned(Gan):
    """Labels, and arguments that are checked."""

    def real_loss(self, x: Tensor) -> Tensor:
        label = F.one_hot((x[:, 0] > 0).long(), 2).float()
        scores = self.discriminator(x) + label.sum(1, keepdim=True)
        return -torch.distributions.Normal(scores, torch.ones_like(scores)).log_prob(x[:, :1]).mean()


class Regularised(Gan):
    """A penalty on the generator's own gradient, and a random branch."""

    def generator_loss(self, count: int) -> Tensor:
        codes = self.codes(count).requires_grad_(True)
        fake = self.generator(codes)
        (gradient,) = torch.autograd.grad(fake.sum(), codes, create_graph=True)
        weight = 1.0 if torch.rand(1).item() > 2 else 0.5
        return F.softplus(-self.discriminator(fake)).mean() + weight * gradient.square().mean()


class Penalised(Gan):
    """WGAN-GP."""

    def real_loss(self, x: Tensor) -> Tensor:
        mixed = (0.3 * x + 0.7 * self.generator(self.codes(len(x))).detach()).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.discriminator(mixed).sum(), mixed, create_graph=True)
        return (10 * (gradient.norm(2, 1) - 1).square()).mean() - self.discriminator(x).mean()


class Reaching(Gan):
    """Settings of the optimizer within."""

    def step_discriminator(self, opt: Any, x: Tensor) -> None:
        opt.optimizer.param_groups[0]["lr"] = 0.5
        super().step_discriminator(opt, x)


@pytest.mark.parametrize("kind", [Penalised, Conditioned, Clamped])
def test_one_record_moves_penalties_and_labels_by_no_more_than_the_bound(kind: type[Gan]) -> None:
    found = []
    for scale in (1.0, 300.0):
        data = records()
        data[7] *= scale
        module = kind()
        fit(module, data, batch_size=N)
        found.append(torch.cat([p.flatten() for p in module.discriminator.parameters()]))
    moved = float((found[0] - found[1]).norm()) * N
    assert 1e-3 < moved <= 2 * 0.7 * (1 + 1e-4)


class WithOwnOptimizers(Gan):
    """The same optimizers in every fit."""

    def configure_optimizers(self) -> Any:
        if not hasattr(self, "kept"):
            self.kept = super().configure_optimizers()
        return self.kept


def test_nothing_is_left_on_parameters_and_optimizers() -> None:
    class Untoggled(WithOwnOptimizers):
        def step_discriminator(self, opt: Any, x: Tensor) -> None:
            super().step_discriminator(opt, x)
            opt.zero_grad()

    module = Untoggled()
    for _ in range(2):
        fit(module, steps=2)
        assert all(p.grad is None for p in module.discriminator.parameters())
    before = module.discriminator[0].weight.detach().clone()
    module.real_loss(records()).backward()
    module.kept[1].step()  # without privacy, outside of a fit
    assert not torch.equal(module.discriminator[0].weight, before)


def test_several_fits_of_one_optimizer_are_each_watched() -> None:
    class Bypassing(WithOwnOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            raw = getattr(self, "raw", False)
            _, opt = self.optimizers(use_pl_optimizer=not raw)
            self.step_discriminator(opt, batch[0])

    module = Bypassing()
    fit(module)
    module.raw = True
    with pytest.raises(PrivacyConfigurationError, match="without use_pl_optimizer=False"):
        fit(module)


def test_records_with_the_batch_in_another_dimension_have_one_length() -> None:
    class TimeFirst(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step((batch[0].transpose(0, 1)[:, 0],), batch_idx)

    fit(TimeFirst(), collate=lambda items: (torch.stack([row.repeat(2, 1) for (row,) in items], 1),))


@pytest.mark.parametrize("kind", [Clamped, Conditioned, Regularised, Penalised, Reaching])
@pytest.mark.parametrize("batch_size", [8, N])
def test_ordinary_steps_are_taken(kind: type[Gan], batch_size: int) -> None:
    module, before = kind(), kind()
    strategy = fit(module, batch_size=batch_size, steps=2)
    assert strategy.examiner.understanding.manual.public == {0}
    for name, found in module.named_parameters():
        assert not torch.equal(found, before.get_parameter(name)), name


def test_what_an_operation_on_records_raised_is_kept() -> None:
    derived, x = DerivedFromRecords(), torch.ones(3)
    derived.mark([x, None])
    with derived:
        with contextlib.suppress(RuntimeError):
            torch.ones(2) + torch.ones(3)
        assert derived.failure is None
        with contextlib.suppress(RuntimeError):
            torch.ones(2) + x
    assert derived.failure is not None


def test_what_is_computed_from_records_is_held() -> None:
    derived, x, y = DerivedFromRecords(), torch.ones(3), torch.zeros(3)
    derived.mark({"x": x})
    with derived, derived.functions():
        view = y[1:]
        view.copy_(x[1:])
        held = [
            x * 2,
            x.view(3, 1),
            x.detach(),
            x.data,
            y,
            torch.stack([y, x]),
            torch.zeros(3).index_fill(0, x.long(), 1),
        ]
        free = [torch.randn_like(x), torch.zeros(len(x)), x.new_ones(2), torch.ones(3) * 2]
        for read in (x.tolist, lambda: bool(x.any()), x.nonzero, lambda: x[x > 0], lambda: torch.equal(x, y)):
            with pytest.raises(UnsupportedModelError, match="reads what records hold"):
                read()
        with pytest.raises(UnsupportedModelError, match="reads what records hold"):
            torch.tensor_split(free[0], x.long())
        float(free[0].sum())
        assert F.one_hot(x.long(), 2).shape == (3, 2)
    assert all(map(derived.holds, held)) and not any(map(derived.holds, free))


def test_a_number_that_is_read_is_computed_with_and_logged_but_decides_nothing() -> None:
    derived, x = DerivedFromRecords(), torch.tensor([1.0, 2.0])
    derived.mark(x)
    with derived, derived.functions():
        number, public = x.sum().item(), torch.ones(2).sum().item()
        assert type(public) is float
        computed = [
            sum([number, 2, number]) / 4,
            -(1 - number),
            abs(number) * 1.5 - 1,
            round(number + 0.26, 1) ** 2 / 4,
        ]
        tensors = [
            torch.ones(2) * number,
            torch.full((2,), 1.0).mul_(number),
            number * torch.ones(2),
            torch.tensor(number),
        ]
        decisions: list[Callable[[], Any]] = [
            lambda: number > 2,
            lambda: number == 3.0,
            lambda: 1 if number else 0,
            lambda: float(number),
            lambda: int(number),
            lambda: range(number),
            lambda: math.exp(number),
            lambda: math.floor(number),
            lambda: number // 1,
            lambda: max(number, 1.0),
            lambda: {number},
            lambda: f"{number:.2f}",
            lambda: str(number),
            lambda: repr([number]),
            lambda: copy.deepcopy(number),
            lambda: np.array([number], dtype=float),
            lambda: torch.zeros(number),
            lambda: torch.full((2,), number),
        ]
        for decide in decisions:
            with pytest.raises(UnsupportedModelError, match="reads what records hold at .*test_manual"):
                decide()
        found = [number.as_tensor() for number in computed]
        assert all(map(derived.holds, found))
        later = DerivedFromRecords()
        with later, later.functions():
            assert later.holds(number.as_tensor()) and later.holds(torch.ones(2) * computed[0])
    assert [float(tensor) for tensor in found] == pytest.approx([2.0, 2.0, 3.5, 3.3**2 / 4])
    with pytest.raises(UnsupportedModelError, match="outside of it"):
        torch.ones(2) * number
    assert all(map(derived.holds, tensors)) and all(t.max() == 3 for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64])
def test_numbers_are_computed_with_as_python_does(dtype: torch.dtype) -> None:
    derived, x = DerivedFromRecords(), torch.ones(3).to(dtype)
    derived.mark(x)
    with derived, derived.functions():
        number = x[0].item()
        total = sum([number * 7] * 300) - 1 + round(number, 2) * 1000 * 1000
        made = torch.tensor([number, 2.5])
        assert torch.tensor([[number], [2.5]]).shape == (2, 1)
        found = total.as_tensor(), made
        assert torch.as_tensor(number).shape == () and torch.tensor(number, dtype=torch.float64).dtype == torch.float64
        for decide in (lambda: np.sqrt(number), lambda: divmod(number, 2)):
            with pytest.raises(UnsupportedModelError, match="reads what records hold"):
                decide()
    assert float(found[0]) == 2100 - 1 + 1e6 and found[1].tolist() == [1.0, 2.5]
    assert derived.holds(made) and made.dtype == torch.float32


def test_records_of_different_lengths_are_refused() -> None:
    class Padded(Gan):
        def real_loss(self, x: Tensor) -> Tensor:
            return F.softplus(-self.discriminator(x[:, 0])).mean()

    def collate(items: list[Any]) -> Any:
        return (nn.utils.rnn.pad_sequence([row.repeat(1 + int(row[0] > 0), 1) for (row,) in items], True),)

    with pytest.raises(PrivacyConfigurationError, match="padding='max_length'"):
        fit(Padded(), collate=collate)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clipping": BackpropClipping(1.0, 1.0)}, "BackpropClipping: use FlatClipping"),
        ({"clipping": AdaptiveClipping(1.0)}, "AdaptiveClipping: use FlatClipping"),
        ({"noise": LaplaceNoise(1.0)}, "LaplaceNoise: use GaussianNoise"),
        ({"engine": "per_example"}, "use 'bookkeeping'"),
        ({"self_check": False}, "found by the self-check"),
        ({"max_physical_batch_size": 4}, "make that smaller"),
        ({"augmentation_multiplicity": 2}, "augment each record once"),
        ({"loss_reduction": "sum"}, "mean over the batch"),
    ],
)
def test_options_that_it_does_not_go_together_with_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PrivacyConfigurationError, match=says):
        fit(Gan(), **options)


class OneParameterTwice(Gan):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1.0), torch.optim.SGD(self.discriminator.parameters(), 1.0)


class LeftOut(Gan):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.generator.parameters(), 1.0), torch.optim.SGD(self.discriminator[0].parameters(), 1)


@pytest.mark.parametrize(("kind", "says"), [(OneParameterTwice, "same parameter"), (LeftOut, "no optimizer holds")])
def test_every_parameter_belongs_to_one_optimizer(kind: type[Gan], says: str) -> None:
    with pytest.raises(PrivacyConfigurationError, match=says):
        fit(kind())


def test_a_budget_pays_for_all_batches() -> None:
    budget = PrivacyBudget(epsilon=3.0, delta=1e-3)
    strategy = fit(Gan(), steps=1.0, epochs=4, noise=GaussianNoise(), callbacks=[budget])
    assert len(strategy.ledger) == 12
    assert 2.9 < strategy.ledger.epsilon(1e-3) <= 3.0
    with pytest.raises(PrivacyLimitReached):
        strategy.manual._charge()


def test_a_sample_is_larger_than_its_bound_with_a_probability_below_the_tail() -> None:
    assert size_bound(1000, 1.0) == 1000
    size = size_bound(100, 0.1, tail=0.01)
    sizes = torch.distributions.Binomial(100, torch.tensor(0.1)).sample((20_000,))
    assert 0.002 < float((sizes > size).float().mean()) < 0.013
    assert float((sizes > size - 1).float().mean()) > 0.006
