"""Everything that is refused, through the Trainer, with the name of the culprit and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opacus.layers
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BackpropClipping,
    FlatClipping,
    GaussianNoise,
    PerLayerClipping,
    PrivacyConfigurationError,
    PrivateStrategy,
    UnsupportedModelError,
)
from tests.conftest import Net, dataset, fit, loader, trainer


def train(module: Any, data: Any = None, **kwargs: Any) -> Any:
    options = {
        key: kwargs.pop(key) for key in ("engine", "loss_reduction", "self_check", "per_record_means") if key in kwargs
    }
    private = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), **options)
    run = trainer(strategy=private, **{"max_steps": 2, **kwargs})
    fit(run, module, loader() if data is None else data)
    return run


def refused(module: Any, says: str, data: Any = None, **kwargs: Any) -> None:
    with pytest.raises((PrivacyConfigurationError, UnsupportedModelError, TypeError), match=says):
        train(module, data, **kwargs)


# -- layers ------------------------------------------------------------------------------------------------------------


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_batch_norm_is_refused_and_the_advice_works() -> None:
    refused(Net(normalised()), r"'net.1' \(BatchNorm1d\).*repair=True")
    images = DataLoader(TensorDataset(torch.randn(40, 1, 5, 5), torch.randint(3, (40,))), batch_size=8)
    convolutional = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 3))
    refused(Net(convolutional), r"'net.1' \(BatchNorm2d\)", images)
    train(Net(ModuleValidator.fix(convolutional)), images)


def test_a_frozen_batch_norm_in_eval_mode_is_an_ordinary_function() -> None:
    net = normalised()
    net[1].eval().requires_grad_(False)
    train(Net(net))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_layer_of_the_users_own_is_run_once_more() -> None:
    train(Net(nn.Sequential(Scale(), nn.Linear(6, 3))))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(6))])
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.gains[0])


def test_parameters_in_a_list_train_as_they_are() -> None:
    train(Net(Holder()))
    train(Net(Holder()), engine="per_example")
    frozen = Holder()
    frozen.gains.requires_grad_(False)
    train(Net(frozen))


class Recurrence(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.view(-1, 3, 2))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train_as_they_are(kind: Any) -> None:
    train(Net(Recurrence(kind(2, 4, batch_first=True))))
    train(Net(Recurrence(kind(2, 4, batch_first=True))), engine="per_example")
    train(Net(Recurrence(getattr(opacus.layers, f"DP{kind.__name__}")(2, 4, batch_first=True))))


class Attention(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, **kwargs)
        self.out = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 2)
        return self.out(self.attention(x, x, x)[0].mean(1))


def test_attention_that_draws_random_numbers_and_has_to_be_run_again_is_refused_and_says_what_to_do() -> None:
    kwargs = {"dropout": 0.1, "batch_first": True}
    refused(Net(Attention(**kwargs, add_bias_kv=True)), r"'net.attention' \(MultiheadAttention\).*add_bias_kv=False")
    train(Net(Attention(**kwargs)))
    train(Net(Attention(batch_first=True, add_bias_kv=True)))


def test_attention_across_the_batch_is_refused() -> None:
    refused(Net(Attention(batch_first=False)), "bmm mixes records")


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused(reentrant: bool) -> None:
    class Checkpointed(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs = batch[0].requires_grad_()
            logits = torch.utils.checkpoint.checkpoint(self.net, inputs, use_reentrant=reentrant)
            return F.cross_entropy(logits, batch[1])

    refused(Checkpointed(), "activation checkpointing")


@pytest.mark.parametrize("engine", ["bookkeeping", "per_example"])
@pytest.mark.parametrize("how", ["in place", "wrapped", "the LightningModule"])
def test_a_compiled_model_trains_through_its_original(how: str, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    def trained(compiled: bool) -> tuple[Net, list[str]]:
        torch.manual_seed(0)
        module = Net()
        given: Any = module
        if compiled and how == "in place":
            module.net.compile(backend="eager")
        elif compiled and how == "wrapped":
            module.net = torch.compile(module.net, backend="eager")
        elif compiled:
            given = torch.compile(module, backend="eager")
        private = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), seed=3, engine=engine)
        fit(trainer(strategy=private, max_steps=2), given, loader())
        return module, list(module.state_dict())

    with caplog.at_level("INFO", logger="lightning.pytorch"):
        module, names = trained(True)
    assert "train through their originals" in caplog.text
    plain, _ = trained(False)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    if how == "in place":
        assert module.net._compiled_call_impl is not None
    elif how == "wrapped":
        assert "net._orig_mod.0.weight" in names
        assert module.net.forward != module.net._orig_mod.__call__
    else:
        assert module._compiler_ctx is not None


def test_one_parameter_in_two_roles_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.norm = nn.LayerNorm(3)
            self.norm.weight = self.linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    refused(Net(Odd()), "one parameter in different roles")


def test_nothing_to_train_is_refused() -> None:
    module = Net()
    module.requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)  # type: ignore[method-assign]
    refused(module, "nothing to train")


# -- losses and gradients that the engine cannot see -------------------------------------------------------------------


class Penalised(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0.1 * self.net[0].weight.pow(2).sum()  # type: ignore[index]


class Contrastive(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = F.normalize(self.net(batch[0]), dim=1)
        return F.cross_entropy(features @ features.detach().T, torch.arange(len(features)))


class SoftmaxOverTheBatch(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return -self.net(batch[0]).log_softmax(0).gather(1, batch[1][:, None]).mean()


class MeanOverValid(Net):
    """The normaliser counts the batch's valid labels: a data-dependent one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = torch.where(batch[0][:, 0] > 0, batch[1], -100)
        return F.cross_entropy(self.net(batch[0]), labels, ignore_index=-100)


