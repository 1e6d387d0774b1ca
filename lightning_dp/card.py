"""The privacy card: what a training guarantees, in words and in numbers, and what it does not.

It says what Ponomareva et al. 2023, "How to DP-fy ML" (section 5.3, on reporting), ask of a statement: setting,
definition, adjacency, unit of privacy, what is released, which uses of the data are covered, the accountant and its
assumptions, and the parameters with which the numbers can be computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_dp import dashboards
from lightning_dp.accounting.events import ACCOUNTANTS, ShiftedNoiseDpEvent, has_loss_distribution
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import JournalError, PrivacyConfigurationError
from lightning_dp.journal.contents import JOURNAL_NAME, JournalContents
from lightning_dp.run_directory import run_directory
from lightning_dp.strategy import PrivateMixin

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
            "name": "Poisson: every record joins every batch independently with probability q",
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
        f"This training is (ε = {_up(epsilon)}, δ = {delta:g})-differentially private with respect to adding or "
        "removing one record of its train set."
    )


def _up(epsilon: float | str) -> str:
    """Four digits, rounded up: what is shown is true."""
    if isinstance(epsilon, str):
        return "∞"
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(Decimal(epsilon))):g}"


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


def render_card(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    definition, mechanism, sampling, steps = (card[key] for key in ("definition", "mechanism", "sampling", "steps"))
    trusted, untrusted = card["epsilon"]["poisson_sampling"], card["epsilon"]["sampling_not_trusted"]
    lost = steps["lost_or_elsewhere"]
    denoised = [f"| denoiser | {_call(mechanism['denoiser'])} |"] if mechanism["denoiser"] else []
    budget = [] if card["target_epsilon"] is None else [f"| budget | ε = {card['target_epsilon']} |"]
    lines = [
        "# Privacy card",
        "",
        f"**{card['statement']}**",
        "",
        *_independence_headline(card),
        f"Training {card['status']}.",
        "",
        "## ε",
        "",
        f"At δ = {card['delta']:g} (δ·N = {card['delta'] * sampling['num_records']:.2g}), rounded up:",
        "",
        "| assumption | ε, privacy loss distributions | ε, Rényi differential privacy |",
        "|---|---|---|",
        f"| Poisson sampling, as it was done | {_up(trusted['pld'])} | {_up(trusted['rdp'])} |",
        "| sampling not trusted: every record in every batch (q = 1) "
        f"| {_up(untrusted['pld'])} | {_up(untrusted['rdp'])} |",
        "",
        card["accounting"],
        "",
        "## Definition",
        "",
        "| | |",
        "|---|---|",
        f"| definition | {definition['name']} |",
        f"| setting | {definition['setting']} |",
        f"| adjacency | {definition['adjacency']} |",
        f"| unit of privacy | {definition['unit_of_privacy']} |",
        f"| released | {definition['released']} |",
        f"| uses of the data that are covered | {definition['data_accesses_covered']} |",
        *budget,
        "",
        "## Mechanism",
        "",
        "| | |",
        "|---|---|",
        f"| mechanism | {mechanism['name']} |",
        f"| clipping | {_call(mechanism['clipping'])} |",
        f"| sensitivity | {mechanism['sensitivity']:.6g}, jointly over {_groups(mechanism['groups'])} |",
        f"| noise | {_call(mechanism['noise'])} |",
        *denoised,
        f"| sampling | {sampling['name']} |",
        f"| q | {sampling['sampling_rate']:.6g} |",
        f"| N | {sampling['num_records']} |",
        f"| q·N | {sampling['expected_batch_size']:.6g} |",
        "",
        f"{steps['total']} private steps: {steps['in_model']} in the model, {lost} lost in crashes or taken by other "
        "trainings that share its ledger. All are charged:",
        "",
        "| mechanism of a step | steps |",
        "|---|---|",
        *(f"| {entry['event']} | {entry['steps']} |" for entry in steps["by_mechanism"]),
        *_statistics(card["statistics"]),
        "",
        *_independence_lines(card.get("independence", {})),
        "## What the guarantee does not cover",
        "",
    ]
    for part in card["not_covered"]:
        named = ""
        if "metrics" in part:
            names = ", ".join(f"`{name}`" for name in part["metrics"])
            named = f" Logged: {names or 'none'}."
        lines.append(f"- **{part['what']}**: {part['why']}{named}")
    lines += ["", "## Configuration", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in card["configuration"].items()]
    lines += [f"| {package} | {version} |" for package, version in card["software"].items()]
    return "\n".join(lines) + "\n"


_VERDICTS = {
    "proven": "Proven: every operation of the training step acts on records one by one, the loss is a sum over "
    "records, "
    "and nothing of a record is kept.",
    "checked": "Checked: at the lines below, the training step reads what records hold. For the values that were "
    "read and "
    "the branches that were taken it is proven; a step that runs other code is examined before it is charged. What the "
    "numbers that are read there do to other records' gradients was looked at for some records, and is not proven.",
    "partly checked": "Checked, except for what is named below.",
    "not checked": "Not checked (self_check=False, or no step was taken). If records influence one another's "
    "gradients, ε "
    "is false.",
}


def _independence_headline(card: Mapping[str, Any]) -> list[str]:
    if card.get("independence", {}).get("verdict") != "not checked":
        return []
    return ["**It is not known whether records influence one another's gradients: if they do, ε is false.**", ""]


def _independence_lines(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    lines = ["## Independence of records", "", _VERDICTS[found["verdict"]], ""]
    lines += [f"- {line}: {what}" for line, what in found["decisions"].items()]
    lines += [f"- {line}: {what}" for line, what in found["losses"].items()]
    lines += [f"- Not checked: {sentence}." for sentence in found["not_checked"]]
    return lines if lines[-1] == "" else [*lines, ""]


def _statistics(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    if not entries:
        return []
    return [
        "",
        "Statistics of all records (a mean, or second moments) were released with noise. They are no steps of "
        "training, "
        "and are charged too:",
        "",
        "| mechanism of a statistic | times |",
        "|---|---|",
        *(f"| {entry['event']} | {entry['times']} |" for entry in entries),
    ]


def _call(stage: Mapping[str, Any]) -> str:
    return f"{stage['class']}({', '.join(f'{key}={value}' for key, value in stage.items() if key != 'class')})"


def _groups(count: int) -> str:
    return "all trainable parameters" if count == 1 else f"{count} groups of parameters"


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


class PrivacyCard(Callback):
    """Writes a privacy card when training ends, also by Ctrl-C or an error: ``privacy_card.md`` and ``.json``.

    The card states ε and δ, what they mean, how they come about, and what they do not cover, the metrics that were
    logged without noise by their names.

    Args:
        path: The directory for the two files. ``None``: beside the folder of the checkpoints.
        delta: The δ at which ε is stated. ``None``: that of the Trainer's `PrivacyBudget` or `PrivacyMonitor`.
    """

    def __init__(self, path: str | None = None, delta: float | None = None) -> None:
        if delta is not None and not 0 < delta < 1:
            raise ValueError(f"PrivacyCard: delta must lie strictly between 0 and 1, got {delta}.")
        self.path, self.delta = path, delta
        #: Where the card was written; empty before.
        self.markdown_path, self.json_path = "", ""
        self._target_epsilon: float | None = None
        self._training_metrics: set[str] = set()
        self._validation_metrics: set[str] = set()
        self._before_validation: set[str] = set()
        self._started = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._started = False
        strategy = _private_strategy(trainer)
        if self.delta is None:
            self.delta = _delta_of(trainer)
        self._target_epsilon = getattr(strategy.budget, "epsilon", None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes sure that the card can be written, before there is anything to write."""
        strategy = _private_strategy(trainer)
        self._started = not getattr(trainer, "fast_dev_run", False)
        self._target_epsilon = getattr(strategy.budget, "epsilon", None)
        if not self._started:
            return
        directory = self._directory(trainer)
        try:
            get_filesystem(directory).makedirs(directory, exist_ok=True)
            writable = "://" in directory or os.access(directory, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise PrivacyConfigurationError(
                f"PrivacyCard cannot write to {directory}. Give PrivacyCard(path=…) a directory that it can write to, "
                "or card=False to DifferentialPrivacy."
            )
        if strategy.journal is not None:  # what earlier runs of this training logged
            self._training_metrics |= set(strategy.journal.contents.notes.get("training_metrics", ()))
            self._validation_metrics |= set(strategy.journal.contents.notes.get("validation_metrics", ()))
        self._note(strategy, delta=self.delta, target_epsilon=self._target_epsilon)

    def _directory(self, trainer: pl.Trainer) -> str:
        return run_directory(trainer) if self.path is None else self.path

    def _note(self, strategy: PrivateMixin, **facts: Any) -> None:
        if strategy.journal is not None:
            strategy.journal.note(**facts)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before_validation = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._started and not trainer.sanity_checking:
            self._training_metrics |= self._before_validation - self._validation_metrics
            self._validation_metrics |= set(trainer.callback_metrics) - self._training_metrics

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._started:
            self._look_at_metrics(trainer)

    def _look_at_metrics(self, trainer: pl.Trainer) -> None:
        before = len(self._training_metrics) + len(self._validation_metrics)
        self._training_metrics |= set(trainer.callback_metrics) - self._validation_metrics
        if len(self._training_metrics) + len(self._validation_metrics) != before:
            training, validation = self._metrics()
            self._note(_private_strategy(trainer), training_metrics=training, validation_metrics=validation)

    def _metrics(self) -> tuple[list[str], list[str]]:
        def named(metrics: set[str]) -> list[str]:
            return sorted(name for name in metrics if not name.startswith("privacy/"))

        return named(self._training_metrics), named(self._validation_metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._started:
            self._look_at_metrics(trainer)
            self._write(trainer, "finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not self._started or not len(_private_strategy(trainer).ledger):
            return  # no step was taken: there is nothing to state
        try:
            self._look_at_metrics(trainer)
            self._write(trainer, f"interrupted by {type(exception).__name__}")
        except Exception as error:  # what went wrong first is what the user must see
            rank_zero_warn(f"PrivacyCard could not write a card: {error}")

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, status: str) -> None:
        self._started = False
        strategy = _private_strategy(trainer)
        assert self.delta is not None
        training, validation = self._metrics()
        card = privacy_card(
            strategy.ledger,
            delta=self.delta,
            configuration=strategy.public_configuration(),
            steps_in_model=trainer.global_step,
            training_metrics=training,
            validation_metrics=validation,
            target_epsilon=self._target_epsilon,
            status=status,
        )
        self.markdown_path, self.json_path = write_card(card, self._directory(trainer))
        if "://" not in self.markdown_path:
            try:
                dashboards.log_card(trainer.loggers, self.markdown_path)
            except Exception as error:  # a dashboard out of reach does not undo a training that is done
                rank_zero_warn(f"PrivacyCard: the card is at {self.markdown_path}, and could not be uploaded: {error}")
        rank_zero_info(f"PrivacyCard: {card['statement']} {self.markdown_path}")


def _private_strategy(trainer: pl.Trainer) -> PrivateMixin:
    if not isinstance(trainer.strategy, PrivateMixin):
        raise PrivacyConfigurationError(
            "PrivacyCard found a Trainer that trains without privacy. Pass strategy=PrivateStrategy(…) to the Trainer, "
            "or use the callback DifferentialPrivacy(epsilon=…, delta=…) alone, which writes a card as well."
        )
    return trainer.strategy


def _delta_of(trainer: pl.Trainer) -> float:
    from lightning_dp.callbacks import PrivacyBudget, PrivacyMonitor, trainer_callbacks  # which import this module

    for callback in trainer_callbacks(trainer):
        if isinstance(callback, PrivacyBudget | PrivacyMonitor):
            return callback.delta
    raise PrivacyConfigurationError(
        "PrivacyCard needs a δ to state ε at: PrivacyCard(delta=…), or a PrivacyMonitor or PrivacyBudget beside it."
    )


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
    if configuration["noise"]["multiplier"] is None:  # what was charged first was no step, and came before the choice
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


def card_command(argv: Sequence[str]) -> None:
    """``lightning-dp card <run>``: the card of a run from its journal."""
    parser = argparse.ArgumentParser(
        prog="lightning-dp card",
        description="States what a run guarantees, from the journal in its directory: prints the privacy card, and "
        "writes it there as Markdown and JSON.",
    )
    parser.add_argument("run", help="the run's directory (the one that holds the checkpoints folder)")
    parser.add_argument("--delta", type=float, help="the δ to state ε at (default: that of the training)")
    parser.add_argument("--out", help="the directory to write to (default: the run's)")
    arguments = parser.parse_args(argv)
    try:
        card = card_of_run(arguments.run, arguments.delta)
        run = Path(arguments.run)
        paths = write_card(card, arguments.out or (run if run.is_dir() else run.parent))
    except (JournalError, ValueError, OSError) as error:
        parser.error(str(error))
    print(render_card(card))
    print(f"lightning-dp: written to {' and '.join(paths)}")
