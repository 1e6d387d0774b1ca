"""Backpropagation clipping: black-box bounds on neighbouring batches, and a naive twin that clips by the definition."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.mechanism.backprop import clipped_backward, clipped_output, layer_bounds
from lightning_dp.mechanism.backprop.input_clip import InputClip
from lightning_dp.mechanism.backprop.layer_bounds import ConvolutionLayerBound, LinearBound
from lightning_dp.mechanism.backprop.rule import BackpropClipping, ModuleBackpropClipping
from lightning_dp.mechanism.noise import GaussianNoise
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.training.single_device import PrivateStrategy
from tests.conftest import Net, assert_close, fit, loader, trainer
from tests.steps import make_step

pytestmark = pytest.mark.on_device


class Tokens(nn.Module):
    """Embeddings of tokens (with padding) and of positions, whose leading dimension is one; a norm; a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(7, 5, padding_idx=0), nn.Embedding(4, 5)
        self.norm, self.out = nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.out(self.norm(self.token(x.abs().nan_to_num(1.0).clamp(max=6).long()) + self.position(positions)))


class Mixer(nn.Module):
    """Linear layers of inputs that they copy first: across positions, and over channels in the middle; a query that all
    examples share; padding that a convolution does by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.across, self.query = nn.Linear(6, 3), nn.Linear(4, 5), nn.Linear(3, 5)
        self.channels = nn.Linear(3, 2)
        self.same = nn.Conv1d(3, 2, 2, padding="same")
        self.register_buffer("queries", torch.ones(1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x)) * x.sum(2, keepdim=True)
        turned = x.transpose(1, 2).contiguous()
        mixed = self.across(x.transpose(1, 2)) + self.query(self.queries)
        return torch.cat([self.channels(mixed.permute(0, 2, 1)).flatten(1), self.same(turned).flatten(1)], 1)


class Reused(nn.Module):
    """A layer called three times, and one that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.tied = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.tied.weight = self.cell.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return self.tied(x)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (2, 3), dilation=(2, 1), groups=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 2, 1),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fully connected": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (7, 6)),
    "normalisation": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.PReLU(), nn.RMSNorm(4), nn.Linear(4, 2, bias=False)),
        (7, 6),
    ),
    "convolutions": (convolutions, (2, 9, 8)),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2)), (2, 9)),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2, padding=1, bias=False), nn.InstanceNorm3d(2, affine=True)),
        (1, 3, 4, 3),
    ),
    "tokens": (Tokens, (4,)),
    "reused and tied": (Reused, (6,)),
    "mixer": (Mixer, (4, 6)),
    "bias only": (lambda: nn.Sequential(_frozen_weight(nn.Linear(6, 5)), nn.Linear(5, 2)), (4, 6)),
}


