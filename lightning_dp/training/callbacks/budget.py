"""A budget that chooses the noise and stops in time."""

from __future__ import annotations

import math
import zlib
from typing import Any

import lightning.pytorch as pl
from dp_accounting import DpEvent
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_dp.accounting.calibration import affordable_steps, calibrate_noise
from lightning_dp.accounting.events import Accountant
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.training import lightning_api
from lightning_dp.training.callbacks.lookup import (
    Delta,
    private_strategy,
    target_epsilon_of,
    trainer_callbacks,
)
from lightning_dp.training.checks.configuration import warn_about_delta, warn_about_strength
from lightning_dp.training.strategy import PrivateMixin

#: How many times the noise that a whole budget needs is worth a warning.
_LARGER = 2.0


class PrivacyBudget(Callback):
    """Keeps ε within a target: chooses the noise for the planned steps, and stops before the target would be exceeded.

    Without a noise multiplier, the smallest one is chosen with which all steps that the Trainer plans (``max_epochs``,
    ``max_steps``) fit. With one, training stops when the next step would exceed the budget. Either way the strategy
    refuses any step beyond it, whatever ``min_epochs`` and ``min_steps`` say.

    A resumed run keeps the noise of the interrupted one, unless mechanism, sampling rate, planned steps or target have
    changed, or a crash has lost steps, which stay charged: then noise is chosen anew for what is left.

    Example::

        trainer = L.Trainer(
            strategy=PrivateStrategy(FlatClipping(1.0)),
            callbacks=[PrivacyBudget(epsilon=3.0, delta=1e-5)],
            max_epochs=20,
        )

    Args:
        epsilon: The most that ε may become, for adding or removing one record.
        delta: The δ at which ε is stated; well below 1/N. ``None``: 1/(10·N), rounded down to a power of ten.
        accountant: ``"pld"`` or ``"rdp"``.

    Raises:
        TypeError, ValueError: ε is not a positive number, or δ not strictly between 0 and 1.
        PrivacyConfigurationError: At the start of a fit: the strategy is not private, there is a second budget, or the
            noise is to be chosen for training without an end, or beside LearningRateFinder or BatchSizeFinder.
        PrivacyLimitReached: In a fit, when a step or statistic beyond the budget is attempted.
    """

    def __init__(self, epsilon: float, delta: float | None = None, accountant: Accountant = "pld") -> None:
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
            raise TypeError(f"PrivacyBudget: epsilon must be a number, got {epsilon!r}.")
        if not epsilon > 0:
            raise ValueError(f"PrivacyBudget: epsilon must be positive, got {epsilon}.")
        self._delta = Delta("PrivacyBudget", delta)
        self.epsilon, self.accountant = epsilon, accountant
        self._chosen: dict[str, float] = {}
        self._limits: dict[tuple[DpEvent, int], int] = {}
        self._verified = 0
        self._stopped = False

    @property
    def target_epsilon(self) -> float:
        """The most that ε may become."""
        return self.epsilon

    @property
    def delta(self) -> float:
        """δ. RuntimeError where none was given and no fit has begun."""
        return self._delta.value

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = private_strategy(trainer, "PrivacyBudget")
        self._delta.follow(strategy)
        searches = [c for c in trainer_callbacks(trainer) if isinstance(c, LearningRateFinder | BatchSizeFinder)]
        if searches and strategy.mechanism.noise.multiplier is None:
            raise PrivacyConfigurationError(
                f"{type(searches[0]).__name__} trains on the private data before the training that the noise is chosen "
                "for, and would spend the budget. Search on public data, or set what it looks for by hand."
            )
        if sum(target_epsilon_of(callback) is not None for callback in trainer_callbacks(trainer)) > 1:
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
        warn_about_strength(self.epsilon, multiplier, strategy.expected_batch_size)
        allowed = self.step_limit(strategy.ledger, step.mechanism.event(multiplier, strategy.sampling_rate)) - len(
            strategy.ledger
        )
        remaining = self._remaining_steps(trainer)
        planned = "an unlimited number of" if remaining is None else f"{remaining}"
        within = allowed if remaining is None else min(allowed, remaining)
        rank_zero_info(
            f"PrivacyBudget: ε ≤ {self.epsilon:g} at δ = {self.delta:g}{self._delta.reason}; noise multiplier "
            f"{multiplier:.4g}, sampling rate {strategy.sampling_rate:.4g}; "
            f"{within} of {planned} planned steps are within the budget."
        )
        if getattr(trainer, "fast_dev_run", False) and strategy.mechanism.noise.multiplier is None:
            rank_zero_info(
                "PrivacyBudget: with fast_dev_run, that is the noise of the trial alone: no more is planned. "
                "lightning_dp.check(module, data, epsilon=…, trainer=…) says what the training would have."
            )
        self._stop_if_spent(trainer, strategy)

    def choose_noise(self, trainer: pl.Trainer, strategy: PrivateMixin) -> None:
        """Sets the strategy's noise multiplier for the planned steps, when its noise has none."""
        if strategy.mechanism.noise.multiplier is None:
            strategy.noise_multiplier = self._choose_noise(strategy, self._remaining_steps(trainer))

    def step_limit(self, ledger: PrivacyLedger, event: DpEvent) -> int:
        """The most releases that the ledger may hold, if all further ones are this event.

        Computed again when the event (its noise or sampling rate) or the number of releases of other events changes.
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
        """Whether ε of the strategy's ledger is known to be within the target, from the last `step_limit`."""
        return 0 < len(ledger) <= self._verified

    def _remaining_steps(self, trainer: pl.Trainer) -> int | None:
        """Private steps that the Trainer still plans; ``None`` when it plans to train forever."""
        planned = trainer.estimated_stepping_batches
        return None if math.isinf(planned) else max(int(planned) - lightning_api.batches_done(trainer), 0)

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
            "mechanism": float(zlib.crc32(repr(strategy.private_step.mechanism.unsampled_event(1.0)).encode())),
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
                    mechanism=strategy.private_step.mechanism.unsampled_event,
                )
            except ValueError:
                return self._chosen.get("noise_multiplier", 0.0)  # all spent: no step will be taken
            self._chosen = {**plan, "noise_multiplier": multiplier}
            _say_what_weights_cost(self, strategy, remaining, multiplier)
            if len(strategy.ledger) and not math.isinf(self.epsilon):
                self._warn_if_spent_before(strategy, remaining, multiplier)
        return self._chosen["noise_multiplier"]

    def _warn_if_spent_before(self, strategy: PrivateMixin, steps: int, multiplier: float) -> None:
        """Warns where what was charged before makes the noise much larger than the whole budget would need."""
        assert strategy.private_step is not None
        event = strategy.private_step.mechanism.unsampled_event
        alone = calibrate_noise(
            epsilon=self.epsilon, delta=self.delta, sampling_rate=strategy.sampling_rate, steps=steps,
            accountant=self.accountant, mechanism=event,
        )  # fmt: skip
        if multiplier < _LARGER * alone:
            return
        needed = strategy.ledger.copy()
        needed.record(strategy.private_step.mechanism.event(alone, strategy.sampling_rate), steps)
        spent, enough = (ledger.epsilon(self.delta, self.accountant) for ledger in (strategy.ledger, needed))
        begins = "; a new module, in a run directory of its own, begins with nothing spent"
        anew = begins if strategy.ledger.steps else ""
        rank_zero_warn(
            f"PrivacyBudget: ε = {spent:.3g} of {self.epsilon:g} was spent before these steps, in "
            f"{len(strategy.ledger)} releases, so that {steps} more steps need a noise multiplier of {multiplier:.3g}, "
            f"{multiplier / alone:.0f} times the {alone:.3g} that they would need with all of it: expect a worse model "
            f"than before. epsilon={enough:.3g} would keep the noise at {alone:.3g}{anew}."
        )

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
        event = step.mechanism.event(multiplier, strategy.sampling_rate)
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


def _say_what_weights_cost(budget: PrivacyBudget, strategy: PrivateMixin, steps: int, multiplier: float) -> None:
    """Where records are drawn with probabilities of their own: what noise equal ones would need."""
    rate = strategy.expected_batch_size / strategy.num_records
    assert strategy.private_step is not None
    if math.isclose(rate, strategy.sampling_rate) or math.isinf(budget.epsilon):
        return
    equal = calibrate_noise(
        epsilon=budget.epsilon, delta=budget.delta, sampling_rate=rate, steps=steps, accountant=budget.accountant,
        spent=strategy.ledger, mechanism=strategy.private_step.mechanism.unsampled_event,
    )  # fmt: skip
    rank_zero_info(
        f"PrivacyBudget: the weights of the sampler cost {multiplier / equal:.3g} times the noise: with equal "
        f"probabilities (shuffle=True) the noise multiplier would be {equal:.4g} instead of {multiplier:.4g}. "
        "Weights in the losses (cross_entropy(…, weight=…)) cost no privacy."
    )
