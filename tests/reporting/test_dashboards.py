"""What the loggers' own files hold after a fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_dp import FlatClipping, GaussianNoise, PrivacyBudget, PrivacyMonitor, PrivateStrategy, epsilon
from lightning_dp.reporting import dashboards
from lightning_dp.reporting.dashboards import log_card
from lightning_dp.reporting.logs import RunLog, read_run
from tests.conftest import Net, fit, loader, trainer
from tests.wandb_files import wandb_records as read_wandb_records

DELTA = 1e-3
NAMES = {"privacy/epsilon", "privacy/delta", "privacy/noise_multiplier", "privacy/budget_spent"}


class Validated(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        outputs = self.net(inputs)
        self.log("val_accuracy", (outputs.argmax(1) == labels).float().mean())
        self.log("val_loss", F.cross_entropy(outputs, labels))


def train(loggers: list[Logger], epochs: int = 3) -> float:
    """ε of a fit of five steps an epoch, logged every second step."""
    torch.manual_seed(0)
    run = trainer(
        strategy=PrivateStrategy(FlatClipping(1.0), GaussianNoise(2.0)),
        max_epochs=epochs,
        logger=loggers,
        log_every_n_steps=2,
        callbacks=[PrivacyBudget(50.0, DELTA), PrivacyMonitor(DELTA)],
    )
    fit(run, Validated(), loader(), loader(16))
    return float(run.strategy.ledger.epsilon(DELTA))


def wandb_records(folder: Path) -> list[Any]:
    """Everything in a run's own file."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.rglob("run-*.wandb")
    records = []
    for data in read_wandb_records(path):
        records.append(wandb_internal_pb2.Record())
        records[-1].ParseFromString(data)
    return records


def test_a_wandb_run_holds_metrics_axis_configuration_summary_chart_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="private")
    spent = train([logger])
    card = tmp_path / "privacy_card.md"
    card.write_text("# Privacy card\n")
    log_card([logger], card)
    wandb.finish()
    wandb.teardown()  # returns when everything is on disk

    records = wandb_records(tmp_path)
    of = {kind: [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]
          for kind in ("history", "metric", "config", "summary", "artifact", "request")}  # fmt: skip
    logged = {item.key or "/".join(item.nested_key) for history in of["history"] for item in history.item}
    assert logged >= NAMES | {"privacy/signal_to_noise", "val_accuracy"}
    assert not [name for name in logged if name.startswith("not_private")]

    axes = {metric.name or metric.glob_name: metric.step_metric for metric in of["metric"]}
    assert axes["privacy_utility/*"] == "privacy/epsilon"
    assert "privacy_utility/val_accuracy" in logged
    assert "privacy_utility_chart/val_accuracy_table/path" in logged

    config = {item.key: json.loads(item.value_json) for update in of["config"] for item in update.update}
    assert config["privacy"]["target_epsilon"] == 50.0
    assert config["privacy"]["sampling_rate"] == 0.2
    assert config["privacy"]["clipping"] == "FlatClipping(max_norm=1.0)"

    summary: dict[str, Any] = {}
    for update in of["summary"]:
        summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update.update}
    assert summary["privacy/epsilon"] == pytest.approx(spent, rel=1e-6)
    assert summary["privacy/steps"] == 15

    files = [entry.path for artifact in of["artifact"] if artifact.type == "privacy-card"
             for entry in artifact.manifest.contents]  # fmt: skip
    assert files == ["privacy_card.md"]


def wandb_run(folder: Path) -> RunLog:
    """The metrics in a run's own file."""
    run = RunLog(str(folder))
    for record in wandb_records(folder):
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in values.items():
            if isinstance(value, int | float) and "trainer/global_step" in values:
                run.add(name, int(values["trainer/global_step"]), float(value))
    return run


@pytest.mark.parametrize("make", [
    lambda folder: CSVLogger(folder),
    lambda folder: TensorBoardLogger(folder),
    lambda folder: WandbLogger(save_dir=str(folder), offline=True),
], ids=["csv", "tensorboard", "wandb"])  # fmt: skip
def test_the_logged_epsilon_is_that_of_the_steps_taken(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = make(tmp_path)
    spent = train([logger])
    if isinstance(logger, WandbLogger):
        import wandb

        wandb.finish()
        wandb.teardown()  # returns when everything is on disk
    run = read_run(tmp_path) if not isinstance(logger, WandbLogger) else wandb_run(tmp_path)
    assert run.metrics.keys() >= NAMES
    shown = run.metrics["privacy/epsilon"]
    for step, value in shown:
        exact = epsilon(noise_multiplier=2.0, sampling_rate=0.2, steps=step + 1, delta=DELTA)
        assert exact * (1 - 1e-6) <= value <= 1.01 * exact
    assert shown[-1] == (14, pytest.approx(spent, rel=1e-6)), "the last value is not the exact one"
    assert [pair[0] for pair in run.against_epsilon("val_accuracy")] == sorted(
        pair[0] for pair in run.against_epsilon("val_accuracy")
    )


def test_tensorboard_shows_the_card_as_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    card = tmp_path / "privacy_card.md"
    card.write_text("# Privacy card of this run\n")
    log_card([logger], card)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    [tag] = [tag for tag in events.Tags()["tensors"] if "privacy_card" in tag]
    assert b"Privacy card of this run" in events.Tensors(tag)[0].tensor_proto.string_val[0]


def test_mlflow_gets_metrics_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the store that mlflow-skinny has without a server
    store = f"file:{tmp_path}/mlruns"
    logger = MLFlowLogger(tracking_uri=store, artifact_location=str(tmp_path / "artifacts"))
    spent = train([logger])
    card = tmp_path / "privacy_card.md"
    card.write_text("# Privacy card\n")
    log_card([logger], card)
    stored = mlflow.tracking.MlflowClient(store).get_run(logger.run_id).data
    assert stored.metrics["privacy/epsilon"] == pytest.approx(spent, rel=1e-6)
    assert stored.params["privacy/target_epsilon"] == "50.0"
    assert list((tmp_path / "artifacts").rglob("privacy_card.md"))


def test_a_logger_that_refuses_changed_parameters_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strict(CSVLogger):
        def log_hyperparams(self, params: Any = None) -> None:
            raise ValueError("Changing param values is not allowed.")

    said: list[str] = []
    monkeypatch.setattr(dashboards, "rank_zero_warn", said.append)
    assert train([Strict(tmp_path)], epochs=1) > 0
    assert len(said) == 1 and "Changing param values" in said[0]


def test_a_missing_card_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no privacy card at"):
        log_card([], tmp_path / "absent.md")