def _frozen_weight(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


@pytest.fixture(autouse=True, params=[False, True], ids=["", "as on a GPU"])
def _asynchronous(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to deal with what is not finite: at once, and without waiting for a device."""
    monkeypatch.setattr(clipped_backward, "is_asynchronous", lambda tensor: request.param)


RULES = [
    BackpropClipping(2.0, 0.1),
    BackpropClipping(0.01, 30.0),
    BackpropClipping(50.0, 0.01, allocation="proportional"),
    BackpropClipping(1.0, 0.2, convolution="unfolded"),
    BackpropClipping(1.0, 1.0, convolution="raw"),
    BackpropClipping(1.0, 0.5, convolution="raw_sum"),
]


def private_step(rule: BackpropClipping, model: nn.Module) -> PrivateStep:
    bound = rule if isinstance(rule, ModuleBackpropClipping) else rule.for_module(model)
    engine = bound.make_engine("bookkeeping", model)
    return make_step(engine, bound, GaussianNoise(), PrivacyLedger(), Randomness())


def grads_of(
    rule: BackpropClipping, model: nn.Module, inputs: Tensor, multiplier: float = 0.0, steepness: float = 1.0
) -> dict[str, Tensor]:
    """What a private step releases, times the divisor, for a loss that is a mean over the examples."""
    for parameter in model.parameters():
        parameter.grad = None
    step = private_step(rule, model)
    step.begin(multiplier, 0.5, 1.0)
    if len(inputs):
        with step.engine.forward(len(inputs)):
            loss = steepness * model(inputs).pow(2).flatten(1).sum(1).mean()
        with step.backward(float(len(inputs))):
            loss.backward()
    step.release()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def extra_record(name: str, shape: tuple[int, ...], model: nn.Module) -> Tensor:
    weight = next(model.parameters()).detach().flatten()
    return {
        "tiny": torch.full(shape, 1e-20),
        "huge": torch.full(shape, 1e8),
        "negative huge": torch.randn(shape) * -1e8,
        "aligned": weight.repeat(500)[: math.prod(shape)].view(shape) * 1e3,
        "one-hot": torch.zeros(shape).index_put_(
            tuple(torch.zeros(len(shape), 1, dtype=torch.long)), torch.tensor(1e4)
        ),
        "same everywhere": torch.ones(shape),
        "overflowing": torch.full(shape, 1e30),
        "infinite": torch.full(shape, float("inf")),
        "nan": torch.full(shape, float("nan")),
    }[name]


EXTRAS = ["tiny", "huge", "negative huge", "aligned", "one-hot", "same everywhere", "overflowing", "infinite", "nan"]


def measured_stds(rule: BackpropClipping, model: nn.Module, multiplier: float, steps: int = 400) -> dict[str, float]:
    """The standard deviation of the noise that empty batches release, per parameter."""
    squares: dict[str, list[Tensor]] = {}
    step = private_step(rule, model)
    for _ in range(steps):
        step.begin(multiplier, 0.5, 1.0)
        step.release()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                squares.setdefault(name, []).append(parameter.grad.double().square().flatten())
    return {name: torch.cat(parts).mean().sqrt().item() for name, parts in squares.items()}


def privacy_used(
    rule: BackpropClipping, model: nn.Module, batch: Tensor, record: Tensor, stds: dict[str, float]
) -> float:
    """``√Σ_l ‖difference_l‖² / σ_l²`` between a batch and the same with one more record: at most 1/z."""
    without, with_record = (
        grads_of(rule, model, batch),
        grads_of(rule, model, torch.cat([batch[:2], record[None], batch[2:]])),
    )
    assert all(grad.isfinite().all() for grad in with_record.values())
    return math.hypot(*((with_record[n] - without[n]).norm().item() / stds[n] for n in without))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_one_record_uses_no_more_privacy_than_the_ledger_says(rule: BackpropClipping, name: str) -> None:
    """Black box: difference of the sums over the noise that was really added, over all parameters jointly."""
    make, shape = MODELS[name]
    model = make()
    stds = measured_stds(rule, model, multiplier=2.0)
    batch = torch.randn(5, *shape) * 3
    for extra in EXTRAS:
        used = privacy_used(rule, model, batch, extra_record(extra, shape, model), stds)
        assert used <= 0.5 * 1.08, extra  # 8 %: the measured std of parameters with few coordinates
    bound = rule.for_module(model)
    sensitivities = bound.sensitivities
    for extra in EXTRAS:  # and exactly, one by one, by the stated sensitivities
        record = extra_record(extra, shape, model)
        alone = grads_of(rule, model, record[None])
        for parameter, grad in alone.items():
            assert grad.norm() <= sensitivities[parameter] * (1 + 1e-4), (extra, parameter)


class _PerToken(LinearBound):
    """A wrong bound: every token by itself."""

    def input_norms(self, module: nn.Module, input: Tensor) -> Tensor:
        return input.norm(dim=-1).flatten(1).amax(1)

    def measure(self, module: nn.Module, input: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return grad.norm(dim=-1).flatten(1).amax(1), grad.sum(1)


def _sensitivity_over_batch_size(bound: ModuleBackpropClipping) -> ModuleBackpropClipping:
    return replace(bound, sensitivities={name: s / 5 for name, s in bound.sensitivities.items()})


def _layers_apart(bound: ModuleBackpropClipping) -> ModuleBackpropClipping:
    class Apart(ModuleBackpropClipping):
        def shares(self, groups: Any, sizes: Any) -> list[float]:
            return [1.0] * len(groups)

    return Apart(**{f.name: getattr(bound, f.name) for f in fields(bound)})


def _per_token(bound: ModuleBackpropClipping) -> ModuleBackpropClipping:
    limits = {name: replace(limit, bound=_PerToken()) for name, limit in bound.limits.items()}
    return replace(bound, limits=limits)


@pytest.mark.parametrize(
    ("mistake", "length"), [(_sensitivity_over_batch_size, 1), (_layers_apart, 1), (_per_token, 7)]
)
def test_the_black_box_test_sees_the_known_mistakes(
    mistake: Callable[..., ModuleBackpropClipping], length: int
) -> None:
    """The withdrawn paper's sensitivity, layers accounted one by one, and clipping per token."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)  # keeps norms, so that one record can reach every layer's bound
        nn.init.zeros_(layer.bias)
    right = BackpropClipping(2.0, 0.1).for_module(model)
    batch, record = torch.randn(5, length, 6), torch.full((length, 6), 1e6)
    used = {}
    for what, rule in {"right": right, "wrong": mistake(right)}.items():
        used[what] = privacy_used(rule, model, batch, record, measured_stds(rule, model, multiplier=2.0))
    assert used["right"] <= 0.5 * 1.08 < used["wrong"]
    assert length > 1 or used["right"] > 0.5 * 0.92


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_all_parameters_together_are_one_mechanism_of_the_multiplier(rule: BackpropClipping) -> None:
    """``Σ_g S_g² / σ_g² = z⁻²`` with measured σ_g; rejected at 2/3 and 3/2 of the noise."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 40))
    multiplier = 1.3
    stds, bound = measured_stds(rule, model, multiplier, steps=100), rule.for_module(model)
    found = math.hypot(*(bound.sensitivities[name] / std for name, std in stds.items())) ** -1
    assert found == pytest.approx(multiplier, rel=0.03)
    assert 1.5 * found != pytest.approx(multiplier, rel=0.03) != found / 1.5


def test_the_bound_is_attained() -> None:
    """A test of an upper bound alone would pass for a rule that sends nothing."""
    model = nn.Linear(3, 1)
    rule = BackpropClipping(2.0, 0.1)
    grads = grads_of(rule, model, torch.full((1, 3), 1e4))
    assert grads["weight"].norm().item() == pytest.approx(0.2, rel=1e-4)
    assert grads["bias"].norm() == pytest.approx(0.1, rel=1e-4)


# -- the naive twin ----------------------------------------------------------------------------------------------------


def naive_norms(layer: nn.Module, input: Tensor, kind: str) -> Tensor:
    """The norm of one example's input, by the definition: unfolded patch by patch."""
    if isinstance(layer, nn.Conv2d) and kind in ("unfolded", "window_sum"):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
        unfolded = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        of_groups = unfolded.unflatten(1, (layer.groups, -1))
        return unfolded.norm() if kind == "unfolded" else of_groups.norm(dim=2).max()
    return input.norm()


def naive_measure(layer: nn.Module, input: Tensor, grad: Tensor, kind: str) -> Tensor:
    """The norm of one example's upstream gradient, by the definition; of a small layer, its gradient's."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        position = (
            grad.flatten(2)
            if isinstance(layer, nn.Conv2d)
            else grad.flatten(1, -2).mT
            if grad.dim() > 2
            else grad[..., None]
        )
        norm = position.abs().sum(2).norm() if kind.endswith("_sum") and isinstance(layer, nn.Conv2d) else grad.norm()
        has_bias = layer.bias is not None and layer.bias.requires_grad
        return torch.maximum(norm, position.sum(2).norm()) if has_bias else norm
    with torch.enable_grad():
        twin = copy.deepcopy(layer)
        twin._forward_hooks.clear()
        twin._forward_pre_hooks.clear()
        own = [p for p in twin.parameters() if p.requires_grad]
        return max(g.norm() for g in torch.autograd.grad((twin(input) * grad).sum(), own))


def naive_sum(rule: BackpropClipping, model: nn.Module, inputs: Tensor, uses: dict[str, int]) -> dict[str, Tensor]:
    """One example at a time: clip the input, go on; clip the gradient that comes back, go on."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    limits = rule.for_module(model).limits
    for example in inputs:
        handles = []
        for name, limit in limits.items():
            layer = model.get_submodule(name)

            def before(layer: nn.Module, args: Any, limit: Any = limit) -> Any:
                if limit.input_norm is None:
                    return None
                norm = naive_norms(layer, args[0].detach(), rule.convolution)
                return (args[0] * min(1.0, limit.input_norm / norm.item()),)

            def after(layer: nn.Module, args: Any, output: Tensor, name: str = name, limit: Any = limit) -> None:
                def clip(grad: Tensor) -> Tensor:
                    norm = naive_measure(layer, args[0].detach(), grad, rule.convolution)
                    return grad * min(1.0, limit.upstream_norm / uses.get(name, 1) / max(norm.item(), 1e-300))

                output.register_hook(clip)

            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        model.zero_grad()
        model(example[None]).pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                totals[name] += parameter.grad
        for handle in handles:
            handle.remove()
    model.zero_grad()
    return totals


NAIVE_MODELS = {
    **{name: MODELS[name] for name in ("fully connected", "convolutions", "tokens", "reused and tied", "bias only")},
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (7, 6)),
    "padding modes": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode="reflect"),
            nn.Tanh(),
            nn.Conv2d(2, 2, (4, 3), padding="same"),
        ),
        (2, 6, 7),
    ),
}


