"""Direct feedback alignment: what every layer learns from, alone and under every bounding rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    BackpropClipping,
    DFAMixin,
    FlatClipping,
    GaussianNoise,
    PerLayerClipping,
    PrivateStrategy,
)
from lightning_dp.errors import UnsupportedModelError
from lightning_dp.zoo import MLP, DigitsDataModule, FeedbackClassifier
from tests.conftest import Net, assert_close, dataset, fit, loader, trainer


class FeedbackNet(DFAMixin, pl.LightningModule):
    """Nothing but the mixin beside an ordinary module."""

    learning_rate = 1.0

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def batch() -> tuple[Tensor, Tensor]:
    inputs, labels = dataset(8).tensors
    return inputs, labels


def by_hand(module: FeedbackNet, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``G_l = ((B_l e) ⊙ φ'(z_l)) a_lᵀ`` for the network above."""
    first, second, last = module.net[0], module.net[2], module.net[4]
    z1 = inputs @ first.weight.T + first.bias
    a1 = torch.tanh(z1)
    z2 = a1 @ second.weight.T + second.bias
    a2 = torch.sigmoid(z2)
    logits = a2 @ last.weight.T + last.bias
    error = (logits.softmax(1) - F.one_hot(labels, 3)) / len(labels)
    matrices = module.feedback_matrices.matrices
    d1 = error @ matrices["net/2"].T * (1 - a1**2)
    d2 = error @ matrices["net/4"].T * a2 * (1 - a2)
    return {
        "net.0.weight": d1.T @ inputs,
        "net.0.bias": d1.sum(0),
        "net.2.weight": d2.T @ a1,
        "net.2.bias": d2.sum(0),
        "net.4.weight": error.T @ a2,
        "net.4.bias": error.sum(0),
    }


