"""Empirical lower bounds on ε: what an attack shows that a training reveals, beside what its ledger claims.

A lower bound above the claim proves that something is broken. One below proves nothing: the attack may be weak. Three
attacks, from the strongest adversary to the weakest:

- `audit_step`: single private steps of a module, with and without one record; the noisy gradient is seen.
- `audit_mechanism`: a whole training by the mechanism of a strategy, in one run, on records whose gradients are zero
  but for one coordinate of their own (Dirac canaries); every step's noisy gradient is seen.
- `audit_training`: a whole training of a module, in one run, on records with wrong labels; the trained model is seen.

Sources: Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run"; Nasr et al. 2023, "Tight
Auditing of Differentially Private Machine Learning" (bounds through Gaussian differential privacy); Dong, Roth and Su
2022, "Gaussian Differential Privacy".
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dp.audit.bounds import Audit, one_run_audit
from lightning_dp.mechanism.clipping import Bounding
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.noise import Noise
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.training.independence.shadow import Shadow
from lightning_dp.training.independence.subject import loss_of, reduced
from lightning_dp.training.single_device import PrivateStrategy
from lightning_dp.training.strategy import PrivateMixin
from lightning_dp.training.users_loader import weights_of


class _Slots(Dataset[int]):
    """A record per slot: a canary's number, or -1 for a record whose gradient is zero."""

    def __init__(self, included: np.ndarray) -> None:
        self.included = included

    def __len__(self) -> int:
        return len(self.included)

    def __getitem__(self, slot: int) -> int:
        return slot if self.included[slot] else -1

    def __getitems__(self, slots: list[int]) -> list[int]:
        return np.where(self.included[slots], slots, -1).tolist()