@pytest.mark.parametrize("name", NAIVE_MODELS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_sum_is_that_of_the_loop(rule: BackpropClipping, name: str) -> None:
    if name == "padding modes" and rule.convolution in ("raw", "raw_sum"):
        pytest.skip("refused")
    make, shape = NAIVE_MODELS[name]
    model = make().double()
    inputs = torch.randn(5, *shape, dtype=torch.float64)
    uses = {"cell": 4, "tied": 4} if name == "reused and tied" else {}
    expected = naive_sum(rule, model, inputs, uses)
    found = grads_of(rule, model, inputs)
    for parameter, total in expected.items():
        assert_close(found[parameter], total, 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    groups=st.sampled_from([1, 2]),
)
def test_convolutions_of_any_geometry(kernel: Any, stride: Any, dilation: Any, padding: Any, groups: int) -> None:
    """Norms of windows without unfolding; and no pixel in more windows than the bound of the raw input says."""
    layer = nn.Conv2d(2, 2, kernel, stride, padding, dilation, groups).double()
    input = torch.randn(3, 2, 11, 12, dtype=torch.float64)
    unfolded = F.unfold(input, kernel, dilation, padding, stride).flatten(1).norm(dim=1)
    assert_close(ConvolutionLayerBound("unfolded").input_norms(layer, input), unfolded, 1e-12)
    windows = F.unfold(input, kernel, dilation, padding, stride).unflatten(1, (groups, -1))
    largest = windows.norm(dim=2).flatten(1).amax(1)
    assert_close(ConvolutionLayerBound("window_sum").input_norms(layer, input), largest, 1e-12)
    raw = ConvolutionLayerBound("raw").sensitivities(layer, 1.0, 1.0)["weight"]
    assert (unfolded <= raw * input.flatten(1).norm(dim=1) + 1e-9).all()
    pixel = torch.zeros(1, 2, 41, 41, dtype=torch.float64)
    pixel[0, 0, 18:24, 18:24] = torch.randn(6, 6)
    for at in range(18, 24):  # well inside, some pixel is in just so many windows
        one = torch.zeros_like(pixel)
        one[0, 0, at, 18:24] = 1.0
        assert F.unfold(one, kernel, dilation, padding, stride).norm() ** 2 <= 6 * raw**2 + 1e-9


def test_the_raw_bound_counts_windows_exactly() -> None:
    layer = nn.Conv2d(1, 1, (8, 3), (2, 4), (3, 0), (3, 2))
    windows = F.unfold(torch.ones(1, 1, 1, 1), 1).numel()  # 1
    counts = layer_bounds._windows_per_pixel(
        (60, 60), (8, 3), (2, 4), (3, 2), ((3, 3), (0, 0)), torch.device("cpu"), torch.float64
    )
    assert ConvolutionLayerBound("raw").sensitivities(layer, 1.0, 1.0)["weight"] ** 2 == pytest.approx(
        counts.max().item() * windows
    )


# -- in the Trainer ----------------------------------------------------------------------------------------------------


def trained(rule: Any = RULES[0], net: nn.Module | None = None, **kwargs: Any) -> tuple[Net, Any]:
    torch.manual_seed(3)
    module = Net(net)
    noise = GaussianNoise(kwargs.pop("multiplier", 0.0))
    strategy = PrivateStrategy(rule, noise, seed=1, **kwargs)
    run = trainer(strategy=strategy, max_epochs=2)
    fit(run, module, loader(size=40, batch_size=10))
    return module, run


@pytest.mark.trains
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_model_trains_with_the_self_check(rule: BackpropClipping, name: str) -> None:
    make, shape = MODELS[name]

    class Squares(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).pow(2).flatten(1).mean(1).mean()

    inputs = TensorDataset(torch.randn(20, *shape) * 3)
    run = trainer(strategy=PrivateStrategy(rule, GaussianNoise(1.0), max_physical_batch_size=4))
    fit(run, Squares(make()), DataLoader(inputs, batch_size=10))
    assert len(run.strategy.ledger) == 2


@pytest.mark.parametrize("micro", [1, 3, 7])
def test_micro_batches_change_nothing(micro: int) -> None:
    whole, _ = trained()
    parts, _ = trained(max_physical_batch_size=micro)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert_close(one, other, 1e-5)


def test_noise_is_that_of_the_step_whatever_the_micro_batches() -> None:
    whole, _ = trained(multiplier=1.0)
    parts, _ = trained(multiplier=1.0, max_physical_batch_size=3)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert_close(one, other, 1e-4)


def test_the_module_goes_on_to_compute_what_was_trained() -> None:
    rule = BackpropClipping(0.5, 0.1)
    module, run = trained(rule)
    inputs = torch.randn(9, 6)
    clipped = inputs / inputs.norm(dim=1, keepdim=True) * 0.5
    hidden = torch.tanh(F.linear(clipped, module.net[0].weight, module.net[0].bias))
    hidden = hidden * (0.5 / hidden.norm(dim=1, keepdim=True)).clamp(max=1)
    expected = F.linear(hidden, module.net[2].weight, module.net[2].bias)
    assert torch.allclose(module.net(inputs), expected, atol=1e-6)
    assert set(module.state_dict()) == set(Net().state_dict())
    with run.strategy.private_step.engine.forward(9):  # and that is what training computes
        assert torch.allclose(module.net(inputs), expected, atol=1e-6)
    fresh = Net()
    fresh.load_state_dict(module.state_dict())
    assert not torch.allclose(fresh.net(inputs), expected, atol=1e-3)
    rule.attach(fresh)
    rule.attach(fresh)  # replaces, does not add
    assert torch.allclose(fresh.net(inputs), expected, atol=1e-6)
    assert torch.allclose(copy.deepcopy(fresh).net(inputs), expected, atol=1e-6)
    assert torch.allclose(pickle.loads(pickle.dumps(fresh.net))(inputs), expected, atol=1e-6)


@pytest.mark.trains
def test_a_trainer_that_only_tests_clips_too() -> None:
    module = Net()
    module.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    run = trainer(strategy=PrivateStrategy(BackpropClipping(0.5, 0.1), GaussianNoise(1.0)))
    run.test(module, loader(), verbose=False)
    clips = [h for m in module.modules() for h in m._forward_pre_hooks.values() if isinstance(h, InputClip)]
    assert [clip.max_norm for clip in clips] == [0.5, 0.5]


def test_hooks_are_gone_and_parameters_trainable_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    step = private_step(RULES[0], model)
    with pytest.raises(RuntimeError, match="boom"), step.engine.forward(2):
        model(torch.randn(2, 3))
        raise RuntimeError("boom")
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_existing_gradients_survive_and_an_interrupted_step_leaves_nothing() -> None:
    model = nn.Linear(3, 1)
    model.weight.grad = torch.full_like(model.weight, 7.0)
    step = private_step(RULES[0], model)
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(2):
        loss = model(torch.randn(2, 3)).sum()
    with step.engine.backward():
        loss.backward()
    assert (model.weight.grad == 7).all()
    step.begin(0.0, 0.5, 1.0)
    step.release()
    assert (model.weight.grad == 0).all()


def test_a_parameter_used_outside_its_layer_is_found_after_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    step = private_step(BackpropClipping(100.0, 100.0), model)
    inputs = torch.randn(4, 3)
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(4):
        loss = model(inputs).sum() + 1e6 * F.linear(inputs, model[0].weight).sum()
    with pytest.raises(UnsupportedModelError, match=r"'0.weight'.*around their layers' bounds"), step.engine.backward():
        loss.backward()


def test_an_example_that_is_not_finite_contributes_nothing_and_is_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    inputs = torch.randn(4, 3)
    expected = grads_of(RULES[0], model, inputs)
    found = grads_of(RULES[0], model, torch.cat([inputs, torch.full((1, 3), float("nan"))]))
    for name, grad in expected.items():
        assert_close(found[name], grad)
    step = private_step(RULES[0], model)
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(2):
        loss = model(torch.tensor([[1.0, 2.0, 3.0], [1.0, float("inf"), 1.0]])).sum()
    with step.backward(1.0):
        loss.backward()
    assert step.nonfinite_examples == 1


def test_buffers_that_examples_share_are_left_alone() -> None:
    model = Mixer()
    step = private_step(RULES[0], model)
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(1):
        loss = model(torch.full((1, 4, 6), float("nan"))).sum()
    with step.backward():
        loss.backward()
    assert step.nonfinite_examples == 1
    assert (model.queries == 1).all()


# -- refusals ----------------------------------------------------------------------------------------------------------


class Custom(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.MultiheadAttention(4, 2), r"layer '0' \(MultiheadAttention\): no bound"),
        (lambda: nn.ConvTranspose2d(2, 2, 2), r"layer '0' \(ConvTranspose2d\): no bound"),
        (lambda: Custom(2, 2), r"layer '0' \(Custom\): no bound"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), "no bound"),
        (lambda: nn.utils.weight_norm(nn.Linear(2, 2)), r"for its parameters \['weight_g', 'weight_v'\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_layers_without_a_proven_bound_are_named(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        BackpropClipping(1.0, 1.0).for_module(nn.Sequential(make()))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BackpropClipping(0.0, 1.0), "BackpropClipping: input_norm must be positive"),
        (lambda: BackpropClipping(1.0, math.inf), "upstream_norm must be positive"),
        (lambda: BackpropClipping({"0": -1.0}, 1.0), "BackpropClipping: 0 must be positive"),
        (lambda: BackpropClipping(1.0, 1.0, convolution="folded"), "convolution must be one of"),
        (lambda: BackpropClipping(1.0, 1.0, allocation="none"), "allocation must be one of"),
        (lambda: BackpropClipping({"0": 1.0}, 1.0).for_module(Net()), r"missing \['net.0', 'net.2'\], unknown \['0'\]"),
        (lambda: BackpropClipping(1.0, {"net.0": 1.0}).for_module(Net()), r"missing \['net.2'\]"),
        (lambda: BackpropClipping(1.0, 1.0).group_sensitivities([]), "depends on the model"),
        (lambda: BackpropClipping(1.0, 1.0).for_module(Net()).make_engine("per_example", Net()), "leave engine out"),
        (
            lambda: BackpropClipping(1.0, 1.0, "raw").for_module(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")),
            "repeats pixels",
        ),
    ],
)
def test_bounds_that_bound_nothing_are_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_norms_per_layer() -> None:
    bound = BackpropClipping({"net.0": 2.0, "net.2": 3.0}, {"net.0": 0.1, "net.2": 0.2}).for_module(Net())
    assert bound.sensitivities == pytest.approx(
        {"net.0.weight": 0.2, "net.0.bias": 0.1, "net.2.weight": 0.6, "net.2.bias": 0.2}
    )


