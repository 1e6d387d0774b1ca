"""What dashboards get beyond plain metrics: configuration, summary, charts and files, through Lightning's loggers.

Every function takes the Trainer's loggers and does for each what it supports. Loggers are recognised by Lightning's
classes; ``wandb`` is imported only where a `WandbLogger` is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

#: The metric that others are drawn against.
EPSILON = "privacy/epsilon"


class UtilityChart:
    """Validation metrics as functions of ε, gathered while training runs."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[tuple[float, float]]] = {}

    def add(self, epsilon: float, metrics: Mapping[str, float]) -> None:
        """Notes the metrics of a model that has cost this ε."""
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append((epsilon, value))


@rank_zero_only
def begin(loggers: Iterable[Logger], configuration: Mapping[str, Any]) -> None:
    """States the private training's parameters, and lets metrics be drawn against ε.

    Weights & Biases: ``define_metric`` makes ``privacy/epsilon`` the axis of all ``privacy_utility/…`` (see `utility`),
    and the parameters stand under ``privacy`` in the run's configuration. MLflow and CSV: as hyper-parameters
    ``privacy/…``.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update({"privacy": dict(configuration)}, allow_val_change=True)
            logger.experiment.define_metric(EPSILON)
            logger.experiment.define_metric("privacy_utility/*", step_metric=EPSILON)
        elif not isinstance(logger, TensorBoardLogger):  # it takes hyper-parameters only once: the model's
            try:
                logger.log_hyperparams({f"privacy/{name}": value for name, value in configuration.items()})
            except Exception as error:  # MLflow refuses to change what an earlier fit of the same run has stated
                rank_zero_warn(f"{type(logger).__name__} did not take the private training's parameters: {error}")


@rank_zero_only
def utility(loggers: Iterable[Logger], step: int, epsilon: float, metrics: Mapping[str, float]) -> None:
    """Logs validation metrics beside the ε of the model that was validated.

    Weights & Biases: as ``privacy_utility/…``, drawn against ε; the metrics themselves keep the axis that they had.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            values = {f"privacy_utility/{name}": value for name, value in metrics.items()}
            logger.experiment.log({**values, EPSILON: epsilon, "trainer/global_step": step})


@rank_zero_only
def finish(loggers: Iterable[Logger], metrics: Mapping[str, float], chart: UtilityChart | None) -> None:
    """Puts the final values into the run's summary, and validation metrics against ε into charts (Weights & Biases).

    Args:
        loggers: The Trainer's.
        metrics: Final values, ``privacy/…``.
        chart: The validation metrics of the fit.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _finish_wandb(logger, metrics, chart)


def _finish_wandb(logger: WandbLogger, metrics: Mapping[str, float], chart: UtilityChart | None) -> None:
    import wandb

    run = logger.experiment
    for name, points in (chart.metrics if chart else {}).items():
        if len(points) > 1:
            table = wandb.Table(columns=["epsilon", name], data=[list(point) for point in points])
            title = f"{name} against ε"
            run.log({f"privacy_utility_chart/{name}": wandb.plot.line(table, "epsilon", name, title=title)})
    run.summary.update(dict(metrics))


@rank_zero_only
def log_card(loggers: Iterable[Logger], path: str | Path) -> None:
    """Stores a privacy card with the run: an artifact (Weights & Biases, MLflow) or a text (TensorBoard).

    Loggers that write into a folder, such as CSVLogger, have the card beside the checkpoint already.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no privacy card at {path}.")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(f"privacy-card-{logger.experiment.id}", type="privacy-card")
            artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path))
        elif isinstance(logger, TensorBoardLogger):
            text = path.read_text(encoding="utf-8")
            logger.experiment.add_text(
                f"privacy_card/{path.name}", text if path.suffix == ".md" else f"```\n{text}\n```"
            )
