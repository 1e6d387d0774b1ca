"""Looks at a training before it is begun: trains nothing, and charges nothing."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
from dp_accounting import NeighboringRelation
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_dp.accounting.calibration import rough_noise
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.training import lightning_api
from lightning_dp.training.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.training.made_tensors import MadeTensors
from lightning_dp.training.report import Plan, Report, layer_groups
from lightning_dp.training.spent import share_spending
from lightning_dp.training.strategy import PrivateMixin

#: Steps that are timed, after the first, in which the training is examined; and further ones, to count tensors in.
_STEPS, _COUNTED = 4, 3


def check(
    module: pl.LightningModule,
    data: DataLoader[Any] | pl.LightningDataModule | None = None,
    epsilon: float | None = 3.0,
    delta: float | None = None,
    trainer: pl.Trainer | None = None,
    **options: Any,
) -> Report:
    """What private training of this module on this data would be like; trains nothing, and charges nothing.

    A copy of the module takes a few private steps, which nobody sees, and is thrown away. What the report says of
    records (losses that were understood, lines that read values, times) is not private, as the messages of a fit are.

    Example::

        report = lightning_dp.check(module, loader, epsilon=3.0, trainer=L.Trainer(max_epochs=20))
        print(report)

    Args:
        module: The module; unchanged afterwards.
        data: A train loader or a data module; ``None``: the module has ``train_dataloader``.
        epsilon, delta: As for `DifferentialPrivacy`.
        trainer: Says how long is trained, in which precision and on what; it is not used. ``None``: one epoch.
        options: As for `DifferentialPrivacy`: ``clipping``, ``noise``, ``engine``, ``repair``, …

    Returns:
        The report; ``report.ok`` is whether private training would begin.

    Raises:
        TypeError, ValueError: An argument is wrong.
    """
    planned = trainer if trainer is not None else pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    return check_with(DifferentialPrivacy(epsilon, delta, **options), module, data, planned)


def check_with(privacy: DifferentialPrivacy, module: pl.LightningModule, data: Any, planned: pl.Trainer) -> Report:
    """What training with a callback would be like; `check` for its arguments."""
    privacy = privacy.again(journal=False, card=False)
    shadow = _copy_of(module)
    share_spending(module, shadow)
    report = Report([])
    costs = _Costs()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = _trainer_like(planned, [privacy, costs], folder)
        try:
            run.fit(shadow, **_data(data))
        except _Enough:
            pass
        except (UnsupportedModelError, PrivacyConfigurationError, TypeError, ValueError) as error:
            report.problems.append(str(error))
        finally:
            costs.close()
        report.layers = layer_groups(shadow, privacy.engine)  # as `repair` has left them
        _describe(report, run, privacy)
        report.step_seconds, report.step_bytes = costs.seconds(), costs.bytes()
        if report.ok:
            plain = _Costs()
            with contextlib.suppress(_Enough), contextlib.closing(plain):
                _trainer_like(planned, [plain], folder).fit(_copy_of(module), **_data(data))
            report.plain_step_seconds, report.plain_step_bytes = plain.seconds(), plain.bytes()
    return report


class _Enough(BaseException):
    """Ends a fit: no error of the user's."""