@pytest.mark.trains
def test_low_precision_is_refused_before_the_first_step() -> None:
    run = trainer(strategy=PrivateStrategy(RULES[0], GaussianNoise(1.0)), precision="bf16-mixed")
    with pytest.raises(PrivacyConfigurationError, match="in low precision"):
        fit(run, Net(), loader())
    model = nn.Linear(3, 3).bfloat16()
    with pytest.raises(UnsupportedModelError, match="bfloat16"), private_step(RULES[0], model).engine.forward(2):
        model(torch.randn(2, 3).bfloat16())


def test_a_number_of_calls_that_changes_is_refused() -> None:
    model = nn.Linear(3, 3)
    step = private_step(RULES[0], model)
    with step.engine.forward(2):
        model(model(torch.randn(2, 3)))
    says = "called 1 times in this forward pass and 2 times in the first"
    with pytest.raises(UnsupportedModelError, match=says), step.engine.forward(2):
        model(torch.randn(2, 3))


def test_an_input_that_is_changed_after_clipping_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    step = private_step(RULES[0], model)
    with pytest.raises(UnsupportedModelError, match="changed its input"), step.engine.forward(2):
        model[0].register_forward_pre_hook(lambda module, args: (args[0] * 100,))
        model(torch.randn(2, 3))


