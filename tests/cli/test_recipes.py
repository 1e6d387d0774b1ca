"""How recipes are listed and copied, and that the shipped ones say what they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_dp import recipes
from lightning_dp.cli.command import COMMANDS, main
from lightning_dp.errors import RecipeError
from lightning_dp.recipes import headline, read_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
NAMES = sorted(shipped_recipes())


def write(folder: Path, **files: str) -> Path:
    """Writes files, and returns the last one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The whole configuration that the command would run with."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments, "--print_config"])
    captured = capsys.readouterr()
    assert not ended.value.code, captured.err
    return dict(yaml.safe_load(captured.out))


def privacy_of(configuration: dict[str, Any]) -> dict[str, Any]:
    [callback] = configuration["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_dp.DifferentialPrivacy"
    return dict(callback["init_args"])


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"], ["-c", "{}"]])
def test_a_later_config_and_a_later_argument_override_a_recipe(
    form: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write(tmp_path, mine="data: {init_args: {batch_size: 7}}\nmodel: {init_args: {learning_rate: 1.0}}\n")
    first = [part.format(shipped_recipes()["mnist/dp_sgd"]) for part in form]
    found = parsed(capsys, *first, "--config", str(mine), "--model.init_args.learning_rate", "2.0",
                   "--trainer.callbacks.init_args.epsilon", "1.5")  # fmt: skip
    assert found["data"]["init_args"]["batch_size"] == 7
    assert found["model"]["init_args"]["learning_rate"] == 2.0
    assert found["model"]["init_args"]["momentum"] == 0.9
    assert privacy_of(found)["epsilon"] == 1.5


def test_a_module_beside_the_recipe_is_found_by_the_installed_command(tmp_path: Path) -> None:
    (tmp_path / "beside_the_recipe.py").write_text(
        "import lightning.pytorch as pl\nclass Net(pl.LightningModule):\n    def __init__(self, width: int = 3):\n"
        "        super().__init__()\n"
    )
    write(tmp_path, mine="model: {class_path: beside_the_recipe.Net, init_args: {width: 5}}\n")
    script = tmp_path / "bin" / "lightning-dp"  # whose folder is where Python looks, as with an installed command
    script.parent.mkdir()
    script.write_text("from lightning_dp.cli import main\nmain()\n")
    done = subprocess.run(
        [sys.executable, str(script), "fit", "--config", "mine.yaml", "--print_config"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert yaml.safe_load(done.stdout)["model"] == {"class_path": "beside_the_recipe.Net", "init_args": {"width": 5}}


def test_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(line.endswith(headline(shipped_recipes()[line.split()[0]])) for line in lines)
    assert "recipes" in COMMANDS


def test_a_copy_stands_alone_and_is_never_overwritten_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["recipes", "copy", "digits/dp_sgd"])
    assert "lightning-dp fit --config digits-dp_sgd.yaml" in capsys.readouterr().out
    copied = tmp_path / "digits-dp_sgd.yaml"
    assert headline(copied) == headline(shipped_recipes()["digits/dp_sgd"])
    original = copied.read_text()
    copied.write_text("changed: true\n")
    with pytest.raises(SystemExit):
        main(["recipes", "copy", "digits/dp_sgd"])
    assert "--force" in capsys.readouterr().err
    assert copied.read_text() == "changed: true\n"
    main(["recipes", "copy", "digits/dp_sgd", "--force"])
    assert copied.read_text() == original
    main(["recipes", "copy", "digits/dp_sgd", "new/folder/mine.yaml"])
    assert (tmp_path / "new" / "folder" / "mine.yaml").read_text() == original
    main(["recipes", "copy", "digits/dp_sgd", "new"])
    assert (tmp_path / "new" / "digits-dp_sgd.yaml").read_text() == original


@pytest.mark.parametrize(
    ("name", "near"), [("mnist/dpsgd", "mnist/dp_sgd"), ("backprop", "mnist/backprop"), ("zzz", "lightning-dp recipes")]
)
def test_an_unknown_name_lists_near_ones(name: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes", "copy", name])
    assert near in capsys.readouterr().err.splitlines()[-1]


def test_in_a_wheel_the_recipes_lie_within_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "lightning_dp"
    (package / "recipes_data" / "mnist").mkdir(parents=True)
    (package / "recipes_data" / "mnist" / "a.yaml").write_text("# A.\n")
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    assert list(shipped_recipes()) == ["mnist/a"]
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "elsewhere" / "lightning_dp" / "recipes.py"))
    with pytest.raises(RecipeError, match="There are no recipes"):
        shipped_recipes()


@pytest.mark.slow
def test_the_wheel_holds_the_recipes(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as unpacked:
        unpacked.extractall(tmp_path / "unpacked")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_dp.cli", "recipes"],
        cwd=tmp_path / "unpacked", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES


# -- the shipped recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_parses_and_its_first_line_is_true(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = shipped_recipes()[name]
    found = parsed(capsys, "--config", str(recipe))
    data_set, method = name.split("/")
    assert found["data"]["class_path"].rpartition(".")[2].lower() == f"{data_set}datamodule"
    assert (
        found["trainer"]["logger"]["init_args"] | {"save_dir": "runs", "name": f"{data_set}-{method}"}
        == (found["trainer"]["logger"]["init_args"])
    )
    line, privacy = headline(recipe), privacy_of(found)
    stated = re.search(r"Expect \d+(?:\.\d+)? % .*at ε = ([\d.]+), δ = ([\d.e-]+), in \d+ (?:s|min|h)\b", line)
    assert stated is not None, line
    assert float(stated[1]) == privacy["epsilon"]
    assert float(stated[2]) == privacy["delta"]


#: What all recipes share, and what those of one optimizer do; each file says it itself.
SHARED = {
    "seed_everything": 1,
    "trainer": {"devices": 1, "enable_model_summary": False},
}


@pytest.mark.parametrize("name", NAMES)
def test_shared_values_are_equal_in_all_recipes(name: str) -> None:
    recipe = read_recipe(shipped_recipes()[name])
    assert recipe["seed_everything"] == SHARED["seed_everything"]
    assert recipe["trainer"] | SHARED["trainer"] == recipe["trainer"]
    model = recipe["model"]["init_args"]
    if model.get("optimizer") == "sgd":
        assert (model["momentum"], model["decay"]) == (0.9, True)


@pytest.mark.parametrize("text", ["a: [1", "- 1", None])
def test_what_is_no_recipe_is_an_error_that_names_the_file(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match="mine.yaml"):
        read_recipe(tmp_path / "mine.yaml")
