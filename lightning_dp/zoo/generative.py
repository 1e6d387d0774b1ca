"""Generative models of labelled images, judged by a classifier that is trained on nothing but what they generate."""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class GenerativeModel(pl.LightningModule):
    """Generates images of given classes; ``test`` reports how well a classifier does that was trained on them alone.

    At the start of ``test``, a small convolutional network is trained on generated images; ``test_accuracy`` is its
    accuracy on the real images of the test set. A picture of generated images, ``samples.png``, is beside the logs.

    Args:
        classes: Number of classes.
        size: Height and width of the images, which have one channel and values in [-1, 1].
        judged_by: Number of images that the classifier is trained on.
    """

    def __init__(self, classes: int, size: int, judged_by: int) -> None:
        super().__init__()
        self.classes, self.size, self.judged_by = classes, size, judged_by
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    @abstractmethod
    def sample(self, labels: Tensor) -> Tensor:
        """Images of these classes: ``(B,) -> (B, 1, size, size)``, without gradients."""

    def on_test_start(self) -> None:
        labels = torch.arange(self.judged_by, device=self.device) % self.classes
        with torch.no_grad():
            images = torch.cat([self.sample(part) for part in labels.split(1000)])
        if self.trainer.log_dir is not None and self.trainer.is_global_zero:
            _save_picture(images[: 10 * self.classes], self.classes, Path(self.trainer.log_dir) / "samples.png")
        # Kept out of the module's own layers: it is no part of what was trained privately.
        object.__setattr__(self, "judge", train_judge(images, labels, self.classes))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self.judge(images), labels)  # type: ignore[operator]
        self.log("test_accuracy", self.test_accuracy)


def train_judge(images: Tensor, labels: Tensor, classes: int, epochs: int = 5) -> nn.Module:
    """A small convolutional classifier, trained on these images with Adam.

    Args:
        images: ``(N, 1, H, W)``.
        labels: ``(N,)``.
        classes: Number of classes.
        epochs: How often it sees each image.
    """
    with torch.enable_grad(), torch.inference_mode(False):
        images, labels = images.clone(), labels.clone()
        height = images.shape[-1] // 4
        judge = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * height * height, classes)),
        ).to(images.device)
        optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(labels), device=labels.device).split(128):
                loss = F.cross_entropy(judge(images[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return judge.eval()


def _save_picture(images: Tensor, columns: int, path: Path) -> None:
    from PIL import Image

    count, _, height, width = images.shape
    rows = count // columns
    grid = images.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).cpu().numpy()).save(path)


class _Generator(nn.Module):
    """Codes and classes to images, by transposed convolutions: ``(B, codes), (B,) -> (B, 1, size, size)``."""

    def __init__(self, codes: int, classes: int, width: int, size: int) -> None:
        super().__init__()
        self.small, self.width = size // 4, width
        self.classes = nn.Embedding(classes, codes)
        self.first = nn.Linear(codes, 2 * width * self.small * self.small)
        self.norm = nn.BatchNorm1d(2 * width * self.small * self.small)
        self.rest = nn.Sequential(
            *(nn.ReLU(), nn.Unflatten(1, (2 * width, self.small, self.small))),
            *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh()),
        )

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        images: Tensor = self.rest(self.norm(self.first(codes * self.classes(labels))))
        return images


