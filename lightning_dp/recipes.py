"""Recipes: configurations of the command that are made of shared parts, listed and copied by name.

A recipe is a YAML file for LightningCLI with one more key, ``defaults``: the files that it builds on. They are composed
here, as plain data, before LightningCLI sees a configuration. The folder ``recipes/`` has one folder a data set and one
file a method; a file whose name begins with ``_`` is a part, not a recipe.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lightning_dp.errors import RecipeError

#: The key that names the files a recipe builds on.
DEFAULTS = "defaults"


def compose(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration that a recipe stands for: its ``defaults`` in order, then its own keys, merged by `merge`.

    Args:
        path: A YAML file. The paths under its key ``defaults`` (one, or a list) are relative to its folder, and those
            files may have ``defaults`` of their own.

    Returns:
        Plain data without the key ``defaults``.

    Raises:
        RecipeError: A file is missing, is not YAML or no mapping, or builds on itself.
    """
    return _compose(Path(path), ())


def _compose(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    here = path.resolve()
    if here in including:
        circle = " -> ".join(str(file) for file in (*including[including.index(here) :], here))
        raise RecipeError(f"{including[-1]}: {DEFAULTS} lead back to where they began: {circle}")
    own = _read(path)
    named = own.pop(DEFAULTS, [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{path}: {DEFAULTS} must be a list of files, got {named!r}.")
    composed: dict[str, Any] = {}
    for name in names:
        part = path.parent / name
        if not part.is_file():
            raise RecipeError(f"{path}: {DEFAULTS} names {name}, and there is no file {part.resolve()}.")
        composed = merge(composed, _compose(part, (*including, here)))
    return merge(composed, own)


def _read(path: Path) -> dict[str, Any]:
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


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``: mappings are merged, everything else (lists too) is replaced.

    Where ``class_path`` changes, the ``init_args`` of ``base`` belong to another class and are dropped.
    """
    before, after = base.get("class_path"), over.get("class_path")
    changed = before is not None and after is not None and before != after
    merged = {key: value for key, value in base.items() if not (changed and key in ("init_args", "dict_kwargs"))}
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    first = {"class_path": merged["class_path"]} if "class_path" in merged else {}
    return first | merged


class _Dumper(yaml.SafeDumper):
    """Writes what `_read` reads again as the same data: blocks, with short lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_list(self, data: Any) -> yaml.Node:
        nested = any(isinstance(item, list | dict) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=not nested)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_implicit_resolver(  # a string that looks like 1e-5 needs quotes, since jsonargparse would read a number
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.][0-9._]*[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def to_yaml(configuration: Mapping[str, Any]) -> str:
    """A composed configuration as text."""
    return yaml.dump(dict(configuration), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class RecipeParser(LightningArgumentParser):
    """LightningCLI's parser, for which ``--config`` may name a recipe with ``defaults``.

    Composition happens within one file. Several ``--config``, and ``--key value`` after them, go on to override one
    another as LightningCLI has it.
    """

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        file = Path(path)
        try:
            composed = DEFAULTS in _read(file)
        except RecipeError:  # a stream, a missing file, no YAML: the parser says what it thinks of it
            composed = False
        if not composed:
            return super().parse_path(path, *args, **kwargs)
        try:
            text = to_yaml(compose(file))
        except RecipeError as error:
            raise TypeError(str(error)) from error  # which the parser reports as an error of the command line
        with contextlib.chdir(file.resolve().parent):  # paths in a configuration are relative to it
            return self.parse_string(text, *args, **kwargs)


# -- the shipped recipes -----------------------------------------------------------------------------------------------


def recipes_folder() -> Path:
    """Where the recipes are: within the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "recipes_data", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise RecipeError(f"There are no recipes: neither {package / 'recipes_data'} nor {package.parent / 'recipes'}.")


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes, by name (``mnist/dp_sgd``)."""
    folder = recipes_folder()
    files = sorted(file for file in folder.rglob("*.yaml") if not file.name.startswith("_"))
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


def self_contained(recipe: Path) -> str:
    """The text of a recipe that builds on no other file, its leading comment kept."""
    lines = recipe.read_text(encoding="utf-8").splitlines(keepends=True)
    comment = "".join(lines[: next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))])
    return comment + to_yaml(compose(recipe))


def copy_recipe(name: str, dest: Path | None, force: bool) -> Path:
    """Writes a recipe that comes with the package to a file of one's own."""
    recipe = find_recipe(name.removesuffix(".yaml"))
    file = Path(f"{recipe.parent.name}-{recipe.name}")
    if dest is not None:
        file = dest / file if dest.is_dir() else dest
    if file.exists() and not force:
        raise RecipeError(f"{file} exists: name another file, or overwrite it with --force.")
    text = self_contained(recipe)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file
