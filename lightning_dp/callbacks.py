"""Callbacks: a budget that chooses the noise and stops in time, a monitor that shows ε, and one that does everything.

They only read the ledger; what is released, and what it costs, is decided by the strategy.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import lightning.pytorch as pl
import torch
from dp_accounting import DpEvent
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dp import dashboards
from lightning_dp.accounting.calibration import affordable_steps, calibrate_noise
from lightning_dp.accounting.events import Accountant
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.monitor import EpsilonMonitor
from lightning_dp.card import PrivacyCard
from lightning_dp.checks import warn_about_delta
from lightning_dp.clipping import Bounding, FlatClipping
from lightning_dp.denoising import Denoiser
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.noise import GaussianNoise, Noise
from lightning_dp.strategy import PrivateMixin, make_private


def private_strategy(trainer: pl.Trainer, callback: str) -> PrivateMixin:
    """The Trainer's strategy, if it is private.

    Raises:
        PrivacyConfigurationError: It is not.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, PrivateMixin):
        raise PrivacyConfigurationError(
            f"{callback} found a Trainer that trains without privacy. Pass strategy=PrivateStrategy(…) to the Trainer, "
            "or use the callback DifferentialPrivacy(epsilon=…, delta=…) alone."
        )
    return strategy


def _check_delta(callback: str, delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"{callback}: delta must lie strictly between 0 and 1, got {delta}.")


