"""Models and data that the recipes use: ordinary Lightning code, with nothing about privacy in it."""

from lightning_dp.zoo.classifier import Classifier, FeedbackClassifier
from lightning_dp.zoo.data import CIFAR10DataModule, DigitsDataModule, MNISTDataModule
from lightning_dp.zoo.models import MLP, TanhCNN

__all__ = [
    "MLP",
    "CIFAR10DataModule",
    "Classifier",
    "DigitsDataModule",
    "FeedbackClassifier",
    "MNISTDataModule",
    "TanhCNN",
]