def test_a_users_own_hook_on_the_output_is_outside_the_bound() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    model[0].register_forward_hook(lambda module, args, output: output * 1e6)
    grads = grads_of(RULES[0], model, torch.ones(1, 3))
    assert grads["0.weight"].norm() <= 0.2 * (1 + 1e-5)


def test_two_backward_passes_through_one_forward_are_refused() -> None:
    model = nn.Linear(3, 1)
    step = private_step(RULES[0], model)
    with step.engine.forward(2):
        loss = model(torch.randn(2, 3)).sum()
    with pytest.raises(UnsupportedModelError, match="more than one backward"), step.engine.backward():
        loss.backward(retain_graph=True)
        loss.backward()


def test_a_backward_pass_of_the_steps_own_leaves_nothing_behind() -> None:
    model = nn.Linear(3, 1)
    step = private_step(BackpropClipping(100.0, 100.0), model)
    x = torch.randn(2, 3)
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(2):
        probe = x.clone().requires_grad_()
        [direction] = torch.autograd.grad(model(probe).pow(2).sum(), probe)
        loss = model(x + direction).sum()
    with step.engine.backward():
        loss.backward()
    step.release()
    assert model.weight.grad is not None
    # Two calls, of which the loss depends on one; each is bounded by half.
    assert_close(model.weight.grad[0], (x + direction).sum(0))


