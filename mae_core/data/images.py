"""Image files: finding them, reading many of them, and what happens to the unreadable ones."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from mae_core.data.config import ImagesConfig
from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, read_content, read_image
from mae_core.data.reading import ReadAs
from mae_core.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff", ".npy"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".jpf", ".jpx", ".avif"),
    }
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)
"""ImageNet's statistics averaged over the channels."""
DEFAULT_STATISTICS = {1: (GREY_MEAN, GREY_STD), 3: (IMAGENET_MEAN, IMAGENET_STD)}

MOST_IN_A_ROW = 100
"""This many unreadable files one after another mean that the folder is wrong, not that some files are damaged."""

Found = TypeVar("Found")


class ImageSource(Protocol):
    """Images by index, from wherever they are."""

    @property
    def names(self) -> Sequence[str]:
        """What identifies each image in its data set, wherever the set lies."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """The pixels of one image. Raises ``UnreadableImage``."""
        ...

    def content(self, index: int) -> bytes:
        """Its file, as it is stored. Raises ``UnreadableImage``."""
        ...


class ImageFiles:
    """Image files by their paths; names are relative to ``root``."""

    def __init__(
        self,
        paths: Sequence[Path],
        read_as: ReadAs,
        root: Path | None = None,
        passed_over: Mapping[str, int] | None = None,
    ) -> None:
        self.paths, self.read_as, self.root = list(paths), read_as, root
        self.passed_over: Mapping[str, int] = passed_over or {}

    @property
    def names(self) -> list[str]:
        """Paths below the root, with / on every system."""
        return relative_names(self.paths, self.root)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Pixels:
        """See ``read_image``."""
        return read_image(self.paths[index], self.read_as)

    def content(self, index: int) -> bytes:
        """See ``read_content``."""
        return read_content(self.paths[index])


def relative_names(paths: Iterable[Path], root: Path | None) -> list[str]:
    """Paths as names that stay the same when ``root`` moves; those outside of it as they are. A ``root`` that is an
    image itself is called by its file name."""
    return [
        p.name if p == root else (p.relative_to(root) if root and p.is_relative_to(root) else p).as_posix()
        for p in paths
    ]


def list_images(folder: Path | None, passed_over: Counter[str] | None = None) -> list[Path]:
    """All image files below ``folder``, sorted, hidden ones left out; linked folders are looked into. One image file
    counts as a folder that holds it alone.

    ``passed_over`` counts the other files by ending. Raises ``UserError`` where the folder is missing or holds none.
    """
    if folder is None:
        raise UserError("no image folder given; set data.path=FOLDER")
    if folder.is_file() and folder.suffix.lower() in IMAGE_SUFFIXES:
        return [folder]
    if not folder.is_dir():
        found = "does not exist"
        if folder.exists():
            found = f"is a file, and {folder.suffix or 'its name'} is not an image's ending"
        raise UserError(f"image folder {folder} {found}; name a folder of images, or one image file")
    others: Counter[str] = Counter()
    paths = sorted(files_below(folder, passed_over=others))
    if not paths:
        there = f"it holds {listed(others)}; " if others else ""
        raise UserError(
            f"no images below {folder} ({there}looked for {', '.join(sorted(IMAGE_SUFFIXES))}); name a folder of images"
        )
    if passed_over is not None:
        passed_over.update(others)
    return paths


def files_below(folder: Path, way: tuple[str, ...] = (), passed_over: Counter[str] | None = None) -> Iterator[Path]:
    """Image files below ``folder`` but dot files and what is in dot folders: thumbnails, notebook copies.

    ``way``: the real folders above. A link back to one of them is not followed. ``passed_over`` counts the files of
    other endings, and what is no regular file (pipes, devices, broken links) under an image's name.
    """
    real = os.path.realpath(folder)
    if real in way or not os.access(folder, os.R_OK | os.X_OK):
        return
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in found:
        path = folder / entry.name
        linked = entry.is_symlink()  # one that goes in circles is an error to the entry, and nothing to os.path
        is_folder = os.path.isdir(path) if linked else entry.is_dir()
        is_file = os.path.isfile(path) if linked else entry.is_file()
        if is_folder:
            yield from files_below(path, (*way, real), passed_over)
        elif is_file and path.suffix.lower() in IMAGE_SUFFIXES:
            yield path
        elif passed_over is not None:
            passed_over[(path.suffix or "no ending") if is_file else "no regular file"] += 1


def listed(passed_over: Mapping[str, int], most: int = 8) -> str:
    """Files by ending, the most frequent first."""
    counts = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} x {ending}" for ending, count in counts[:most]) + (", ..." if len(counts) > most else "")


def passed_over_in(source: ImageSource) -> Counter[str]:
    """The files by ending that were passed over where a source was opened."""
    return Counter(getattr(source, "passed_over", {}))


def describe_passed_over(passed_over: Mapping[str, int]) -> str:
    """A sentence for the start of a run and for the check; empty if every file is an image."""
    if not passed_over:
        return ""
    count = sum(passed_over.values())
    return f"{count} file{'s' * (count > 1)} passed over, by ending: {listed(passed_over)}"


def refuse_unreadable(found: Iterable[Unreadable]) -> None:
    """Raise ``UserError`` naming the first of ``found``, if there is one."""
    for path, reason in found:
        raise UserError(f"image {path} cannot be read ({reason}); replace or remove it, or set data.on_error=skip")


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


def spread_indices(total: int, count: int) -> list[int]:
    """At most ``count`` indices spread evenly over ``total``."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def read_some(source: ImageSource, count: int) -> list[Pixels]:
    """At most ``count`` images spread over ``source``. Raises ``UserError`` where none of those tried can be read."""
    starts = [*spread_indices(len(source), count), len(source)]
    images: list[Pixels] = []
    problems: list[Unreadable] = []
    for start, stop in pairwise(starts):
        for index in range(start, min(stop, start + MOST_IN_A_ROW)):
            try:
                images.append(source.read(index))
                break
            except UnreadableImage as error:
                problems.append(error.unreadable)
    if not images:
        raise UserError(
            f"none of {len(problems)} images tried can be read; the first, {problems[0].path}: {problems[0].reason}"
        )
    return images


