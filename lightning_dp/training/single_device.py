"""The private strategy of one device."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism.clipping import Bounding, FlatClipping
from lightning_dp.mechanism.denoising import Denoiser
from lightning_dp.mechanism.noise import GaussianNoise, Noise
from lightning_dp.training.spent import follow_checkpoints
from lightning_dp.training.strategy import PrivateMixin


class PrivateStrategy(PrivateMixin, SingleDeviceStrategy):
    """Differentially private training of an unchanged `LightningModule`, on one device.

    Every step draws a Poisson sample of the train set, bounds the contribution of each example to the gradient, adds
    noise, and charges the ledger. The user's train loader supplies data set, collation and workers; its batch size
    becomes the *expected* batch size.

    Example::

        trainer = L.Trainer(
            strategy=PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.1), max_physical_batch_size=256),
            callbacks=[PrivacyMonitor(delta=1e-5)],
        )

    Args:
        clipping: How contributions are bounded. A number is the norm of a `FlatClipping`.
        noise: The noise. Without a multiplier, `PrivacyBudget` chooses one. A number is the multiplier of a
            `GaussianNoise`.
        denoiser: What is done to the noisy gradient before the optimizer sees it; ``None``: nothing.
        options: ``max_physical_batch_size``, ``engine``, ``loss_reduction``, ``self_check``, ``seed``, ``journal``,
            ``secure_rng``, ``augmentation_multiplicity``, ``per_record_means``, ``repair``: see `privacy_options`.
        device, accelerator, checkpoint_io, precision_plugin: As for Lightning's `SingleDeviceStrategy`; the Trainer
            fills them in.

    Raises:
        PrivacyConfigurationError, UnsupportedModelError: At the start of a fit, when something cannot be trained
            privately; the message says what and what to do.
    """

    strategy_name = "private"

    def __init__(
        self,
        clipping: Bounding | float = FlatClipping(1.0),
        noise: Noise | float = GaussianNoise(),
        denoiser: Denoiser | None = None,
        *,
        device: torch.device | str | int | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        **options: Any,
    ) -> None:
        super().__init__("cpu" if device is None else device, accelerator, checkpoint_io, precision_plugin)
        self._device_chosen = device is not None
        self._num_nodes = 1
        self.configure_privacy(clipping, noise, denoiser, **options)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The Trainer assigns the devices that it chose; more than one is refused."""
        return None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise PrivacyConfigurationError(
                f"PrivateStrategy trains on one device, and the Trainer has {len(devices)}. Use PrivateDDPStrategy "
                "(strategy='private_ddp'), or Trainer(devices=1)."
            )
        if devices and not self._device_chosen:
            self._root_device = devices[0]

    @property
    def num_nodes(self) -> int:
        """The Trainer assigns the number of nodes; more than one is refused."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes > 1:
            raise PrivacyConfigurationError(
                "PrivateStrategy trains on one node. Use PrivateDDPStrategy (strategy='private_ddp'), or "
                "Trainer(num_nodes=1)."
            )
        self._num_nodes = num_nodes


def register_strategies() -> None:
    """Makes ``Trainer(strategy="private")`` work, and ``load_from_checkpoint`` note a module's spending."""
    follow_checkpoints()
    StrategyRegistry.register(
        PrivateStrategy.strategy_name,
        PrivateStrategy,
        description="Differentially private training on one device",
        override=True,
    )