# -- ways around the bounds, each of which once worked -----------------------------------------------------------------


def normalising(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (4, 3)), layer, nn.Flatten())


@pytest.mark.parametrize("value", [1e16, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(12),
        lambda: nn.RMSNorm(12),
        nn.PReLU,
        lambda: normalising(nn.GroupNorm(2, 4)),
        lambda: normalising(nn.InstanceNorm1d(4, affine=True)),
    ],
)
def test_what_cannot_be_normalised_leaves_the_sum_finite(make: Callable[[], nn.Module], value: float) -> None:
    model = make()
    inputs = torch.randn(3, 12)
    expected = grads_of(RULES[0], model, inputs)
    for row in (torch.full((12,), value), torch.randn(12) * value):
        found = grads_of(RULES[0], model, torch.cat([inputs, row[None]]))
        for name, grad in expected.items():
            assert torch.allclose(found[name], grad, atol=1e-6)


def unbounded_step(model: nn.Module, loss: Callable[[], Tensor], size: int = 2) -> None:
    step = private_step(RULES[0], model)
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(size):
        value = loss()
    with step.engine.backward():
        value.backward()


def test_a_forward_pass_from_before_the_step_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    cached = model(torch.full((2, 3), 1e6))
    with pytest.raises(UnsupportedModelError, match=r"\['0.weight', '0.bias'\]: a gradient came to them around"):
        unbounded_step(model, lambda: model(torch.randn(2, 3)).sum() + cached.pow(2).sum())
    assert all(p.grad is None for p in model.parameters())


