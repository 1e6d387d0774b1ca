"""Recipes: YAML configurations of the ``lightning-dp`` command, listed and copied by name.

A recipe is a YAML file for LightningCLI, whole by itself. The folder ``recipes/`` has one folder a data set and one
file a method.
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from lightning_dp.errors import RecipeError


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe as plain data.

    Raises:
        RecipeError: It is missing, is not YAML, or holds no mapping.
    """
    try:
        # jsonargparse's own reading of YAML, by which 1e-5 is a number
        content = jsonargparse.get_loader("yaml")(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no mapping of keys to values.")
    return content


def recipes_folder() -> Path:
    """Where the recipes are: within the installed package, or beside it in a checkout.

    Raises:
        RecipeError: Neither folder exists.
    """
    package = Path(__file__).parent
    for folder in (package / "recipes_data", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise RecipeError(f"There are no recipes: neither {package / 'recipes_data'} nor {package.parent / 'recipes'}.")


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes, by name (``mnist/dp_sgd``)."""
    folder = recipes_folder()
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(name: str) -> Path:
    """The shipped recipe of a name.

    Raises:
        RecipeError: There is none; names that come near are listed.
    """
    known = shipped_recipes()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known)
    near += [other for other in known if name in other.split("/") and other not in near]
    hint = f"Did you mean {' or '.join(near)}?" if near else "lightning-dp recipes lists them."
    raise RecipeError(f"There is no recipe {name!r}. {hint}")


def headline(recipe: Path) -> str:
    """The first comment line of a recipe: what it is, and what to expect."""
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def copy_recipe(name: str, dest: Path | None, force: bool) -> Path:
    """Copies a shipped recipe, and returns the path of the copy.

    Args:
        name: As in `shipped_recipes`.
        dest: A file or an existing folder. ``None``: ``<folder>-<recipe>.yaml`` in the working directory.
        force: Whether an existing file is overwritten.

    Raises:
        RecipeError: There is no such recipe, or the file exists.
    """
    recipe = find_recipe(name.removesuffix(".yaml"))
    file = Path(f"{recipe.parent.name}-{recipe.name}")
    if dest is not None:
        file = dest / file if dest.is_dir() else dest
    if file.exists() and not force:
        raise RecipeError(f"{file} exists: name another file, or overwrite it with --force.")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe, file)
    return file
