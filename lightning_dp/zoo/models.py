"""Networks of the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lightning_dp.statistics.centering import PrivateCentering
from lightning_dp.statistics.projection import PrivateProjection


class MLP(nn.Sequential):
    """Fully connected layers with tanh in between: ``(B, *) -> (B, sizes[-1])``.

    Args:
        sizes: Number of features of the flattened input, of every hidden layer, and of the output.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), nn.Tanh()]
        super().__init__(*layers[:-1])


class ProjectedMLP(nn.Sequential):
    """One hidden layer of ReLU units on private principal components, equalized: ``(B, *) -> (B, classes)``.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", section 5.2, where components are as they are.

    Args:
        noise_multiplier: Of the release of the components; see `PrivateProjection`.
        inputs: Number of features of a flattened record.
        components: Number of principal components.
        hidden: Number of units of the hidden layer.
        classes: Number of classes.
    """

    def __init__(
        self, noise_multiplier: float, inputs: int = 784, components: int = 60, hidden: int = 1000, classes: int = 10
    ) -> None:
        projection = PrivateProjection(inputs, components, noise_multiplier, equalized=True)
        super().__init__(projection, nn.Linear(components, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class CenteredLinear(nn.Sequential):
    """A linear layer on features from which the train set's mean is subtracted, privately: ``(B, *) -> (B, classes)``.

    Without a bias: centred features hardly need one, and it would take its part of every clipped gradient.

    Args:
        features: Number of features of a flattened record.
        noise_multiplier: Of the release of the mean; see `PrivateCentering`.
        classes: Number of classes.
    """

    def __init__(self, features: int, noise_multiplier: float, classes: int = 10) -> None:
        super().__init__(PrivateCentering(features, noise_multiplier), nn.Linear(features, classes, bias=False))


class TanhCNN(nn.Module):
    """The small convolutional network of the DP literature, by default for MNIST:
    ``(B, channels, size, size) -> (B, classes)``.

    Convolutions 16@8×8/2 and 32@4×4/2, max-pooling 2×2/1 after each, a hidden layer, tanh throughout (bounded
    activations suit clipping). Source: Papernot et al. 2021, "Tempered Sigmoid Activations for Deep Learning with
    Differential Privacy", table 1.

    Args:
        classes: Number of classes.
        channels: Number of channels of the images.
        size: Height and width of the images.
        hidden: Number of units of the hidden layer.
    """

    def __init__(self, classes: int = 10, channels: int = 1, size: int = 28, hidden: int = 32) -> None:
        super().__init__()
        first = (size + 6 - 8) // 2  # after convolution and pooling
        last = (first - 4) // 2
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 8, stride=2, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * last * last, hidden), nn.Tanh(), nn.Linear(hidden, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class FeatureClassifier(nn.Module):
    """A small network on fixed features: ``(B, channels, size, size) -> (B, classes)``.

    Features are normalised per image (GroupNorm without parameters): no statistic of the data set is needed. Of several
    views of an image, ``(B, V, channels, size, size)``, the logits are averaged. Source: Tramèr & Boneh 2021,
    "Differentially Private Learning Needs Better Features (or Much More Data)", appendix C.

    Args:
        channels, size: Of the features: 81 and 7 for `Scattering2D` of MNIST, 243 and 8 of CIFAR-10.
        groups: Number of groups of the GroupNorm. ``None``: features are not normalised.
        head: ``"linear"``; ``"mlp"``, with 64 hidden units, for MNIST; ``"cnn"``: convolutions 64@3×3, max-pooling,
            64@3×3, for CIFAR-10. Activations are tanh.
        scale: What normalised features are multiplied with, before the network.
        classes: Number of classes.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        groups: int | None = 27,
        head: Literal["linear", "mlp", "cnn"] = "linear",
        scale: float = 1.0,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.norm = nn.Identity() if groups is None else nn.GroupNorm(groups, channels, affine=False)
        self.scale = scale
        layers: list[nn.Module]
        if head == "linear":
            layers = [nn.Flatten(), nn.Linear(channels * size**2, classes)]
        elif head == "mlp":
            layers = [nn.Flatten(), nn.Linear(channels * size**2, 64), nn.Tanh(), nn.Linear(64, classes)]
        else:
            layers = [nn.Conv2d(channels, 64, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.Tanh()]
            layers += [nn.Flatten(), nn.Linear(64 * (size // 2) ** 2, classes)]
        self.head = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 5:
            return self(features.flatten(0, 1)).unflatten(0, features.shape[:2]).mean(1)
        logits: Tensor = self.head(self.norm(features) * self.scale)
        return logits
