"""Faults in folders of images and label maps, found in seconds, before a training meets them after hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_core.data.check import Problem
from mae_core.data.decoding import UnreadableImage, size_of
from mae_core.data.images import Unreadable
from mae_core.data.orientation import ON_THEIR_SIDE, orientation_of
from mae_core.errors import UserError
from transfer.segmentation.label_coding import LabelCoding, Names, coding_mistake
from transfer.segmentation.label_maps import Colour, LabelledImage, files_below, missing_maps, read_label_map
from transfer.segmentation.pixels import WrongChannels, read_pixels

MOST_CHECKED = 2000
MOST_NAMED = 8
READERS_ABREAST = 8
MEANING = "the meaning of the values"


@dataclass(frozen=True)
class LabelCheck:
    """What a check saw.

    pixels      (num_classes,) int64, pixels of each class
    ignored     pixels without a class
    checked     pairs read, of ``total``
    unreadable  images that cannot be read and are left out
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
    """What one pair holds: pixels by label value (none where it is not to be counted), what is wrong with it, the
    palette's colours of these values, and the image where it cannot be read."""

    values: dict[int, int]
    problems: list[Problem]
    colours: dict[int, Colour]
    unreadable: Unreadable | None = None


class Survey(NamedTuple):
    """What many pairs hold: pixels by label value, everything that is wrong, how many pairs were read, and the images
    that cannot be."""

    values: Counter[int]
    problems: list[Problem]
    checked: int
    unreadable: list[Unreadable]


def survey(
    pairs: Sequence[LabelledImage],
    coding: LabelCoding,
    *,
    channels: int = 3,
    seed: int = 0,
    most: int = MOST_CHECKED,
    names: Names = "unknown",
) -> Survey:
    """Read every pair, or a seeded sample of ``most``, and list all that is wrong, in the order of the pairs.

    channels  of the encoder
    names     where those of the classes come from
    """
    chosen = list(pairs)
    if len(chosen) > most:
        picks = np.random.default_rng(seed).choice(len(chosen), size=most, replace=False)
        chosen = [pairs[index] for index in sorted(picks)]
    values: Counter[int] = Counter()
    problems: list[Problem] = []
    unreadable: list[Unreadable] = []
    colours: dict[int, tuple[Colour, Path]] = {}
    with ThreadPoolExecutor(READERS_ABREAST) as pool:
        for pair, found in zip(chosen, pool.map(lambda pair: read_pair(pair, coding, channels), chosen), strict=True):
            values.update(found.values)
            problems += found.problems
            unreadable += [found.unreadable] if found.unreadable is not None else []
            problems += other_palettes(pair.label_map, found.colours, colours)
    mistake = coding_mistake(values, coding, names=names)
    if mistake is not None:
        problems.append(Problem(MEANING, mistake))
    if not any(problem.severity == "refused" for problem in problems):
        problems += _nothing_to_learn(chosen, values, unreadable, coding)
    return Survey(values, problems, len(chosen), unreadable)


def _nothing_to_learn(
    pairs: Sequence[LabelledImage], values: Counter[int], unreadable: Sequence[Unreadable], coding: LabelCoding
) -> Iterator[Problem]:
    """A problem where no image can be read, or every pixel is ignored."""
    if pairs and len(unreadable) == len(pairs):
        sentence = (
            f"none of the {len(pairs)} images can be read, such as {unreadable[0].path} ({unreadable[0].reason}); "
            "set data_root to a folder of images"
        )
        yield Problem("no image", sentence)
    elif pairs and not any(values[value] for entry in coding.classes for value in entry):
        sentence = (
            f"every pixel of the {len(pairs)} label maps beside {pairs[0].label_map} is ignored; "
            "check reduce_zero_label and the folder"
        )
        yield Problem("no labelled pixel", sentence)