class _Discriminator(nn.Module):
    """Whether an image is one of its class: ``(B, 1, size, size), (B,) -> (B,)``."""

    def __init__(self, classes: int, width: int, size: int) -> None:
        super().__init__()
        features = 2 * width * (size // 4) ** 2
        self.features = nn.Sequential(
            *(nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten()),
        )
        self.out = nn.Linear(features, classes + 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        scores = self.out(self.features(images))
        return scores[:, -1] + scores.gather(1, labels[:, None])[:, 0]


class ConditionalGAN(GenerativeModel):
    """A DCGAN with classes: records meet the discriminator alone, and its steps are private; the generator's are not.

    The discriminator takes several steps for one of the generator: its noise needs to be averaged out. Source: Bie,
    Kamath & Zhang 2023, "Private GANs, Revisited", section 3. Classes of what is generated are drawn evenly: those of
    the batch would take the records' labels past the noise.

    Args:
        classes, size, judged_by: As for `GenerativeModel`.
        codes: Number of random numbers that an image is made from.
        width: Channels of the layers at half the size; twice as many at a quarter.
        loss: ``"logistic"`` (Goodfellow et al. 2014, non-saturating) or ``"wasserstein"``, with a gradient penalty
            (Gulrajani et al. 2017).
        every: Steps of the discriminator for one of the generator.
        learning_rate: Of both Adams, with β₁ = 0.5.
        penalty: Weight of the gradient penalty.
    """

    def __init__(
        self,
        classes: int = 10,
        size: int = 28,
        judged_by: int = 20_000,
        codes: int = 64,
        width: int = 32,
        loss: Literal["logistic", "wasserstein"] = "logistic",
        every: int = 10,
        learning_rate: float = 5e-4,
        penalty: float = 10.0,
    ) -> None:
        super().__init__(classes, size, judged_by)
        self.automatic_optimization = False
        self.codes, self.loss, self.every, self.learning_rate, self.penalty = codes, loss, every, learning_rate, penalty
        self.generator = _Generator(codes, classes, width, size)
        self.discriminator = _Discriminator(classes, width, size)

    def forward(self, labels: Tensor) -> Tensor:
        images: Tensor = self.generator(torch.randn(len(labels), self.codes, device=labels.device), labels)
        return images

    def sample(self, labels: Tensor) -> Tensor:
        images: Tensor = self(labels)
        return images

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, labels = batch
        optimizers: Any = self.optimizers()
        of_generator, of_discriminator = optimizers
        drawn = torch.randint(self.classes, (len(real),), device=self.device)
        fake = self(drawn)
        of_discriminator.zero_grad()
        self.manual_backward(self._discriminator_loss(real, labels, fake.detach(), drawn))
        of_discriminator.step()
        if (batch_idx + 1) % self.every:
            return
        score = self.discriminator(fake, drawn)
        of_generator.zero_grad()
        self.manual_backward(-score.mean() if self.loss == "wasserstein" else F.softplus(-score).mean())
        of_generator.step()

    def _discriminator_loss(self, real: Tensor, labels: Tensor, fake: Tensor, drawn: Tensor) -> Tensor:
        of_real, of_fake = self.discriminator(real, labels), self.discriminator(fake, drawn)
        if self.loss == "logistic":
            return F.softplus(-of_real).mean() + F.softplus(of_fake).mean()
        between = torch.lerp(real, fake, torch.rand(len(real), 1, 1, 1, device=self.device)).requires_grad_()
        [slopes] = torch.autograd.grad(self.discriminator(between, labels).sum(), between, create_graph=True)
        steepness = slopes.flatten(1).norm(dim=1)
        return of_fake.mean() - of_real.mean() + self.penalty * (steepness - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(part.parameters(), self.learning_rate, betas=(0.5, 0.999))
            for part in (self.generator, self.discriminator)
        ]


class Diffusion(GenerativeModel):
    """A denoiser of images with classes: fully connected, on images that noise of many strengths was added to.

    A record is shown several times, each with noise of its own and of another strength
    (``augmentation_multiplicity``), and the gradient of its mean loss is bounded. Source: Dockhorn et al. 2023,
    "Differentially Private Diffusion Models", section 3.2; preconditioning and sampler: Karras et al. 2022,
    "Elucidating the Design Space of Diffusion-Based Generative Models", table 1 and algorithm 2 (without churn).

    Args:
        classes, size, judged_by: As for `GenerativeModel`.
        width: Units of the three hidden layers.
        learning_rate: Of Adam.
        average: Of the moving average of the weights that images are generated with.
        steps: Of the sampler.
    """

    def __init__(
        self,
        classes: int = 10,
        size: int = 28,
        judged_by: int = 20_000,
        width: int = 512,
        learning_rate: float = 1e-3,
        average: float = 0.99,
        steps: int = 20,
    ) -> None:
        super().__init__(classes, size, judged_by)
        self.learning_rate, self.average, self.steps = learning_rate, average, steps
        self.net = _Denoiser(classes, size * size, width)
        self.averaged = _Denoiser(classes, size * size, width).requires_grad_(False)
        self.averaged.load_state_dict(self.net.state_dict())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        strength = torch.exp(torch.randn(len(images), device=self.device) * 1.2 - 0.5)[:, None]
        clean = images.flatten(1)
        noisy = clean + strength * torch.randn_like(clean)
        weight = (strength.square() + _SPREAD**2) / (strength * _SPREAD).square()
        return (weight * (self.denoise(self.net, noisy, strength, labels) - clean).square()).mean()

    @staticmethod
    def denoise(net: nn.Module, noisy: Tensor, strength: Tensor, labels: Tensor) -> Tensor:
        """The mean of the images that may have become these: ``(B, P), (B, 1), (B,) -> (B, P)``."""
        scale = (strength.square() + _SPREAD**2).sqrt()
        kept, added = (_SPREAD / scale).square(), strength * _SPREAD / scale
        return kept * noisy + added * net(noisy / scale, strength.log() / 4, labels)

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for mean, new in zip(self.averaged.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(new, 1 - min(self.average, (1 + self.global_step) / (10 + self.global_step)))

    def sample(self, labels: Tensor) -> Tensor:
        # From much noise to none, by Heun's method.
        powers = torch.linspace(20.0 ** (1 / 7), 0.02 ** (1 / 7), self.steps, device=labels.device) ** 7
        strengths = [*powers.tolist(), 0.0]
        images = strengths[0] * torch.randn(len(labels), self.size * self.size, device=labels.device)
        for now, then in zip(strengths, strengths[1:], strict=False):
            slope = self._slope(images, now, labels)
            ahead = images + (then - now) * slope
            if then:
                ahead = images + (then - now) * (slope + self._slope(ahead, then, labels)) / 2
            images = ahead
        return images.clamp(-1, 1).view(-1, 1, self.size, self.size)

    def _slope(self, images: Tensor, strength: float, labels: Tensor) -> Tensor:
        column = torch.full((len(images), 1), strength, device=images.device)
        return (images - self.denoise(self.averaged, images, column, labels)) / strength

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), self.learning_rate)


#: Standard deviation of the pixels of images in [-1, 1], about: a constant of `Diffusion`.
_SPREAD = 0.6


class _Denoiser(nn.Module):
    """Noisy images, their noise and classes to what is subtracted: ``(B, P), (B, 1), (B,) -> (B, P)``."""

    def __init__(self, classes: int, pixels: int, width: int) -> None:
        super().__init__()
        self.first, self.classes, self.strength = (
            nn.Linear(pixels, width),
            nn.Embedding(classes, width),
            nn.Linear(16, width),
        )
        self.second, self.third, self.last = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, pixels)

    def forward(self, images: Tensor, strength: Tensor, labels: Tensor) -> Tensor:
        angles = strength * torch.arange(1, 9, device=images.device) * math.pi / 2
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        hidden = F.silu(self.first(images) + self.classes(labels) + self.strength(waves))
        hidden = hidden + F.silu(self.second(hidden))
        hidden = hidden + F.silu(self.third(hidden))
        result: Tensor = self.last(hidden)
        return result
