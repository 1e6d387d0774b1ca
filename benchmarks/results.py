"""Accuracy of the recipes against privacy: runs them, keeps what came out, and writes docs/results.md with a plot.

    python benchmarks/results.py                         # what has no stored result yet, then the report
    python benchmarks/results.py --only 'mnist/*' --redo
    python benchmarks/results.py --only none             # the report alone
    python benchmarks/results.py --only cifar10/encoding -- --trainer.accelerator gpu

The rows are in ``results.yaml`` beside this file. Every run is appended to ``docs/results.jsonl`` when it is done, so
that an interruption loses nothing but the run in progress. Lines of another machine are appended to that file as they
are; where two lines have the same recipe, arguments and seed, the later one counts. The fields of a line:

recipe, arguments, seed
    The row that it belongs to: its name, and the list of its further arguments, as in ``results.yaml``.
device_arguments
    Further arguments that make no other row, such as ``--trainer.accelerator gpu``.
test_accuracy
    Between 0 and 1.
epsilon, delta, steps
    As the training stated them, ε rounded up to four digits after the point, and its number of private steps. ε is
    ``"inf"`` for a training without privacy.
seconds
    Wall-clock time of the process, start and test included.
hardware
    Model and number of the CPUs, or the name of the GPU.
software
    Versions by name, as in the privacy card.
date, commit
    Day (UTC), and commit of the code, marked ``+`` if the package or its recipes had changes.
configuration
    `fingerprint` of the recipe, by which the report knows that a recipe has changed since. May be left out.
card
    The `CARD_FIELDS` of the privacy card, each under its last name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonargparse
from seeds import interval, run

from lightning_dp.recipes import find_recipe, read_recipe

ROOT = Path(__file__).parent.parent

#: Where the essential fields are in a privacy card.
CARD_FIELDS = (
    ("epsilon", "poisson_sampling"),
    ("epsilon", "sampling_not_trusted"),
    ("mechanism", "clipping"),
    ("mechanism", "sensitivity"),
    ("mechanism", "noise"),
    ("mechanism", "denoiser"),
    ("sampling", "sampling_rate"),
    ("sampling", "num_records"),
    ("configuration", "model"),
    ("configuration", "trainable_parameters"),
    ("configuration", "seed_given"),
)


#: Without which a line says nothing.
FIELDS = ("recipe", "arguments", "seed", "test_accuracy", "epsilon", "delta", "steps", "seconds", "hardware", "date",
          "commit")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of ours: see results.yaml."""

    recipe: str
    arguments: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    target: float | None = None
    compared_with: str = ""
    note: str = ""

    @property
    def data(self) -> str:
        return self.recipe.partition("/")[0]

    @property
    def command(self) -> str:
        recipe = f"recipes/{self.recipe}.yaml"
        seeds = map(str, self.seeds)
        return shlex.join(["python", "benchmarks/seeds.py", recipe, "--seeds", *seeds, *self.arguments])


@dataclass(frozen=True)
class Quoted:
    """A row of a paper: see results.yaml."""

    method: str
    data: str
    epsilon: float
    accuracy: float
    source: str
    delta: float | None = None
    note: str = ""


Stored = Mapping[str, Any]


def read_table(path: Path) -> tuple[list[Row], list[Quoted]]:
    """The rows, ours and quoted.

    Raises:
        ValueError: A row has a field that there is none of, or lacks one.
    """
    table = jsonargparse.get_loader("yaml")(path.read_text(encoding="utf-8"))

    def read(kind: type, entry: dict[str, Any]) -> Any:
        known = [known.name for known in fields(kind)]
        if unknown := entry.keys() - set(known):
            raise ValueError(f"{path}: {entry} has the unknown field {min(unknown)}; there are {', '.join(known)}.")
        try:
            return kind(**entry)
        except TypeError as error:
            raise ValueError(f"{path}: {entry}: {error}") from error

    ours = [read(Row, {**row, "arguments": [str(a) for a in row.get("arguments", [])]}) for row in table["rows"]]
    return ours, [read(Quoted, row) for row in table.get("quoted", [])]


def read_store(path: Path) -> list[Stored]:
    """The stored runs, in the order of storing.

    Raises:
        ValueError: A line is no JSON object, or lacks a field.
    """
    store = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            stored = json.loads(line)
            if lacking := set(FIELDS) - stored.keys():
                raise ValueError(f"no {', '.join(sorted(lacking))}")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        store.append(stored)
    return store


