"""Differentially private training for PyTorch Lightning: one callback, any LightningModule.

trainer = L.Trainer(max_epochs=20, callbacks=[DifferentialPrivacy(epsilon=3.0, delta=1e-5)])
"""

from lightning_dp.accounting import (
    Phase,
    PrivacyLedger,
    calibrate_noise,
    calibrate_schedule,
    calibrate_steps,
    delta,
    epsilon,
)
from lightning_dp.backprop import BackpropClipping
from lightning_dp.callbacks import DifferentialPrivacy, PrivacyBudget, PrivacyMonitor
from lightning_dp.card import PrivacyCard, card_of_run, privacy_card, render_card
from lightning_dp.checks import PrivacyConfigurationError
from lightning_dp.clipping import AdaptiveClipping, AutomaticClipping, FlatClipping, PerLayerClipping
from lightning_dp.dfa import DFAMixin
from lightning_dp.journal import JournalError
from lightning_dp.noise import GaussianNoise
from lightning_dp.records import UnsupportedModelError
from lightning_dp.strategy import PrivateStrategy, register_strategies

register_strategies()

__version__ = "0.1.0.dev0"

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "BackpropClipping",
    "DFAMixin",
    "DifferentialPrivacy",
    "FlatClipping",
    "GaussianNoise",
    "JournalError",
    "PerLayerClipping",
    "Phase",
    "PrivacyBudget",
    "PrivacyCard",
    "PrivacyConfigurationError",
    "PrivacyLedger",
    "PrivacyMonitor",
    "PrivateStrategy",
    "UnsupportedModelError",
    "calibrate_noise",
    "calibrate_schedule",
    "calibrate_steps",
    "card_of_run",
    "delta",
    "epsilon",
    "privacy_card",
    "render_card",
]
