"""Image files: finding them, reading them, and what happens to the unreadable ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from PIL import Image, UnidentifiedImageError

from mae_core.config import ImagesConfig
from mae_core.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)
"""ImageNet's statistics averaged over the channels."""

MOST_IN_A_ROW = 100
"""This many unreadable files one after another mean that the folder is wrong, not that some files are damaged."""

Found = TypeVar("Found")


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
    """All image files below ``folder``, sorted, hidden ones left out; linked folders are looked into.

    Raises ``UserError`` where the folder is missing or holds none.
    """
    if folder is None:
        raise UserError("no image folder given; set data.path=FOLDER")
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"image folder {folder} {found}; set data.path to a folder of images")
    paths = sorted(_files_below(folder))
    if not paths:
        raise UserError(
            f"no images below {folder} (looked for {', '.join(sorted(IMAGE_SUFFIXES))}); "
            "set data.path to a folder of images"
        )
    return paths


def _files_below(folder: Path, way: tuple[str, ...] = ()) -> Iterator[Path]:
    """Image files below ``folder`` but dot files and what is in dot folders: thumbnails, notebook copies.

    ``way``: the real folders above. A link back to one of them is not followed.
    """
    real = os.path.realpath(folder)
    if real in way or not os.access(folder, os.R_OK | os.X_OK):
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _files_below(path, (*way, real))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


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


class MaybePixels(Protocol):
    """A sample: no pixels where neither its file nor any of those after it could be read."""

    @property
    def pixels(self) -> Any: ...

    @property
    def unreadable(self) -> list[Unreadable]: ...


def next_readable(index: int, length: int, read: Callable[[int], Found]) -> tuple[int, Found | None, list[Unreadable]]:
    """``read`` the place ``index`` of ``length``, or the first after it that does not raise ``UnreadableImage``.

    Returns the place read, what was read there (None where ``MOST_IN_A_ROW`` places failed) and what failed before.
    """
    unreadable: list[Unreadable] = []
    for shift in range(min(length, MOST_IN_A_ROW)):
        place = (index + shift) % length
        try:
            return place, read(place), unreadable
        except UnreadableImage as error:
            unreadable.append(error.unreadable)
    return index, None, unreadable


def check_found(samples: Iterable[MaybePixels], suspects: str = "data.path") -> None:
    """Raise ``UserError``, with what to check, where ``next_readable`` found nothing for one of ``samples``."""
    for sample in samples:
        if sample.pixels is None:
            count, last = len(sample.unreadable), sample.unreadable[-1]
            raise UserError(
                f"{count} images in a row cannot be read, the last is {last.path} ({last.reason}); check {suspects}"
            )


def read_some(paths: Sequence[Path], channels: int, count: int) -> list[Image.Image]:
    """At most ``count`` images spread over ``paths``. Raises ``UserError`` where none of those tried can be read."""
    count = min(count, len(paths))
    starts = [number * len(paths) // count for number in range(count)] + [len(paths)]
    images: list[Image.Image] = []
    problems: list[Unreadable] = []
    for start, stop in pairwise(starts):
        for path in paths[start : min(stop, start + MOST_IN_A_ROW)]:
            try:
                images.append(read_image(path, channels))
                break
            except UnreadableImage as error:
                problems.append(error.unreadable)
    if not images:
        raise UserError(
            f"none of {len(problems)} images tried can be read; the first, {problems[0].path}: {problems[0].reason}"
        )
    return images


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
