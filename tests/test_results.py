"""The harness behind ``make results``: what is run, what is stored, and what the report says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from lightning_dp.recipes import read_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/results.py, imported as the script that it is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    return results


def line(seed: int = 1, accuracy: float = 0.9, **others: Any) -> dict[str, Any]:
    """A stored run."""
    return {"recipe": "digits/dp_sgd", "arguments": [], "seed": seed, "test_accuracy": accuracy, "epsilon": 2.9981,
            "delta": 1e-4, "steps": 180, "seconds": 15.0, "hardware": "A CPU", "date": "2026-01-01",
            "commit": "abc"} | others  # fmt: skip


def cells(text: str, start: str) -> list[str]:
    """The cells of the first table line that begins so."""
    found = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def test_the_table_names_shipped_recipes_and_no_row_twice(results: ModuleType) -> None:
    rows, quoted = results.read_table(ROOT / "benchmarks" / "results.yaml")
    assert {row.recipe for row in rows} <= set(shipped_recipes())
    assert len({(row.recipe, *row.arguments) for row in rows}) == len(rows)
    assert {row.data for row in quoted} <= {name.partition("/")[0] for name in shipped_recipes()}


@pytest.mark.parametrize(
    ("row", "says"), [("{recipe: a/b, epsilom: 3}", "epsilom"), ("{target: 3}", "recipe"), ("{recipe: 3, x: 1}", "x")]
)
def test_a_wrong_row_is_an_error(row: str, says: str, results: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(f"rows:\n  - {row}\n")
    with pytest.raises(ValueError, match=says):
        results.read_table(tmp_path / "table.yaml")


def test_only_what_has_no_stored_result_is_run(results: ModuleType) -> None:
    plain = results.Row("digits/dp_sgd")
    other = results.Row("digits/dp_sgd", arguments=["--trainer.callbacks.init_args.epsilon", "1"], seeds=[1])
    store = [line(seed=2), line(seed=9), line(seed=3, recipe="mnist/dp_sgd")]
    assert results.missing([plain, other], store) == [(plain, 1), (plain, 3), (other, 1)]
    assert len(results.missing([plain, other], store, redo=True)) == 4


def test_the_last_of_two_results_counts_and_other_seeds_do_not(results: ModuleType) -> None:
    row = results.Row("digits/dp_sgd", seeds=[1])
    [figures] = results.gather([row], [line(accuracy=0.1), line(accuracy=0.9), line(seed=2, accuracy=0.2)])
    assert figures.accuracy[0] == pytest.approx(90)


def test_the_report_states_mean_interval_target_and_command(results: ModuleType) -> None:
    row = results.Row("digits/dp_sgd", target=92.5, compared_with="someone", arguments=["--x", "a b"])
    quoted = results.Quoted("their method", "digits", 1.0, 95.5, "A paper, 2000", delta=1e-5)
    store = [line(seed, accuracy, arguments=["--x", "a b"], epsilon=2.9981 - seed / 100)
             for seed, accuracy in ((1, 0.90), (2, 0.92), (3, 0.94))]  # fmt: skip
    text = results.report([row], [quoted], store)
    recipe, epsilon, accuracy, seeds, target, steps, time, hardware, command = cells(text, "`digits/dp_sgd`")
    assert recipe == "`digits/dp_sgd`"
    assert epsilon == "2.989"  # the largest of the three, rounded up
    # Student's t with two degrees of freedom at 0.975 is 4.3027; the standard deviation is 2
    assert accuracy == f"92.00 % ± {4.30265 * 2 / 3**0.5:.2f}"
    assert (seeds, steps, time, hardware) == ("3", "180", "15 s", "A CPU")
    assert target == "92.5 % (someone): missed by 0.50"
    assert command == "`python benchmarks/seeds.py recipes/digits/dp_sgd.yaml --seeds 1 2 3 --x 'a b'`"
    assert cells(text, "*quoted*")[:3] == ["*quoted*: their method (A paper, 2000; δ = 1e-05)", "1", "95.5 %"]
    assert text.index("*quoted*: their") < text.index("| `digits/dp_sgd`")  # sorted by ε
    assert results.verdict(row, 93.0) == "92.5 % (someone): met, 0.50 above"


def test_the_report_says_what_is_not_run_and_what_has_changed(results: ModuleType) -> None:
    rows = [results.Row("digits/dp_sgd"), results.Row("mnist/dp_sgd")]
    now = results.fingerprint(shipped_recipes()["digits/dp_sgd"])
    text = results.report(rows, [], [line(configuration=now)])
    assert "2 more to run" in text
    assert "has changed since" not in text
    assert "Not run yet: `mnist/dp_sgd`" in text
    assert "has changed since" in results.report(rows, [], [line(configuration="other")])


def test_the_fingerprint_is_of_the_training_and_not_of_its_logs(results: ModuleType, tmp_path: Path) -> None:
    recipe = shipped_recipes()["digits/dp_sgd"]

    def with_(changes: dict[str, Any]) -> str:
        changed = read_recipe(recipe)
        for part, values in changes.items():
            changed[part] |= values
        (tmp_path / "child.yaml").write_text(f"# Any comment.\n{yaml.safe_dump(changed)}")
        return str(results.fingerprint(tmp_path / "child.yaml"))

    same, model = results.fingerprint(recipe), read_recipe(recipe)["model"]["init_args"]
    assert with_({"trainer": {"log_every_n_steps": 1, "logger": False}}) == same
    assert with_({"trainer": {"max_epochs": 1}}) != same
    assert with_({"model": {"init_args": model | {"learning_rate": 9.0}}}) != same


def test_every_run_is_stored_when_it_is_done(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run fails, the next is interrupted: what was done before is stored, and reported."""
    (tmp_path / "table.yaml").write_text("rows:\n  - {recipe: digits/dp_sgd, seeds: [1, 2, 3, 4]}\n")

    def run(recipe: str, seed: int, extra: list[str]) -> Any:
        if seed == 2:
            raise RuntimeError("this one failed")
        if seed == 4:
            raise KeyboardInterrupt
        return SimpleNamespace(accuracy=0.5, epsilon=1.0, delta=1e-5, steps=3, seconds=1.0, folder=None)

    monkeypatch.setattr(results, "run", run)
    arguments = ["--table", str(tmp_path / "table.yaml"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        results.main([*arguments, "--", "--trainer.accelerator", "gpu"])
    stored = results.read_store(tmp_path / "results.jsonl")
    assert [entry["seed"] for entry in stored] == [1, 3]
    assert stored[0]["device_arguments"] == ["--trainer.accelerator", "gpu"]
    assert stored[0]["arguments"] == []
    assert "this one failed" in capsys.readouterr().err
    assert "2 more to run" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "images" / "results.png").stat().st_size > 0


def test_a_line_after_a_torn_one_is_its_own(results: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line(seed=1)))
    results.append(path, line(seed=2))
    assert [entry["seed"] for entry in results.read_store(path)] == [1, 2]
    path.write_text('{"recipe": "digits/dp_sgd"}\n')
    with pytest.raises(ValueError, match="line 1: no arguments"):
        results.read_store(path)


