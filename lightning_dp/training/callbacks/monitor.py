"""A monitor that shows ε while a training runs."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_dp.accounting.events import Accountant
from lightning_dp.accounting.monitor import EpsilonMonitor
from lightning_dp.reporting import dashboards
from lightning_dp.torch_api import euclidean_norms
from lightning_dp.training.callbacks.budget import PrivacyBudget
from lightning_dp.training.callbacks.lookup import (
    Delta,
    default_delta,
    private_strategy,
    target_of_budget,
    trainer_setting,
)
from lightning_dp.training.checks.configuration import warn_about_delta
from lightning_dp.training.strategy import PrivateMixin

#: The name of ε in the progress bar.
SHOWN = "ε"


class PrivacyMonitor(Callback):
    """Shows what has been spent: to every logger, to the progress bar, and to callbacks that monitor metrics.

    Logged every ``log_every_n_steps`` private steps, and for progress bar and callbacks also after the first step and
    after every epoch: ``privacy/epsilon``, ``privacy/delta``, ``privacy/noise_multiplier``; with a `PrivacyBudget`,
    ``privacy/budget_spent`` (the fraction of its ε); with `AdaptiveClipping`, ``privacy/clipping_max_norm``. Every
    ``log_every_n_steps`` also ``privacy/signal_to_noise``: the norm of the gradient's signal over that of its noise,
    estimated from the noisy gradient alone, and so without further cost.

    While training runs, the ε shown is never below the true one, and within 1 % of the exact computation, at far less
    cost than that at every step (see `EpsilonMonitor`). The last value of a fit is exact.

    In Weights & Biases, every metric can be drawn against ``privacy/epsilon``, the final values stand in the run's
    summary, and a chart of the validation metrics against ε is added at the end.

    Args:
        delta: The δ at which ε is stated. ``None``: 1/(10·N), rounded down to a power of ten.
        accountant: ``"pld"`` or ``"rdp"``.
        log_not_private: Also log ``not_private/clipped_fraction`` and quantiles of the gradient norms before clipping,
            ``not_private/median_gradient_norm``, ``not_private/gradient_norm_p10`` and ``…_p90``. **These are computed
            from the data without noise: whoever sees them learns more than ε says.**

    Raises:
        ValueError: δ is not strictly between 0 and 1.
        PrivacyConfigurationError: At the start of a fit: the strategy is not private.
    """

    def __init__(
        self, delta: float | None = None, accountant: Accountant = "pld", log_not_private: bool = False
    ) -> None:
        self._delta = Delta("PrivacyMonitor", delta)
        self.accountant, self.log_not_private = accountant, log_not_private
        #: ε as last shown.
        self.epsilon = 0.0
        self._monitor: EpsilonMonitor | None = None
        self._computed_at, self._exact_at = -1, -1
        self._noise_square = 0.0
        self._signal_to_noise: float | None = None
        self._chart: dashboards.UtilityChart | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._delta.follow(private_strategy(trainer, "PrivacyMonitor"))

    @property
    def delta(self) -> float:
        """δ. RuntimeError where none was given and no fit has begun."""
        return self._delta.value

    def delta_of(self, num_records: int) -> float:
        """δ for a train set of so many records."""
        return default_delta(num_records) if self._delta.given is None else self._delta.given

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = private_strategy(trainer, "PrivacyMonitor")
        warn_about_delta(self.delta, strategy.num_records)
        self._computed_at, self._exact_at = -1, -1
        if strategy.private_step is not None:
            strategy.private_step.contributions.keep_norms = self.log_not_private
        self._chart = dashboards.UtilityChart()
        dashboards.begin(trainer.loggers, self._configuration(trainer, strategy))

    def _configuration(self, trainer: pl.Trainer, strategy: PrivateMixin) -> dict[str, Any]:
        """The settings of private training that dashboards show beside the curves: all public."""
        return {
            "delta": self.delta,
            "accountant": self.accountant,
            "adjacency": "add_or_remove",
            "target_epsilon": target_of_budget(trainer),
            "noise_multiplier": strategy.noise_multiplier,
            "sampling_rate": strategy.sampling_rate,
            "expected_batch_size": strategy.expected_batch_size,
            "clipping": repr(strategy.mechanism.clipping),
            "noise": repr(strategy.mechanism.noise),
            "denoiser": repr(strategy.mechanism.denoiser),
            "engine": strategy.options.engine,
        }

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Computes the expected squared norm of the noise of this step, for `on_after_backward`."""
        step = private_strategy(trainer, "PrivacyMonitor").private_step
        if step is None or not self._due(trainer, ahead=1):
            return
        scales, parameters = step.scales, step.engine.parameters
        std = step.mechanism.noise.std()
        square = sum(parameters[name].numel() * (scale * std) ** 2 for name, scale in scales.items() if scale)
        self._noise_square = square if math.isfinite(square) else 0.0

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Estimates the signal-to-noise ratio: ``E‖signal + noise‖² = ‖signal‖² + E‖noise‖²``."""
        self._signal_to_noise = None
        step = private_strategy(trainer, "PrivacyMonitor").private_step
        if step is None or not self._noise_square:
            return
        if step.mechanism.denoiser is None:
            gradients = [p.grad for p in step.engine.parameters.values() if p.grad is not None]
            square = float(torch.stack(euclidean_norms(gradients)).double().square().sum())
        else:
            square = step.noisy_square
        self._signal_to_noise = math.sqrt(max(0.0, square / self._noise_square - 1))
        self._noise_square = 0.0

    def _due(self, trainer: pl.Trainer, ahead: int = 0) -> bool:
        return (trainer.global_step + ahead) % max(trainer_setting(trainer, "log_every_n_steps"), 1) == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = private_strategy(trainer, "PrivacyMonitor")
        first_or_last = self._computed_at < 0 or trainer.is_last_batch or trainer.should_stop
        if not (self._due(trainer) or first_or_last):
            return
        metrics = self._metrics(trainer, strategy, exact=_is_last_step(trainer))
        for name, value in metrics.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
            if name == "privacy/epsilon":  # under a short name, so that the bar stays on one line
                pl_module.log(SHOWN, value, prog_bar=True, logger=False, batch_size=1)
        if self.log_not_private:
            self._log_not_private(pl_module, strategy)

    def _metrics(self, trainer: pl.Trainer, strategy: PrivateMixin, exact: bool) -> dict[str, float]:
        target = target_of_budget(trainer)
        steps = len(strategy.ledger)
        if exact and steps != self._exact_at:
            self.epsilon = strategy.ledger.epsilon(self.delta, self.accountant)
            self._computed_at = self._exact_at = steps
        elif steps != self._computed_at:
            # Lightning keeps metrics in single precision: rounded upwards.
            if self._monitor is None or self._monitor.delta != self.delta:
                self._monitor = EpsilonMonitor(self.delta, self.accountant)
            self.epsilon = self._monitor.bound(strategy.ledger) * (1 + 1e-6)
            budget = strategy.budget
            if (
                isinstance(budget, PrivacyBudget)
                and (budget.delta, budget.accountant) == (self.delta, self.accountant)
                and budget.holds_for(strategy.ledger)
            ):
                self.epsilon = min(self.epsilon, budget.epsilon)  # both are upper limits on ε: show the smaller
            self._computed_at = steps
        metrics = {
            "privacy/epsilon": self.epsilon,
            "privacy/delta": self.delta,
            "privacy/noise_multiplier": strategy.noise_multiplier or 0.0,
        }
        if strategy.private_step is not None:  # public: found with noise
            metrics |= {f"privacy/clipping_{name}": v for name, v in strategy.private_step.clipping_state.items()}
        if self._signal_to_noise is not None:
            metrics["privacy/signal_to_noise"] = self._signal_to_noise
        if target:
            metrics["privacy/budget_spent"] = 0.0 if math.isinf(target) else self.epsilon / target
        return metrics

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the validation metrics beside ε, for the chart."""
        if self._chart is None or trainer_setting(trainer, "sanity_checking") or trainer.state.fn != TrainerFn.FITTING:
            return
        epsilon = self._metrics(trainer, private_strategy(trainer, "PrivacyMonitor"), exact=False)["privacy/epsilon"]
        names = [n for n in trainer.callback_metrics if not n.startswith(("privacy/", "not_private/")) and n != SHOWN]
        metrics = {name: float(trainer.callback_metrics[name]) for name in names}
        self._chart.add(epsilon, metrics)
        dashboards.utility(trainer.loggers, max(trainer.global_step - 1, 0), epsilon, metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the exact ε, also when the last step is not one of those that are logged."""
        strategy = private_strategy(trainer, "PrivacyMonitor")
        logged = self._exact_at == len(strategy.ledger) and (self._due(trainer) or trainer.should_stop)
        metrics = self._metrics(trainer, strategy, exact=True)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        if not logged:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=max(trainer.global_step - 1, 0))
        dashboards.finish(trainer.loggers, {**metrics, "privacy/steps": strategy.ledger.steps}, self._chart)

    def _log_not_private(self, pl_module: pl.LightningModule, strategy: PrivateMixin) -> None:
        step = strategy.private_step
        if step is None or not step.contributions.norms:
            return
        norms, weights = torch.cat(step.contributions.norms).flatten().float(), torch.cat(step.contributions.weights)
        low, median, high = norms.quantile(torch.tensor([0.1, 0.5, 0.9], device=norms.device)).tolist()
        values = {
            "clipped_fraction": (weights < 1).float().mean().item(),
            "gradient_norm_p10": low,
            "median_gradient_norm": median,
            "gradient_norm_p90": high,
        }
        for name, value in values.items():
            pl_module.log(f"not_private/{name}", value, on_step=True, on_epoch=False, batch_size=1)


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the step that has just been taken is known to be the last one of this fit."""
    if trainer.should_stop or trainer.global_step >= trainer.max_steps >= 0:
        return True
    return (
        trainer.is_last_batch and trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    )
