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

import argparse
import json
import math
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.callbacks import DifferentialPrivacy, PrivacyMonitor, trainer_callbacks
from lightning_dp.clipping import Bounding
from lightning_dp.independence.shadow import Shadow
from lightning_dp.independence.subject import loss_of, reduced
from lightning_dp.noise import GaussianNoise, Noise, with_multiplier
from lightning_dp.pipeline import PrivateStep
from lightning_dp.randomness import Randomness
from lightning_dp.strategy import PrivateMixin, PrivateStrategy

#: Of the trials of `audit_step`, the share that only chooses the attack.
_REHEARSAL = 0.25

#: ε above which a bound is not searched.
_LARGEST_EPSILON = 60.0


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Args:
        attack: Which one.
        lower_bound: ε is at least that, at `delta`, with probability `confidence`.
        claimed: What the ledger claims.
        delta, confidence: At which both are stated.
        trials: Canaries, or pairs of steps.
        details: What the bound was computed from.
    """

    attack: str
    lower_bound: float
    claimed: float
    delta: float
    confidence: float
    trials: int
    details: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the claim stands."""
        return self.lower_bound <= self.claimed

    def __str__(self) -> str:
        verdict = "the claim stands" if self.passed else "THE CLAIM IS FALSE"
        return (
            f"{self.attack}: ε ≥ {self.lower_bound:.3f} with {100 * self.confidence:g} % confidence, claimed ε = "
            f"{self.claimed:.3f} (δ = {self.delta:g}): {verdict}"
        )


# -- bounds ------------------------------------------------------------------------------------------------------------


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest ε that so many correct guesses reject.

    Every canary was included with probability 1/2, independently; ``guesses`` of them were guessed to be in or out.
    With ``p = e^ε/(1 + e^ε)``, ``B ~ Bin(guesses, p)``, ``β = P[B ≥ v]`` and ``α = max_i (P[B ≥ v - i] - β)/i``, what
    is (ε, δ)-private gives ``correct = v`` or more with probability at most ``β + 2 m δ α``.
    Source: Steinke et al. 2023, theorem 5.2.

    Args:
        canaries: m, how many were included with probability 1/2.
        guesses: How many were guessed; the others abstained. The number must not depend on which are in.
        correct: How many guesses were right.
        delta: δ of the claim.
        confidence: One minus the probability that the bound is above the truth.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"There are {correct} correct of {guesses} guesses about {canaries} canaries.")

    def probability(epsilon: float) -> float:
        binomial = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
        at_least = binomial.sf(correct - 1)
        fewer = np.arange(1, correct + 1)
        slack = float(np.max((binomial.sf(correct - 1 - fewer) - at_least) / fewer, initial=0.0))
        return float(at_least + 2 * canaries * delta * slack)

    significance = 1 - confidence
    if probability(0.0) > significance:
        return 0.0
    if probability(_LARGEST_EPSILON) <= significance:
        return _LARGEST_EPSILON
    low, high = 0.0, _LARGEST_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) <= significance else (low, middle)
    return low


def error_rates(mistakes: int, trials: int, confidence: float) -> float:
    """Clopper and Pearson's upper bound on a probability, of which ``mistakes`` in ``trials`` were seen."""
    return 1.0 if mistakes >= trials else float(stats.beta.ppf(confidence, mistakes + 1, trials - mistakes))


def gaussian_bound(
    false_positives: int, false_negatives: int, trials: int, delta: float, confidence: float = 0.95
) -> float:
    """The ε at δ of the most private Gaussian mechanism that allows a test with so few errors.

    ``μ ≥ Φ⁻¹(1 - fpr) - Φ⁻¹(fnr)`` for every test between neighbours under μ-GDP, with Clopper and Pearson's bounds on
    both rates, each at half of the significance. It is a bound on ε if the mechanism is Gaussian.

    Args:
        false_positives, false_negatives: Errors of a test that was fixed before, each among ``trials``.
    """
    each = 1 - (1 - confidence) / 2
    fpr, fnr = (error_rates(errors, trials, each) for errors in (false_positives, false_negatives))
    separation = float(stats.norm.isf(fpr) - stats.norm.ppf(fnr))
    return 0.0 if not separation > 0 else gaussian_epsilon(separation, delta)


def gaussian_epsilon(separation: float, delta: float) -> float:
    """ε at δ of μ-GDP, ``δ(ε) = Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2)`` (Dong et al. 2022, corollary 1)."""

    def excess(epsilon: float) -> float:
        first, second = -epsilon / separation + separation / 2, -epsilon / separation - separation / 2
        return float(stats.norm.cdf(first) - math.exp(epsilon + stats.norm.logcdf(second))) - delta

    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, 1.0 + separation**2 + 10 * separation))


