"""Image files: finding them, reading them, and what happens to the unreadable ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from mae_core.config import ImagesConfig
from mae_core.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)
"""ImageNet's statistics averaged over the channels."""


class Unreadable(NamedTuple):
    """An image file that could not be used, and why."""

    path: str
    reason: str


class UnreadableImage(Exception):
    """Raised by ``read_image``; carries the ``Unreadable``."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.unreadable = Unreadable(str(path), reason)


def list_images(folder: Path | None) -> list[Path]:
    """All image files below ``folder``, sorted, hidden ones left out.

    Raises ``UserError`` where the folder is missing or holds none.
    """
    if folder is None:
        raise UserError("no image folder given; set data.path=FOLDER")
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"image folder {folder} {found}; set data.path to a folder of images")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not _hidden(p, folder))
    if not paths:
        raise UserError(
            f"no images below {folder} (looked for {', '.join(sorted(IMAGE_SUFFIXES))}); "
            "set data.path to a folder of images"
        )
    return paths


def _hidden(path: Path, folder: Path) -> bool:
    """Whether the file, or a folder on the way to it, is a dot file: thumbnails and notebook copies are no data."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_image(path: Path, channels: int) -> Image.Image:
    """Decode an 8-bit image as greyscale (``channels=1``) or RGB (3).

    Raises ``UnreadableImage`` for a file that is no image, is truncated, or has more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise UnreadableImage(path, f"{image.mode} image; 8 bits a channel are supported")
                return image.convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError:
        raise UnreadableImage(path, "not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def refuse_unreadable(found: Iterable[Unreadable]) -> None:
    """Raise ``UserError`` naming the first of ``found``, if there is one."""
    for path, reason in found:
        raise UserError(f"image {path} cannot be read ({reason}); mend or remove it, or set data.on_error=skip")


def check_all(paths: Sequence[Path], channels: int, *, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Decode every file; what ``data.on_error=raise`` does before a run starts. Raises ``UserError`` at the first bad
    one."""

    def problem(path: Path) -> Unreadable | None:
        try:
            read_image(path, channels)
        except UnreadableImage as error:
            return error.unreadable
        return None

    with ThreadPoolExecutor(4) as pool:
        for done, bad in enumerate(_in_chunks(pool, problem, paths), start=1):
            if bad is not None:
                refuse_unreadable([bad])
            if on_progress is not None:
                on_progress(done, len(paths))


def _in_chunks(
    pool: ThreadPoolExecutor, function: Callable[[Path], Unreadable | None], paths: Sequence[Path], size: int = 256
) -> Iterator[Unreadable | None]:
    for start in range(0, len(paths), size):
        yield from pool.map(function, paths[start : start + size])


class Statistics(NamedTuple):
    """Mean and standard deviation per channel, of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics_of(data: ImagesConfig, weights: Mapping[str, Any] | None = None) -> Statistics:
    """What the metadata of the weights says (their encoder expects such pixels), else the configuration, else
    ImageNet's.

    Raises ``UserError`` where the configuration contradicts the weights.
    """
    mean, std = (GREY_MEAN, GREY_STD) if data.channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    found = {"mean": data.mean or mean, "std": data.std or std}
    for name in found:
        theirs = tuple((weights or {}).get(name) or found[name])
        if getattr(data, name) not in (None, theirs):
            raise UserError(f"data.{name}={found[name]} was asked for, but the weights were trained with {theirs}")
        found[name] = theirs
    return Statistics(**found)
