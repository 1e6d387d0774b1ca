"""The scripts in the documentation run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["manual", "images", "text", "language_models", "sequences"])
def test_the_script_of_a_page_trains_privately(page: str, tmp_path: Path) -> None:
    [script] = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "-differentially private with respect to adding or removing one record" in done.stderr + done.stdout


def test_the_script_that_looks_before_it_trains_runs(tmp_path: Path) -> None:
    [script] = re.findall(r"```python\n(.*?)```", (DOCS / "check.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "repair=True" in done.stdout
    assert "Private training would begin" in done.stdout
