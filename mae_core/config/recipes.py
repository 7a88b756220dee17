"""Recipes by name: the files of ``configs/``, which an installation brings along, whatever the working folder is."""

from __future__ import annotations

from pathlib import Path

import mae_core
from mae_core.config.schema import hint

ENDINGS = (".yaml", ".py")


def recipes_folder() -> Path:
    """Where the recipes are: beside this package in a clone, inside it where it was installed from a wheel."""
    package = Path(mae_core.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def recipe_names(kind: str) -> list[str]:
    """Names of the recipes of one kind, such as ``pretrain`` or ``detection``; each is what ``find_recipe`` takes."""
    folder = recipes_folder() / kind
    files = (path.relative_to(folder) for ending in ENDINGS for path in folder.rglob(f"*{ending}"))
    return sorted(path.with_suffix("").as_posix() for path in files if "_base_" not in path.parts)


def find_recipe(given: Path | str, kind: str) -> Path:
    """``given`` if it is a file; else the recipe that it names: ``tiny_96``, ``tiny_96.yaml`` or, from any folder,
    ``configs/pretrain/tiny_96.yaml``. What names nothing is returned as it is.
    """
    given = Path(given).expanduser()
    in_clone = given.parts[:1] == ("configs",)
    if given.is_file() or given.is_absolute() or not (kind or in_clone):
        return given
    folder = recipes_folder()
    below = folder.joinpath(*given.parts[1:]) if in_clone else folder / kind / given
    named = [below, *(below.with_name(below.name + ending) for ending in ENDINGS)]
    return next((path for path in named if path.is_file()), given)


def name_of(recipe: Path) -> str:
    """The name by which its command finds an installed recipe: ``configs/pretrain/table1/d_pca.yaml`` ->
    ``table1/d_pca``."""
    return Path(*recipe.relative_to(recipes_folder()).with_suffix("").parts[1:]).as_posix()


def which_recipe(given: Path, kind: str) -> str:
    """What may have been meant by a name that ``find_recipe`` did not find, for the end of a message."""
    names = recipe_names(kind) if kind else []
    return f"as a recipe's name: {hint(given.stem, names)}" if names else "give the path of a file"
