"""Private training through the Trainer: what is computed, what is visible, and that a user's module works as ever."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BackpropClipping,
    DifferentialPrivacy,
    FlatClipping,
    GaussianNoise,
    PerLayerClipping,
    PrivacyMonitor,
    PrivateDDPStrategy,
    PrivateStrategy,
)
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.sampling import draw_poisson_sample
from tests.conftest import Net, assert_close, dataset, fit, loader, oracle_gradients, trainer
from tests.gradients.test_layers import EXAMPLES, randn
from tests.mechanism.test_noise import is_gaussian_of_std
from tests.tensors import DEVICE


def strategy(multiplier: float | None = 0.0, max_norm: float = 0.3, **kwargs: Any) -> PrivateStrategy:
    kwargs.setdefault("clipping", FlatClipping(max_norm))
    return PrivateStrategy(noise=GaussianNoise(multiplier), **kwargs)


class SquaredError(Net):
    """Works for any layer: the loss is a squared distance to random targets, averaged over the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return (self.net(inputs) - targets).pow(2).flatten(1).sum(1).mean()


def first_sample(num_records: int, rate: float, seed: int) -> list[int]:
    return draw_poisson_sample(num_records, rate, Randomness(seed).numpy("sampling", 0)).tolist()


@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda cls: cls.__name__)
def test_one_step_equals_clipping_autograds_gradients_by_hand(kind: type[nn.Module], micro: int | None) -> None:
    for make in EXAMPLES[kind].values():
        layer, example = make()
        count = 12
        shape = example.shape[1:]
        indices = not example.is_floating_point()
        inputs = torch.randint(5, (count, *shape)) if indices else randn(count, *shape)
        layer.double()
        targets = torch.randn_like(layer(inputs))
        module = SquaredError(layer)
        before = copy.deepcopy(module)
        seed, max_norm = 3, 1.5
        private = strategy(0.0, max_norm, max_physical_batch_size=micro, seed=seed)
        data = DataLoader(TensorDataset(inputs, targets), batch_size=6)
        fit(trainer(strategy=private, max_steps=1, precision="64-true"), module, data)

        drawn = first_sample(count, 0.5, seed)
        rows = oracle_gradients(
            before, lambda i: before.training_step((inputs[drawn[i : i + 1]], targets[drawn[i : i + 1]]), 0), len(drawn)
        )
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in rows.values()]).norm(dim=0)
        weights = (max_norm / norms).clamp(max=1)
        assert (norms > max_norm).any(), "the test clips nothing"
        for (name, after), old in zip(module.named_parameters(), before.parameters(), strict=True):
            expected = torch.einsum("b,b...->...", weights, rows[name]) / 6
            assert_close(old.double() - after.double(), expected, 1e-5)