def other_palettes(
    path: Path, colours: Mapping[int, Colour], known: MutableMapping[int, tuple[Colour, Path]]
) -> Iterator[Problem]:
    """A problem where the palette of a label map gives a value another colour than a file before; fills ``known``."""
    for value, colour in colours.items():
        expected, first = known.setdefault(value, (colour, path))
        if colour != expected:
            told = (
                f"label map {path} has another palette than {first}: the value {value} is {colour}, not "
                f"{expected}, and may be another class; write all with one palette, or in grey if the values "
                "are right"
            )
            yield Problem("palettes that differ", told, str(path))
            return


def read_pair(pair: LabelledImage, coding: LabelCoding, channels: int) -> Reading:
    """Read an image and its label map as a training would."""
    try:
        label_map = read_label_map(pair.label_map)
    except UserError as error:
        return Reading({}, [Problem("unreadable label maps", str(error), str(pair.label_map))], {})
    problems, labels, unreadable = [], label_map.values, None
    found, counts = np.unique(labels, return_counts=True)
    values = dict(zip(found.tolist(), counts.tolist(), strict=True))
    try:
        height, width = size_of(read_pixels(pair.image, channels))
        if labels.shape != (height, width):
            sizes = f"{height}x{width} pixels and its label map {pair.label_map} {labels.shape[0]}x{labels.shape[1]}"
            turned = labels.shape == (width, height) and orientation_of(pair.image) in ON_THEIR_SIDE
            remedy = "turn the map as its image's orientation tag says" if turned else "give both the same size"
            problems.append(Problem("different sizes", f"image {pair.image} has {sizes}; {remedy}", str(pair.image)))
    except WrongChannels as error:
        problems.append(Problem("images with other channels", str(error), str(pair.image)))
    except UnreadableImage as error:
        unreadable = error.unreadable
        sentence = f"image {pair.image} cannot be read ({unreadable.reason}); repair or remove it"
        problems.append(Problem("unreadable images", sentence, str(pair.image), "wrong"))
        values = {}
    if wrong := coding.unknown(found.tolist()):
        refusal = coding.refusal(pair.label_map, wrong)
        problems.append(Problem("values that are no class", refusal, str(pair.label_map)))
    return Reading(values, problems, label_map.colours(), unreadable)


def stray_maps(pairs: Sequence[LabelledImage], images: Path, label_maps: Path) -> Iterator[Problem]:
    """The names that do not match, from both sides."""
    for pair, sentence in missing_maps(pairs):
        yield Problem("images without a label map", sentence, str(pair.image))
    wanted = {pair.label_map for pair in pairs}
    for path in files_below(label_maps):
        if path not in wanted:
            told = f"label map {path} has no image of the same name below {images}; add it, or remove the map"
            yield Problem("label maps without an image", told, str(path), "wrong")


def check_label_maps(
    pairs: Sequence[LabelledImage],
    coding: LabelCoding,
    *,
    channels: int = 3,
    seed: int = 0,
    most: int = MOST_CHECKED,
    on_error: str = "skip",
    names: Names = "unknown",
) -> LabelCheck:
    """What ``survey`` says, for a training: an image that cannot be read is listed, or refused with
    ``on_error="raise"``.

    Raises ``UserError`` for the first thing that is wrong with a label map, where the values mean something else, and
    where no image can be read.
    """
    if on_error not in ("skip", "raise"):
        raise UserError(f"on_error is {on_error!r}; set it to skip or raise")
    values, problems, checked, unreadable = survey(pairs, coding, channels=channels, seed=seed, most=most, names=names)
    if unreadable and on_error == "raise":
        path, reason = unreadable[0]
        raise UserError(f"image {path} cannot be read ({reason}); repair or remove it, or set on_error=skip")
    refused = [problem for problem in problems if problem.severity == "refused"]
    if refused:
        meaning = next((problem for problem in refused if problem.kind == MEANING), None)
        hint = f"; {meaning.sentence}" if meaning is not None and meaning is not refused[0] else ""
        others = len(refused) - 1 - bool(hint)
        more = f" ({others} more like it; mae check labels lists them)" if others else ""
        raise UserError(refused[0].sentence + hint + more)
    classes = np.array([sum(values[value] for value in entry) for entry in coding.classes], dtype=np.int64)
    return LabelCheck(classes, values.total() - int(classes.sum()), checked, len(pairs), tuple(unreadable))
