from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.training.checks.model import check_model
from lightning_dp.zoo import (
    MLP,
    CIFAR10DataModule,
    Classifier,
    DigitsDataModule,
    FeatureClassifier,
    Scattering2D,
    TanhCNN,
    Upright,
    WideResNet,
)
from lightning_dp.zoo.data import TensorTable, ViewTable, augmented, upright
from lightning_dp.zoo.features.scattering import dead_leaves
from lightning_dp.zoo.wide_resnet import standardized
from tests.conftest import assert_close, fit, oracle_gradients, trainer


def test_the_tanh_network_has_the_papers_shape() -> None:
    net = TanhCNN()
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == 26_010  # Papernot et al. 2021, table 1; Tramèr & Boneh 2021
    check_model(Classifier(net), "bookkeeping")
    assert TanhCNN(channels=3, size=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_layers_of_an_mlp() -> None:
    linear = [layer for layer in MLP([12, 5, 3]) if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(12, 5), (5, 3)]


def test_digits_are_split_without_overlap() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    assert data.train is not None
    assert data.test is not None
    assert len(data.train) + len(data.test) == 1797
    images, labels = data.train.__getitems__([0, 5])
    assert images.shape == (2, 1, 8, 8)
    assert labels.shape == (2,)
    assert images.abs().max() <= 1
    assert data.train.__getitems__([])[0].shape == (0, 1, 8, 8)


def smooth_image(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.sin(0.9 * rows + 0.02 * columns**2) + torch.cos(0.05 * rows * columns)


KYMATIO = json.loads((Path(__file__).parent / "kymatio.json").read_text())


@pytest.mark.parametrize("shape", KYMATIO)
def test_scattering_gives_kymatios_numbers(shape: str) -> None:
    """Numbers that kymatio 0.3.0 gives for this image: all features at one place, every seventh at another.

    kymatio divides by 2 · 3.1415, which is 3e-5 less than 2π.
    """
    height, width, scales, angles = map(int, shape.split())
    transform = Scattering2D(height, width, scales, angles)
    image = smooth_image(height, width).float()
    features = transform(torch.stack([image, -2 * image])[None])[0].unflatten(0, (2, -1))
    assert features.shape[1:] == (transform.channels, height // 2**scales, width // 2**scales)
    inside, corner = map(torch.tensor, KYMATIO[shape])
    assert_close(features[0, :, 2, 1], inside, 2e-4)
    assert_close(features[0, ::7, 0, -1], corner, 2e-4)
    assert_close(features[1, 0], -2 * features[0, 0], 1e-5)  # channels do not mix, and the average is linear
    assert_close(features[1, 1:], 2 * features[0, 1:], 1e-5)  # the rest are averages of moduli


def test_scattering_transforms_every_image_by_itself() -> None:
    transform = Scattering2D(16, 16, standardize=True)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    assert_close(transform(images)[2:3], transform(images[2:3]), 1e-5)
    with pytest.raises(ValueError, match="made for images of 16 × 16"):
        transform(torch.zeros(1, 3, 17, 16))
    with pytest.raises(ValueError, match="too small"):
        Scattering2D(7, 28)


def test_standardised_features_have_mean_0_and_variance_1_over_generated_images() -> None:
    features = Scattering2D(16, 16, standardize=True)(dead_leaves(512, 16, 16)).unflatten(1, (3, -1))
    deviation, mean = torch.std_mean(features, (0, 1, 3, 4))
    assert mean.abs().max() < 1e-3
    assert (deviation - 1).abs().max() < 1e-3


def test_copies_of_a_record_get_different_views() -> None:
    views = torch.arange(40.0).view(10, 4, 1)
    table = ViewTable(views, torch.arange(10))
    seen = set()
    for _ in range(50):
        values, labels = table.__getitems__([3, 3, 3, 7, 7, 3])
        assert labels.tolist() == [3, 3, 3, 7, 7, 3]
        assert (values[:, 0] // 4).tolist() == labels.tolist()
        assert len(set(values[:3, 0].tolist())) == 3
        assert values[3] != values[4]
        seen |= set(values[:, 0].tolist())
    assert seen == {*range(12, 16), *range(28, 32)}
    assert table.__getitems__([])[0].shape == (0, 1)
    together = ViewTable(views, torch.arange(10), together=True)
    assert together[2][0].tolist() == views[2].tolist()


def test_augmentation_moves_every_image_by_itself() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6)
    padded = F.pad(image, [2] * 4, mode="reflect")
    allowed = [padded[0, 0, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
    allowed += [window.flip(-1) for window in allowed]
    moved = augmented(image.expand(400, 3, 6, 6), flips=True, shifts=2)
    found = {next(i for i, window in enumerate(allowed) if torch.equal(one[0], window)) for one in moved}
    assert len(found) > 40, "of 50 ways to move it"
    assert torch.equal(moved[:, 0], moved[:, 2])
    assert torch.equal(augmented(image, flips=False, shifts=0), image)
    assert augmented(image[:0], True, 2).shape == (0, 1, 6, 6)


def test_ink_is_centred_and_stands_upright_in_every_image_by_itself() -> None:
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    slants = torch.linspace(-0.6, 0.6, 9).view(-1, 1, 1)
    middle = 12 + slants * (rows - 16)
    stroke = torch.exp(-((columns - middle) ** 2) / 4) * torch.exp(-((rows - 16) ** 2) / 20)
    images = (2 * stroke - 1)[:, None]
    moved = upright(images)
    ink, y, x = (moved + 1) / 2, rows - 13.5, columns - 13.5
    mass = ink.sum((1, 2, 3))
    for moment in (y, x, y * x):
        assert ((ink * moment).sum((1, 2, 3)) / mass).abs().max() < 0.3  # it was up to 10: the rest is interpolation
    spread = moved - moved.mean(0, keepdim=True)
    assert spread.abs().max() < 0.2, "strokes of all slants look the same"
    assert_close(upright(images[3:4]), moved[3:4])
    empty = torch.full((2, 1, 9, 9), -1.0)
    assert torch.equal(upright(empty), empty)
    assert torch.equal(Upright(nn.Flatten())(images), moved.flatten(1))


def test_logits_of_several_views_are_averaged() -> None:
    net = FeatureClassifier(6, 4, groups=3, head="cnn")
    views = torch.randn(5, 2, 6, 4, 4)
    assert_close(net(views), (net(views[:, 0]) + net(views[:, 1])) / 2, 1e-5)


@pytest.mark.parametrize("head", ["linear", "mlp", "cnn"])
@pytest.mark.parametrize("groups", [27, None])
def test_feature_networks_can_be_trained_privately(head: str, groups: int | None) -> None:
    net = FeatureClassifier(81, 7, groups, head)  # type: ignore[arg-type]
    assert net(torch.randn(2, 81, 7, 7)).shape == (2, 10)
    check_model(Classifier(net), "bookkeeping")


def test_a_wide_residual_network_has_the_papers_size_and_per_example_gradients() -> None:
    net = WideResNet()
    # De et al. 2022: WRN-16-4 has 2.75 million parameters.
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 2.75
    check_model(Classifier(net), "bookkeeping")
    with pytest.raises(ValueError, match="6 n \\+ 4"):
        WideResNet(depth=18)
    small = WideResNet(10, 1, groups=4).double()
    nn.init.normal_(small.head.weight)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = oracle_gradients(small, lambda i: small(images[2 * i : 2 * i + 2]).pow(2).sum(), 2)
    engine = BookKeeping(small)
    engine.copies = 2
    with engine.forward(4):
        loss = small(images).pow(2).sum()
    with engine.backward():
        loss.backward()
    for name, gradient in engine.gradients().items():
        assert_close(gradient.squared_norms(), expected[name].flatten(1).pow(2).sum(1), 1e-8)


def test_standardised_kernels_have_mean_0_and_variance_1_over_their_size() -> None:
    weight = standardized(3 + 5 * torch.randn(4, 3, 3, 3)).flatten(1)
    assert weight.mean(1).abs().max() < 1e-6
    assert_close(weight.square().sum(1), torch.ones(4), 1e-5)


def images_on_disk(folder: Path, train: int, test: int) -> None:
    """CIFAR-10's layout, with generated images."""
    (folder / "cifar10").mkdir()
    for part, count in (("train", train), ("test", test)):
        pixels = ((dead_leaves(count, 32, 32, discs=9) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        rows = {"img": [Image.fromarray(image) for image in pixels], "label": [i % 10 for i in range(count)]}
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        stored = datasets.Dataset.from_dict(rows, features=features)
        stored.to_parquet(str(folder / "cifar10" / f"{part}-00000-of-00001.parquet"))


def test_features_are_computed_once_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images_on_disk(tmp_path, 12, 4)
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    transform = Scattering2D(32, 32)
    data = CIFAR10DataModule(batch_size=4, val_size=2, features=transform, flips=True)
    plain = CIFAR10DataModule(batch_size=4, val_size=2)
    module = Classifier(FeatureClassifier(243, 8), learning_rate=0.1)
    private = DifferentialPrivacy(8.0, 1e-5, augmentation_multiplicity=2)
    fitted = trainer(callbacks=[private], max_epochs=2)
    fit(fitted, module, data)
    plain.setup("fit")
    assert isinstance(data.train, ViewTable)
    assert isinstance(plain.train, TensorTable)
    for view, images in enumerate((plain.train.columns[0], plain.train.columns[0].flip(-1))):
        assert_close(data.train.columns[0][:, view].float(), transform(images), 1e-3)
    assert len(data.train) == 10
    assert len(fitted.strategy.ledger) == 6
    [metrics] = trainer().test(module, data, verbose=False)
    assert 0 <= metrics["test_accuracy"] <= 1
    with pytest.raises(ValueError, match="65504"):
        CIFAR10DataModule(features=Large()).setup("fit")
    with pytest.raises(ValueError, match="depend on which others"):
        CIFAR10DataModule(features=nn.BatchNorm2d(3, affine=False, track_running_stats=False)).setup("fit")
    with pytest.raises(ValueError, match="shifts"):
        CIFAR10DataModule(features=transform, shifts=2)
    with pytest.raises(ValueError, match="no trainable parameters"):
        CIFAR10DataModule(features=nn.Conv2d(3, 3, 1))


class Large(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 1e6 * images


def test_validating_before_training_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images_on_disk(tmp_path, 12, 4)
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    data = CIFAR10DataModule(batch_size=4, val_size=2)
    data.setup("validate")
    assert data.val is not None
    assert data.train is None
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 10  # type: ignore[arg-type]


def test_images_are_augmented_in_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images_on_disk(tmp_path, 12, 4)
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    data = CIFAR10DataModule(batch_size=4, flips=True, shifts=4)
    seen: dict[str, list[Tensor]] = {"train": [], "test": []}

    class Looks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen["train"].append(batch[0])
            return super().training_step(batch, batch_idx)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen["test"].append(batch[0])
            super().test_step(batch, batch_idx)

    module = Looks(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))
    private = DifferentialPrivacy(8.0, 1e-5, seed=1, self_check=False, augmentation_multiplicity=3)
    fit(trainer(callbacks=[private], max_steps=1), module, data)
    trainer().test(module, data, verbose=False)
    assert data.train is not None
    assert data.test is not None
    assert torch.equal(seen["test"][0], data.test.columns[0])
    originals = data.train.columns[0].flatten(1)
    rows = seen["train"][-1].flatten(1)
    assert len(rows) % 3 == 0
    assert (torch.cdist(rows, originals).min(1).values > 1).any(), "nothing was moved"
