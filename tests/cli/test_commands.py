from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lightning_dp
from lightning_dp import calibrate_noise, epsilon
from lightning_dp.accounting.calibration import calibrate_steps
from lightning_dp.cli.command import COMMANDS, main


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    main([*arguments, "--delta", "1e-5", "--json"])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return found


def test_epsilon_prints_every_combination(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "epsilon", "--noise-multiplier", "2", "4", "--sampling-rate", "0.1", "--steps", "10", "20")
    assert [(row["noise_multiplier"], row["steps"]) for row in found] == [(2, 10), (2, 20), (4, 10), (4, 20)]
    for row in found:
        assert row["epsilon"] == epsilon(
            noise_multiplier=row["noise_multiplier"], sampling_rate=0.1, steps=row["steps"], delta=1e-5
        )


def test_dataset_size_and_epochs_stand_for_rate_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    [row] = rows(capsys, "epsilon", "--noise-multiplier", "4", "--dataset-size", "1000", "--batch-size", "100",
                 "--epochs", "2", "--accountant", "rdp", "--adjacency", "replace_one")  # fmt: skip
    assert (row["sampling_rate"], row["steps"]) == (0.1, 20)
    expected = epsilon(noise_multiplier=4, sampling_rate=0.1, steps=20, delta=1e-5, accountant="rdp",
                       adjacency="replace_one")  # fmt: skip
    assert row["epsilon"] == expected


def test_calibrate_finds_noise_or_steps(capsys: pytest.CaptureFixture[str]) -> None:
    [row] = rows(capsys, "calibrate", "--epsilon", "2", "--sampling-rate", "0.1", "--steps", "50")
    assert row["noise_multiplier"] == calibrate_noise(epsilon=2, delta=1e-5, sampling_rate=0.1, steps=50)
    assert 1.99 < row["epsilon"] <= 2
    [row] = rows(capsys, "calibrate", "--epsilon", "2", "--sampling-rate", "0.1", "--noise-multiplier", "3")
    assert row["steps"] == calibrate_steps(epsilon=2, delta=1e-5, sampling_rate=0.1, noise_multiplier=3)
    assert row["epsilon"] <= 2


def test_the_table_states_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    main(["epsilon", "--noise-multiplier", "0", "4", "--sampling-rate", "0.1", "--steps", "1", "--delta", "1e-5"])
    head, names, without, _ = capsys.readouterr().out.splitlines()
    assert head == "δ = 1e-05, adding or removing one record, Poisson sampling, accountant pld"
    assert names.split() == ["noise_multiplier", "sampling_rate", "steps", "epsilon"]
    assert without.split()[-1] == "inf"


def test_infinity_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    [row] = rows(capsys, "epsilon", "--noise-multiplier", "0", "--sampling-rate", "0.1", "--steps", "1")
    assert row["epsilon"] == "inf"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.1"], "either --steps or --epochs"),
        (["epsilon", "--noise-multiplier", "1", "--steps", "3"], "either --sampling-rate"),
        (["epsilon", "--noise-multiplier", "1", "--batch-size", "3", "--steps", "3"], "needs --dataset-size"),
        (["epsilon", "--noise-multiplier", "1", "--batch-size", "30", "--dataset-size", "20", "--steps", "3"],
         "between 0 and the dataset size"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0", "--epochs", "3"], "--sampling-rate must lie"),
        (["epsilon", "--noise-multiplier", "-1", "--sampling-rate", "0.1", "--steps", "3"], "noise_multiplier must"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.1", "--steps", "-3"], "must not be negative"),
        (["calibrate", "--epsilon", "-1", "--sampling-rate", "0.1", "--steps", "3"], "epsilon must be positive"),
        (["calibrate", "--epsilon", "1", "--sampling-rate", "0.1", "--steps", "3", "--noise-multiplier", "1"],
         "leave out --steps"),
    ],
)  # fmt: skip
def test_bad_arguments_are_errors_that_name_them(arguments: list[str], says: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--delta", "1e-5"])
    assert says in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "epsilon", "calibrate", "plot"):
        assert command in text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-dp {lightning_dp.__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("fitt", "fit"), ("epsilo", "epsilon"), ("foo", "")])
def test_an_unknown_command_is_met_with_all_that_there_are(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([typed])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("fit", "validate", "test", "predict", *COMMANDS))
    assert (f"did you mean {meant}?" in said) == bool(meant)


def test_check_says_what_a_recipe_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    digits = str(Path(__file__).parents[2] / "recipes" / "digits" / "dp_sgd.yaml")
    main(["check", "--config", digits, "--json", "--trainer.max_epochs", "1"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["plan"]["steps"] == 6
    with pytest.raises(SystemExit, match="1"):
        main(["check", "--config", digits, "--trainer.overfit_batches", "2", "--trainer.max_epochs", "1"])
