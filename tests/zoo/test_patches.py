"""Features of patches, and equalized features, against what their definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dp import DifferentialPrivacy
from lightning_dp.zoo import CenteredLinear, Classifier, EqualizedFeatures, PatchFeatures, Scattering2D
from lightning_dp.zoo.features.patches import _SMOOTH
from lightning_dp.zoo.features.scattering import dead_leaves
from tests.conftest import assert_close, fit, trainer
from tests.statistics.test_projection import random_loader


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


def test_patterns_are_whitened_patches_of_generated_images() -> None:
    images = dead_leaves(1000, 20, 20, 1)
    patches = images.unfold(2, 4, 2).unfold(3, 4, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 16)
    patches = patches[patches.var(1, correction=0) > _SMOOTH].double()
    scaled = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, correction=0, keepdim=True) + _SMOOTH).sqrt()
    moment = scaled.T @ scaled / len(scaled)
    floor = 1e-2 * moment.trace() / 16 * torch.eye(16)
    square = torch.linalg.inv(moment + floor)  # of the matrix that whitens
    patterns = PatchFeatures(30, 1, 4)._patterns().flatten(1).double()
    # A kernel is W W p / |W p| less its mean, p a scaled patch: among all patches, one has this direction and length.
    kernels = scaled @ square / (scaled @ square * scaled).sum(1, keepdim=True).sqrt()
    kernels = kernels - kernels.mean(1, keepdim=True)
    assert torch.cdist(patterns, kernels).min(1).values.max() < 1e-3 * patterns.norm(dim=1).min()
    assert torch.pdist(patterns).min() > 0


def test_an_image_is_transformed_by_itself_and_like_its_mirror_image() -> None:
    transform, images = small(), dead_leaves(7, 16, 16)
    together = transform(images)
    assert_close(transform(images[2:3]), together[2:3], 1e-4)
    assert_close(transform(images.flip(-1)), together, 1e-4)
    assert together.shape == (7, (3 * 9 + 12) * 2)


@pytest.mark.slow
def test_the_same_in_every_instance() -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert_close(small()(images), small()(images), 1e-5)


def test_at_power_one_generated_images_are_white() -> None:
    features = small(power=1.0)(dead_leaves(400, 16, 16))
    assert features.mean(0).abs().max() < 1e-2
    spread = torch.linalg.eigvalsh(torch.cov(features.T))
    assert spread.max() < 1.02
    assert spread.median() > 0.9, "all but the directions that are next to nothing"


@pytest.mark.parametrize("power", [pytest.param(0.3, marks=pytest.mark.slow), 0.7])
def test_a_power_is_that_of_the_standard_deviation(power: float) -> None:
    images = dead_leaves(400, 16, 16)
    plain = torch.linalg.eigvalsh(torch.cov(small(power=0.0)(images).T)).flip(0)
    equalized = torch.linalg.eigvalsh(torch.cov(small(power=power)(images).T)).flip(0)
    assert_close(equalized[:20], plain[:20] ** (1 - power), 2e-2)


@pytest.mark.slow
def test_the_first_call_leaves_no_mark() -> None:
    images = dead_leaves(3, 16, 16)
    expected = small(generated=200)(images)
    transform, patches = small(generated=200), PatchFeatures(6, cells=2)
    with pytest.raises(ValueError, match=r"floating point numbers.*uint8"):
        patches(images.byte())
    with torch.autocast("cpu", torch.bfloat16):
        transform(images)
    transform(images.double())
    assert_close(transform(images), expected, 1e-5)
    patches(images.double())
    assert_close(patches(images), PatchFeatures(6, cells=2)(images), 1e-6)
    with pytest.raises(ValueError, match=r"equalized for images of shape \(3, 16, 16\), got \(3, 16, 18\)"):
        transform(torch.zeros(1, 3, 16, 18))


def test_impossible_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\).*see channels"):
        PatchFeatures(4)(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="at least 4 positions"):
        PatchFeatures(4)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="takes images"):
        PatchFeatures(4)(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="size at least 2"):
        PatchFeatures(size=1)
    for wrong in ({"power": 1.5}, {"power": float("nan")}, {"cells": 0}, {"generated": 1}):
        with pytest.raises(ValueError, match="a power between 0 and 1"):
            EqualizedFeatures([PatchFeatures()], **wrong)
    with pytest.raises(ValueError, match="do not determine the covariance of 78 features"):
        small(generated=70)(torch.zeros(1, 3, 16, 16))


def test_a_constant_part_adds_nothing() -> None:
    constant = torch.nn.Hardtanh(-1e-9, -1e-9 + 1e-12)
    features = EqualizedFeatures([constant, torch.nn.Identity()], cells=2, generated=100)(dead_leaves(3, 8, 8))
    assert features.isfinite().all()


def test_parts_count_alike() -> None:
    features = small(power=0.0)(dead_leaves(400, 16, 16))
    scattering, patches = features.var(0, correction=0).split([54, 24])
    assert_close(scattering.sum(), torch.tensor(1.0), 1e-2)
    assert_close(patches.sum(), torch.tensor(1.0), 1e-2)


def test_a_centred_linear_layer_is_trained_privately() -> None:
    private = DifferentialPrivacy(8.0, 1e-3, noise=3.0, self_check=False)
    training = trainer(callbacks=[private], max_epochs=1)
    fit(
        training,
        Classifier(CenteredLinear(6, noise_multiplier=5.0, classes=3), learning_rate=0.1),
        random_loader(40, 6),
    )
    ledger = training.strategy.ledger  # type: ignore[attr-defined]
    assert len(ledger.statistics()) == 1 and ledger.epsilon(1e-3) <= 8
