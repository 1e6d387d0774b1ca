"""The scripts in the documentation run, each in a directory of its own."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def run_script(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [script] = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    (folder / "script.py").write_text(script, encoding="utf-8")
    monkeypatch.chdir(folder)
    runpy.run_path("script.py", run_name="__main__")


@pytest.mark.parametrize("page", ["manual", "images", "text", "language_models", "sequences"])
def test_the_script_of_a_page_trains_privately(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(page, tmp_path, monkeypatch)
    [card] = tmp_path.rglob("privacy_card.md")
    assert "-differentially private with respect to adding or removing one record" in card.read_text(encoding="utf-8")


def test_the_script_that_looks_before_it_trains_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("check", tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "repair=True" in printed
    assert "Private training would begin" in printed