def append(path: Path, stored: Stored) -> None:
    """Adds a run to the store, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(stored, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def results_of(row: Row, store: Sequence[Stored]) -> dict[int, Stored]:
    """The stored runs of a row by seed, the last of each."""
    mine = [s for s in store if (s["recipe"], s["arguments"]) == (row.recipe, row.arguments)]
    return {s["seed"]: s for s in mine if s["seed"] in row.seeds}


def missing(rows: Sequence[Row], store: Sequence[Stored], redo: bool = False) -> list[tuple[Row, int]]:
    """Rows and seeds to run: those without a stored run, or all."""
    return [(row, seed) for row in rows for seed in row.seeds if redo or seed not in results_of(row, store)]


def fingerprint(recipe: Path) -> str:
    """Tells a recipe's model, data and training from others', whatever it logs and prints."""
    composed = read_recipe(recipe)
    silent = ("logger", "log_every_n_steps", "enable_model_summary", "enable_progress_bar")
    trainer = {key: value for key, value in composed.get("trainer", {}).items() if key not in silent}
    text = json.dumps({**composed, "trainer": trainer}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(row: Row, seed: int, device_arguments: Sequence[str]) -> Stored:
    """Runs a recipe once."""
    recipe = find_recipe(row.recipe)
    done = run(str(recipe), seed, [*row.arguments, *device_arguments])
    card = _json(done.folder / "privacy_card.json") if done.folder else {}
    return {
        "recipe": row.recipe,
        "arguments": row.arguments,
        "seed": seed,
        "device_arguments": list(device_arguments),
        "test_accuracy": done.accuracy,
        "epsilon": done.epsilon if math.isfinite(done.epsilon) else "inf",
        "delta": done.delta,
        "steps": done.steps,
        "seconds": round(done.seconds, 1),
        "hardware": _hardware(done.folder),
        "software": card.get("software", {}),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "configuration": fingerprint(recipe),
        "card": {key: card[part][key] for part, key in CARD_FIELDS if part in card},
    }


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _hardware(folder: Path | None) -> str:
    """Of the accelerator that the run's saved configuration names."""
    import torch

    saved = folder / "config.yaml" if folder else None
    trainer = jsonargparse.get_loader("yaml")(saved.read_text())["trainer"] if saved and saved.exists() else {}
    if trainer.get("accelerator", "cpu") != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", "lightning_dp", "recipes")
        return git("rev-parse", "--short", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# -- the report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """A row with its stored runs: accuracies in per cent."""

    row: Row
    runs: list[Stored]

    @property
    def epsilon(self) -> float:
        return max(float(stored["epsilon"]) for stored in self.runs)

    @property
    def accuracy(self) -> tuple[float, float]:
        return interval([100 * stored["test_accuracy"] for stored in self.runs])

    @property
    def last(self) -> Stored:
        return self.runs[-1]


def gather(rows: Sequence[Row], store: Sequence[Stored]) -> list[Figures]:
    """The rows that have stored runs."""
    found = [(row, results_of(row, store)) for row in rows]
    return [Figures(row, [runs[seed] for seed in sorted(runs)]) for row, runs in found if runs]


def verdict(row: Row, mean: float) -> str:
    """Whether a goal of ours, or a paper's figure, was met, and by how much it was missed."""
    if row.target is None:
        return "–"
    whose = f" ({row.compared_with})" if row.compared_with else " (our goal)"
    short = row.target - mean
    return f"{row.target:g} %{whose}: " + (f"missed by {short:.2f}" if short > 0 else f"met, {-short:.2f} above")


def rounded_up(epsilon: float | str) -> str:
    """Rounded up: what is shown is true."""
    return f"{math.ceil(1e3 * float(epsilon)) / 1e3:g}" if math.isfinite(float(epsilon)) else "∞"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for line in body:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
    yield ""


def _our_line(figures: Figures) -> list[str]:
    row, runs = figures.row, figures.runs
    mean, half = figures.accuracy
    names = sorted({stored["hardware"] for stored in runs})
    seconds = [stored["seconds"] for stored in runs]
    notes = [row.note] if row.note else []
    recipe = find_recipe(row.recipe)
    if any(stored.get("configuration", fingerprint(recipe)) != fingerprint(recipe) for stored in runs):
        notes.append("the recipe has changed since")
    if len(runs) < len(row.seeds):
        notes.append(f"{len(row.seeds) - len(runs)} more to run")
    accuracy = f"{mean:.2f} % ± {half:.2f}" if len(runs) > 1 else f"{mean:.2f} %"
    return [
        f"`{row.recipe}`" + (f" ({'; '.join(notes)})" if notes else ""),
        rounded_up(figures.epsilon),
        accuracy,
        str(len(runs)),
        verdict(row, mean),
        str(max(stored["steps"] for stored in runs) or "not private"),
        _duration(sum(seconds) / len(seconds)),
        ", ".join(names),
        f"`{row.command}`",
    ]


def _quoted_line(quoted: Quoted) -> list[str]:
    delta = "" if quoted.delta is None else f"δ = {quoted.delta:g}"
    about = "; ".join(part for part in (quoted.source, delta, quoted.note) if part)
    what = f"*quoted*: {quoted.method} ({about})"
    return [what, f"{quoted.epsilon:g}", f"{quoted.accuracy:g} %", "–", "–", "–", "–", "–", "–"]


def _call(described: Mapping[str, Any] | None) -> str:
    if not described:
        return "none"
    inner = ", ".join(
        f"{key}={_call(value) if isinstance(value, Mapping) else f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in described.items()
        if key != "class"
    )
    return f"{described.get('class', '')}({inner})"


def _privacy_line(figures: Figures) -> list[str]:
    card = figures.last.get("card", {})
    assumptions = (("poisson_sampling", "rdp"), ("sampling_not_trusted", "pld"))
    return [
        f"`{figures.row.recipe}`",
        rounded_up(figures.epsilon),
        f"{figures.last['delta']:g}",
        *(rounded_up(card[key][accountant]) if key in card else "–" for key, accountant in assumptions),
        _call(card["clipping"]) if "clipping" in card else "–",
        _call(card["noise"]) if "noise" in card else "–",
        f"{card['sampling_rate']:.4g}" if "sampling_rate" in card else "–",
        str(card.get("num_records", "–")),
        f"{card.get('trainable_parameters', '–')}",
        f"{figures.last['date']}, {figures.last['commit'] or 'no commit'}",
    ]


#: How the data sets are called.
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "digits": "Digits (scikit-learn)", "adult": "Adult", "sst2": "SST-2"}

