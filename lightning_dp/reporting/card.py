"""The privacy card: what a training guarantees, in words and in numbers, and what it does not.

It says what Ponomareva et al. 2023, "How to DP-fy ML" (section 5.3, on reporting), ask of a statement: setting,
definition, adjacency, unit of privacy, what is released, which uses of the data are covered, the accountant and its
assumptions, and the parameters with which the numbers can be computed again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_dp.accounting.events import ACCOUNTANTS, ShiftedNoiseDpEvent, has_loss_distribution
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import JournalError
from lightning_dp.journal.contents import JOURNAL_NAME, JournalContents
from lightning_dp.reporting.markdown import render_card, rounded_up

#: The card's files, within its directory.
CARD_NAME = "privacy_card"


#: Parts of the configuration that the card states under their own headings.
_STATED_ELSEWHERE = frozenset(
    (
        "clipping",
        "sensitivity",
        "groups",
        "noise",
        "denoiser",
        "num_records",
        "sampling_rate",
        "expected_batch_size",
        "independence",
        "statistics",
        "software",
    )
)


def without_amplification(ledger: PrivacyLedger) -> PrivacyLedger:
    """The same steps, each as if every record had been in its batch.

    Formal guarantee: its ε holds however the batches were chosen, as long as one record does not influence which
    others are in them. Proof: a batch with the record and the same batch without it differ in one bounded term, so the
    step is the unsampled mechanism, or, where the record is in neither, reveals nothing of it.
    """
    plain = PrivacyLedger()
    for event, count in ledger:
        plain.record(event.event if isinstance(event, PoissonSampledDpEvent) else event, count)
    return plain


def privacy_card(
    ledger: PrivacyLedger,
    *,
    delta: float,
    configuration: Mapping[str, Any],
    steps_in_model: int | None = None,
    training_metrics: Sequence[str] = (),
    validation_metrics: Sequence[str] = (),
    target_epsilon: float | None = None,
    status: str = "finished",
) -> dict[str, Any]:
    """The card as plain data, of which `render_card` makes Markdown.

    Args:
        ledger: Every private step, those that were lost included.
        delta: The δ at which ε is stated, strictly between 0 and 1.
        configuration: As `PrivateMixin.public_configuration` gives it.
        steps_in_model: How many of the steps the trained model contains; ``None``: all.
        training_metrics: Names of what was logged from the training steps, without noise.
        validation_metrics: Names of what was logged from validation.
        target_epsilon: The budget, if there was one.
        status: How the training ended.

    Returns:
        Strings, numbers, lists and dictionaries; an infinite ε is the string ``"inf"``.

    Raises:
        ValueError: δ is not strictly between 0 and 1.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1, got {delta}.")
    assumptions = {"poisson_sampling": ledger, "sampling_not_trusted": without_amplification(ledger)}
    epsilons = {
        name: {accountant: _finite_or_name(steps.epsilon(delta, accountant)) for accountant in ACCOUNTANTS}
        for name, steps in assumptions.items()
    }
    total = ledger.steps
    in_model = total if steps_in_model is None else min(steps_in_model, total)
    mechanisms: dict[DpEvent, int] = {}
    for event, count in ledger:
        mechanisms[event] = mechanisms.get(event, 0) + count
    statistics = {event: mechanisms.pop(event) for event in dict(ledger.statistics())}
    return {
        "format": 1,
        "statement": _statement(epsilons["poisson_sampling"]["pld"], delta),
        "status": status,
        "definition": {
            "name": "(ε, δ)-differential privacy",
            "setting": "central: the training process sees the records, and what it releases is private",
            "adjacency": "add or remove one record",
            "unit_of_privacy": "one record of the train set (one index of its data set)",
            "released": "the model after every step, and everything that is computed from it alone",
            "data_accesses_covered": "the private steps and statistics that are counted below, and no others"
            if statistics
            else "the private steps that are counted below, and no others",
        },
        "delta": delta,
        "epsilon": epsilons,
        "accounting": _accounting(ledger),
        "target_epsilon": None if target_epsilon is None else _finite_or_name(target_epsilon),
        "mechanism": {
            "name": "noisy sums of bounded per-example gradients, divided by the expected batch size (DP-SGD)",
            "clipping": configuration["clipping"],
            "sensitivity": configuration["sensitivity"],
            "groups": configuration["groups"],
            "noise": configuration["noise"],
            "denoiser": configuration.get("denoiser"),
        },
        "sampling": {
            "name": "Poisson: every record joins every batch independently with a probability of its own, at most q; ε "
            "is that of the likeliest"
            if configuration.get("weighted_sampling")
            else "Poisson: every record joins every batch independently with probability q",
            "sampling_rate": configuration["sampling_rate"],
            "num_records": configuration["num_records"],
            "expected_batch_size": configuration["expected_batch_size"],
        },
        "steps": {
            "total": total,
            "in_model": in_model,
            "lost_or_elsewhere": total - in_model,
            "by_mechanism": [{"event": _in_words(event), "steps": count} for event, count in mechanisms.items()],
        },
        "independence": _independence(configuration),
        "statistics_of": list(configuration.get("statistics", [])),
        "statistics": [{"event": _in_words(event), "times": count} for event, count in statistics.items()],
        "not_covered": _not_covered(configuration, training_metrics, validation_metrics),
        "configuration": {key: value for key, value in configuration.items() if key not in _STATED_ELSEWHERE},
        "software": configuration["software"],
    }


