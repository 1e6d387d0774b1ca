"""The wheel in an empty environment, with the README's snippet: slow, it installs everything."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def snippet() -> str:
    """The first Python block of the README that trains."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return next(block for block in blocks if ".fit(" in block)


def test_the_readmes_snippet_runs(tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(snippet())
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ε = " in done.stdout


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_the_snippet_runs(tmp_path: Path) -> None:
    def run(*command: str | Path, **kwargs: object) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr[-3000:]
        return str(done.stdout)

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    (tmp_path / "snippet.py").write_text(snippet())
    assert "ε = " in run(python, "snippet.py", cwd=tmp_path)
    assert "fit" in run(tmp_path / "env" / "bin" / "lightning-dp", "--help")
