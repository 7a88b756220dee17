"""The images that a user names on a command line: files, or folders of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mae_core.data.images import list_images
from mae_core.errors import UserError


def named_images(images: Sequence[Path | str]) -> Iterator[tuple[str, Path]]:
    """(name below the output folders, file) of every image; folders keep their sub-folders.

    Raises ``UserError`` for a missing path and for two images of one name.
    """
    taken: dict[str, Path] = {}
    for given in map(Path, images):
        if not given.exists():
            raise UserError(f"image {given} does not exist; give image files or folders of them")
        for path in _images_below(given) if given.is_dir() else [given]:
            name = path.relative_to(given).with_suffix("").as_posix() if given.is_dir() else path.stem
            if name in taken:
                raise UserError(f"{taken[name]} and {path} would both be written as {name}.png; give them one by one")
            taken[name] = path
            yield name, path


def _images_below(folder: Path) -> list[Path]:
    """``list_images``, whose error names an option of a run."""
    try:
        return list_images(folder)
    except UserError as error:
        raise UserError(f"{str(error).partition(';')[0]}; give image files or folders of them") from None
