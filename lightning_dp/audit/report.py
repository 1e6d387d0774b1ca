"""Audits as a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_dp.audit.bounds import Audit


def write_audits(audits: Sequence[Audit], folder: str | Path) -> list[Path]:
    """Writes ``audit.json``, and where matplotlib is installed ``audit.png`` (lower bounds beside claims).

    Args:
        audits: At least one; all at the same δ and confidence.
        folder: Is made if it does not exist.

    Returns:
        The paths of the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "audit.json"
    path.write_text(json.dumps([{**asdict(audit), "passed": audit.passed} for audit in audits], indent=1))
    try:
        import matplotlib
    except ImportError:
        return [path]
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 1 + 0.8 * len(audits)))
    for row, audit in enumerate(reversed(audits)):
        axes.barh(row, audit.claimed, color="lightgrey", label="claimed" if not row else None)
        color = "tab:blue" if audit.passed else "tab:red"
        axes.barh(row, audit.lower_bound, height=0.4, color=color, label="lower bound" if not row else None)
    axes.set_yticks(range(len(audits)), [audit.attack for audit in reversed(audits)])
    axes.set_xlabel(f"ε at δ = {audits[0].delta:g}, bounds with {100 * audits[0].confidence:g} % confidence")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "audit.png", dpi=150)
    plt.close(figure)
    return [path, folder / "audit.png"]
