"""Models and data that the recipes use: ordinary Lightning code; only `ProjectedMLP` knows of privacy."""

from lightning_dp.zoo.classifier import Classifier, FeedbackClassifier
from lightning_dp.zoo.data import CIFAR10DataModule, DigitsDataModule, MNISTDataModule
from lightning_dp.zoo.models import MLP, ProjectedMLP, TanhCNN

__all__ = [
    "MLP",
    "CIFAR10DataModule",
    "Classifier",
    "DigitsDataModule",
    "FeedbackClassifier",
    "MNISTDataModule",
    "ProjectedMLP",
    "TanhCNN",
]
