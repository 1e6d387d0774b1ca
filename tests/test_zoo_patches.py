"""Features of patches, and equalized features, against what their definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dp import DifferentialPrivacy
from lightning_dp.zoo import CenteredLinear, Classifier, EqualizedFeatures, PatchFeatures, Scattering2D
from lightning_dp.zoo.patches import _SMOOTH
from lightning_dp.zoo.scattering import dead_leaves
from tests.conftest import assert_close, fit, trainer
from tests.test_pca import random_loader


def small(power: float = 0.7, cells: int = 2, generated: int = 400) -> EqualizedFeatures:
    parts = [Scattering2D(16, 16, angles=2, standardize=True), PatchFeatures(6, cells=2)]
    return EqualizedFeatures(parts, power=power, cells=cells, generated=generated)


def likeness(patterns: Tensor, patch: Tensor) -> Tensor:
    """What one patch ``(C, size, size)`` has in common with every pattern."""
    centred = patch - patch.mean()
    scaled = centred / (patch.var(correction=0) + _SMOOTH).sqrt()
    return (patterns * scaled).sum((1, 2, 3))


@pytest.mark.parametrize(("channels", "size", "cells"), [(3, 6, 4), (1, 5, 2), (2, 4, 3)])
def test_patch_features_are_those_of_the_loop_over_patches(channels: int, size: int, cells: int) -> None:
    features = PatchFeatures(5, channels, size, cells, threshold=0.2)
    positions, patterns = 3 * cells, features._patterns()
    images = dead_leaves(3, positions + size - 1, positions + size - 1, channels, discs=40)
    for image, result in zip(images, features(images), strict=True):
        sums = torch.zeros(10, cells, cells)
        for row in range(positions):
            for column in range(positions):
                like = likeness(patterns, image[:, row : row + size, column : column + size])
                beyond = torch.cat([(like - 0.2).clamp_min(0), (-like - 0.2).clamp_min(0)])
                sums[:, row // 3, column // 3] += beyond / 9
        assert_close(result, sums.sqrt(), 1e-3)


def test_patterns_whiten_patches_of_generated_images() -> None:
    patterns = PatchFeatures(40)._patterns()
    assert patterns.mean((1, 2, 3)).abs().max() < 1e-6
    images = dead_leaves(50, 30, 30)
    patches = images.unfold(2, 6, 3).unfold(3, 6, 3).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 6, 6)
    patches = patches[patches.var((1, 2, 3)) > _SMOOTH]
    scaled = (patches - patches.mean((1, 2, 3), keepdim=True)) / patches.std((1, 2, 3), keepdim=True)
    responses = torch.einsum("nchw,kchw->nk", scaled, patterns)
    assert 0.1 < responses.std() < 2, "unit patterns of whitened patches respond with variances near one"


def test_an_image_is_transformed_by_itself_and_like_its_mirror_image() -> None:
    transform, images = small(), dead_leaves(7, 16, 16)
    together = transform(images)
    assert_close(transform(images[2:3]), together[2:3], 1e-4)
    assert_close(transform(images.flip(-1)), together, 1e-4)
    assert together.shape == (7, (3 * 9 + 12) * 2)


def test_the_same_in_every_instance() -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert_close(small()(images), small()(images), 1e-5)


def test_at_power_one_generated_images_are_white() -> None:
    features = small(power=1.0)(dead_leaves(400, 16, 16))
    assert features.mean(0).abs().max() < 1e-2
    spread = torch.linalg.eigvalsh(torch.cov(features.T))
    assert spread.max() < 1.02
    assert spread.median() > 0.9, "all but the directions that are next to nothing"


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_a_power_is_that_of_the_standard_deviation(power: float) -> None:
    images = dead_leaves(400, 16, 16)
    plain = torch.linalg.eigvalsh(torch.cov(small(power=0.0)(images).T)).flip(0)
    equalized = torch.linalg.eigvalsh(torch.cov(small(power=power)(images).T)).flip(0)
    assert_close(equalized[:20], plain[:20] ** (1 - power), 2e-2)


def test_parts_count_alike() -> None:
    features = small(power=0.0)(dead_leaves(400, 16, 16))
    scattering, patches = features.var(0, correction=0).split([54, 24])
    assert_close(scattering.sum(), torch.tensor(1.0), 1e-2)
    assert_close(patches.sum(), torch.tensor(1.0), 1e-2)


def test_a_centred_linear_layer_is_trained_privately() -> None:
    private = DifferentialPrivacy(8.0, 1e-3)
    training = trainer(callbacks=[private], max_epochs=1)
    fit(
        training,
        Classifier(CenteredLinear(6, noise_multiplier=5.0, classes=3), learning_rate=0.1),
        random_loader(40, 6),
    )
    ledger = training.strategy.ledger  # type: ignore[attr-defined]
    assert len(ledger.statistics()) == 1 and ledger.epsilon(1e-3) <= 8