class _Canaries(pl.LightningModule):
    """One parameter for every canary, which no other canary moves; and the log-likelihood ratio that it was included.

    A step adds ``log(1 - q + q exp((x - 1/2)/z²))`` to the ratio, where x is the noisy sum in units of a canary's
    contribution, with noise of standard deviation z.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.numbers = nn.Embedding(count, 1)
        self.scores = np.zeros(count)
        self.contribution = 1.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        values = self.numbers(batch.clamp(min=0)).squeeze(-1)
        return (1e3 * values * (batch >= 0)).mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        strategy: Any = self.trainer.strategy
        grad = self.numbers.weight.grad
        assert grad is not None
        q, z = strategy.sampling_rate, strategy.noise_multiplier
        observed = grad.double().flatten().cpu().numpy() * strategy.expected_batch_size / self.contribution
        self.scores += np.log1p(q * np.expm1(np.clip((observed - 0.5) / z**2, -700, 700)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def audit_mechanism(
    make_strategy: Callable[[], PrivateStrategy],
    *,
    records: int,
    expected_batch_size: int,
    steps: int,
    delta: float,
    confidence: float = 0.95,
    guessed: float = 0.01,
    seed: int | None = None,
    root: str | Path | None = None,
) -> Audit:
    """Audits a whole training by a strategy's mechanism, sampling, noise and ledger, in one run of a Trainer.

    Every record is, with probability 1/2, a canary whose gradient is large in one coordinate of its own and zero in all
    others, and else a record without gradient. The auditor sees the noisy gradient of every step.

    Args:
        make_strategy: Makes the strategy, with its noise.
        records: N, and the number of canaries.
        expected_batch_size: q·N.
        steps: Private steps T.
        delta, confidence: Of the bound.
        guessed: Share of canaries about which the auditor does not abstain; fixed before.
        seed: Of the choice of canaries; ``None`` draws one.
        root: Where the training writes its journal.
    """
    included = np.random.default_rng(secrets.randbits(128) if seed is None else seed).random(records) < 0.5
    module, strategy = _Canaries(records), make_strategy()
    module.contribution = _contribution(strategy.mechanism.clipping, strategy.mechanism.noise)
    loader = DataLoader(_Slots(included), batch_size=expected_batch_size, collate_fn=torch.tensor)
    trainer = _quiet_trainer(strategy, root, max_steps=steps, max_epochs=-1)
    trainer.fit(module, loader)
    claimed = strategy.ledger.epsilon(delta)
    return one_run_audit("Dirac canaries", module.scores, included, claimed, delta, confidence, guessed)


def _contribution(clipping: Bounding, noise: Noise) -> float:
    """What a canary adds to its coordinate, measured."""
    module = _Canaries(2)
    step = PrivateStep.of(Mechanism(clipping, noise), module)
    step.begin(0.0, 1.0, 1.0)
    with step.engine.forward(1):
        loss = module.training_step(torch.zeros(1, dtype=torch.long), 0)
    with step.backward(1.0, last=True):
        loss.backward()
    step.release()
    assert module.numbers.weight.grad is not None
    return float(module.numbers.weight.grad[0, 0])


def _quiet_trainer(strategy: Any, root: str | Path | None, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        strategy=strategy,
        default_root_dir=root,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


class _WithCanaries(Dataset[Any]):
    """Records, and after them copies of some of them with labels that are wrong."""

    def __init__(self, records: Any, sources: np.ndarray, labels: np.ndarray) -> None:
        self.records, self.sources, self.labels = records, sources, labels

    def __len__(self) -> int:
        return len(self.records) + len(self.sources)

    def __getitem__(self, index: int) -> Any:
        added = index - len(self.records)
        if added < 0:
            return self.records[index]
        return _with_label(self.records[int(self.sources[added])], int(self.labels[added]))

    def __getitems__(self, indices: list[int]) -> Any:
        together = getattr(self.records, "__getitems__", None)
        if together is None:
            return [self[index] for index in indices]
        added = np.array(indices) - len(self.records)
        canaries = added >= 0
        found = together(np.where(canaries, self.sources[added.clip(min=0)], indices).tolist())
        if isinstance(found, list):
            return [_with_label(r, int(self.labels[a])) if a >= 0 else r for r, a in zip(found, added, strict=True)]
        wrong = torch.from_numpy(self.labels[added[canaries]])  # a table: one column per field, collated already
        labels = found[-1].clone()
        labels[torch.from_numpy(canaries)] = wrong.to(labels.dtype)
        return (*found[:-1], labels)


_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


def _label_of(record: Any) -> int:
    if isinstance(record, tuple | list) and len(record) > 1:
        return int(record[-1])
    if isinstance(record, dict):
        for key in _LABEL_KEYS:
            if key in record:
                return int(record[key])
    raise ValueError(
        "The black-box attack gives records wrong labels, and finds none: a record must be a tuple or list that ends "
        f"with a whole number, or a dictionary with one of the keys {_LABEL_KEYS}. Use the other attacks."
    )


def _with_label(record: Any, label: int) -> Any:
    if isinstance(record, dict):
        key = next(key for key in _LABEL_KEYS if key in record)
        return {**record, key: _like(record[key], label)}
    return type(record)((*record[:-1], _like(record[-1], label)))


def _like(value: Any, label: int) -> Any:
    return torch.full_like(value, label) if isinstance(value, Tensor) else type(value)(label)


def audit_training(
    module: pl.LightningModule,
    loader: DataLoader[Any],
    trainer: pl.Trainer,
    *,
    delta: float,
    canaries: int = 1000,
    confidence: float = 0.95,
    guessed: float = 0.1,
    seed: int | None = None,
) -> Audit:
    """Trains a module, and tells from the trained model which wrongly labelled records were among the train set.

    The score of a canary is how much its loss has fallen.

    Args:
        module: Is trained in place.
        loader: Its train loader; records are ``(…, label)`` or dictionaries with a label.
        trainer: Trains it, by a private strategy or with `DifferentialPrivacy`.
        delta, confidence: Of the bound.
        canaries: How many records are copied, given another label, and added with probability 1/2.
        guessed: Share of canaries about which the attack does not abstain; fixed before.
        seed: Of the choice of canaries; ``None`` draws one.

    Raises:
        ValueError: Records have no labels or all the same one, ``canaries`` is less than 2 or more than the records, or
            (after training) the Trainer's strategy was not private; or the loader weights its records.
    """
    if weights_of(loader) is not None:
        raise ValueError(
            "The train loader weights its records (WeightedRandomSampler), and copies of them have no weights. Attack "
            "the mechanism and single steps instead (lightning-dp audit --attacks mechanism step)."
        )
    random = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
    records: Any = loader.dataset
    if not 2 <= canaries <= len(records):
        raise ValueError(f"canaries must be between 2 and the {len(records)} records of the train set, got {canaries}.")
    sources = random.choice(len(records), canaries, replace=False)
    labels = np.array([_label_of(records[int(source)]) for source in sources])
    kinds = np.unique(labels)
    if len(kinds) < 2:
        raise ValueError("All records that were looked at have the same label: none of them can be wrong.")
    wrong = np.array([random.choice(kinds[kinds != label]) for label in labels])
    included = random.random(canaries) < 0.5
    everything = _WithCanaries(records, sources, wrong)

    def losses() -> np.ndarray:
        shadow = Shadow(module).module.eval()
        with torch.no_grad():
            found = []
            for index in range(len(records), len(records) + canaries):
                batch = loader.collate_fn(everything.__getitems__([index]))
                batch = trainer.strategy.batch_to_device(batch, shadow.device)
                found.append(float(reduced(loss_of(shadow.training_step(batch, 0)), "mean")))
        return np.array(found)

    module.trainer = trainer
    before = losses()
    added = _WithCanaries(records, sources[included], wrong[included])
    train = DataLoader(
        added, batch_size=loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers, shuffle=True
    )
    trainer.fit(module, train)
    strategy: Any = trainer.strategy
    if not isinstance(strategy, PrivateMixin):
        raise ValueError("The Trainer trains without privacy: there is no claim to audit.")
    scores = before - losses()
    claimed = strategy.ledger.epsilon(delta)
    return one_run_audit("wrong labels", scores, included, claimed, delta, confidence, guessed)