class PrivacyBudget(Callback):
    """Keeps ε within a target: chooses the noise for the planned steps, and stops before the target would be exceeded.

    Without a noise multiplier, the smallest one is chosen with which all steps that the Trainer plans (``max_epochs``,
    ``max_steps``) fit. With one, training stops when the next step would exceed the budget. Either way the strategy
    refuses any step beyond it, whatever ``min_epochs`` and ``min_steps`` say.

    A resumed run keeps the noise of the interrupted one while the plan and the target are the same; when they change,
    noise is chosen anew for what is left.

    Example::

        trainer = L.Trainer(
            strategy=PrivateStrategy(FlatClipping(1.0)),
            callbacks=[PrivacyBudget(epsilon=3.0, delta=1e-5)],
            max_epochs=20,
        )

    Args:
        epsilon: The most that ε may become, for adding or removing one record.
        delta: The δ at which ε is stated; well below 1/N.
        accountant: ``"pld"`` or ``"rdp"``.
    """

    def __init__(self, epsilon: float, delta: float, accountant: Accountant = "pld") -> None:
        for name, value in (("epsilon", epsilon), ("delta", delta)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"PrivacyBudget: {name} must be a number, got {value!r}.")
        if not epsilon > 0:
            raise ValueError(f"PrivacyBudget: epsilon must be positive, got {epsilon}.")
        _check_delta("PrivacyBudget", delta)
        self.epsilon, self.delta, self.accountant = epsilon, delta, accountant
        self._chosen: dict[str, float] = {}
        self._limits: dict[tuple[DpEvent, int], int] = {}
        self._verified = 0
        self._stopped = False

    @property
    def target_epsilon(self) -> float:
        """The most that ε may become."""
        return self.epsilon

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = private_strategy(trainer, "PrivacyBudget")
        searches = [c for c in trainer_callbacks(trainer) if isinstance(c, LearningRateFinder | BatchSizeFinder)]
        if searches and strategy.noise.multiplier is None:
            raise PrivacyConfigurationError(
                f"{type(searches[0]).__name__} trains on the private data before the training that the noise is chosen "
                "for, and would spend the budget. Search on public data, or set what it looks for by hand."
            )
        if sum(_target_epsilon(callback) is not None for callback in trainer_callbacks(trainer)) > 1:
            raise PrivacyConfigurationError(
                "The Trainer has several privacy budgets, and noise can be chosen for one: keep one PrivacyBudget, or "
                "DifferentialPrivacy(epsilon=…) alone."
            )
        self._limits, self._verified = {}, 0
        self._stopped = False
        strategy.budget = self

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Chooses the noise, and says how far the budget reaches."""
        strategy = private_strategy(trainer, "PrivacyBudget")
        warn_about_delta(self.delta, strategy.num_records)
        self.choose_noise(trainer, strategy)
        step, multiplier = strategy.private_step, strategy.noise_multiplier
        assert step is not None
        if multiplier is None:
            return
        allowed = self.step_limit(strategy.ledger, step.event(multiplier, strategy.sampling_rate)) - len(
            strategy.ledger
        )
        remaining = self._remaining_steps(trainer)
        planned = "an unlimited number of" if remaining is None else f"{remaining}"
        within = allowed if remaining is None else min(allowed, remaining)
        rank_zero_info(
            f"PrivacyBudget: ε ≤ {self.epsilon:g} at δ = {self.delta:g}; noise multiplier {multiplier:.4g}, sampling "
            f"rate {strategy.sampling_rate:.4g}; {within} of {planned} planned steps are within the budget."
        )
        self._stop_if_spent(trainer, strategy)

    def choose_noise(self, trainer: pl.Trainer, strategy: PrivateMixin) -> None:
        """Sets the strategy's noise multiplier for the planned steps, when its noise has none."""
        if strategy.noise.multiplier is None:
            strategy.noise_multiplier = self._choose_noise(strategy, self._remaining_steps(trainer))

    def step_limit(self, ledger: PrivacyLedger, event: DpEvent) -> int:
        """The most steps that the ledger may hold if all further ones are this event.

        Computed once per event and number of other ones; another sampling rate or noise is another event.
        """
        key = event, sum(count for other, count in ledger if other != event)
        if key not in self._limits:
            more = affordable_steps(
                ledger, event, epsilon=self.epsilon, delta=self.delta, at_most=10**9, accountant=self.accountant
            )
            self._limits = {key: len(ledger) + more}
            self._verified = len(ledger) + more if more else 0
        return self._limits[key]

    def holds_for(self, ledger: PrivacyLedger) -> bool:
        """Whether ε of this ledger, the strategy's, has been found to be within the target."""
        return 0 < len(ledger) <= self._verified

    def _remaining_steps(self, trainer: pl.Trainer) -> int | None:
        """Private steps that the Trainer still plans; ``None`` when it plans to train forever."""
        planned = trainer.estimated_stepping_batches
        return None if math.isinf(planned) else max(int(planned) - trainer.global_step, 0)

    def _choose_noise(self, strategy: PrivateMixin, remaining: int | None) -> float | None:
        if remaining is None:
            raise PrivacyConfigurationError(
                "PrivacyBudget cannot choose the noise for training without an end (max_epochs=-1). Set max_epochs or "
                "max_steps, or give GaussianNoise(multiplier=…) and let the budget decide when to stop."
            )
        if remaining == 0:
            return self._chosen.get("noise_multiplier", 0.0)
        assert strategy.private_step is not None
        plan = {
            "mechanism": float(zlib.crc32(repr(strategy.private_step.mechanism(1.0)).encode())),
            "epsilon": self.epsilon,
            "delta": self.delta,
            "sampling_rate": strategy.sampling_rate,
            "total_steps": float(len(strategy.ledger) + remaining),
        }
        if any(self._chosen.get(key) != value for key, value in plan.items()):
            rank_zero_info(f"PrivacyBudget: choosing the noise for {remaining} steps …")
            try:
                multiplier = calibrate_noise(
                    epsilon=self.epsilon,
                    delta=self.delta,
                    sampling_rate=strategy.sampling_rate,
                    steps=remaining,
                    accountant=self.accountant,
                    spent=strategy.ledger,
                    mechanism=strategy.private_step.mechanism,
                )
            except ValueError:
                return self._chosen.get("noise_multiplier", 0.0)  # all spent: no step will be taken
            self._chosen = {**plan, "noise_multiplier": multiplier}
        return self._chosen["noise_multiplier"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks again: a reloaded train loader may draw with another sampling rate, at another price."""
        self._stop_if_spent(trainer, private_strategy(trainer, "PrivacyBudget"))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks the Trainer to stop when the next step would exceed the budget."""
        self._stop_if_spent(trainer, private_strategy(trainer, "PrivacyBudget"))

    def _stop_if_spent(self, trainer: pl.Trainer, strategy: PrivateMixin) -> None:
        step, multiplier = strategy.private_step, strategy.noise_multiplier
        if step is None or multiplier is None or self._stopped:
            return
        event = step.event(multiplier, strategy.sampling_rate)
        if len(strategy.ledger) < self.step_limit(strategy.ledger, event):
            return
        # The Trainer ignores should_stop while a minimum is not met; a budget admits no minimum.
        trainer.fit_loop.min_epochs = 0
        trainer.fit_loop.epoch_loop.min_steps = None
        trainer.should_stop = True
        if self._remaining_steps(trainer) == 0 < len(strategy.ledger):
            return  # all that was planned has been done: `on_train_end` says so
        self._stopped = True
        rank_zero_info(
            f"PrivacyBudget: stopping after {strategy.ledger.steps} private steps, because one more would exceed the "
            f"budget: {self._balance(strategy)}."
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports what is left, when something other than the budget ended the training."""
        strategy = private_strategy(trainer, "PrivacyBudget")
        if not self._stopped:
            rank_zero_info(
                f"PrivacyBudget: training ended after {strategy.ledger.steps} private steps, within the budget: "
                f"{self._balance(strategy)}."
            )

    def _balance(self, strategy: PrivateMixin) -> str:
        spent = strategy.ledger.epsilon(self.delta, self.accountant)
        if math.isinf(self.epsilon):
            return f"ε = {spent:.4g} is spent at δ = {self.delta:g}, of a budget without end"
        left = f"{self.epsilon - spent:.3g} is left" if spent <= self.epsilon else "it was exceeded before this fit"
        return f"ε = {spent:.4g} of {self.epsilon:g} is spent at δ = {self.delta:g}, {left}"

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": dict(self._chosen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._chosen = dict(state_dict["chosen"])


class PrivacyMonitor(Callback):
    """Shows what has been spent: to every logger, to the progress bar, and to callbacks that monitor metrics.

    Logged every ``log_every_n_steps`` private steps and at the end of every epoch: ``privacy/epsilon``,
    ``privacy/delta``, ``privacy/noise_multiplier``; with a `PrivacyBudget`, ``privacy/budget_spent`` (the fraction of
    its ε); and ``privacy/signal_to_noise``, estimated from the noisy gradient alone, and so without further cost.

    While training runs, the ε shown is never below the true one, and within 1 % of the exact computation, at far less
    cost than that at every step (see `EpsilonMonitor`). The last value of a fit is exact.

    In Weights & Biases, every metric can be drawn against ``privacy/epsilon``, the final values stand in the run's
    summary, and a chart of the validation metrics against ε is added at the end.

    Args:
        delta: The δ at which ε is stated.
        accountant: ``"pld"`` or ``"rdp"``.
        log_not_private: Also log ``not_private/clipped_fraction`` and quantiles of the gradient norms before clipping,
            ``not_private/median_gradient_norm``, ``not_private/gradient_norm_p10`` and ``…_p90``. **These are computed
            from the data without noise: whoever sees them learns more than ε says.**
    """

    def __init__(self, delta: float, accountant: Accountant = "pld", log_not_private: bool = False) -> None:
        _check_delta("PrivacyMonitor", delta)
        self.delta, self.accountant, self.log_not_private = delta, accountant, log_not_private
        #: ε as last shown.
        self.epsilon = 0.0
        self._monitor = EpsilonMonitor(delta, accountant)
        self._computed_at, self._exact_at = -1, -1
        self._noise_square = 0.0
        self._signal_to_noise: float | None = None
        self._chart: dashboards.UtilityChart | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            private_strategy(trainer, "PrivacyMonitor")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = private_strategy(trainer, "PrivacyMonitor")
        warn_about_delta(self.delta, strategy.num_records)
        self._computed_at, self._exact_at = -1, -1
        if strategy.private_step is not None:
            strategy.private_step.keep_norms = self.log_not_private
        self._chart = dashboards.UtilityChart()
        dashboards.begin(trainer.loggers, self._configuration(trainer, strategy))

    def _configuration(self, trainer: pl.Trainer, strategy: PrivateMixin) -> dict[str, Any]:
        """What a dashboard should state beside the curves: all of it public."""
        return {
            "delta": self.delta,
            "accountant": self.accountant,
            "adjacency": "add_or_remove",
            "target_epsilon": _target(trainer),
            "noise_multiplier": strategy.noise_multiplier,
            "sampling_rate": strategy.sampling_rate,
            "expected_batch_size": strategy.expected_batch_size,
            "clipping": repr(strategy.clipping),
            "noise": repr(strategy.noise),
            "denoiser": repr(strategy.denoiser),
            "engine": strategy.engine,
        }

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Notes the expected square of the noise's norm, before the clipping norm of the next step is known."""
        step = private_strategy(trainer, "PrivacyMonitor").private_step
        if step is None or not self._due(trainer, ahead=1):
            return
        scales, parameters = step.noise_scales(), step.engine.parameters
        std = step.noise.std()
        square = sum(parameters[name].numel() * (scale * std) ** 2 for name, scale in scales.items() if scale)
        self._noise_square = square if math.isfinite(square) else 0.0

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Estimates the signal-to-noise ratio: ``E‖signal + noise‖² = ‖signal‖² + E‖noise‖²``."""
        self._signal_to_noise = None
        step = private_strategy(trainer, "PrivacyMonitor").private_step
        if step is None or not self._noise_square:
            return
        if step.denoiser is None:
            gradients = [p.grad for p in step.engine.parameters.values() if p.grad is not None]
            square = float(torch.stack(torch._foreach_norm(gradients)).double().square().sum())
        else:
            square = step.noisy_square
        self._signal_to_noise = math.sqrt(max(0.0, square / self._noise_square - 1))
        self._noise_square = 0.0

    def _due(self, trainer: pl.Trainer, ahead: int = 0) -> bool:
        return (trainer.global_step + ahead) % max(_setting(trainer, "log_every_n_steps"), 1) == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = private_strategy(trainer, "PrivacyMonitor")
        first_or_last = self._computed_at < 0 or trainer.is_last_batch or trainer.should_stop
        if not (self._due(trainer) or first_or_last):
            return
        metrics = self._metrics(trainer, strategy, exact=_is_last_step(trainer))
        for name, value in metrics.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name == "privacy/epsilon", batch_size=1)
        if self.log_not_private:
            self._log_not_private(pl_module, strategy)

    def _metrics(self, trainer: pl.Trainer, strategy: PrivateMixin, exact: bool) -> dict[str, float]:
        target = _target(trainer)
        steps = len(strategy.ledger)
        if exact and steps != self._exact_at:
            self.epsilon = strategy.ledger.epsilon(self.delta, self.accountant)
            self._computed_at = self._exact_at = steps
        elif steps != self._computed_at:
            # Lightning keeps metrics in single precision: rounded upwards.
            self.epsilon = self._monitor.bound(strategy.ledger) * (1 + 1e-6)
            budget = strategy.budget
            if (
                isinstance(budget, PrivacyBudget)
                and (budget.delta, budget.accountant) == (self.delta, self.accountant)
                and budget.holds_for(strategy.ledger)
            ):
                self.epsilon = min(self.epsilon, budget.epsilon)  # a lower bound that is proven as well
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
        if self._chart is None or _setting(trainer, "sanity_checking") or trainer.state.fn != TrainerFn.FITTING:
            return
        epsilon = self._metrics(trainer, private_strategy(trainer, "PrivacyMonitor"), exact=False)["privacy/epsilon"]
        names = [name for name in trainer.callback_metrics if not name.startswith(("privacy/", "not_private/"))]
        metrics = {name: float(trainer.callback_metrics[name]) for name in names}
        self._chart.add(epsilon, metrics)
        dashboards.utility(trainer.loggers, max(trainer.global_step - 1, 0), epsilon, metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """States the exact ε, also where the last step was none that is logged."""
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
        if step is None or not step.norms:
            return
        norms, weights = torch.cat(step.norms).flatten().float(), torch.cat(step.weights)
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


def _target(trainer: pl.Trainer) -> float | None:
    """ε of the Trainer's budget, if it has one."""
    return next((target for target in map(_target_epsilon, trainer_callbacks(trainer)) if target), None)


def _setting(trainer: pl.Trainer, name: str) -> Any:
    """An attribute that the Trainer's type does not declare."""
    return getattr(trainer, name)


def trainer_callbacks(trainer: pl.Trainer) -> list[Callback]:
    """The Trainer's callbacks."""
    callbacks: list[Callback] = _setting(trainer, "callbacks")
    return callbacks


def _target_epsilon(callback: Callback) -> float | None:
    """The ε that a callback keeps a training within, if it does."""
    return getattr(callback, "target_epsilon", None)


class DifferentialPrivacy(Callback):
    """Makes a plain Trainer train privately: strategy, budget, monitor and privacy card in one callback.

    Example::

        trainer = L.Trainer(max_epochs=20, callbacks=[DifferentialPrivacy(epsilon=3.0, delta=1e-5)])
        trainer.fit(AnyLightningModule(), datamodule)

    Args:
        epsilon: The most that ε may become. ``None``: no limit; ``noise`` must then have a multiplier.
        delta: The δ at which ε is stated; well below 1/N.
        clipping, noise, denoiser, max_physical_batch_size, engine, loss_reduction, self_check, seed, journal,
            secure_rng, augmentation_multiplicity, per_record_means: As for `PrivateStrategy`.
        accountant: ``"pld"`` or ``"rdp"``.
        log_not_private: As for `PrivacyMonitor`.
        card: Whether a `PrivacyCard` is written beside the logs at the end.
    """

    def __init__(
        self,
        epsilon: float | None,
        delta: float,
        clipping: Bounding = FlatClipping(1.0),
        noise: Noise = GaussianNoise(),
        denoiser: Denoiser | None = None,
        max_physical_batch_size: int | None = None,
        engine: str = "bookkeeping",
        loss_reduction: str = "mean",
        self_check: bool = True,
        seed: int | None = None,
        accountant: Accountant = "pld",
        log_not_private: bool = False,
        journal: bool = True,
        card: bool = True,
        secure_rng: bool = False,
        augmentation_multiplicity: int = 1,
        per_record_means: bool = True,
    ) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a noise such as GaussianNoise(1.1), got {noise!r}.")
        if epsilon is None and noise.multiplier is None:
            raise ValueError(
                "DifferentialPrivacy: give epsilon (the noise is then chosen for it), or "
                "noise=GaussianNoise(multiplier=…)."
            )
        self.budget = None if epsilon is None else PrivacyBudget(epsilon, delta, accountant)
        self.monitor = PrivacyMonitor(delta, accountant, log_not_private)
        self.card = PrivacyCard(delta=delta) if card else None
        self._clipping = clipping
        self._configuration = {
            "clipping": clipping,
            "noise": noise,
            "denoiser": denoiser,
            "max_physical_batch_size": max_physical_batch_size,
            "engine": engine,
            "loss_reduction": loss_reduction,
            "self_check": self_check,
            "seed": seed,
            "journal": journal,
            "secure_rng": secure_rng,
            "augmentation_multiplicity": augmentation_multiplicity,
            "per_record_means": per_record_means,
        }

    @property
    def target_epsilon(self) -> float | None:
        """The most that ε may become; ``None``: there is no limit."""
        return None if self.budget is None else self.budget.epsilon

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Exchanges the class of the Trainer's strategy before Lightning sets it up."""
        if stage != "fit":
            self._clipping.attach(pl_module)
            return
        if isinstance(trainer.strategy, PrivateMixin) and not trainer.strategy.made_private:
            raise PrivacyConfigurationError(
                "DifferentialPrivacy configures the strategy itself, and the Trainer has a private strategy already: "
                "use either DifferentialPrivacy on a plain Trainer, or PrivateStrategy with PrivacyBudget and "
                "PrivacyMonitor."
            )
        make_private(trainer.strategy, **self._configuration)
        if self.budget:
            self.budget.setup(trainer, pl_module, stage)
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

    def state_dict(self) -> dict[str, Any]:
        return self.budget.state_dict() if self.budget else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.budget and state_dict:
            self.budget.load_state_dict(state_dict)