def rates_bound(
    false_positives: int, false_negatives: int, trials: int, delta: float, confidence: float = 0.95
) -> float:
    """``ε ≥ log((1 - δ - fnr) / fpr)``, for any mechanism (Kairouz et al. 2015), with the same bounds on the rates."""
    each = 1 - (1 - confidence) / 2
    fpr, fnr = (error_rates(errors, trials, each) for errors in (false_positives, false_negatives))
    found = [math.log((1 - delta - miss) / hit) for miss, hit in ((fnr, fpr), (fpr, fnr)) if 1 - delta - miss > hit]
    return max(found, default=0.0)


# -- single steps ------------------------------------------------------------------------------------------------------


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
    """Tells single steps with one record more from those without, from all noisy gradients.

    The attack: the noise-free difference d of the two sums is known, and how strongly every parameter is noised; the
    score is ``Σ_l ⟨ĝ_l, d_l⟩ / σ_l²`` (the likelihood ratio of Gaussian noise). Its threshold is chosen on trials of
    its own.

    Args:
        make_step: Makes the private step under audit, of a module that is not changed by it.
        backward: Runs forward and backward passes of a batch within a step that has begun.
        without, with_record: Batches for ``backward``: neighbours.
        multiplier: Noise multiplier z.
        delta, confidence: Of the bound.
        trials: Steps of each kind.
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
    gaussian = isinstance(step.noise, GaussianNoise)
    bound = gaussian_bound if gaussian else rates_bound
    claim = PrivacyLedger()
    claim.record(step.event(multiplier, 1.0))
    return Audit(
        "one step",
        bound(false_positives, false_negatives, trials, delta, confidence),
        claim.epsilon(delta),
        delta,
        confidence,
        trials,
        {"false_positives": false_positives, "false_negatives": false_negatives, "multiplier": multiplier},
    )


# -- a whole training, in one run --------------------------------------------------------------------------------------


def guess(scores: np.ndarray, guesses: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions that are guessed to be in, and out: the highest and the lowest scores, half each."""
    order = np.argsort(scores)
    half = guesses // 2
    return order[len(order) - half :], order[:half]


def _one_run(
    attack: str, scores: np.ndarray, included: np.ndarray, claimed: float, delta: float, confidence: float, share: float
) -> Audit:
    guesses = max(2, 2 * int(share * len(scores) / 2))
    high, low = guess(scores, guesses)
    correct = int(included[high].sum() + (~included[low]).sum())
    bound = one_run_bound(len(scores), guesses, correct, delta, confidence)
    details = {"guesses": float(guesses), "correct": float(correct)}
    return Audit(attack, bound, claimed, delta, confidence, len(scores), details)


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
    """A number for every canary, which alone it moves; and the log likelihood ratio of its being there.

    With contribution 1 and noise of standard deviation z, a step's is ``log(1 - q + q exp((x - 1/2)/z²))``.
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
    module.contribution = _contribution(strategy.clipping, strategy.noise)
    loader = DataLoader(_Slots(included), batch_size=expected_batch_size, collate_fn=torch.tensor)
    trainer = _quiet_trainer(strategy, root, max_steps=steps, max_epochs=-1)
    trainer.fit(module, loader)
    claimed = strategy.ledger.epsilon(delta)
    return _one_run("Dirac canaries", module.scores, included, claimed, delta, confidence, guessed)


def _contribution(clipping: Bounding, noise: Noise) -> float:
    """What a canary adds to its coordinate, measured."""
    module = _Canaries(2)
    bound = clipping.bind(module)
    step = PrivateStep(bound.make_engine("bookkeeping", module), bound, noise, PrivacyLedger(), Randomness())
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
        module: What is trained; it is trained afterwards.
        loader: Its train loader.
        trainer: Trains it, by a private strategy or with `DifferentialPrivacy`.
        delta, confidence: Of the bound.
        canaries: How many records are copied, given another label, and added with probability 1/2.
        guessed: Share of canaries about which the attack does not abstain; fixed before.
        seed: Of the choice of canaries; ``None`` draws one.

    Raises:
        ValueError: The records have no labels, or there are too few of them.
    """
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
    return _one_run("wrong labels", scores, included, claimed, delta, confidence, guessed)


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
    """`audit_step` of a module on its own records: four of them, and one more, whose label is wrong if it has one."""
    records: Any = loader.dataset
    first = loader.collate_fn(_take(records, [0, 1, 2, 3]))
    more = loader.collate_fn(_take(records, [0, 1, 2, 3, 4]))
    shadow = Shadow(module).module
    bound = clipping.bind(shadow)
    bound.attach(shadow)

    def make_step() -> PrivateStep:
        made = bound.make_engine(engine, shadow)
        return PrivateStep(made, bound, noise, PrivacyLedger(), Randomness())

    def backward(step: PrivateStep, batch: Any) -> None:
        count = 5 if batch is more else 4
        with step.engine.forward(count):
            loss = reduced(loss_of(shadow.training_step(batch, 0)), "mean")
        with step.backward(float(count), last=True):
            loss.backward()

    return audit_step(
        make_step, backward, first, more, multiplier=multiplier, delta=delta, trials=trials, confidence=confidence
    )


