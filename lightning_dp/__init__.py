"""Differentially private training for PyTorch Lightning: one callback, any LightningModule.

trainer = L.Trainer(max_epochs=20, callbacks=[DifferentialPrivacy(epsilon=3.0, delta=1e-5)])
"""

from lightning_dp.accounting.calibration import calibrate_noise, calibrate_schedule, calibrate_steps
from lightning_dp.accounting.events import Phase
from lightning_dp.accounting.ledger import PrivacyLedger, delta, epsilon
from lightning_dp.dfa import DFAMixin
from lightning_dp.errors import JournalError, PrivacyConfigurationError, ReplicasDiverged, UnsupportedModelError
from lightning_dp.mechanism.backprop.rule import BackpropClipping
from lightning_dp.mechanism.clipping import AdaptiveClipping, AutomaticClipping, FlatClipping, PerLayerClipping
from lightning_dp.mechanism.denoising import JamesSteinDenoiser, KSDenoiser, LowPassDenoiser
from lightning_dp.mechanism.encoding.codebooks import (
    FlatCodebook,
    PowerLawCodebook,
    PublicCodebook,
    RandomCodebook,
    learn_codebook,
    public_gradients,
)
from lightning_dp.mechanism.encoding.rule import GradientEncoding
from lightning_dp.mechanism.noise import GaussianNoise, LaplaceNoise, StudentTNoise
from lightning_dp.reporting.card import card_of_run, privacy_card
from lightning_dp.reporting.markdown import render_card
from lightning_dp.statistics.centering import PrivateCentering
from lightning_dp.statistics.projection import PrivateProjection
from lightning_dp.training.callbacks.budget import PrivacyBudget
from lightning_dp.training.callbacks.card import PrivacyCard
from lightning_dp.training.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.training.callbacks.monitor import PrivacyMonitor
from lightning_dp.training.check import check
from lightning_dp.training.distributed import PrivateDDPStrategy
from lightning_dp.training.distributed import register_strategies as register_ddp_strategies
from lightning_dp.training.repair import repair
from lightning_dp.training.report import Report
from lightning_dp.training.single_device import PrivateStrategy, register_strategies

register_strategies()
register_ddp_strategies()

__version__ = "0.1.0.dev0"

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "BackpropClipping",
    "DFAMixin",
    "DifferentialPrivacy",
    "FlatClipping",
    "FlatCodebook",
    "GaussianNoise",
    "GradientEncoding",
    "JamesSteinDenoiser",
    "JournalError",
    "KSDenoiser",
    "LaplaceNoise",
    "LowPassDenoiser",
    "PerLayerClipping",
    "Phase",
    "PowerLawCodebook",
    "PrivacyBudget",
    "PrivacyCard",
    "PrivacyConfigurationError",
    "PrivacyLedger",
    "PrivacyMonitor",
    "PrivateCentering",
    "PrivateDDPStrategy",
    "PrivateProjection",
    "PrivateStrategy",
    "PublicCodebook",
    "RandomCodebook",
    "ReplicasDiverged",
    "Report",
    "StudentTNoise",
    "UnsupportedModelError",
    "calibrate_noise",
    "calibrate_schedule",
    "calibrate_steps",
    "card_of_run",
    "check",
    "delta",
    "epsilon",
    "learn_codebook",
    "privacy_card",
    "public_gradients",
    "render_card",
    "repair",
]