def _independence(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What is known about one record's influence on another's gradient."""
    found = configuration.get("independence")
    if configuration["self_check"] and found:
        return dict(found)
    return {"verdict": "not checked", "decisions": {}, "losses": {}, "not_checked": ["whether records are independent"]}


def _finite_or_name(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def _statement(epsilon: float | str, delta: float) -> str:
    if epsilon == "inf":
        return "A step was taken without noise: this training has no privacy guarantee (ε is infinite)."
    return (
        f"This training is (ε = {rounded_up(epsilon)}, δ = {delta:g})-differentially private with respect to adding or "
        "removing one record of its train set."
    )


def _in_words(event: DpEvent) -> str:
    if isinstance(event, PoissonSampledDpEvent):
        return f"{_in_words(event.event)}, Poisson-sampled with q = {event.sampling_probability:.6g}"
    if isinstance(event, GaussianDpEvent):
        return f"Gaussian mechanism of noise multiplier {event.noise_multiplier:.6g}"
    if isinstance(event, ShiftedNoiseDpEvent):
        vectors, levels = len(event.magnitudes.values), len(event.magnitudes.counts)
        return (
            f"{type(event.noise).__name__.removesuffix('Density')}Noise of scale {event.scale:.6g} on every "
            f"coordinate; what one record adds is bounded by one of {vectors} public vectors of {levels} levels"
        )
    return str(event)


def _accounting(ledger: PrivacyLedger) -> str:
    if has_loss_distribution(ledger.event()):
        return "Both are upper bounds, and the smaller one is the tighter statement."
    return (
        "The noise is not Gaussian: its privacy loss distribution is not known here, and both numbers are the upper "
        "bound that follows from Rényi divergences at integer orders."
    )


_WEIGHTS = (
    {
        "what": "weights of records",
        "why": "The probabilities with which records join batches were declared to be public (public_weights=True). If "
        "they were computed from these records, what they say is not covered.",
    },
)


def _not_covered(
    configuration: Mapping[str, Any], training: Sequence[str], validation: Sequence[str]
) -> list[dict[str, Any]]:
    if configuration["seed_given"]:
        seed = (
            "seed= was given. Whoever knows it can compute the noise and take it away: the guarantee holds only while "
            "it is secret, and it must not have been used for another training."
        )
    else:
        seed = (
            "Sampling and noise were seeded by the operating system, and neither seed nor state was saved. A seed "
            "(seed=…) that becomes known would void the guarantee."
        )
    if configuration.get("secure_rng"):
        floats = (
            "Sampling and noise came from a cryptographic generator, and every Gaussian number was a sum of four. It "
            "was still added in floating point: a mathematical guarantee for real numbers, not for each of their bits."
        )
    else:
        floats = (
            "Sampling and noise came from fast generators that are not cryptographic, and noise is added in floating "
            "point: an adversary who sees every noisy gradient to its last bit may learn more (secure_rng=True)."
        )
    parts: list[dict[str, Any]] = [
        {"what": "floating-point numbers", "why": floats},
        {
            "what": "hyper-parameter search",
            "why": "Every further training on these records, and every choice made by its result, costs privacy that "
            "is not counted here: learning rates, clipping norms, architectures, the number of trials.",
        },
        {
            "what": "validation and test data",
            "why": "Records that were used to validate, to choose a checkpoint or to stop early are not protected by "
            "this guarantee.",
            "metrics": list(validation),
        },
        {
            "what": "training metrics",
            "why": "Metrics that were logged from training steps are computed from the records without noise. Whoever "
            "sees them learns more than ε says; what was printed or logged past the Trainer is not known here.",
            "metrics": list(training),
        },
        {"what": "seed", "why": seed},
        *(_WEIGHTS if configuration.get("weighted_sampling") else ()),
        {
            "what": "preprocessing",
            "why": "Statistics, vocabularies, feature selection or pre-trained weights that come from the private "
            "records are not counted, unless this card names their release.",
        },
        {
            "what": "the number of records",
            "why": "N is treated as public: q and the divisor q·N depend on it. Under adding or removing a record it "
            "is strictly speaking private, and stating it reveals whether a record was added.",
        },
        {
            "what": "groups of records",
            "why": "Who contributed several records, or whose data is in other people's records, is protected less.",
        },
        {
            "what": "the machine",
            "why": "Times, memory, errors and the rounding of floating-point noise are not part of the mechanism.",
        },
    ]
    if configuration["self_check"]:
        parts.append(
            {
                "what": "checks before training",
                "why": "A few records passed through the model to check that it can be trained privately; that "
                "training began reveals that the check succeeded. What a data set does within one item, and state "
                "outside of the module, nobody looked at.",
            }
        )
    if not configuration["journal"]:
        parts.append(
            {
                "what": "steps lost in crashes",
                "why": "No journal was kept (journal=False): steps that a killed process took after its last "
                "checkpoint are not counted.",
            }
        )
    return parts


def write_card(card: Mapping[str, Any], directory: str | os.PathLike[str]) -> tuple[str, str]:
    """Writes ``privacy_card.md`` and ``privacy_card.json`` into a directory, local or remote; returns their paths."""
    directory = os.fspath(directory)
    filesystem = get_filesystem(directory)
    filesystem.makedirs(directory, exist_ok=True)
    markdown, data = (os.path.join(directory, f"{CARD_NAME}.{ending}") for ending in ("md", "json"))
    with filesystem.open(markdown, "w", encoding="utf-8") as file:
        file.write(render_card(card))
    with filesystem.open(data, "w", encoding="utf-8") as file:
        json.dump(card, file, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    return markdown, data


def card_of_run(run: str | os.PathLike[str], delta: float | None = None) -> dict[str, Any]:
    """The card of a run from its journal alone, also of one that was killed.

    Args:
        run: The run's directory, or the journal in it.
        delta: The δ to state ε at. ``None``: that of the training.

    Raises:
        JournalError: There is no journal, or none of a step, or it cannot be read.
        ValueError: δ is not strictly between 0 and 1, or the training had none.
    """
    path = Path(run)
    if path.is_dir():
        path = path / JOURNAL_NAME
    if not path.is_file():
        below = sorted(str(found.parent) for found in Path(run).rglob(JOURNAL_NAME))[:5] if Path(run).is_dir() else []
        hint = f" There is one in: {', '.join(below)}." if below else ""
        raise JournalError(
            f"No privacy journal {path}: give a run's directory (where its checkpoints folder is).{hint}"
        )
    contents = JournalContents(path)
    last = contents.last_run()
    if last is None:
        raise JournalError(f"The privacy journal {path} knows of no private step.")
    if delta is None:
        delta = contents.notes.get("delta")
    if delta is None:
        raise ValueError("The training had no δ (no PrivacyMonitor, PrivacyBudget or PrivacyCard): give one, --delta.")
    ending = "killed" if last.killed or not last.ended else "finished or stopped"
    status = f"{ending}; card made from its journal"
    if contents.continued:
        status += f"; it went on in {', '.join(link['path'] for link in contents.continued)}, which has its own card"
    taken = PrivacyLedger.from_state_dict({"runs": [{"name": last.name, "steps": last.charged(not contents.damaged)}]})
    configuration = last.about["configuration"]
    if configuration["noise"]["multiplier"] is None:  # a statistic described the run, before a budget chose the noise
        multiplier = contents.notes.get("noise_multiplier")
        configuration = {**configuration, "noise": {**configuration["noise"], "multiplier": multiplier}}
    return privacy_card(
        contents.ledger(),
        delta=delta,
        configuration=configuration,
        steps_in_model=int(last.about["model_steps"]) + taken.steps,
        training_metrics=contents.notes.get("training_metrics", ()),
        validation_metrics=contents.notes.get("validation_metrics", ()),
        target_epsilon=contents.notes.get("target_epsilon"),
        status=status,
    )