def check_all(source: ImageSource, *, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Decode every image; what ``data.on_error=raise`` does before a run starts. Raises ``UserError`` at the first bad
    one."""

    def problem(index: int) -> Unreadable | None:
        try:
            source.read(index)
        except UnreadableImage as error:
            return error.unreadable
        return None

    for done, bad in enumerate(in_threads(problem, len(source)), start=1):
        if bad is not None:
            refuse_unreadable([bad])
        if on_progress is not None:
            on_progress(done, len(source))


def in_threads(function: Callable[[int], Found], count: int, *, threads: int = 4, chunk: int = 256) -> Iterator[Found]:
    """``function`` of 0 .. count - 1, in order, some at once; never much further than what has been taken.

    Each call runs in a copy of the context, so that ``notes_taken`` around this sees what the threads note.
    """
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, chunk):
            places = range(start, min(start + chunk, count))
            contexts = (copy_context() for _ in places)
            yield from pool.map(lambda context, place: context.run(function, place), contexts, places)


class Statistics(NamedTuple):
    """Mean and standard deviation per channel, of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics_of(data: ImagesConfig, weights: Mapping[str, Any] | None = None) -> Statistics:
    """What the metadata of the weights says (their encoder expects such pixels), else the configuration, else
    ImageNet's.

    Raises ``UserError`` where the configuration contradicts the weights, and where neither states the numbers and the
    images do not have ImageNet's channels.
    """
    mean, std = DEFAULT_STATISTICS.get(data.channels, ((), ()))
    found = {"mean": data.mean or mean, "std": data.std or std}
    for name in found:
        theirs = tuple((weights or {}).get(name) or found[name])
        if getattr(data, name) not in (None, theirs):
            raise UserError(
                f"data.{name}={found[name]} was asked for, but the weights were trained with "
                f"{theirs}; leave data.{name} out"
            )
        if not theirs:
            raise UserError(
                f"there is no default {name} for {data.channels} channels; run mae data-stats on the images "
                "and set data.mean and data.std to its result"
            )
        found[name] = theirs
    return Statistics(**found)