def test_the_stored_results_are_readable_and_the_report_is_of_them(results: ModuleType) -> None:
    store = results.read_store(ROOT / "docs" / "results.jsonl")
    rows, quoted = results.read_table(ROOT / "benchmarks" / "results.yaml")
    assert (ROOT / "docs" / "results.md").read_text() == results.report(rows, quoted, store)


@pytest.mark.slow
def test_a_real_run_is_measured_with_its_card(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    row = results.Row("digits/dp_sgd", arguments=["--trainer.max_epochs", "1"], seeds=[5])
    stored = results.measure(row, 5, [])
    assert json.loads(json.dumps(stored)) == stored
    assert set(results.FIELDS) <= stored.keys()
    assert 0 <= stored["test_accuracy"] <= 1
    assert stored["card"]["poisson_sampling"]["pld"] <= stored["epsilon"] <= 3.0
    assert (stored["steps"], stored["delta"], stored["seed"]) == (6, 1e-4, 5)
    assert stored["card"]["num_records"] == 1437
    assert "torch" in stored["software"]
    assert "GaussianNoise" in results.report([row], [], [stored])


# -- figures that stand elsewhere --------------------------------------------------------------------------------------


def stored_accuracies(results: ModuleType) -> dict[str, list[str]]:
    """By recipe, what the store says of every row with three seeds, as it is written: ``98.88 % ± 0.12``."""
    rows, _ = results.read_table(ROOT / "benchmarks" / "results.yaml")
    found: dict[str, list[str]] = {}
    for figures in results.gather(rows, results.read_store(ROOT / "docs" / "results.jsonl")):
        mean, half = figures.accuracy if len(figures.runs) > 1 else (100 * figures.runs[0]["test_accuracy"], 0.0)
        found.setdefault(figures.row.recipe, []).append(f"{mean:.2f} % ± {half:.2f}")
    return found


def test_the_readme_states_what_is_stored(results: ModuleType) -> None:
    stored = stored_accuracies(results)
    lines = re.findall(r"^\| `(\w+/\w+)`[^|]*\| ([\d.]+ % ± [\d.]+) ", (ROOT / "README.md").read_text(), re.M)
    assert len(lines) == 4
    for recipe, figure in lines:
        assert figure in stored[recipe], (recipe, stored[recipe])


def rounds_to(figure: str, exact: str) -> bool:
    """Whether ``98.9 % ± 0.1`` is ``98.88 % ± 0.12`` with fewer digits."""
    return all(
        abs(float(short) - float(long)) <= 0.5 * 10.0 ** -len(short.partition(".")[2]) + 1e-9
        for short, long in zip(re.findall(r"[\d.]+", figure), re.findall(r"[\d.]+", exact), strict=True)
    )


def test_recipes_say_what_is_stored(results: ModuleType) -> None:
    stored = stored_accuracies(results)
    for name, file in shipped_recipes().items():
        expected = re.search(r"Expect ([\d.]+ % ± [\d.]+) ", file.read_text(encoding="utf-8").partition("\n")[0])
        if expected is not None:
            assert any(rounds_to(expected[1], exact) for exact in stored[name]), (name, expected[1], stored[name])


def test_the_page_of_recipes_says_what_is_stored(results: ModuleType) -> None:
    stored = stored_accuracies(results)
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+/\w+)\.yaml`[^|]*\| ([\d.]+ % ± [\d.]+)", page, re.M)
    assert len(lines) > 15
    for recipe, figure in lines:
        assert any(rounds_to(figure, exact) for exact in stored[recipe]), (recipe, figure, stored[recipe])


def test_goals_of_ours_are_called_that(results: ModuleType) -> None:
    """A paper's figure stands as a quoted row as well."""
    rows, quoted = results.read_table(ROOT / "benchmarks" / "results.yaml")
    figures = {(row.data, row.accuracy, row.source) for row in quoted}
    for row in rows:
        if row.compared_with:
            source = row.compared_with.partition(",")[0]
            assert any(
                (data, accuracy) == (row.data, row.target) and source in about for data, accuracy, about in figures
            ), f"{row.recipe}: {row.target} is no figure of {row.compared_with} that is quoted"
