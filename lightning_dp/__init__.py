"""Differentially private training for PyTorch Lightning: one callback, any LightningModule.

trainer = L.Trainer(max_epochs=20, callbacks=[DifferentialPrivacy(epsilon=3.0, delta=1e-5)])
"""

from lightning_dp.accounting.calibration import calibrate_noise, calibrate_schedule, calibrate_steps
from lightning_dp.accounting.events import Phase
from lightning_dp.accounting.ledger import PrivacyLedger, delta, epsilon
from lightning_dp.backprop import BackpropClipping
from lightning_dp.callbacks import DifferentialPrivacy, PrivacyBudget, PrivacyMonitor
from lightning_dp.card import PrivacyCard, card_of_run, privacy_card, render_card
from lightning_dp.centering import PrivateCentering
from lightning_dp.clipping import AdaptiveClipping, AutomaticClipping, FlatClipping, PerLayerClipping
from lightning_dp.denoising import JamesSteinDenoiser, KSDenoiser, LowPassDenoiser
from lightning_dp.dfa import DFAMixin
from lightning_dp.distributed import PrivateDDPStrategy
from lightning_dp.distributed import register_strategies as register_ddp_strategies
from lightning_dp.encoding import (
    FlatCodebook,
    GradientEncoding,
    PowerLawCodebook,
    PublicCodebook,
    RandomCodebook,
    learn_codebook,
    public_gradients,
)
from lightning_dp.errors import JournalError, PrivacyConfigurationError, ReplicasDiverged, UnsupportedModelError
from lightning_dp.noise import GaussianNoise, LaplaceNoise, StudentTNoise
from lightning_dp.pca import PrivateProjection
from lightning_dp.strategy import PrivateStrategy, register_strategies

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
    "StudentTNoise",
    "UnsupportedModelError",
    "calibrate_noise",
    "calibrate_schedule",
    "calibrate_steps",
    "card_of_run",
    "delta",
    "epsilon",
    "learn_codebook",
    "privacy_card",
    "public_gradients",
    "render_card",
]