@pytest.mark.parametrize("engine", ["bookkeeping", "per_example"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_updates_do_not_depend_on_micro_batches_engine_or_reduction(engine: str, reduction: str) -> None:
    def trained(**kwargs: Any) -> list[Tensor]:
        torch.manual_seed(0)
        module = Net(reduction=kwargs.get("loss_reduction", "mean"))
        fit(trainer(strategy=strategy(1.0, seed=1, **kwargs), max_steps=4), module, loader())
        return list(module.parameters())

    reference = trained()
    for micro in (1, 3, 100):
        found = trained(max_physical_batch_size=micro, engine=engine, loss_reduction=reduction)
        for one, other in zip(found, reference, strict=True):
            assert_close(one, other, 1e-5)


class Augmented(Net):
    """Adds another pattern to every row of a batch, by its place among the three of its record."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        inputs, labels = batch
        shifts = torch.linspace(-1, 1, 3).repeat(-(-len(inputs) // 3))[: len(inputs), None]
        return inputs + shifts.to(inputs) * (self.trainer.training and torch.arange(6, device=inputs.device)), labels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("engine", "micro"), [("bookkeeping", None), ("bookkeeping", 7), ("per_example", 3)])
def test_augmentations_are_averaged_before_they_are_clipped(engine: str, micro: int | None, reduction: str) -> None:
    seed, max_norm, data = 3, 0.5, dataset(12)
    module = Augmented(reduction=reduction)
    before = copy.deepcopy(module)
    private = strategy(
        0.0, max_norm, max_physical_batch_size=micro, seed=seed, engine=engine, augmentation_multiplicity=3,
        loss_reduction=reduction, self_check=False,
    )  # fmt: skip
    fit(trainer(strategy=private, max_steps=1), module, DataLoader(data, batch_size=6))

    drawn = first_sample(12, 0.5, seed)
    patterns = torch.linspace(-1, 1, 3)[:, None] * torch.arange(6)

    def loss(i: int) -> Tensor:
        inputs, label = data[drawn[i]]
        return torch.nn.functional.cross_entropy(before.net(inputs + patterns), label.expand(3))

    rows = oracle_gradients(before, loss, len(drawn))
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in rows.values()]).norm(dim=0)
    weights = (max_norm / norms).clamp(max=1)
    assert (norms > max_norm).any(), "the test clips nothing"
    for (name, after), old in zip(module.named_parameters(), before.parameters(), strict=True):
        assert_close(old - after, torch.einsum("b,b...->...", weights, rows[name]) / 6, 1e-4)


@pytest.mark.parametrize("rule", [FlatClipping(0.5), PerLayerClipping(0.5), AutomaticClipping()])
def test_a_record_moves_the_sum_by_at_most_the_bound_however_it_is_augmented(rule: Any) -> None:
    """A neighbouring data set lacks a record whose three rows are adversarial: of any size, and different."""
    data = dataset(12)
    seen: dict[bool, list[Tensor]] = {}
    torch.manual_seed(0)
    start = Net()
    for present in (True, False):
        module = copy.deepcopy(start)

        def transfer(batch: Any, dataloader_idx: int, present: bool = present) -> Any:
            inputs, labels = batch
            scale = torch.tensor([1e3, -7.0, 1e-2], device=inputs.device)[:, None]
            inputs[:3] = inputs[:3] * scale if present else torch.nan  # of a record with NaN, nothing is added
            return inputs, labels

        module.on_after_batch_transfer = transfer
        private = strategy(clipping=rule, seed=3, augmentation_multiplicity=3, self_check=False)
        fit(trainer(strategy=private, max_steps=1), module, DataLoader(data, batch_size=6))
        seen[present] = [p.detach() for p in module.parameters()]
    moved = 6 * torch.cat([(a - b).flatten() for a, b in zip(seen[True], seen[False], strict=True)]).norm()
    groups = rule.groups([name for name, _ in start.named_parameters()])
    bound = math.hypot(*rule.group_sensitivities(groups))
    assert 0.3 * bound < moved <= bound * (1 + 1e-5)


class Lengths(Dataset[Any]):
    """Sequences of different lengths."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1 + 7 * index % 5, 6), float(index)), index % 3


def padded(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    sequences = nn.utils.rnn.pad_sequence([sequence for sequence, _ in items], batch_first=True)
    return sequences.sum(1), torch.tensor([label for _, label in items])


def longest_first(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return padded(sorted(items, key=lambda item: -len(item[0])))


@pytest.mark.parametrize("engine", ["bookkeeping", "per_example"])
def test_collation_that_reorders_augmentations_is_refused(engine: str) -> None:
    def train(copies: int, collate: Any) -> None:
        private = strategy(engine=engine, augmentation_multiplicity=copies, seed=1)
        fit(trainer(strategy=private, max_steps=1), Net(), DataLoader(Lengths(), batch_size=6, collate_fn=collate))

    train(2, padded)
    with pytest.raises(PrivacyConfigurationError, match="cannot be told from those of another"):
        train(2, longest_first)


class Together(Net):
    """Averages the logits over the rows of a record: in the right order, or in another."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self.net(inputs)
        if self.right:
            return F.cross_entropy(logits.view(-1, 3, 3).mean(1), labels[::3])
        return F.cross_entropy(logits.view(3, -1, 3).mean(0), labels[: len(labels) // 3])


def test_a_training_step_may_treat_the_augmentations_of_a_record_together() -> None:
    fit(trainer(strategy=strategy(augmentation_multiplicity=3, seed=1), max_steps=2), Together(True), loader())
    with pytest.raises(UnsupportedModelError, match="mix records"):
        fit(trainer(strategy=strategy(augmentation_multiplicity=3, seed=1)), Together(False), loader())


def test_augmentations_that_cannot_be_averaged_are_refused() -> None:
    with pytest.raises(ValueError, match="all augmentations of a record pass"):
        PrivateStrategy(max_physical_batch_size=2, augmentation_multiplicity=3)
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match="a whole number, at least 1"):
            PrivateStrategy(augmentation_multiplicity=wrong)  # type: ignore[arg-type]
    private = strategy(clipping=BackpropClipping(1.0, 1.0), augmentation_multiplicity=2)
    with pytest.raises(PrivacyConfigurationError, match="forms its sum within the backward pass"):
        fit(trainer(strategy=private), Net(), loader())


def updates(steps: int, **kwargs: Any) -> list[Tensor]:
    """The weights after every step of a training whose gradients are zero: nothing but noise."""
    module = Net(nn.Linear(50, 40, bias=False))
    seen: list[Tensor] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(pl_module.net.weight.detach().clone())

    data = DataLoader(TensorDataset(torch.zeros(40, 50), torch.zeros(40, dtype=torch.long)), batch_size=8)
    start = module.net.weight.detach().to(DEVICE, copy=True)
    fit(trainer(strategy=strategy(**kwargs), max_steps=steps, max_epochs=-1, callbacks=[Keep()]), module, data)
    return [b - a for a, b in zip([start, *seen[:-1]], seen, strict=True)]


def test_noise_through_the_trainer_has_the_std_that_the_ledger_claims_and_is_fresh() -> None:
    steps = updates(3, multiplier=2.0, max_norm=0.3)
    std = 2.0 * 0.3 / 8
    for step in steps:
        sample = step.flatten().double()
        assert is_gaussian_of_std(sample, std)
        assert not is_gaussian_of_std(sample, std * 2 / 3)
        assert not is_gaussian_of_std(sample, std * 3 / 2)
    assert abs((steps[0] * steps[1]).mean() / std**2) < 5 / 2000**0.5


def test_noise_differs_between_runs_under_the_same_global_seed() -> None:
    pl.seed_everything(1, verbose=False)
    first = updates(1, multiplier=1.0)
    pl.seed_everything(1, verbose=False)
    second = updates(1, multiplier=1.0)
    assert not torch.allclose(first[0], second[0])
    assert_close(updates(1, multiplier=1.0, seed=4)[0], updates(1, multiplier=1.0, seed=4)[0], 1e-4)


ENTRIES: dict[str, Any] = {
    "strategy object": lambda z: {"strategy": strategy(z)},
    "callback": lambda z: {"callbacks": [DifferentialPrivacy(None, 1e-5, FlatClipping(0.3), GaussianNoise(z))]},
    "backpropagation clipping": lambda z: {"strategy": strategy(z, clipping=BackpropClipping(1.0, 0.3))},
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_huge_noise_multiplier_destroys_training_through_every_entry(entry: str) -> None:
    def distance(z: float) -> float:
        module = Net()
        start = [p.detach().clone() for p in module.parameters()]
        fit(trainer(**ENTRIES[entry](z)), module, loader())
        return sum((p - s).norm().item() for p, s in zip(module.parameters(), start, strict=True))

    assert distance(1e6) > 1e3 * distance(0.0)


class Spy(Callback):
    """Looks at gradients from every hook that has a chance to."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def look(self, hook: str, module: pl.LightningModule) -> None:
        grads = [p.grad.norm().item() for p in module.parameters() if p.grad is not None]
        self.seen.setdefault(hook, []).extend(grads)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("on_train_batch_start", pl_module)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("on_before_zero_grad", pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("on_before_backward", pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.look("on_after_backward", pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("on_before_optimizer_step", pl_module)


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("rule", [{}, {"engine": "per_example"}, {"clipping": BackpropClipping(1.0, 0.3)}], ids=str)
def test_no_hook_sees_a_gradient_without_noise(rule: dict[str, Any], micro: int | None) -> None:
    spy = Spy()
    private = strategy(1e6, max_physical_batch_size=micro, **rule)
    fit(trainer(strategy=private, callbacks=[spy], max_steps=3), Net(), loader())
    assert len(spy.seen["on_after_backward"]) == 3 * 4 == len(spy.seen["on_before_optimizer_step"])
    assert all(norm > 1e3 for norms in spy.seen.values() for norm in norms)


class Ordinary(pl.LightningModule):
    """A module that uses much of what Lightning offers."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.1), nn.ReLU(inplace=True))
        self.head = nn.Linear(5, 3)
        self.mean_loss = MeanMetric()
        self.hooks: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        inputs, labels = batch
        loss = F.cross_entropy(self.head(self.body(inputs)), labels)
        self.mean_loss(loss.detach(), len(labels))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        self.log("examples", float(len(labels)), on_step=False, on_epoch=True, reduce_fx="sum")
        return {"loss": loss, "extra": 1}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", F.cross_entropy(self.head(self.body(inputs)), labels))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.body(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            [{"params": self.body.parameters(), "lr": 1e-2}, {"params": self.head.parameters()}], lr=1e-3
        )
        assert self.trainer.estimated_stepping_batches == 10
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "interval": "step"},
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "epoch"},
        ]

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **kwargs: Any) -> None:
        self.hooks.append("configure_gradient_clipping")
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        assert torch.cat([p.grad.flatten() for p in self.parameters()]).norm() <= 1.0 + 1e-5  # type: ignore[union-attr]

    def on_train_epoch_end(self) -> None:
        self.hooks.append("on_train_epoch_end")


@pytest.mark.parametrize("micro", [None, 3])
def test_an_ordinary_module_works_as_in_plain_lightning(tmp_path: Path, micro: int | None) -> None:
    module = Ordinary()
    keys, hooks = list(module.state_dict()), [name for name, m in module.named_modules() if m._forward_hooks]
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    callbacks = [
        checkpoint,
        EarlyStopping("val_loss", patience=50),
        EMAWeightAveraging(decay=0.5),
        LearningRateMonitor(),
    ]
    run = trainer(
        strategy=strategy(1.0, max_physical_batch_size=micro),
        max_epochs=2,
        enable_checkpointing=True,
        callbacks=callbacks,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    fit(run, module, loader(), loader())
    assert run.global_step == 10 == len(run.strategy.ledger)
    assert module.hooks.count("configure_gradient_clipping") == 10 and module.hooks.count("on_train_epoch_end") == 2
    assert list(module.state_dict()) == keys
    assert [name for name, m in module.named_modules() if m._forward_hooks] == hooks
    assert all(p.requires_grad for p in module.parameters())
    assert type(module) is Ordinary
    metrics = run.callback_metrics
    assert_close(metrics["train_loss_epoch"], metrics["mean_loss"])
    assert metrics["examples"] > 0
    rates = run.optimizers[0].param_groups[0]["lr"] / run.optimizers[0].param_groups[1]["lr"]
    assert rates == pytest.approx(10.0)
    fresh = Ordinary.load_from_checkpoint(checkpoint.best_model_path, map_location="cpu")
    assert list(fresh.state_dict()) == keys
    assert run.test(module, loader(), verbose=False, ckpt_path=checkpoint.last_model_path)[0]["val_loss"] > 0
    predictions = run.predict(module, loader(), ckpt_path=checkpoint.best_model_path)
    assert predictions is not None
    assert sum(len(p) for p in predictions) == 40
    assert len(run.strategy.ledger) == 10, "testing and predicting cost nothing"


def test_the_loss_that_callbacks_see_is_that_of_the_whole_logical_batch() -> None:
    def losses(micro: int | None) -> list[float]:
        torch.manual_seed(0)
        seen = []

        class Keep(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
                seen.append(outputs["loss"].item())

        private = strategy(0.0, seed=1, max_physical_batch_size=micro)
        fit(trainer(strategy=private, callbacks=[Keep()]), Net(), loader())
        return seen

    assert losses(3) == pytest.approx(losses(None), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"limit_train_batches": 2}, 2),
        ({"limit_train_batches": 0.4}, 2),
        ({"max_steps": 3}, 3),
    ],
)
def test_shortened_runs(options: dict[str, Any], steps: int) -> None:
    run = trainer(strategy=strategy(1.0), **options)
    fit(run, Net(), loader())
    assert len(run.strategy.ledger) == steps == run.global_step


def test_gradient_clip_val_acts_on_the_noisy_gradient() -> None:
    module = Net(nn.Linear(6, 3, bias=False))
    start = module.net.weight.detach().to(DEVICE, copy=True)
    fit(trainer(strategy=strategy(1e6), max_steps=1, gradient_clip_val=0.25), module, loader())
    assert (module.net.weight - start).norm().item() == pytest.approx(0.25, rel=1e-3)


def test_empty_draws_are_steps_of_pure_noise() -> None:
    """40 records, q = 1/40: about a third of all batches is empty."""
    run = trainer(strategy=strategy(1.0), max_epochs=1)
    module = Net()
    fit(run, module, loader(batch_size=1))
    assert len(run.strategy.ledger) == 40 == run.global_step
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    module = Net()
    run = trainer(strategy=strategy(1.0, max_physical_batch_size=3), precision=precision, max_steps=3)
    fit(run, module, loader())
    assert len(run.strategy.ledger) == 3
    assert all(p.isfinite().all() for p in module.parameters())


def test_frozen_layers_stay_and_are_not_in_the_norm() -> None:
    module = Net()
    module.net[0].requires_grad_(False)  # type: ignore[index]
    before = copy.deepcopy(module.state_dict())
    fit(trainer(strategy=strategy(1.0), max_steps=2), module, loader())
    assert torch.equal(module.state_dict()["net.0.weight"], before["net.0.weight"])
    assert not torch.equal(module.state_dict()["net.2.weight"], before["net.2.weight"])


def test_layers_that_are_unfrozen_later_are_bounded_from_then_on() -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.net[0].requires_grad_(True)

    module = Net()
    module.net[0].requires_grad_(False)  # type: ignore[index]
    before = copy.deepcopy(module.state_dict())
    run = trainer(strategy=strategy(1.0), max_epochs=2, callbacks=[Unfreeze()])
    fit(run, module, loader())
    assert not torch.equal(module.state_dict()["net.0.weight"], before["net.0.weight"])
    assert len(run.strategy.ledger) == 10


class ExchangeHead(Callback):
    """Replaces the last layer by another of the same shape."""

    def __init__(self, epoch_start: bool) -> None:
        self.epoch_start = epoch_start

    def exchange(self, trainer: Any, module: Any) -> None:
        module.net[2] = nn.Linear(5, 3)
        trainer.optimizers[0].param_groups[0]["params"] = list(module.parameters())

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1 and self.epoch_start:
            self.exchange(trainer, pl_module)


def test_layers_that_are_exchanged_between_steps_are_bounded_from_then_on() -> None:
    spy = Spy()
    run = trainer(strategy=strategy(1e6), max_epochs=2, callbacks=[ExchangeHead(True), spy])
    fit(run, Net(), loader())
    assert min(spy.seen["on_after_backward"]) > 1e3


def test_layers_that_are_unfrozen_within_a_step_stop_the_training() -> None:
    class Impatient(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                self.net[0].requires_grad_(True)  # type: ignore[index]
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Impatient()
    module.net[0].requires_grad_(False)  # type: ignore[index]
    run = trainer(strategy=strategy(1.0, self_check=False))
    with pytest.raises(RuntimeError, match="does not bound"):
        fit(run, module, loader())
    assert len(run.strategy.ledger) == 2


def test_looking_at_a_batch_of_the_train_loader_disturbs_nothing() -> None:
    class Curious(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            next(iter(trainer.train_dataloader))

    run = trainer(strategy=strategy(1.0), callbacks=[Curious()])
    fit(run, Net(), loader())
    assert len(run.strategy.ledger) == 5


# -- checkpoints -------------------------------------------------------------------------------------------------------


def run_and_save(path: Path, seed: int | None, epochs: int, resume: Path | None = None) -> tuple[Net, PrivateStrategy]:
    torch.manual_seed(0)
    module, private = Net(), strategy(1.0, seed=seed)
    run = trainer(strategy=private, max_epochs=epochs)
    fit(run, module, loader(), ckpt_path=resume)
    run.save_checkpoint(path)
    return module, private


def test_a_resumed_run_has_the_same_ledger_and_under_a_seed_the_same_bits(tmp_path: Path) -> None:
    _, whole = run_and_save(tmp_path / "whole.ckpt", 5, 4)
    run_and_save(tmp_path / "half.ckpt", 5, 2)
    module, resumed = run_and_save(tmp_path / "resumed.ckpt", 5, 4, tmp_path / "half.ckpt")
    assert list(resumed.ledger) == list(whole.ledger) and len(resumed.ledger) == 20
    assert resumed.ledger.epsilon(1e-5) == whole.ledger.epsilon(1e-5)
    uninterrupted = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    for name, value in module.state_dict().items():
        assert torch.equal(value, uninterrupted[name])


def test_a_resumed_run_draws_fresh_noise(tmp_path: Path) -> None:
    run_and_save(tmp_path / "half.ckpt", None, 1)
    one, _ = run_and_save(tmp_path / "a.ckpt", None, 2, tmp_path / "half.ckpt")
    two, _ = run_and_save(tmp_path / "b.ckpt", None, 2, tmp_path / "half.ckpt")
    assert not torch.equal(one.net[0].weight, two.net[0].weight)  # type: ignore[index]


def test_a_run_interrupted_within_an_epoch_resumes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = trainer(
        strategy=strategy(1.0),
        max_epochs=4,
        enable_checkpointing=True,
        logger=False,
        callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)],
    )

    class Crash(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 8:
                raise KeyboardInterrupt

    run.callbacks.insert(0, Crash())  # type: ignore[attr-defined]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(run, Net(), loader())
    [saved] = tmp_path.glob("*.ckpt")
    again = strategy(1.0)
    fit(trainer(strategy=again, max_epochs=4), Net(), loader(), ckpt_path=saved)
    assert len(again.ledger) == 20 + 1, "the eighth step was taken and lost"


def test_a_checkpoint_is_plain_data_without_any_generator_state(tmp_path: Path) -> None:
    _, private = run_and_save(tmp_path / "run.ckpt", None, 1)
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(checkpoint["lightning_dp"]) == {"ledger", "clipping", "denoiser", "journal"}
    assert set(checkpoint["lightning_dp"]["journal"]) == {"name", "path", "relative"}
    secret = private.randomness._entropy
    for form in (str(secret).encode(), secret.to_bytes(32, "little"), secret.to_bytes(32, "big")):
        assert form not in (tmp_path / "run.ckpt").read_bytes()
    assert "_entropy" not in str(checkpoint)


def test_steps_that_a_checkpoint_does_not_know_are_still_charged(tmp_path: Path) -> None:
    private = strategy(1.0)
    run = trainer(
        strategy=private,
        max_epochs=2,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)],
    )
    module = Net()
    fit(run, module, loader())
    assert len(private.ledger) == 10
    fit(run, module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len(private.ledger) == 15, "10 steps were taken, and 5 of them taken again"


def test_a_checkpoint_saved_after_validation_keeps_its_ledger(tmp_path: Path) -> None:
    run_and_save(tmp_path / "first.ckpt", None, 1)

    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    run = trainer(strategy=strategy(1.0))
    run.validate(Validated(), loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    run.save_checkpoint(tmp_path / "second.ckpt")
    _, resumed = run_and_save(tmp_path / "third.ckpt", None, 2, tmp_path / "first.ckpt")
    assert len(resumed.ledger) == 10


def test_runs_of_the_same_configuration_are_not_taken_for_one_another(tmp_path: Path) -> None:
    run_and_save(tmp_path / "other.ckpt", None, 1)
    private = strategy(1.0)
    run = trainer(strategy=private, max_epochs=1)
    module = Net()
    fit(run, module, loader())
    run.fit_loop.max_epochs = 2
    fit(run, module, loader(), ckpt_path=tmp_path / "other.ckpt")
    assert len(private.ledger) >= 10


def test_resuming_from_training_without_privacy_is_refused(tmp_path: Path) -> None:
    run = trainer()
    fit(run, Net(), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(PrivacyConfigurationError, match="no privacy ledger"):
        fit(trainer(strategy=strategy(1.0), max_epochs=2), Net(), loader(), ckpt_path=tmp_path / "plain.ckpt")


def test_an_adaptive_norm_is_resumed_and_the_same_for_every_clipping_rule(tmp_path: Path) -> None:
    def adaptive(epochs: int, resume: Path | None = None) -> Any:
        private = PrivateStrategy(AdaptiveClipping(5.0), GaussianNoise(1.0), seed=2)
        run = trainer(strategy=private, max_epochs=epochs)
        torch.manual_seed(0)
        fit(run, Net(), loader(), ckpt_path=resume)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return private.private_step.clipping_state

    whole = adaptive(4)
    half = adaptive(2)
    assert half != {"max_norm": 5.0}
    assert adaptive(4, tmp_path / "2.ckpt") == whole


@pytest.mark.parametrize("clipping", [PerLayerClipping(0.5), AutomaticClipping(), AdaptiveClipping(0.5)], ids=repr)
def test_every_clipping_rule_trains_and_micro_batches_change_nothing(clipping: Any) -> None:
    def trained(micro: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        module = Net()
        private = PrivateStrategy(clipping, GaussianNoise(1.0), max_physical_batch_size=micro, seed=1)
        fit(
            trainer(strategy=private, max_steps=4, callbacks=[PrivacyMonitor(1e-3, log_not_private=True)]),
            module,
            loader(),
        )
        return list(module.parameters())

    for one, other in zip(trained(3), trained(None), strict=True):
        assert_close(one, other, 1e-5)


# -- entries -----------------------------------------------------------------------------------------------------------


def test_the_registered_name_gives_the_strategy_and_asks_for_noise() -> None:
    run = trainer(strategy="private")
    assert isinstance(run.strategy, PrivateStrategy)
    with pytest.raises(PrivacyConfigurationError, match="No noise multiplier.*PrivacyBudget"):
        fit(run, Net(), loader())


def test_several_devices_are_refused_rather_than_ignored() -> None:
    with pytest.raises(PrivacyConfigurationError, match="one device, and the Trainer has 2"):
        trainer(strategy=strategy(1.0), devices=2, accelerator="cpu")


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"clipping": "flat"}, "clipping must be"),
        ({"noise": "1.0"}, "noise must be"),
        ({"engine": "fast"}, "engine must be one of"),
        ({"loss_reduction": "none"}, "loss_reduction must be"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        PrivateStrategy(**kwargs)


def test_workers_and_dictionary_batches() -> None:
    class Dictionary(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

    x, y = dataset().tensors
    data = [{"x": a, "y": b, "name": "n"} for a, b in zip(x, y, strict=True)]
    run = trainer(strategy=strategy(1.0, max_physical_batch_size=3), max_epochs=2)
    fit(run, Dictionary(), DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True))
    assert len(run.strategy.ledger) == 20


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_records_that_are_not_finite_are_left_out_and_reported(recwarn: pytest.WarningsRecorder) -> None:
    inputs, labels = dataset().tensors
    spoiled = inputs.clone()
    spoiled[3], spoiled[17] = float("nan"), float("inf")
    kept = torch.tensor([i for i in range(40) if i not in (3, 17)])
    weights = []
    for data in (TensorDataset(spoiled, labels), TensorDataset(inputs[kept], labels[kept])):
        torch.manual_seed(0)
        module, private = Net(), strategy(0.0, clipping=FlatClipping(0.1), self_check=False)
        trainer(strategy=private, max_steps=1, max_epochs=-1).fit(module, DataLoader(data, batch_size=len(data)))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    start = torch.manual_seed(0) and torch.cat([p.detach().flatten() for p in Net().parameters()])
    moved = [40 * (weights[0] - start), 38 * (weights[1] - start)]
    assert torch.allclose(*moved, atol=1e-5), "the public divisors differ, the sums do not"
    assert [
        str(w.message) for w in recwarn if "2 examples of this step had a gradient that is not finite" in str(w.message)
    ]


def test_a_data_set_of_one_record() -> None:
    private = strategy(1.0)
    fit(trainer(strategy=private, max_epochs=3), Net(), loader(1, 1))
    assert private.sampling_rate == 1 and len(private.ledger) == 3


def test_labels_out_of_range_stop_before_anything_is_charged() -> None:
    inputs, labels = dataset().tensors
    private = strategy(1.0)
    with pytest.raises(IndexError):
        fit(trainer(strategy=private), Net(), DataLoader(TensorDataset(inputs, labels + 7), batch_size=8))
    assert len(private.ledger) == 0


@pytest.mark.parametrize(
    "make", [PrivateStrategy, PrivateDDPStrategy, lambda **options: DifferentialPrivacy(1, 1e-5, **options)]
)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engin": "bookkeeping"}, "no option 'engin': did you mean engine"),
        ({"self_check": "no"}, "self_check must be True or False"),
        ({"journal": 0}, "journal must be True or False"),
        ({"secure_rng": "no"}, "secure_rng must be True or False"),
        ({"max_physical_batch_size": 2.5}, "max_physical_batch_size must be a whole number"),
        ({"max_physical_batch_size": True}, "max_physical_batch_size must be a whole number"),
        ({"max_physical_batch_size": 0}, "max_physical_batch_size must be at least 1"),
        ({"augmentation_multiplicity": True}, "augmentation_multiplicity must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"secure_rng": True, "seed": 3}, "leave seed out"),
        ({"noise": "1.1"}, "noise must be a noise such as"),
    ],
)
def test_a_wrong_option_is_named(make: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make(**options)


def test_what_a_checkpoint_brought_stays_in_the_fit_that_resumed_from_it(tmp_path: Path) -> None:
    first = trainer(strategy=PrivateStrategy(AdaptiveClipping(1.0, learning_rate=2.0), GaussianNoise(1.0)))
    fit(first, Net(), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    strategy = PrivateStrategy(AdaptiveClipping(1.0, learning_rate=2.0), GaussianNoise(1.0))
    again = trainer(strategy=strategy, max_epochs=1)
    fit(again, Net(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert strategy.private_step is not None and strategy.private_step.clipping_state["max_norm"] != 1.0

    class Notes(Callback):
        found: float | None = None

        def on_train_start(self, *args: Any) -> None:
            assert strategy.private_step is not None
            self.found = strategy.private_step.clipping_state["max_norm"]

    notes = Notes()
    again.callbacks.append(notes)
    again.fit_loop.max_epochs = 4
    fit(again, Net(), loader())
    assert notes.found == 1.0
