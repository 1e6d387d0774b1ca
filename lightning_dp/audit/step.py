"""Attacks on a single step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.audit.bounds import Audit, gaussian_bound, rates_bound
from lightning_dp.mechanism.clipping import Bounding
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.noise import GaussianNoise, Noise
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.training.independence.shadow import Shadow
from lightning_dp.training.independence.subject import loss_of, reduced

# -- single steps ------------------------------------------------------------------------------------------------------

#: Further steps of each kind that choose the threshold in `audit_step`, as a share of its ``trials``.
_REHEARSAL = 0.25


def audit_step(
    make_step: Callable[[], PrivateStep],
    backward: Callable[[PrivateStep, Any], None],
    without: Any,
    with_record: Any,
    *,
    multiplier: float,
    delta: float = 1e-5,
    trials: int = 4000,
    confidence: float = 0.95,
) -> Audit:
    """A lower bound on ε from single steps: how well an attack tells those with one more record from those without.

    The attack knows the noise-free difference d of the two sums, and measures the standard deviation σ_l of the noise
    on every parameter; the score of a noisy gradient ĝ is ``Σ_l ⟨ĝ_l, d_l⟩ / σ_l²`` (the likelihood ratio of Gaussian
    noise). Its threshold is chosen on trials of its own.

    Args:
        make_step: Makes the private step under audit, of a module that is not changed by it.
        backward: Runs forward and backward passes of a batch within a step that has begun.
        without, with_record: Batches for ``backward``: neighbours.
        multiplier: Noise multiplier z.
        delta, confidence: Of the bound.
        trials: Steps of each kind.

    Raises:
        ValueError: The step adds no noise.
    """
    step = make_step()

    def release(batch: Any, multiplier: float) -> Tensor:
        step.begin(multiplier, 1.0, 1.0)
        backward(step, batch)
        step.release()
        grads = [parameter.grad for parameter in step.engine.parameters.values()]
        return torch.cat([grad.detach().double().flatten() for grad in grads if grad is not None])

    difference = release(with_record, 0.0) - release(without, 0.0)
    base = release(without, 0.0)
    sizes = [parameter.numel() for parameter in step.engine.parameters.values()]
    squares = torch.zeros(len(sizes), dtype=torch.float64)
    rehearsal = max(10, int(_REHEARSAL * trials))
    for _ in range(min(rehearsal, 50)):
        noise = release(without, multiplier) - base
        squares += torch.stack([part.square().mean() for part in noise.split(sizes)])
    stds = (squares / min(rehearsal, 50)).sqrt()
    if float(stds.max()) == 0:
        raise ValueError("There is no noise: nothing is private.")
    # What has (nearly) no noise gives everything away: it gets a weight that outdoes all others.
    weights = stds.clamp(min=float(stds.max()) * 1e-9).repeat_interleave(torch.tensor(sizes)) ** -2

    def score(batch: Any) -> float:
        return float(((release(batch, multiplier) - base) * difference * weights).sum())

    practice = [[score(batch) for _ in range(rehearsal)] for batch in (without, with_record)]
    threshold = float(np.median(np.concatenate(practice)))
    scores = [[score(batch) for _ in range(trials)] for batch in (without, with_record)]
    false_positives = sum(value > threshold for value in scores[0])
    false_negatives = sum(value <= threshold for value in scores[1])
    gaussian = isinstance(step.mechanism.noise, GaussianNoise)
    bound = gaussian_bound if gaussian else rates_bound
    claim = PrivacyLedger()
    claim.record(step.mechanism.event(multiplier, 1.0))
    return Audit(
        "one step",
        bound(false_positives, false_negatives, trials, delta, confidence),
        claim.epsilon(delta),
        delta,
        confidence,
        trials,
        {"false_positives": false_positives, "false_negatives": false_negatives, "multiplier": multiplier},
    )


def audit_module(
    module: pl.LightningModule,
    loader: DataLoader[Any],
    clipping: Bounding,
    noise: Noise,
    *,
    multiplier: float = 1.0,
    engine: str = "bookkeeping",
    delta: float = 1e-5,
    trials: int = 1000,
    confidence: float = 0.95,
) -> Audit:
    """`audit_step` of a module on its own records: the first four of its train set, and the first five.

    Args:
        module: Is copied, and not changed.
        loader: Its train loader, of at least five records.
        clipping, noise: The mechanism under audit.
        multiplier: Noise multiplier z.
        engine: As for `PrivateStrategy`.
        delta, trials, confidence: As for `audit_step`.
    """
    records: Any = loader.dataset
    first = loader.collate_fn(_take(records, [0, 1, 2, 3]))
    more = loader.collate_fn(_take(records, [0, 1, 2, 3, 4]))
    shadow = Shadow(module).module
    mechanism = Mechanism(clipping, noise)
    mechanism.for_module(shadow).clipping.attach(shadow)

    def make_step() -> PrivateStep:
        return PrivateStep.of(mechanism, shadow, engine)

    def backward(step: PrivateStep, batch: Any) -> None:
        count = 5 if batch is more else 4
        with step.engine.forward(count):
            loss = reduced(loss_of(shadow.training_step(batch, 0)), "mean")
        with step.backward(float(count), last=True):
            loss.backward()

    return audit_step(
        make_step, backward, first, more, multiplier=multiplier, delta=delta, trials=trials, confidence=confidence
    )


def _take(records: Any, indices: list[int]) -> Any:
    together = getattr(records, "__getitems__", None)
    return together(indices) if together else [records[index] for index in indices]