_INTRODUCTION = """\
# Results

Written by `make results` from `docs/results.jsonl` (every run, one a line) and `benchmarks/results.yaml`.

Accuracy is the mean on the test set over seeds of the initial weights, with a 95 % interval (Student's t); sampling and
noise are fresh secrets in every run. ε is for adding or removing one record, by privacy loss distributions where the
noise is Gaussian and by Rényi divergences where it is not, and covers one training: the search for a recipe's settings
is not in it. *Quoted* rows are other people's figures, from the source that is named; nothing of them was run here.
Goals of ours are called that.

**Which recipes saw the test set before their last setting**: `mnist/scatternet` (ε = 8, once), `cifar10/patches` (both
ε, once), `mnist/encoding` (one trial) and `cifar10/encoding` (four), and SST-2's comparison without privacy. All other
settings were chosen on records held out of the train set.

![accuracy against ε](images/results.png)
"""


def report(rows: Sequence[Row], quoted: Sequence[Quoted], store: Sequence[Stored]) -> str:
    """The text of docs/results.md."""
    lines = [_INTRODUCTION]
    all_figures = gather(rows, store)
    for data in _data_sets(rows, quoted):
        mine = [figures for figures in all_figures if figures.row.data == data]
        theirs = [row for row in quoted if row.data == data]
        body = [(figures.epsilon, 0, _our_line(figures)) for figures in mine]
        body += [(row.epsilon, 1, _quoted_line(row)) for row in theirs]
        lines += [f"## {TITLES.get(data, data)}", ""]
        head = [
            "recipe",
            "ε",
            "test accuracy",
            "seeds",
            "goal, or a paper's figure",
            "private steps",
            "time a run",
            "hardware",
            "command",
        ]
        lines += _markdown(head, [line for *_, line in sorted(body, key=lambda entry: entry[:2])]) if body else []
        if mine:
            lines += ["From the privacy cards (of the last seed):", ""]
            head = [
                "recipe",
                "ε",
                "δ",
                "ε by Rényi divergences",
                "ε if sampling is not trusted",
                "clipping",
                "noise",
                "q",
                "N",
            ]
            privacy = sorted((f for f in mine if math.isfinite(f.epsilon)), key=lambda figures: figures.epsilon)
            lines += _markdown([*head, "parameters", "date, commit"], [_privacy_line(figures) for figures in privacy])
        waiting = [row for row in rows if row.data == data and not results_of(row, store)]
        if waiting:
            lines += [
                "Not run yet: " + ", ".join(f"`{shlex.join([r.recipe, *r.arguments])}`" for r in waiting) + ".",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def _data_sets(rows: Sequence[Row], quoted: Sequence[Quoted]) -> list[str]:
    return list(dict.fromkeys([*(row.data for row in rows), *(row.data for row in quoted)]))


def draw(rows: Sequence[Row], quoted: Sequence[Quoted], store: Sequence[Stored]) -> Any:
    """A panel a data set: our accuracy against ε with intervals, and what is quoted as hollow markers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    all_figures = gather(rows, store)
    known = {figures.row.data for figures in all_figures} | {row.data for row in quoted}
    shown = [data for data in _data_sets(rows, quoted) if data in known]
    columns = max(1, min(3, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(5.5 * columns, 5.6 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in panels[len(shown) :]:
        unused.set_axis_off()
    for axes, data in zip(panels, shown, strict=False):
        mine = [figures for figures in all_figures if figures.row.data == data]
        theirs = [row for row in quoted if row.data == data]
        for figures in (f for f in mine if not math.isfinite(f.epsilon)):
            axes.axhline(figures.accuracy[0], linestyle=":", color="grey", label=f"{figures.row.recipe}, not private")
        mine = [figures for figures in mine if math.isfinite(figures.epsilon)]
        for number, recipe in enumerate(dict.fromkeys(figures.row.recipe for figures in mine)):
            points = sorted((f.epsilon, *f.accuracy) for f in mine if f.row.recipe == recipe)
            epsilons, means, halves = zip(*points, strict=True)
            axes.errorbar(epsilons, means, halves, marker="o", capsize=3, color=f"C{number % 10}", label=recipe)
        for number, source in enumerate(dict.fromkeys(row.source for row in theirs)):
            points = [(row.epsilon, row.accuracy) for row in theirs if row.source == source]
            axes.plot(*zip(*points, strict=True), "sD^vP*X"[number % 7], markerfacecolor="none", color="grey",
                      label=f"quoted: {source}")  # fmt: skip
        ticks = sorted({round(e, 2) for e in [*(f.epsilon for f in mine), *(row.epsilon for row in theirs)]})
        axes.set_xscale("log")
        apart = [e for number, e in enumerate(ticks) if not number or e > 1.15 * ticks[number - 1]]
        axes.set_xticks(apart, [f"{e:g}" for e in apart])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="ε (adding or removing one record)", ylabel="test accuracy (%)", title=TITLES.get(data, data))
        axes.grid(alpha=0.3)
        if ticks:
            axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    return figure


def write_report(rows: Sequence[Row], quoted: Sequence[Quoted], store: Sequence[Stored], folder: Path) -> None:
    """``results.md`` and ``images/results.png``."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(report(rows, quoted, store), encoding="utf-8")
    draw(rows, quoted, store).savefig(folder / "images" / "results.png", dpi=120)
    print(f"written to {folder / 'results.md'} and {folder / 'images' / 'results.png'}")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="recipes to run, e.g. mnist/dp_sgd or 'mnist/*'; none: write the report only")
    parser.add_argument("--redo", action="store_true", help="run also what has a stored result")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "results.yaml", help="the rows")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of results.jsonl and of the report")
    options = parser.parse_args(arguments[:cut])
    rows, quoted = read_table(options.table)
    chosen = [row for row in rows if options.only is None or fnmatch(row.recipe, options.only)]
    if not chosen and options.only != "none":
        parser.error(f"--only {options.only}: there are {', '.join(dict.fromkeys(row.recipe for row in rows))}")
    path = options.out / "results.jsonl"
    work = missing(chosen, read_store(path), options.redo)
    failed = False
    try:
        for number, (row, seed) in enumerate(work, 1):
            print(f"{number} of {len(work)}: {shlex.join([row.recipe, *row.arguments])}, seed {seed} …", flush=True)
            try:
                append(path, measure(row, seed, arguments[cut + 1 :]))
            except (RuntimeError, ValueError) as error:  # the others may do better
                failed = True
                print(error, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        failed = True
        print("interrupted: what was done is stored", file=sys.stderr)
    write_report(rows, quoted, read_store(path), options.out)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
