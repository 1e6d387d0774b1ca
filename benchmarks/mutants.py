"""Mutation testing: of a random sample of small changes to the core, how many a test notices.

    make mutants        # or: python benchmarks/mutants.py [--sample 200] [--seed 0] [--processes 2]

`mutmut` makes the changes, one at a time, and runs the tests that reach them (``[tool.mutmut]`` in pyproject.toml says
which files and tests). Survivors are printed; ``mutmut show NAME`` shows one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

#: Some mutant, to have all of them made.
FIRST = "lightning_dp.mechanism.clipping.x_check_positive__mutmut_1"

#: Exit codes of mutants that no test failed on: it passed, none ran, none was to be run, or nobody tried.
UNNOTICED = (0, 5, 33, 34, None)


def run(names: list[str], processes: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # mutants run in forked processes
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(processes), *names]
    subprocess.run(command, check=True, env=environment)


def outcomes() -> dict[str, int | None]:
    """Exit code of the tests by mutant; `None` where they were not run."""
    found: dict[str, int | None] = {}
    for path in sorted(Path("mutants").rglob("*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    run([FIRST], arguments.processes)
    sample = random.Random(arguments.seed).sample(sorted(outcomes()), arguments.sample)
    run(sample, arguments.processes)
    found = outcomes()
    survivors = [name for name in sample if found[name] in UNNOTICED]
    print("\n".join(survivors))
    print(f"{len(sample) - len(survivors)} of {len(sample)} mutants were noticed ({len(survivors)} survived)")


if __name__ == "__main__":
    main()
