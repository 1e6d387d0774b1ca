"""One callback that makes a plain Trainer private."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dp.accounting.events import Accountant
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.mechanism.clipping import Bounding, FlatClipping
from lightning_dp.mechanism.denoising import Denoiser
from lightning_dp.mechanism.noise import GaussianNoise, Noise
from lightning_dp.training.callbacks.budget import PrivacyBudget
from lightning_dp.training.callbacks.card import PrivacyCard
from lightning_dp.training.callbacks.monitor import PrivacyMonitor
from lightning_dp.training.made_private import make_private
from lightning_dp.training.options import check_names, privacy_options
from lightning_dp.training.repair import repair_and_say
from lightning_dp.training.report import layer_groups, layers_text
from lightning_dp.training.strategy import PrivateMixin


class DifferentialPrivacy(Callback):
    """Makes a plain Trainer train privately: strategy, budget, monitor and privacy card in one callback.

    Example::

        trainer = L.Trainer(max_epochs=20, callbacks=[DifferentialPrivacy(epsilon=3.0, delta=1e-5)])
        trainer.fit(AnyLightningModule(), datamodule)

    Args:
        epsilon: The most that ε may become. ``None``: no limit; ``noise`` must then have a multiplier.
        delta: The δ at which ε is stated; well below 1/N. ``None``: 1/(10·N), rounded down to a power of ten.
        clipping, noise, denoiser: As for `PrivateStrategy`.
        accountant: ``"pld"`` or ``"rdp"``.
        log_not_private: As for `PrivacyMonitor`.
        card: Whether a `PrivacyCard` is written beside the logs at the end.
        options: ``max_physical_batch_size``, ``engine``, ``loss_reduction``, ``self_check``, ``seed``, ``journal``,
            ``secure_rng``, ``augmentation_multiplicity``, ``per_record_means``, ``repair``: see `privacy_options`.

    Raises:
        TypeError, ValueError: An argument is wrong, or neither ε nor a noise multiplier is given.
        PrivacyConfigurationError, UnsupportedModelError: At the start of a fit, when something cannot be trained
            privately; the message says what and what to do.
    """

    def __init__(
        self,
        epsilon: float | None,
        delta: float | None = None,
        clipping: Bounding | float = FlatClipping(1.0),
        noise: Noise | float = GaussianNoise(),
        denoiser: Denoiser | None = None,
        *,
        accountant: Accountant = "pld",
        log_not_private: bool = False,
        card: bool = True,
        **options: Any,
    ) -> None:
        check_names("DifferentialPrivacy", options)
        mechanism, checked = privacy_options(clipping, noise, denoiser, **options)  # an error here, not in fit
        if epsilon is None and mechanism.noise.multiplier is None:
            raise ValueError(
                "DifferentialPrivacy: give epsilon (the noise is then chosen for it), or "
                "noise=GaussianNoise(multiplier=…)."
            )
        self.budget = None if epsilon is None else PrivacyBudget(epsilon, delta, accountant)
        self.monitor = PrivacyMonitor(delta, accountant, log_not_private)
        self.card = PrivacyCard() if card else None
        if self.card is not None:
            self.card.follow(self.monitor)
        self._repair = checked.repair
        #: What decides ε, and the engine.
        self.mechanism, self.engine = mechanism, checked.engine
        self._arguments: dict[str, Any] = {
            "epsilon": epsilon, "delta": delta, "accountant": accountant, "card": card,
            "log_not_private": log_not_private,
        }  # fmt: skip
        self._configuration = {"clipping": clipping, "noise": noise, "denoiser": denoiser, **options}

    @property
    def target_epsilon(self) -> float | None:
        """The most that ε may become; ``None``: there is no limit."""
        return None if self.budget is None else self.budget.epsilon

    def again(self, **changes: Any) -> DifferentialPrivacy:
        """A callback with the same arguments, but for these changes."""
        return DifferentialPrivacy(**{**self._arguments, **self._configuration, **changes})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """For a fit, makes the Trainer's strategy private, by `make_private`, before Lightning sets it up."""
        if self._repair:
            repair_and_say(pl_module)
        if stage != "fit":
            self.mechanism.clipping.attach(pl_module)
            return
        if isinstance(trainer.strategy, PrivateMixin) and not trainer.strategy.made_private:
            raise PrivacyConfigurationError(
                "DifferentialPrivacy configures the strategy itself, and the Trainer has a private strategy already: "
                "use either DifferentialPrivacy on a plain Trainer, or PrivateStrategy with PrivacyBudget and "
                "PrivacyMonitor."
            )
        make_private(trainer.strategy, **self._configuration).accumulation.take_over(trainer)
        if self.budget:
            self.budget.setup(trainer, pl_module, stage)
        self.monitor.setup(trainer, pl_module, stage)
        if self.card:
            self.card.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.budget:
            self.budget.on_train_start(trainer, pl_module)
        self.monitor.on_train_start(trainer, pl_module)
        if self.card:
            self.card.on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.budget:
            self.budget.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.budget:
            self.budget.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.monitor.on_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.monitor.on_after_backward(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.card:
            self.card.on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.monitor.on_validation_end(trainer, pl_module)
        if self.card:
            self.card.on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.card:
            self.card.on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.budget:
            self.budget.on_train_end(trainer, pl_module)
        self.monitor.on_train_end(trainer, pl_module)
        if self.card:
            self.card.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.card:
            self.card.on_exception(trainer, pl_module, exception)
        if isinstance(exception, UnsupportedModelError):
            rank_zero_info(f"{layers_text(layer_groups(pl_module, self.engine))}\n(lightning_dp.check says more.)")

    def state_dict(self) -> dict[str, Any]:
        return self.budget.state_dict() if self.budget else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.budget and state_dict:
            self.budget.load_state_dict(state_dict)
