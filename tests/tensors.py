"""Where tests make models and tensors, and where Trainers train: the CPU, or what ``make test-device`` names.

A module of tests whose tensors belong on that device says so (``pytestmark = pytest.mark.on_device``); a test in it
whose Trainer brings the module there is marked ``trains``.
"""

from __future__ import annotations

import os

import torch
from hypothesis import settings

DEVICE = torch.device(os.environ.get("LIGHTNING_DP_TEST_DEVICE", "cpu"), 0)

if DEVICE.type != "cpu":
    torch.backends.cudnn.allow_tf32 = False  # the oracle is compared with in single precision
    settings.register_profile("device", deadline=None)  # a kernel's first call takes long
    settings.load_profile("device")