# -- the command -------------------------------------------------------------------------------------------------------

ATTACKS = ("training", "mechanism", "step")


def audit_command(arguments: Sequence[str]) -> None:
    """``lightning-dp audit --config …``: trains a recipe with canaries, and attacks what comes out."""
    parser = argparse.ArgumentParser(
        prog="lightning-dp audit",
        description="Lower bounds on ε, by attacks, beside what the ledger claims. Trains the recipe once, on its "
        "records and wrongly labelled copies of some. A bound above the claim proves a defect; one below proves "
        "nothing. Further arguments (--trainer.max_epochs 1) are LightningCLI's.",
    )
    parser.add_argument("--config", required=True, action="append", help="the recipe; further ones override it")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="default: all")
    parser.add_argument("--canaries", type=int, default=1000, help="wrongly labelled records; default: %(default)s")
    parser.add_argument("--trials", type=int, default=1000, help="single steps of each kind; default: %(default)s")
    parser.add_argument("--confidence", type=float, default=0.95, help="of every bound; default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder for audit.json and audit.png (default: that of the logs)")
    options, others = parser.parse_known_args(list(arguments))
    if not 0.5 <= options.confidence < 1:
        parser.error(f"--confidence must lie in [0.5, 1), got {options.confidence:g}")

    from lightning.pytorch.cli import LightningCLI

    from lightning_dp.recipes import RecipeParser

    cli = LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        args=[*(f"--config={config}" for config in options.config), *others],
        parser_class=RecipeParser,
    )
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    loader = cli.datamodule.train_dataloader()
    delta = _delta_of(cli.trainer)
    common: dict[str, Any] = {"delta": delta, "confidence": options.confidence}
    try:
        found = [audit_training(cli.model, loader, cli.trainer, canaries=options.canaries, **common)]
    except ValueError as error:
        parser.error(str(error))
    print(found[0], flush=True)
    strategy: Any = cli.trainer.strategy
    noise = with_multiplier(strategy.noise, strategy.noise_multiplier)
    if "mechanism" in options.attacks:
        with tempfile.TemporaryDirectory() as root:
            found.append(
                audit_mechanism(
                    lambda: PrivateStrategy(strategy.clipping, noise),
                    records=strategy.num_records,
                    expected_batch_size=round(strategy.expected_batch_size),
                    steps=strategy.ledger.steps,
                    root=root,
                    **common,
                )
            )
        print(found[-1], flush=True)
    if "step" in options.attacks:
        found.append(
            audit_module(
                cli.model, loader, strategy.clipping, noise, multiplier=1.0, engine=strategy.engine,
                trials=options.trials, **common,
            )
        )  # fmt: skip
        print(found[-1], flush=True)
    folder = options.out or Path(cli.trainer.log_dir or cli.trainer.default_root_dir)
    print("lightning-dp: written to " + " and ".join(str(path) for path in write_audits(found, folder)))
    if not all(audit.passed for audit in found):
        raise SystemExit(1)


def _delta_of(trainer: pl.Trainer) -> float:
    for callback in trainer_callbacks(trainer):
        monitor = callback.monitor if isinstance(callback, DifferentialPrivacy) else callback
        if isinstance(monitor, PrivacyMonitor):
            return monitor.delta
    raise SystemExit("lightning-dp audit: the recipe states no δ: add DifferentialPrivacy or PrivacyMonitor.")


def write_audits(audits: Sequence[Audit], folder: str | Path) -> list[Path]:
    """``audit.json``, and ``audit.png`` where matplotlib is installed: bounds beside claims."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "audit.json"
    path.write_text(json.dumps([{**asdict(audit), "passed": audit.passed} for audit in audits], indent=1))
    try:
        import matplotlib
    except ImportError:
        return [path]
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 1 + 0.8 * len(audits)))
    for row, audit in enumerate(reversed(audits)):
        axes.barh(row, audit.claimed, color="lightgrey", label="claimed" if not row else None)
        color = "tab:blue" if audit.passed else "tab:red"
        axes.barh(row, audit.lower_bound, height=0.4, color=color, label="lower bound" if not row else None)
    axes.set_yticks(range(len(audits)), [audit.attack for audit in reversed(audits)])
    axes.set_xlabel(f"ε at δ = {audits[0].delta:g}, bounds with {100 * audits[0].confidence:g} % confidence")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "audit.png", dpi=150)
    plt.close(figure)
    return [path, folder / "audit.png"]


def _take(records: Any, indices: list[int]) -> Any:
    together = getattr(records, "__getitems__", None)
    return together(indices) if together else [records[index] for index in indices]
