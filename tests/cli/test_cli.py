"""The command and the recipes, as a user runs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_dp.cli.command import main
from lightning_dp.recipes import read_recipe, shipped_recipes
from tests.zoo.test_tables import records
from tests.zoo.test_tables import write as write_table
from tests.zoo.test_text import write as write_texts

ROOT = Path(__file__).parents[2]
RECIPES = list(shipped_recipes().values())
DIGITS = str(ROOT / "recipes" / "digits" / "dp_sgd.yaml")


def recipe_id(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture
def tiny_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data sets in the hub's layout, with random contents."""
    from datasets import Dataset, Features, Image, Value

    generator = np.random.default_rng(0)
    for name, column, shape in (("mnist", "image", (28, 28)), ("cifar10", "img", (32, 32, 3))):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for split, size in (("train", 64), ("test", 16)):
            rows = {
                column: list(generator.integers(0, 256, (size, *shape), dtype=np.uint8)),
                "label": generator.integers(0, 10, size).tolist(),
            }
            features = Features({column: Image(), "label": Value("int64")})
            Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    write_table(tmp_path / "data", records(80))
    write_texts(tmp_path / "data")
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: One recipe a data set runs with every change; `test_recipes` parses all of them.
QUICK = (
    "digits/dp_sgd",
    "mnist/scatternet",
    "mnist/dp_sgd",
    "adult/dp_sgd",
    "sst2/embedding_bag",
)


def cases() -> list[Any]:
    slow = {path: () if recipe_id(path) in QUICK else (pytest.mark.slow,) for path in RECIPES}
    return [pytest.param(path, id=recipe_id(path), marks=marks) for path, marks in slow.items()]


@pytest.mark.parametrize("recipe", cases())
def test_every_recipe_runs(recipe: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1", "--data.init_args.batch_size", "16",
          "--trainer.enable_progress_bar", "false", "--trainer.limit_train_batches", "2"])  # fmt: skip
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(
        r"test_accuracy = [01]\.\d+; ε = \d+\.\d+ at δ = [\d.e-]+ \(adding or removing one record, 2 private", last
    )
    checkpoint = re.search(r"checkpoint (.*\.ckpt)", last)
    assert checkpoint is not None
    assert Path(checkpoint.group(1)).is_file()
    assert "logs in runs/" in last


def test_fit_then_resume_validate_test_and_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["--config", DIGITS, "--trainer.enable_progress_bar", "false"]
    main(["fit", *quiet, "--trainer.max_epochs", "2"])
    [checkpoint] = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["lightning_dp"]["ledger"]["runs"][0]["steps"][0]["count"] == 12
    main(["fit", *quiet, "--trainer.max_epochs", "3", "--ckpt_path", str(checkpoint)])
    out = capsys.readouterr().out
    assert "18 private steps" in out
    main(["test", *quiet, "--ckpt_path", str(checkpoint)])
    assert "test_accuracy" in capsys.readouterr().out
    main(["predict", *quiet, "--ckpt_path", str(checkpoint)])


def test_the_strategy_can_be_configured_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = read_recipe(Path(DIGITS))
    noise = {"class_path": "lightning_dp.GaussianNoise", "init_args": {"multiplier": 2.0}}
    clipping = {"class_path": "lightning_dp.FlatClipping", "init_args": {"max_norm": 0.5}}
    config["trainer"] |= {
        "strategy": {"class_path": "lightning_dp.PrivateStrategy", "init_args": {"noise": noise, "clipping": clipping}},
        "callbacks": [{"class_path": "lightning_dp.PrivacyMonitor", "init_args": {"delta": 1e-4}}],
        "max_steps": 3,
        "enable_progress_bar": False,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "mine.yaml"])
    assert "3 private steps" in capsys.readouterr().out


def test_training_without_privacy_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = read_recipe(Path(DIGITS))
    config["trainer"] |= {"callbacks": [], "max_epochs": 1, "enable_progress_bar": False}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "plain.yaml"])
    assert "NOT PRIVATE" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trainer.callbacks.init_args.epsilom", "3"], "epsilom"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--model.init_args.learning_rate", "fast"], "learning_rate"),
    ],
)
def test_bad_configuration_is_an_error_that_names_the_key(arguments: list[str], says: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", DIGITS, *arguments])
    assert says in capsys.readouterr().err


def test_a_missing_data_folder_is_named(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tiny_data))
    with pytest.raises(FileNotFoundError, match="no folder 'mnist'"):
        main(["fit", "--config", str(ROOT / "recipes" / "mnist" / "dp_sgd.yaml")])


def test_a_refusal_is_a_sentence_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(Path(__file__).parents[2] / "recipes" / "digits" / "dp_sgd.yaml")
    monkeypatch.setattr("sys.argv", ["lightning-dp", "fit", "--config", recipe, "--trainer.overfit_batches", "2"])
    with pytest.raises(SystemExit, match="^lightning-dp: overfit_batches repeats the same batches"):
        main()
