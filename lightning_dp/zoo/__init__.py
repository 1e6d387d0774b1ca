"""Models and data that the recipes use: ordinary Lightning code, with nothing about privacy in it."""

from lightning_dp.zoo.classifier import Classifier, FeedbackClassifier
from lightning_dp.zoo.data import CIFAR10DataModule, DigitsDataModule, MNISTDataModule
from lightning_dp.zoo.models import MLP, TanhCNN
from lightning_dp.zoo.tables import AdultDataModule
from lightning_dp.zoo.text import BagOfWords, SST2DataModule, TextTransformer

__all__ = [
    "MLP",
    "AdultDataModule",
    "BagOfWords",
    "CIFAR10DataModule",
    "Classifier",
    "DigitsDataModule",
    "FeedbackClassifier",
    "MNISTDataModule",
    "SST2DataModule",
    "TanhCNN",
    "TextTransformer",
]