def test_activation_checkpointing_is_refused() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 2)
    model = nn.Sequential(first, second)
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match="activation checkpointing"):
        unbounded_step(model, lambda: second(checkpoint(first, x, use_reentrant=True)).sum())


def test_a_gradient_penalty_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    x = torch.randn(2, 3, requires_grad=True)

    def loss() -> Tensor:
        output = model(x).sum()
        return output + torch.autograd.grad(output, x, create_graph=True)[0].pow(2).sum()

    with pytest.raises(UnsupportedModelError, match=r"Layer '0': the loss depends on a gradient"):
        unbounded_step(model, loss)


def test_arguments_besides_the_input_are_refused() -> None:
    model = nn.EmbeddingBag(5, 3, mode="sum")
    tokens = torch.randint(5, (2, 4))
    with pytest.raises(UnsupportedModelError, match="more than its input"):
        unbounded_step(model, lambda: model(tokens, per_sample_weights=torch.full((2, 4), 1e6)).sum())


@pytest.mark.parametrize("kind", ["window_sum", "unfolded"])
def test_padding_that_was_changed_after_the_layer_was_made_counts(kind: Any) -> None:
    model = nn.Conv2d(1, 2, 3, stride=3)
    model.padding = (1, 1)
    image = torch.zeros(1, 1, 7, 7)
    image[..., 6, 6] = 1e3
    rule = BackpropClipping(1.0, 0.1, convolution=kind)
    assert grads_of(rule, model, image)["weight"].norm() <= 0.1 * (1 + 1e-4)


