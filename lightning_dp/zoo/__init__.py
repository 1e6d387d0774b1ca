"""Models and data that the recipes use: ordinary Lightning code.

Only `ProjectedMLP` and `CenteredLinear` (a statistic released with noise) and `StandardizedConv2d` (a gradient rule)
contain something about privacy.
"""

from lightning_dp.zoo.classifier import Classifier, FeedbackClassifier
from lightning_dp.zoo.data import CIFAR10DataModule, DigitsDataModule, MNISTDataModule, Upright
from lightning_dp.zoo.features.patches import EqualizedFeatures, PatchFeatures
from lightning_dp.zoo.features.scattering import Scattering2D
from lightning_dp.zoo.generative import ConditionalGAN, Diffusion, GenerativeModel
from lightning_dp.zoo.models import MLP, CenteredLinear, FeatureClassifier, ProjectedMLP, TanhCNN
from lightning_dp.zoo.tables import AdultDataModule
from lightning_dp.zoo.text import BagOfWords, SST2DataModule, TextTransformer
from lightning_dp.zoo.wide_resnet import StandardizedConv2d, WideResNet

__all__ = [
    "MLP",
    "AdultDataModule",
    "BagOfWords",
    "CIFAR10DataModule",
    "CenteredLinear",
    "Classifier",
    "ConditionalGAN",
    "Diffusion",
    "DigitsDataModule",
    "EqualizedFeatures",
    "FeatureClassifier",
    "FeedbackClassifier",
    "GenerativeModel",
    "MNISTDataModule",
    "PatchFeatures",
    "ProjectedMLP",
    "SST2DataModule",
    "Scattering2D",
    "StandardizedConv2d",
    "TanhCNN",
    "TextTransformer",
    "Upright",
    "WideResNet",
]
