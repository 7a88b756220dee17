"""What is wrong with folders of images and label maps: found in seconds, before a training meets it after hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mae_core.data.images import Unreadable
from mae_core.errors import UserError, first_line
from transfer.segmentation.label_maps import IGNORED, LabelledImage, files_below, read_label_map

MOST_CHECKED = 2000
MOST_NAMED = 8
READERS_ABREAST = 8
Names = Literal["unknown", "dataset", "written"]
UNREADABLE_IMAGE = "unreadable images"
KINDS = (
    "images without a label map",
    "label maps without an image",
    UNREADABLE_IMAGE,
    "unreadable label maps",
    "different sizes",
    "values that are no class",
    "the zero label",
)
"""What can be wrong, in the order of the report."""


class Problem(NamedTuple):
    """One thing that is wrong: a kind of ``KINDS``, the file, and a sentence with the remedy."""

    kind: str
    path: str
    sentence: str


@dataclass(frozen=True)
class LabelCheck:
    """What a check saw.

    pixels      (num_classes,) int64, pixels of each class
    ignored     pixels without a class
    checked     pairs read, of ``total``
    unreadable  images that cannot be read and are to be left out
    """

    pixels: np.ndarray
    ignored: int
    checked: int
    total: int
    unreadable: tuple[Unreadable, ...] = ()

    def describe(self, classes: Sequence[str]) -> str:
        """One sentence: how many pairs, which classes never occur, the share of ignored pixels."""
        missing = [name for name, count in zip(classes, self.pixels, strict=True) if not count]
        which = "all" if self.checked == self.total else f"{self.checked} of"
        share = self.ignored / max(self.ignored + int(self.pixels.sum()), 1)
        absent = f"; never labelled: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}" if missing else ""
        maps = f"{which} {self.total} label maps fit {len(classes)} classes"
        named = ", ".join(f"{path} ({reason})" for path, reason in self.unreadable[:MOST_NAMED])
        more = ", ..." if len(self.unreadable) > MOST_NAMED else ""
        skipped = f"; {len(self.unreadable)} unreadable images left out: {named}{more}" if named else ""
        return f"{maps}, {share:.1%} of their pixels are ignored{absent}{skipped}"


class Reading(NamedTuple):
    """What one pair holds: pixels by label value (none where it is not to be counted), and what is wrong with it."""

    values: dict[int, int]
    problems: list[Problem]


class Survey(NamedTuple):
    """What many pairs hold: pixels by label value, everything that is wrong, and how many pairs were read."""

    values: Counter[int]
    problems: list[Problem]
    checked: int


def survey(
    pairs: Sequence[LabelledImage],
    num_classes: int,
    *,
    reduce_zero_label: bool,
    seed: int = 0,
    most: int = MOST_CHECKED,
    names: Names = "unknown",
) -> Survey:
    """Read every pair, or a seeded sample of ``most``, and list all that is wrong, in the order of the pairs.

    names  where those of the classes come from: nobody has named them (``unknown``), the ``dataset``'s type fixes them,
           or the user has ``written`` them down one by one
    """
    chosen = list(pairs)
    if len(chosen) > most:
        picks = np.random.default_rng(seed).choice(len(chosen), size=most, replace=False)
        chosen = [pairs[index] for index in sorted(picks)]
    values: Counter[int] = Counter()
    problems: list[Problem] = []
    with ThreadPoolExecutor(READERS_ABREAST) as pool:
        for found in pool.map(lambda pair: read_pair(pair, num_classes, reduce_zero_label), chosen):
            values.update(found.values)
            problems += found.problems
    mistake = zero_label_mistake(values, num_classes, reduce_zero_label, names=names)
    if mistake is not None:
        problems.append(Problem(KINDS[-1], "", mistake))
    return Survey(values, problems, len(chosen))


def read_pair(pair: LabelledImage, num_classes: int, reduce_zero_label: bool) -> Reading:
    """Read an image and its label map as a training would."""
    try:
        labels = read_label_map(pair.label_map)
    except UserError as error:
        return Reading({}, [Problem("unreadable label maps", str(pair.label_map), str(error))])
    problems = []
    found, counts = np.unique(labels, return_counts=True)
    values = dict(zip(found.tolist(), counts.tolist(), strict=True))
    try:
        with Image.open(pair.image) as image:
            image.load()
            width, height = ImageOps.exif_transpose(image).size  # mmcv turns images as their EXIF tag says
        if labels.shape != (height, width):
            sizes = f"{height}x{width} pixels and its label map {pair.label_map} {labels.shape[0]}x{labels.shape[1]}"
            told = f"image {pair.image} has {sizes}; give both the same size"
            problems.append(Problem("different sizes", str(pair.image), told))
    except Exception as error:  # Pillow's decoders raise what they like
        problems.append(Problem(UNREADABLE_IMAGE, str(pair.image), first_line(error)))
        values = {}
    last = num_classes - 1 + reduce_zero_label
    wrong = [value for value in found.tolist() if not (0 <= value <= last or value == IGNORED)]
    if wrong:
        told = _out_of_range(pair.label_map, wrong, num_classes, reduce_zero_label)
        problems.append(Problem("values that are no class", str(pair.label_map), told))
    return Reading(values, problems)


def zero_label_mistake(
    values: Collection[int], num_classes: int, reduce_zero_label: bool, *, names: Names = "unknown"
) -> str | None:
    """A sentence where ``reduce_zero_label`` seems to be the wrong way round for the ``values`` that occur, else None.

    Kept though every value is in range: with the flag wrongly set, each class would silently be trained as its
    neighbour, or not at all. Where the type of the data set names the classes, a rare last one may be absent: it takes
    all of the others to occur. See ``survey`` for ``names``.
    """
    present = set(values) - {IGNORED}
    if not present:
        return None
    if not reduce_zero_label and max(present) == num_classes:
        return (
            f"the values run from {min(present)} to {num_classes}, one more than the {num_classes} classes: "
            "if 0 is void, as in ADE20K, set reduce_zero_label=True; if it is a class, set "
            f"num_classes={num_classes + 1}"
        )
    as_classes = max(present) == num_classes - 1 if names == "unknown" else present == set(range(num_classes))
    if reduce_zero_label and 0 in present and as_classes and names != "written":
        return (
            f"the values run from 0 to {num_classes - 1}, as many as there are classes: with reduce_zero_label=True, 0 "
            "would be ignored and the last class never occur; set reduce_zero_label=False, or num_classes="
            f"{num_classes - 1} if 0 is void, or name the classes in classes.txt if this is meant"
        )
    return None


def stray_maps(pairs: Sequence[LabelledImage], images: Path, label_maps: Path, map_suffix: str) -> Iterator[Problem]:
    """The names that do not match, from both sides; says which suffix would match them, where one would."""
    wanted = {pair.label_map for pair in pairs}
    strays = [path for path in files_below(label_maps) if path not in wanted]
    missing = [pair for pair in pairs if not pair.label_map.is_file()]
    suffixes: Counter[str] = Counter()
    for pair in missing[:MOST_CHECKED]:
        stem = pair.image.relative_to(images).with_suffix("").as_posix()
        names = [path.relative_to(label_maps).as_posix() for path in strays[:MOST_CHECKED]]
        suffixes.update(
            name.removeprefix(stem) for name in names if name.startswith(stem) and not name[len(stem)].isalnum()
        )
    ((suffix, count),) = suffixes.most_common(1) or [("", 0)]
    remedy = f"set seg_map_suffix={suffix}" if count > len(missing) / 2 else "add it, or take the image out"
    for pair in missing:
        told = f"image {pair.image} has no label map; it would be {pair.label_map}; {remedy}"
        yield Problem("images without a label map", str(pair.image), told)
    for path in strays:
        told = f"label map {path} has no image of its name below {images}; add it, or take the map out"
        yield Problem("label maps without an image", str(path), told)


def check_label_maps(
    pairs: Sequence[LabelledImage],
    num_classes: int,
    *,
    reduce_zero_label: bool,
    seed: int = 0,
    most: int = MOST_CHECKED,
    on_error: str = "skip",
    names: Names = "unknown",
) -> LabelCheck:
    """What ``survey`` says, for a training: an image that cannot be read is listed, or refused with
    ``on_error="raise"``.

    Raises ``UserError`` for the first thing that is wrong with a label map, where the zero label is wrong, and where no
    image can be read.
    """
    if on_error not in ("skip", "raise"):
        raise UserError(f"on_error is {on_error!r}; set it to skip or raise")
    values, problems, checked = survey(
        pairs, num_classes, reduce_zero_label=reduce_zero_label, seed=seed, most=most, names=names
    )
    unreadable = [
        Unreadable(problem.path, problem.sentence) for problem in problems if problem.kind == UNREADABLE_IMAGE
    ]
    zero = next((problem for problem in problems if problem.kind == KINDS[-1]), None)
    for problem in problems:
        if problem.kind == UNREADABLE_IMAGE:
            if on_error == "raise":
                raise UserError(
                    f"image {problem.path} cannot be read ({problem.sentence}); mend or remove it, or set on_error=skip"
                )
            continue
        others = sum(other.kind != UNREADABLE_IMAGE for other in problems) - 1 - (zero is not None)
        more = f" ({others} more like it; check_data.py lists them)" if others > 0 else ""
        hint = f"; {zero.sentence}" if zero is not None and problem is not zero else ""
        raise UserError(problem.sentence + hint + more)
    if len(unreadable) == checked:
        raise UserError(
            f"none of the {checked} images can be read, such as {unreadable[0].path} ({unreadable[0].reason}); "
            "set data_root to a folder of images"
        )
    first = 1 if reduce_zero_label else 0
    classes = np.array([values[value] for value in range(first, first + num_classes)], dtype=np.int64)
    if not classes.any():
        raise UserError(
            f"every pixel of the {checked} label maps beside {pairs[0].label_map} is ignored; "
            "check reduce_zero_label and the folder"
        )
    return LabelCheck(classes, values.total() - int(classes.sum()), checked, len(pairs), tuple(unreadable))


def _out_of_range(path: Path, values: Sequence[int], num_classes: int, reduce_zero_label: bool) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    first = 1 if reduce_zero_label else 0
    zero = ", 0 = ignored" if reduce_zero_label else ""
    return (
        f"label map {path} holds the value {shown}{', ...' if len(values) > 5 else ''}, but num_classes={num_classes} "
        f"allows {first}..{first + num_classes - 1}{zero} and {IGNORED} = ignored; correct the map, num_classes or "
        "reduce_zero_label"
    )
