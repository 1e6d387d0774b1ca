"""``lightning-dp recipes``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_dp.errors import RecipeError
from lightning_dp.recipes import copy_recipe, headline, shipped_recipes


def recipes_command(arguments: Sequence[str]) -> None:
    """``lightning-dp recipes``: lists the shipped recipes, and copies one."""
    parser = argparse.ArgumentParser(
        prog="lightning-dp recipes", description="Lists the shipped recipes, or copies one to change and to run."
    )
    copy = parser.add_subparsers(dest="action").add_parser("copy", help="write a recipe out as one file of your own")
    copy.add_argument("name", help="as it is listed, e.g. mnist/dp_sgd")
    copy.add_argument("dest", nargs="?", type=Path, help="file or folder (default: e.g. mnist-dp_sgd.yaml, here)")
    copy.add_argument("--force", action="store_true", help="overwrite what is there")
    options = parser.parse_args(arguments)
    try:
        if options.action == "copy":
            dest = copy_recipe(options.name, options.dest, options.force)
            print(f"lightning-dp: written to {dest}; run it: lightning-dp fit --config {dest}")
            return
        recipes = shipped_recipes()
    except (RecipeError, OSError) as error:
        parser.error(str(error))
    width = max(map(len, recipes), default=0)
    for name, file in recipes.items():
        print(f"{name.ljust(width)}  {headline(file)}")