class RunningMean(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean.mul_(0.9).add_(0.1 * batch[0].mean(0))
        return super().training_step(batch, batch_idx)


class Standardised(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] - batch[0].mean(0)) / batch[0].std(0), batch[1]


class NoisySum(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
        return F.cross_entropy(self.net(noisy), batch[1], reduction="sum")


class WeightedClasses(Net):
    """A mean weighted by class divides by the weights of the labels that happen to be in the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 20.0]))


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Contrastive(), r"not a sum over records: mm mixes records at .*test_checks.py:\d+"),
        (SoftmaxOverTheBatch(), r"_log_softmax along the dimension of the batch at .*test_checks.py:\d+"),
        (RunningMean(), "kept in 'mean', without noise"),
        (Standardised(), "on_after_batch_transfer.*mixes records"),
        (NoisySum(), "loss_reduction='mean' does not explain"),
        (Net(reduction="sum"), "loss_reduction='sum'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gradients_that_mix_examples_or_escape_the_engine_are_refused(module: Net, says: str) -> None:
    refused(module, says)


class Without(Net):
    """As `MeanOverValid`, or weighted by class, per record: what those are understood as."""

    def __init__(self, other: Net) -> None:
        super().__init__()
        self.other = other

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        if isinstance(self.other, WeightedClasses):
            weights = torch.tensor([1.0, 5.0, 20.0])
            return (
                F.cross_entropy(self.net(inputs), labels, reduction="none") * (weights / weights.mean())[labels]
            ).mean()
        labels = torch.where(inputs[:, 0] > 0, labels, -100)
        return F.cross_entropy(self.net(inputs), labels, reduction="none").mean()


@pytest.mark.parametrize("kind", [WeightedClasses, MeanOverValid])
def test_a_mean_that_depends_on_the_batch_is_understood_or_refused(kind: Any) -> None:
    def trained(module: Net) -> Tensor:
        torch.manual_seed(0)
        module.net = Net().net
        private = PrivateStrategy(FlatClipping(1.0), GaussianNoise(0.0), seed=3)
        fit(trainer(strategy=private, max_steps=2), module, loader())
        return torch.cat([p.detach().flatten() for p in module.net.parameters()])

    torch.testing.assert_close(trained(kind()), trained(Without(kind())))
    refused(kind(), "per_record_means", per_record_means=False)


def test_a_mean_where_a_sum_was_announced_is_refused() -> None:
    refused(Net(), "loss_reduction='sum' does not explain", loss_reduction="sum")


def test_the_self_check_leaves_no_trace() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)))
            self.register_buffer("steps", torch.zeros(()))
            self.seen: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.steps += 1
            self.seen.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    def trained(self_check: bool) -> Counting:
        torch.manual_seed(0)
        module = Counting()
        private = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), self_check=self_check, seed=1)
        fit(trainer(strategy=private, max_steps=3), module, loader())
        return module

    with_check, without = trained(True), trained(False)
    assert with_check.steps == 3 == len(with_check.seen)
    for one, other in zip(with_check.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other), "random streams were shifted"


def mixup(examples: Any) -> Any:
    x, y = (torch.stack(column) for column in zip(*examples, strict=True))
    return 0.7 * x + 0.3 * x.flip(0), y


@pytest.mark.parametrize("place", [0, -1])
def test_a_row_that_takes_from_another_is_refused_wherever_it_is(place: int) -> None:
    def collate(items: list[Any]) -> Any:
        inputs, targets = torch.utils.data.default_collate(items)
        inputs[place] = inputs[place] + inputs[-1 - place] / 2
        return inputs, targets

    refused(Net(), "collate_fn .*mixes records", loader(collate_fn=collate))


def test_mixing_in_the_collate_function_is_refused() -> None:
    refused(Net(), "collate_fn .*mixes records", loader(collate_fn=mixup))


def ragged(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2 + i % 5, 6), torch.tensor(i % 3)) for i in range(count)]


def padded(examples: Any) -> Any:
    sequences, labels = zip(*examples, strict=True)
    lengths = torch.tensor([len(s) for s in sequences])
    return nn.utils.rnn.pad_sequence(list(sequences), batch_first=True), lengths, torch.stack(labels)


class Pooled(Net):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, lengths, labels = batch
        outputs = self.net(inputs)
        mask = torch.arange(inputs.shape[1])[None] < lengths[:, None]
        pooled = (outputs * mask[..., None]).sum(1) / lengths[:, None] if self.masked else outputs.mean(1)
        return F.cross_entropy(pooled, labels)


def test_padding_is_fine_when_masked_and_refused_when_it_leaks() -> None:
    data = DataLoader(ragged(40), batch_size=8, collate_fn=padded)
    train(Pooled(masked=True), data)
    refused(Pooled(masked=False), "exchanging some examples", data)


def test_gradient_hooks_on_parameters_are_refused() -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        module = Net()
        getattr(module.net[0].weight, register)(lambda grad: None)  # type: ignore[index]
        refused(module, r"\['net.0.weight'\] have gradient hooks")
        refused(module, r"\['net.0.weight'\] have gradient hooks", engine="per_example")


def test_a_frozen_batch_norm_that_wakes_up_is_refused() -> None:
    class WakeUp(Net):
        def on_train_epoch_start(self) -> None:
            self.train()

    net = normalised()
    net[1].eval().requires_grad_(False)
    refused(WakeUp(net), "BatchNorm1d")


def test_a_step_that_fetches_its_own_batches_is_refused() -> None:
    class Fetching(Net):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    refused(Fetching(), "Take a batch instead")


def test_a_schedule_counted_inside_the_step_is_not_a_dependence() -> None:
    class Annealed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.count += 1
            return super().training_step(batch, batch_idx) * min(1.0, self.count / 100)

    train(Annealed())


def test_a_transformer_in_mixed_precision_is_accepted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x[:, None] * torch.arange(1.0, 17.0)[None, :, None])).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v)).mean(1)

    for precision in ("bf16-mixed", "bf16-true"):
        train(Net(Attention()), precision=precision)


def test_a_gradient_past_the_layers_is_found_without_the_self_check() -> None:
    refused(Penalised(), r"\['net.0.weight'\]: a gradient came to them past", self_check=False)


def test_that_nobody_looks_is_said() -> None:
    private = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), self_check=False)
    with pytest.warns(UserWarning, match="nobody looks whether records influence"):
        trainer(strategy=private, max_steps=1).fit(Net(), loader())


def test_a_step_that_is_random_is_not_mistaken_for_one_that_mixes_examples() -> None:
    class Noisy(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch[0] + torch.randn_like(batch[0]), batch[1]), batch_idx)

    train(Noisy())


# -- Trainer and optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})], "max_epochs": 2, "max_steps": -1},
            "within the fit",
        ),
        ({"overfit_batches": 2}, "fast_dev_run"),
        ({"precision": "16-true"}, "bf16-mixed"),
    ],
)
def test_trainer_options_that_break_the_accounting_are_refused(options: dict[str, Any], says: str) -> None:
    refused(Net(), says, **options)


def test_a_gradient_scaler_of_another_plugin_is_refused() -> None:
    from lightning.pytorch.plugins import Precision

    plugin = Precision()
    plugin.scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    refused(Net(), "scales the loss and skips steps.*16-mixed", plugins=[plugin])


class TwoOptimizers(Net):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[2].parameters(), 0.1)]  # type: ignore[index]


class Quasi(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class PartlyOptimized(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), 0.1)  # type: ignore[index]


class ForeignParameters(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(7))], 0.1)


class Skipping(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class TwiceEvaluating(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class Twice(Net):
    def configure_optimizers(self) -> Any:
        return TwiceEvaluating(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (TwoOptimizers(), "multiple optimizers|2 optimizers"),
        (Quasi(), "LBFGS"),
        (PartlyOptimized(), r"net.2.weight.*freeze them"),
        (ForeignParameters(), r"shapes \[\(7,\)\].*configure_optimizers"),
        (Skipping(), "return a loss for every batch"),
        (Twice(), "more than once on one batch"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_optimization_that_is_not_one_release_per_batch_is_refused(module: Net, says: str) -> None:
    with pytest.raises(Exception, match=says):
        train(module)


def test_optimizing_frozen_parameters_too_is_fine() -> None:
    module = Net()
    module.net[0].requires_grad_(False)  # type: ignore[index]
    train(module)


def test_several_train_loaders_are_refused() -> None:
    class Either(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"], batch_idx)

    refused(Either(), "exactly one train dataloader", {"a": loader(), "b": loader()})
    refused(Either(), "exactly one train dataloader", CombinedLoader({"a": loader(), "b": loader()}, "min_size"))


def test_a_batch_size_beyond_the_data_is_warned_about() -> None:
    private = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    with pytest.warns(UserWarning, match="exceeds the 5 records"):
        trainer(strategy=private, max_steps=1).fit(Net(), DataLoader(dataset(5), batch_size=8))
    assert private.sampling_rate == 1.0


# -- the bounding itself, before the first step ------------------------------------------------------------------------


class TooLarge(FlatClipping):
    """Weighs with twice the norm that it states."""

    def weights(self, norms: Any, groups: Any, state: Any = ()) -> Any:
        return 2 * super().weights(norms, groups, state)


class Together(FlatClipping):
    """Clips to the mean norm of the batch."""

    def weights(self, norms: Any, groups: Any, state: Any = ()) -> Any:
        return super().weights(norms.mean().expand_as(norms), groups, state).clamp(max=1e-3)

    def group_sensitivities(self, groups: Any, state: Any = ()) -> list[float]:
        return [1e9]


@pytest.mark.parametrize(
    ("rule", "says"), [(TooLarge(1e-3), "its bound is 0.001"), (Together(1e-4), "who else is there")]
)
def test_a_rule_that_does_not_keep_its_bound_is_found_before_the_first_step(rule: Any, says: str) -> None:
    strategy = PrivateStrategy(rule, GaussianNoise(1.0))
    module = Net()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(UnsupportedModelError, match=says):
        fit(trainer(strategy=strategy), module, loader())
    assert len(strategy.ledger) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    "rule",
    [
        FlatClipping(1e-3),
        PerLayerClipping(1e-3),
        AutomaticClipping(),
        AdaptiveClipping(1e-3),
        BackpropClipping(1.0, 1e-3),
    ],
    ids=repr,
)
def test_rules_that_keep_their_bounds_pass(rule: Any) -> None:
    strategy = PrivateStrategy(rule, GaussianNoise(1.0))
    fit(trainer(strategy=strategy), Net(), loader())
    assert len(strategy.ledger) == 5


def _by_splitting(x: Tensor) -> int:
    flag = torch.where((x > 1e6).any(), 5, 9).view(1)
    return len(torch.tensor_split(torch.zeros(9), flag)[0]) - 8


def _by_its_name(x: Tensor) -> int:
    return -1 if "True" in repr((x > 1e6).any()) else 1


@pytest.mark.parametrize("read", [_by_splitting, _by_its_name])
def test_numbers_that_no_operation_reads_are_noticed(read: Callable[[Tensor], int]) -> None:
    class Reads(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]) * read(batch[0]), batch[1])

    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    try:
        fit(trainer(strategy=strategy, max_steps=1), Reads(), loader())
    except UnsupportedModelError:
        return
    assert strategy.findings is not None and strategy.findings.verdict != "proven" and strategy.findings.decisions


def test_a_number_of_the_batch_that_shares_memory_with_its_rows_leaves_them_records() -> None:
    class Looks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, targets, _ = batch
            return F.cross_entropy(self.net(x) * torch.where((x > 1e6).any(), -1.0, 1.0), targets)

    def collate(items: list[Any]) -> Any:
        x, targets = torch.utils.data.default_collate(items)
        memory = torch.cat([x.flatten(), x.mean().view(1)])
        return memory[:-1].view_as(x), targets, memory[-1:]

    refused(Looks(), "any over several records", loader(collate_fn=collate))