def test_every_layers_gradient_is_that_computed_by_hand() -> None:
    module = FeedbackNet()
    inputs, labels = batch()
    module.training_step((inputs, labels), 0).backward()
    for name, expected in by_hand(module, inputs, labels).items():
        assert_close(module.get_parameter(name).grad, expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_backpropagation_would_not_pass_that_test() -> None:
    module = FeedbackNet()
    inputs, labels = batch()
    module.training_step((inputs, labels), 0)
    expected = by_hand(module, inputs, labels)
    F.cross_entropy(module.net(inputs), labels).backward()
    assert_close(module.net[4].weight.grad, expected["net.4.weight"])
    assert (module.net[0].weight.grad - expected["net.0.weight"]).norm() > 0.1 * expected["net.0.weight"].norm()


RULES = {
    "flat": FlatClipping(0.05),
    "per layer": PerLayerClipping(0.05),
    "automatic": AutomaticClipping(),
    "adaptive": AdaptiveClipping(0.05),
    "backpropagation clipping": BackpropClipping(1.0, 0.05),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ["bookkeeping", "per_example"])
def test_private_updates_are_those_of_clipped_feedback_gradients(rule: str, engine: str) -> None:
    """Example by example, each rule's own weights on the gradients by hand, through a Trainer."""
    if rule == "backpropagation clipping" and engine == "per_example":
        pytest.skip("refused")
    torch.manual_seed(1)
    module = FeedbackNet()
    inputs, labels = batch()
    if rule == "backpropagation clipping":
        module = FeedbackNet(nn.Sequential(nn.Linear(6, 3)))  # its twin for hidden layers is in the test below
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    strategy = PrivateStrategy(RULES[rule], GaussianNoise(0.0), engine=engine, max_physical_batch_size=3, seed=0)
    run = trainer(strategy=strategy, max_steps=1, max_epochs=-1)
    data = DataLoader(TensorDataset(inputs, labels), batch_size=8)  # rate 1: everyone is drawn
    expected: dict[str, Tensor] = {}
    bound = RULES[rule].for_module(module)
    for i in range(8):
        if rule == "backpropagation clipping":
            a = inputs[i] * min(1.0, 1.0 / inputs[i].norm().item())
            e = (F.linear(a, module.net[0].weight, module.net[0].bias).softmax(0) - F.one_hot(labels[i], 3)).detach()
            e = e * min(1.0, 0.05 / e.norm().item())
            grads = {"net.0.weight": torch.outer(e, a), "net.0.bias": e}
            weights = dict.fromkeys(grads, 1.0)
        else:
            module.training_step((inputs[:1], labels[:1]), 0)  # makes the matrices
            grads = {n: g.detach() for n, g in by_hand(module, inputs[i : i + 1], labels[i : i + 1]).items()}
            groups = bound.groups(list(grads))
            norms = torch.stack([torch.cat([grads[n].flatten() for n in group]).norm() for group in groups])
            row = bound.weights(norms[None], groups, bound.initial_state())[0]
            weights = {n: row[g].item() for g, group in enumerate(groups) for n in group}
        for name, grad in grads.items():
            expected[name] = expected.get(name, 0) + weights[name] * grad / 8
    fit(run, module, data)
    for name, total in expected.items():
        assert_close(before[name] - module.get_parameter(name), total, 1e-4)


def test_backpropagation_clipping_bounds_the_error_behind_the_activation() -> None:
    """The paper's method: δ_l itself is clipped, after φ', and the output layer like the others."""
    module = FeedbackNet()
    inputs, labels = dataset(1).tensors
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    net = module.net
    module.training_step((inputs, labels), 0)
    matrices = module.feedback_matrices.matrices

    def clip(v: Tensor, norm: float) -> Tensor:
        return v * min(1.0, norm / v.norm().item())

    a0 = clip(inputs[0], 1.0)
    a1 = torch.tanh(net[0].weight @ a0 + net[0].bias)
    c1 = clip(a1, 1.0)
    a2 = torch.sigmoid(net[2].weight @ c1 + net[2].bias)
    c2 = clip(a2, 1.0)
    error = (net[4].weight @ c2 + net[4].bias).softmax(0) - F.one_hot(labels[0], 3)
    # The error that is sent is that at the output layer's clipped output.
    d3 = clip(error, 0.05)
    d1 = clip(matrices["net/2"] @ error * (1 - a1**2), 0.05)
    d2 = clip(matrices["net/4"] @ error * a2 * (1 - a2), 0.05)
    strategy = PrivateStrategy(BackpropClipping(1.0, 0.05), GaussianNoise(0.0), self_check=False)
    run = trainer(strategy=strategy, max_steps=1, max_epochs=-1)
    fit(run, module, DataLoader(TensorDataset(inputs, labels), batch_size=1))
    for layer, (d, a) in {"net.0": (d1, a0), "net.2": (d2, c1), "net.4": (d3, c2)}.items():
        assert_close(before[f"{layer}.weight"] - module.get_parameter(f"{layer}.weight"), torch.outer(d, a), 1e-4)
        assert_close(before[f"{layer}.bias"] - module.get_parameter(f"{layer}.bias"), d, 1e-4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.norm(x)))


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), Block(), Block(), nn.Flatten(), nn.Linear(3 * 16, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(2, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@pytest.mark.parametrize("make", [convolutional, residual])
@pytest.mark.parametrize("rule", [None, *RULES])
def test_convolutional_and_residual_networks_train(make: Callable[[], nn.Module], rule: str | None) -> None:
    torch.manual_seed(0)
    labels = torch.randint(2, (64,))
    images = torch.randn(64, 1, 6, 6) + labels[:, None, None, None]
    module = FeedbackNet(make())
    module.learning_rate = 1.0 if rule and rule != "automatic" else 0.05
    private = {} if rule is None else {"strategy": PrivateStrategy(RULES[rule], GaussianNoise(0.0))}
    before = module.training_step((images, labels), 0).item()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(trainer(**private, max_epochs=5), module, DataLoader(TensorDataset(images, labels), batch_size=16))
    assert module.training_step((images, labels), 0).item() < before
    assert all((p != start[name]).any() for name, p in module.named_parameters())


def test_chosen_blocks_learn_by_backpropagation_within() -> None:
    module = FeedbackNet(residual())
    module.feedback_layers = ["net.2", "net.4"]
    images, labels = torch.randn(4, 1, 6, 6), torch.randint(3, (4,))
    module.training_step((images, labels), 0).backward()
    matrices = module.feedback_matrices.matrices
    assert set(matrices) == {"net/2", "net/4"}
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    hidden = module.net[1](module.net[0](images))
    cut = hidden.detach()
    features = module.net[2](cut)
    logits = module.net[4](features.detach().flatten(1))
    error = (logits.softmax(1) - F.one_hot(labels, 3)).detach() / 4
    module.zero_grad()
    ((error @ matrices["net/2"].T).view_as(hidden) * hidden).sum().backward()
    ((error @ matrices["net/4"].T) * features.flatten(1)).sum().backward()
    F.cross_entropy(logits, labels).backward()
    for name, parameter in module.named_parameters():
        assert_close(found[name], parameter.grad)


def test_sequences_of_one_length_share_a_matrix_over_positions() -> None:
    module = FeedbackNet(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Flatten(0, 1)))
    module.training_step((torch.randn(2, 7, 6), torch.randint(3, (14,))), 0).backward()
    assert module.feedback_matrices.matrices["net/2"].shape == (5, 3)
    module.training_step((torch.randn(2, 9, 6), torch.randint(3, (18,))), 0)  # of any length


def test_matrices_have_norm_one_follow_from_the_seed_and_ignore_other_randomness() -> None:
    def matrices(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(int(torch.randint(1000, ())))
        module = FeedbackNet()
        module.feedback_seed = seed
        inputs, labels = batch()
        state = torch.get_rng_state()
        module.training_step((inputs * torch.rand(1), labels), 0)
        state_after = torch.get_rng_state()
        assert (state != state_after).any()  # only the test's own draw
        return module.feedback_matrices.matrices

    first, again, other = matrices(0), matrices(0), matrices(1)
    for key, matrix in first.items():
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1.0, abs=1e-5)
        assert torch.equal(matrix, again[key]) and not torch.equal(matrix, other[key])
    assert set(first) == {"net/2", "net/4"}


def test_matrices_are_saved_loaded_and_used(tmp_path: Path) -> None:
    module = FeedbackNet()
    module.feedback_seed = 5
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(trainer(enable_checkpointing=True, callbacks=[saving]), module, loader())
    loaded = FeedbackNet.load_from_checkpoint(tmp_path / "last.ckpt")  # whose own seed is another
    for name, matrix in module.feedback_matrices.matrices.items():
        assert torch.equal(loaded.feedback_matrices.matrices[name], matrix)
    loaded.cpu().training_step(batch(), 0).backward()
    for name, expected in by_hand(loaded, *batch()).items():
        assert_close(loaded.get_parameter(name).grad, expected)
    fit(trainer(max_epochs=2), module, loader(), ckpt_path=tmp_path / "last.ckpt")


def test_weights_from_before_the_first_step_and_averaged_weights_fit_in(tmp_path: Path) -> None:
    module = FeedbackNet()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    averaging = EMAWeightAveraging(decay=0.9)
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(trainer(callbacks=[averaging, saving], enable_checkpointing=True, max_epochs=2), module, loader())
    assert set(module.state_dict()) - set(before) == {"feedback_matrices.net/2", "feedback_matrices.net/4"}
    module.load_state_dict(before)
    kept = module.feedback_matrices.matrices["net/2"]
    module.training_step(batch(), 0).backward()
    assert torch.equal(module.feedback_matrices.matrices["net/2"].cpu(), kept.cpu())


def test_a_classifier_on_digits_learns_and_every_layer_aligns() -> None:
    """The feedback works because the weights come to agree with it: every angle ends below 90°."""
    torch.manual_seed(0)
    module = FeedbackClassifier(MLP([64, 64, 64, 10]), learning_rate=0.1)
    data = DigitsDataModule(batch_size=64)
    run = trainer(max_epochs=15)
    fit(run, module, data)
    [metrics] = run.test(module, datamodule=data, verbose=False)
    assert metrics["test_accuracy"] > 0.93
    angles = module.alignment_angles(data.train[:256], 0)
    assert set(angles) == {name for name, _ in module.named_parameters()}
    assert max(angles.values()) < 90
    assert angles["net.5.weight"] < 1  # the output layer learns by the true gradient
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_angles_without_training_are_about_ninety_degrees() -> None:
    torch.manual_seed(0)
    module = FeedbackNet(nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3)))
    angles = module.alignment_angles(batch(), 0)
    assert 60 < angles["net.0.weight"] < 120 and 60 < angles["net.2.weight"] < 120
    assert angles["net.4.weight"] < 1


