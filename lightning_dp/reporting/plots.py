"""Accuracy against ε, of several runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_dp.reporting.logs import EPSILON, RunLog, missing_package


def accuracy_metric(runs: Iterable[RunLog]) -> str | None:
    """The metric to draw against ε when none is named: an accuracy of validation, else of test, else any accuracy."""
    names = sorted({name for run in runs for name in run.metrics if "acc" in name.lower()})
    for start in ("val", "test", ""):
        if matching := [name for name in names if name.startswith(start)]:
            return matching[0]
    return None


def draw(runs: Sequence[RunLog], metric: str | None = None) -> Any:
    """A figure with ε against steps and, where there is a metric, the metric against ε.

    Args:
        runs: At least one of them with ``privacy/epsilon``.
        metric: Name of the metric; ``None`` for an accuracy, if one was logged.

    Returns:
        A matplotlib ``Figure``. Runs without ``privacy/epsilon`` are left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No run has ``privacy/epsilon``, or none has the metric that was named.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("matplotlib", "plots", "plot") from error
    private = [run for run in runs if EPSILON in run.metrics]
    if not private:
        raise ValueError(f"No {EPSILON} in {', '.join(run.name for run in runs)}: add PrivacyMonitor, or a logger.")
    if metric is not None and not any(metric in run.metrics for run in private):
        known = sorted({name for run in private for name in run.metrics})
        raise ValueError(f"No metric {metric!r} in these runs; there are: {', '.join(known)}")
    metric = metric or accuracy_metric(private)
    figure = Figure(figsize=(11 if metric else 5.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if metric else 1, squeeze=False)[0]
    for number, run in enumerate(private):
        style = {"label": run.name, "color": f"C{number % 10}"}
        points = sorted(run.metrics[EPSILON])
        axes[0].plot([step + 1 for step, _ in points], [value for _, value in points], **style)
        if metric and (pairs := run.against_epsilon(metric)):
            axes[1].plot([pair[0] for pair in pairs], [pair[1] for pair in pairs], marker=".", **style)
    axes[0].set(xlabel="private steps", ylabel="ε", title="Privacy spent")
    if metric:
        axes[1].set(xlabel="ε", ylabel=metric, title="Utility against privacy")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.margins(x=0.02)
    axes[-1].legend(fontsize="small")
    return figure