@pytest.mark.trains
def test_no_gradient_is_visible_before_the_noise_even_within_the_backward_pass() -> None:
    seen = []

    class Looking(Net):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward()
            seen.extend(p.grad for p in self.parameters())

    strategy = PrivateStrategy(RULES[0], GaussianNoise(1.0), self_check=False)
    fit(trainer(strategy=strategy, max_steps=2, max_epochs=-1), Looking(), loader())
    assert seen == [None] * len(seen) and seen


def test_tiny_bounds_of_huge_examples_are_kept() -> None:
    model = nn.Linear(3, 2)
    rule = BackpropClipping(1e-4, 1e-4)
    grads = grads_of(rule, model, torch.full((1, 3), 3e7), steepness=1e6)
    assert grads["weight"].norm() <= 1e-8 * (1 + 1e-4)
    assert grads["bias"].norm() <= 1e-4 * (1 + 1e-4)


def test_global_hooks_are_refused() -> None:
    model = nn.Linear(3, 2)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 1e6)
    try:
        with pytest.raises(UnsupportedModelError, match="Hooks on all modules"):
            unbounded_step(model, lambda: model(torch.randn(2, 3)).sum())
    finally:
        handle.remove()


def test_full_backward_hooks_and_evaluation_of_other_batches_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    plain = copy.deepcopy(model)
    model[1].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    inputs = torch.randn(4, 3)

    class WithTeacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.net(torch.full((7, 3), float("inf")))
            return self.net(x)

    expected = grads_of(RULES[0], plain, inputs)
    for name, grad in grads_of(RULES[0], WithTeacher(), inputs).items():
        assert_close(grad, expected[name.removeprefix("net.")])


class _Kept(nn.Module):
    """A layer whose input an earlier layer has computed, arranged in memory as asked for."""

    def __init__(self, layer: nn.Module, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.arrange = layer, arrange
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        input = self.arrange(x * torch.ones_like(x, requires_grad=True))
        output = self.layer(input)
        self.seen = input, output
        return output


@pytest.mark.parametrize(
    ("layer", "shape", "arrange", "same"),
    [
        (lambda: nn.Linear(3, 2), (4, 3), lambda x: x, True),
        (lambda: nn.Linear(3, 2), (4, 5, 3), lambda x: x, True),
        (lambda: nn.Conv2d(2, 3, 3, padding=1), (4, 2, 5, 5), lambda x: x, True),
        (
            lambda: nn.Conv2d(2, 3, 3, padding=1),
            (4, 2, 5, 5),
            lambda x: x.contiguous(memory_format=torch.channels_last),
            True,
        ),
        (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (4, 2, 5, 5), lambda x: x, False),
        (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (4, 2, 5, 5), lambda x: x, False),
        (lambda: nn.Linear(3, 2), (1, 3), lambda x: x.expand(4, 3), False),
        (lambda: nn.Linear(3, 2), (4, 3), lambda x: x.detach(), False),
        (lambda: nn.Linear(3, 2), (8, 3), lambda x: x, False),
    ],
)
def test_inputs_are_changed_in_place_where_autograd_keeps_them_and_nowhere_else(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], arrange: Callable[[Tensor], Tensor], same: bool
) -> None:
    """Against autograd itself: with the input zeroed afterwards, the weight's gradient is zero just when it kept it."""
    module = _Kept(layer(), arrange)
    output = module(torch.rand(*shape) + 0.1)
    assert module.seen is not None
    input = module.seen[0]
    assert clipped_output.is_what_autograd_keeps(module.layer, input, 4) == same
    if same:
        input.data.zero_()
        output.sum().backward()
        assert not module.layer.weight.grad.any()


@pytest.mark.parametrize("name", ["fully connected", "convolutions", "sequence"])
def test_a_forward_without_gradients_computes_what_one_with_them_computes(name: str) -> None:
    make, shape = MODELS[name]
    model, inputs = make(), 10 * torch.randn(4, *shape)
    step = private_step(BackpropClipping(0.01, 30.0), model)
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(4), torch.no_grad():
        without = model(inputs)
    step = private_step(BackpropClipping(0.01, 30.0), model)
    step.begin(0.0, 0.5, 1.0)
    with step.engine.forward(4):
        output = model(inputs)
    assert_close(without, output.detach())
    assert (without - model(inputs)).abs().max() > 1e-3, "inputs are clipped"
