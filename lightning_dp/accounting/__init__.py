"""Privacy accounting: events, ledger, ε and δ, and noise for a target ε. Does not use PyTorch."""

from lightning_dp.accounting.calibration import affordable_steps, calibrate_noise, calibrate_schedule, calibrate_steps
from lightning_dp.accounting.cost import event_delta, event_epsilon
from lightning_dp.accounting.events import (
    ACCOUNTANTS,
    ADJACENCIES,
    Accountant,
    Adjacency,
    Phase,
    gaussian_event,
    subsampled_gaussian,
)
from lightning_dp.accounting.ledger import PrivacyLedger, delta, epsilon
from lightning_dp.accounting.monitor import EpsilonMonitor

__all__ = [
    "ACCOUNTANTS",
    "ADJACENCIES",
    "Accountant",
    "Adjacency",
    "EpsilonMonitor",
    "Phase",
    "PrivacyLedger",
    "affordable_steps",
    "calibrate_noise",
    "calibrate_schedule",
    "calibrate_steps",
    "delta",
    "epsilon",
    "event_delta",
    "event_epsilon",
    "gaussian_event",
    "subsampled_gaussian",
]
