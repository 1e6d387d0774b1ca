"""Generative models: trained privately, and judged by a classifier that sees nothing but what they generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.zoo import ConditionalGAN, Diffusion, GenerativeModel
from lightning_dp.zoo.generative import train_judge

CLASSES, SIZE = 3, 8


def templates() -> Tensor:
    """One image a class: a bar at another place."""
    images = torch.full((CLASSES, 1, SIZE, SIZE), -1.0)
    for number in range(CLASSES):
        images[number, :, :, 2 * number : 2 * number + 2] = 1.0
    return images


def data(count: int = 60) -> TensorDataset:
    labels = torch.arange(count) % CLASSES
    noise = 0.1 * torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return TensorDataset((templates()[labels] + noise).clamp(-1, 1), labels)


def gan(loss: Any) -> ConditionalGAN:
    return ConditionalGAN(CLASSES, SIZE, judged_by=90, codes=4, width=4, loss=loss, every=2)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    private = DifferentialPrivacy(epsilon=8.0, delta=1e-3, noise=2.0, **options)
    return L.Trainer(
        max_epochs=2, accelerator="cpu", logger=CSVLogger(folder), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[private],
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["logistic", "wasserstein"])
def test_only_the_discriminators_steps_are_private(loss: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, run = gan(loss), trainer(tmp_path)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run.fit(module, DataLoader(data(), batch_size=20, shuffle=True))
    plan = run.strategy.examiner.understanding.manual  # type: ignore[attr-defined]
    assert (plan.private, plan.public) == ({1}, {0})
    assert run.strategy.ledger.steps == 6  # type: ignore[attr-defined]
    assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())
    [result] = run.test(module, DataLoader(data(30), batch_size=10), verbose=False)
    assert 0 <= result["test_accuracy"] <= 1
    with Image.open(Path(str(run.log_dir)) / "samples.png") as picture:
        assert picture.size == (CLASSES * SIZE, 10 * SIZE)


def test_a_diffusion_model_shows_each_record_several_times(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Diffusion(CLASSES, SIZE, judged_by=30, width=8, steps=5)
    run = trainer(tmp_path, augmentation_multiplicity=3)
    run.fit(module, DataLoader(data(), batch_size=20, shuffle=True))
    assert run.strategy.ledger.steps == 6  # type: ignore[attr-defined]
    assert any(
        not torch.equal(a, b) for a, b in zip(module.net.parameters(), module.averaged.parameters(), strict=True)
    )
    images = module.sample(torch.arange(CLASSES))
    assert images.shape == (CLASSES, 1, SIZE, SIZE) and images.abs().max() <= 1


def test_the_sampler_finds_what_the_denoiser_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images that are one of three for certain, the denoiser is their mean, and the sampler ends at it."""
    module = Diffusion(CLASSES, SIZE)
    known = templates().flatten(1)
    monkeypatch.setattr(module, "denoise", lambda net, noisy, strength, labels: known[labels])
    labels = torch.tensor([2, 0, 1, 1])
    torch.testing.assert_close(module.sample(labels), templates()[labels], atol=0.02, rtol=0)


def test_a_denoiser_without_a_network_keeps_images_without_noise() -> None:
    """The preconditioning alone: what has hardly any noise is kept, and what is noise alone is thrown away."""

    class Zero(nn.Module):
        def forward(self, images: Tensor, *rest: Tensor) -> Tensor:
            return torch.zeros_like(images)

    images, labels = torch.randn(4, SIZE * SIZE), torch.zeros(4, dtype=torch.long)
    little = Diffusion.denoise(Zero(), images, torch.full((4, 1), 1e-3), labels)
    much = Diffusion.denoise(Zero(), images * 1e3, torch.full((4, 1), 1e3), labels)
    torch.testing.assert_close(little, images, rtol=1e-4, atol=1e-4)
    assert much.abs().max() < 1e-2 * images.abs().max()


@pytest.mark.parametrize("right", [True, False])
def test_the_judge_is_as_good_as_what_it_was_trained_on(right: bool, tmp_path: Path) -> None:
    class Known(GenerativeModel):
        def sample(self, labels: Tensor) -> Tensor:
            return templates()[labels if right else (labels + 1) % CLASSES]

    torch.manual_seed(0)
    run = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=str(tmp_path))
    [result] = run.test(Known(CLASSES, SIZE, judged_by=600), DataLoader(data(30), batch_size=10), verbose=False)
    assert result["test_accuracy"] > 0.95 if right else result["test_accuracy"] < 0.05


def test_the_judge_learns_from_images_made_without_gradients() -> None:
    with torch.inference_mode():
        images = templates().repeat(40, 1, 1, 1)
    judge = train_judge(images, torch.arange(CLASSES).repeat(40), CLASSES)
    assert (judge(templates()).argmax(1) == torch.arange(CLASSES)).all() and not judge.training