def test_a_plain_trainer_and_evaluation_are_untouched() -> None:
    module, plain = FeedbackNet(), Net()
    plain.net = module.net
    inputs, labels = batch()
    with torch.no_grad():
        assert module.training_step((inputs, labels), 0) == plain.training_step((inputs, labels), 0)
    assert not module.feedback_matrices.matrices


class Backwards(FeedbackNet):
    """Its output layer is defined first."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential())
        self.head, self.body = nn.Linear(5, 3), nn.Linear(6, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.body(batch[0]))), batch[1])


def test_an_output_layer_that_is_not_the_last_is_named_and_can_be_chosen() -> None:
    module = Backwards()
    with pytest.raises(
        UnsupportedModelError, match=r"Layer 'head': no feedback.*'body' was not called after it.*output_layer"
    ):
        module.training_step(batch(), 0)
    module.output_layer = "head"
    module.training_step(batch(), 0).backward()
    assert module.body.weight.grad.norm() > 0
    module.feedback_layers = ["nowhere"]
    with pytest.raises(UnsupportedModelError, match="no module 'nowhere'"):
        module.training_step(batch(), 0)


def test_inputs_of_another_size_are_named() -> None:
    net = nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Conv1d(2, 2, 1), nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(6, 3)
    )
    module = FeedbackNet(net)
    module.training_step((torch.randn(4, 2, 6), torch.randint(3, (4,))), 0)
    module.net[0] = nn.Linear(6, 8)
    with pytest.raises(UnsupportedModelError, match=r"input of layer 'net.2' is \(10, 3\), and 16 features"):
        module.training_step((torch.randn(4, 2, 6), torch.randint(3, (4,))), 0)


def test_no_gradient_crosses_a_weight() -> None:
    """With all weights but the first zero, backpropagation gives the first layer nothing; feedback does."""
    module = FeedbackNet()
    for layer in (module.net[2], module.net[4]):
        nn.init.zeros_(layer.weight)
    module.training_step(batch(), 0).backward()
    assert module.net[0].weight.grad.norm() > 1e-3
    assert math.isfinite(module.net[0].weight.grad.norm().item())
