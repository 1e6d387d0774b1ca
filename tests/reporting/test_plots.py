from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_dp.cli.command import main
from lightning_dp.reporting.logs import RunLog, read_run
from lightning_dp.reporting.plots import accuracy_metric, draw


def write_csv(folder: Path, slope: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    lines = ["epoch,privacy/epsilon,step,val_accuracy"]
    for step in range(0, 50, 10):
        lines += [f"0,{slope * (step + 1) ** 0.5},{step},", f"0,,{step + 5},{0.5 + step / 100}"]
    path = folder / "metrics.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_run_that_was_resumed_in_its_folder_is_read_whole(tmp_path: Path) -> None:
    for steps in ((0, 1), (2, 3)):  # an event file each
        logger = TensorBoardLogger(tmp_path, name="run", version=0)
        for step in steps:
            logger.log_metrics({"privacy/epsilon": float(step)}, step)
        logger.finalize("success")
    assert len(list(tmp_path.rglob("*tfevents*"))) == 2
    assert sorted(read_run(tmp_path).metrics["privacy/epsilon"]) == [(step, float(step)) for step in range(4)]


def test_a_metric_is_paired_with_the_epsilon_of_its_step(tmp_path: Path) -> None:
    run = read_run(write_csv(tmp_path / "run").parent)
    pairs = run.against_epsilon("val_accuracy")
    assert pairs == [((step + 1) ** 0.5, 0.5 + step / 100) for step in range(0, 50, 10)]
    assert run.against_epsilon("absent") == []
    assert RunLog("empty", {"acc": [(0, 1.0)]}).against_epsilon("acc") == []


def test_plot_writes_png_and_svg_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "one")
    write_csv(tmp_path / "two", 2.0)
    main(["plot", str(tmp_path / "one"), str(tmp_path / "two" / "metrics.csv"), "--names", "small", "large",
          "--out", str(tmp_path / "figures" / "v1.5")])  # fmt: skip
    png, svg = (tmp_path / "figures" / f"v1.5{end}" for end in (".png", ".svg"))
    assert capsys.readouterr().out.split() == [str(png), str(svg)]
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_the_figure_shows_every_run_in_both_panels(tmp_path: Path) -> None:
    runs = [read_run(write_csv(tmp_path / name)) for name in ("one", "two")]
    left, right = draw(runs).axes
    assert len(left.lines) == len(right.lines) == 2
    assert (left.get_ylabel(), right.get_xlabel(), right.get_ylabel()) == ("ε", "ε", "val_accuracy")
    assert left.lines[0].get_xdata()[0] == 1, "the first step is the first, not the zeroth"
    for run in runs:
        del run.metrics["val_accuracy"]
    assert len(draw(runs).axes) == 1


def test_validation_accuracy_is_preferred() -> None:
    values = [(0, 0.5)]
    assert accuracy_metric([RunLog("a", {"test_acc": values, "val_acc": values, "loss": values})]) == "val_acc"
    assert accuracy_metric([RunLog("a", {"loss": values})]) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: [folder / "absent"], "There is no"),
        (lambda folder: [folder], "holds no metrics.csv"),
        (lambda folder: [write_csv(folder / "a").parent, write_csv(folder / "b").parent, "--metric", "f1"],
         "No metric 'f1'.*val_accuracy"),
        (lambda folder: [write_csv(folder / "a" / "x").parents[1], write_csv(folder / "a" / "y").parents[1]],
         "logs of 2 runs"),
        (lambda folder: [write_csv(folder / "a"), "--names", "p", "q"], "2 names for 1 runs"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_that_says_what(make, says: str, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    import re

    with pytest.raises(SystemExit):
        main(["plot", *map(str, make(tmp_path)), "--out", str(tmp_path / "out")])
    assert re.search(says, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out.png").exists()


def test_runs_without_epsilon_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,val_accuracy\n0,1,0.5\n")
    with pytest.raises(ValueError, match="No privacy/epsilon.*PrivacyMonitor"):
        draw([read_run(path)])
