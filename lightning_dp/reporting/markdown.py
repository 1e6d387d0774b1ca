"""The privacy card as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any


def render_card(card: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        card: As `privacy_card` and `card_of_run` return it.
    """
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
        f"| Poisson sampling, as it was done | {rounded_up(trusted['pld'])} | {rounded_up(trusted['rdp'])} |",
        "| sampling not trusted: every record in every batch (q = 1) "
        f"| {rounded_up(untrusted['pld'])} | {rounded_up(untrusted['rdp'])} |",
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
        f"| expected batch | {sampling['expected_batch_size']:.6g} |",
        "",
        f"{steps['total']} private steps: {steps['in_model']} in the model, {lost} lost in crashes or taken by other "
        "trainings that share its ledger. All are charged:",
        "",
        "| mechanism of a step | steps |",
        "|---|---|",
        *(f"| {entry['event']} | {entry['steps']} |" for entry in steps["by_mechanism"]),
        *_statistics(card["statistics"], card.get("statistics_of", [])),
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


def _statistics(entries: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> list[str]:
    if not entries:
        return []
    return [
        "",
        f"Statistics of all records were released with noise{_named(layers)}. They are no steps of training, and are "
        "charged too:",
        "",
        "| mechanism of a statistic | times |",
        "|---|---|",
        *(f"| {entry['event']} | {entry['times']} |" for entry in entries),
    ]


def _named(layers: Sequence[str]) -> str:
    return f", for {', '.join(dict.fromkeys(layers))}" if layers else ""


def _call(stage: Mapping[str, Any]) -> str:
    return f"{stage['class']}({', '.join(f'{key}={value}' for key, value in stage.items() if key != 'class')})"


def _groups(count: int) -> str:
    return "all trainable parameters" if count == 1 else f"{count} groups of parameters"


def rounded_up(epsilon: float | str) -> str:
    """ε with four significant digits, rounded up, so that the statement stays true; the string ``"inf"`` as ∞."""
    if isinstance(epsilon, str):
        return "∞"
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(Decimal(epsilon))):g}"