class _Costs(Callback):
    """Takes the time of some steps, counts the tensors that further ones make, and ends the fit."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._peaks: list[int] = []
        self._begun = 0.0
        self._made: MadeTensors | None = None

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if len(self._seconds) > _STEPS:
            self._made = MadeTensors().__enter__()
        self._begun = time.perf_counter()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._made is not None:
            self._peaks.append(self._made.peak)
            self.close()
            if len(self._peaks) == _COUNTED:
                raise _Enough
            return
        self._seconds.append(time.perf_counter() - self._begun)

    def close(self) -> None:
        """Nothing is counted any more."""
        if self._made is not None:
            self._made.__exit__(None, None, None)
            self._made = None

    def bytes(self) -> int | None:
        """The median, over some steps, of the most that were alive at once; ``None``: there were not as many steps."""
        return int(statistics.median(self._peaks)) if self._peaks else None

    def seconds(self) -> float | None:
        """The median of all steps but the first; ``None``: there was no other."""
        return statistics.median(self._seconds[1:]) if len(self._seconds) > 1 else None


def _copy_of(module: pl.LightningModule) -> pl.LightningModule:
    """A copy that is trained without callbacks of its own, which would write checkpoints."""
    with lightning_api.detached(module):
        found = copy.deepcopy(module)
    found.configure_callbacks = list  # type: ignore[method-assign]
    return found


def _data(data: Any) -> dict[str, Any]:
    if data is None:
        return {}
    return {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"train_dataloaders": data}


def _trainer_like(planned: pl.Trainer, callbacks: list[Callback], folder: str) -> pl.Trainer:
    """A Trainer that plans the same steps, and writes nothing where the other would."""
    return pl.Trainer(
        accelerator="cpu" if planned.strategy.root_device.type == "cpu" else "gpu",
        devices=1,
        precision=planned.precision,
        max_epochs=planned.max_epochs,
        max_steps=planned.max_steps,
        limit_train_batches=planned.limit_train_batches,
        limit_val_batches=0,
        overfit_batches=getattr(planned, "overfit_batches", 0.0),
        accumulate_grad_batches=planned.accumulate_grad_batches,
        gradient_clip_val=planned.gradient_clip_val,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=folder,
    )


def _describe(report: Report, run: pl.Trainer, privacy: DifferentialPrivacy) -> None:
    """What is known once the training has begun, or was refused."""
    strategy: Any = run.strategy
    if not isinstance(strategy, PrivateMixin):
        return
    findings = strategy.findings
    if findings is not None and report.ok:
        report.verdict = findings.verdict
        report.notes = [f"understood: {what} ({line})" for line, what in findings.understood.items()]
        report.notes += [f"decided by records: {what} ({line})" for line, what in findings.decisions.items()]
        report.notes += [f"not looked at: {sentence}" for sentence in findings.unseen]
    step, multiplier = strategy.private_step, strategy.noise_multiplier
    if step is None or strategy.train_loader is None or not multiplier:
        return
    planned = run.estimated_stepping_batches
    if math.isinf(planned):
        return
    delta, steps = privacy.monitor.delta, int(planned)
    event = step.mechanism.event(multiplier, strategy.sampling_rate)
    ledger = PrivacyLedger()
    ledger.record(event, steps)
    scales = step.noise_scales(multiplier, strategy.expected_batch_size)
    std = step.mechanism.noise.std()
    noise = math.sqrt(sum(step.engine.parameters[n].numel() * (scale * std) ** 2 for n, scale in scales.items()))
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    ratio = noise / step.clipping.sensitivity(relation, step.groups, step.clipping_state)
    report.plan = Plan(
        ledger.epsilon(delta), delta, steps, strategy.sampling_rate, strategy.expected_batch_size,
        strategy.num_records, multiplier, ratio,
    )  # fmt: skip
    if privacy.target_epsilon is not None and math.isfinite(privacy.target_epsilon):
        report.plan.halved_by = _halved_by(report.plan, privacy.target_epsilon, step.mechanism.unsampled_event)


def _halved_by(plan: Plan, epsilon: float, event: Any) -> dict[str, float]:
    """How far the noise goes down by larger batches in as many epochs, and by fewer epochs, at the same ε."""

    def multiplier(rate: float, steps: int) -> float:
        return rough_noise(epsilon=epsilon, delta=plan.delta, sampling_rate=rate, steps=steps, mechanism=event)

    own = multiplier(plan.sampling_rate, plan.steps)

    def ratio(rate: float, steps: int) -> float:
        return plan.noise_to_clip * multiplier(rate, steps) / own * plan.sampling_rate / rate

    found = {}
    for factor in (2, 4, 8, 16):
        if plan.sampling_rate * factor <= 1 and plan.steps >= factor:
            change = f"Batches {factor} times as large, in as many epochs"
            found = {change: ratio(plan.sampling_rate * factor, plan.steps // factor)}
            if found[change] <= plan.noise_to_clip / 2:
                break
    if plan.steps >= 4:
        found["A quarter of the steps"] = ratio(plan.sampling_rate, plan.steps // 4)
    return found
