"""Folders of images and label maps: pairing, class names, and a check that finds what would break a training later.

A label map is a one-channel image of the same size as its image; a pixel's value is its class, 255 means ignored. With
``reduce_zero_label`` the value 0 is ignored as well and the classes count from 1, as in ADE20K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mae_core.data.images import IMAGE_SUFFIXES, Unreadable
from mae_core.errors import UserError, first_line

IGNORED = 255
MOST_CHECKED = 2000
MOST_NAMED = 20
ONE_CHANNEL_MODES = ("1", "L", "P", "I", "I;16")


class LabelledImage(NamedTuple):
    """An image file and its label map."""

    image: Path
    label_map: Path


@dataclass(frozen=True)
class LabelCheck:
    """What a check saw.

    pixels   (num_classes,) int64, pixels of each class
    ignored  pixels without a class
    checked  pairs read, of ``total``
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


def pair_files(images: Path | str, label_maps: Path | str, *, map_suffix: str = ".png") -> list[LabelledImage]:
    """Every image below ``images`` with the label map of the same relative name below ``label_maps``, sorted; hidden
    files are left out.

    Raises ``UserError`` for a missing folder, a folder without images and images without a label map.
    """
    images, label_maps = Path(images), Path(label_maps)
    for what, folder in (("image", images), ("label map", label_maps)):
        if not folder.is_dir():
            raise UserError(
                f"{what} folder {folder} does not exist; set data_root to the folder with images/ and annotations/"
            )
    found = sorted(
        path
        for path in images.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(images).parts)
    )
    if not found:
        raise UserError(f"image folder {images} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); set data_root")
    pairs = [LabelledImage(path, label_maps / path.relative_to(images).with_suffix(map_suffix)) for path in found]
    check_maps_exist(pairs)
    return pairs


def check_maps_exist(pairs: Sequence[LabelledImage]) -> None:
    """Raise ``UserError`` with the number and the first of the images that have no label map."""
    without = [pair for pair in pairs if not pair.label_map.is_file()]
    if without:
        raise UserError(
            f"{len(without)} of {len(pairs)} images have no label map, such as {without[0].image}, whose map would be "
            f"{without[0].label_map}; add the maps or take the images out"
        )


def read_classes(path: Path | str, *, reduce_zero_label: bool) -> list[str]:
    """Class names from lines of ``value<TAB>name``, ordered by value; value 0 is left out when it is ignored.

    Raises ``UserError`` for a missing file, another layout, or values with gaps.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"class file {path} does not exist; write a line value<TAB>name for each class")
    names: dict[int, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        value, _, name = line.partition("\t")
        if not line.strip():
            continue
        if not value.strip().isdigit() or not name.strip() or int(value) in names:
            raise UserError(f"{path}, line {number}: {line!r} is not value<TAB>name with a value of its own")
        names[int(value)] = name.strip()
    first = 1 if reduce_zero_label else 0
    if reduce_zero_label:
        names.pop(0, None)
    if sorted(names) != list(range(first, first + len(names))):
        raise UserError(f"{path} names the values {sorted(names)}; they must run from {first} without gaps")
    return [names[value] for value in sorted(names)]


def check_label_maps(
    pairs: Sequence[LabelledImage],
    num_classes: int,
    *,
    reduce_zero_label: bool,
    seed: int = 0,
    most: int = MOST_CHECKED,
    on_error: str = "skip",
) -> LabelCheck:
    """Read every pair, or a seeded sample of ``most``, as the training will.

    An image that cannot be read is listed, or refused with ``on_error="raise"``. Raises ``UserError`` for the first
    label map (in order) that cannot be read, is not a one-channel map, differs in size from its image or holds a value
    that is no class, and where no image can be read.
    """
    if on_error not in ("skip", "raise"):
        raise UserError(f"on_error is {on_error!r}; set it to skip or raise")
    chosen = list(pairs)
    if len(chosen) > most:
        picks = np.random.default_rng(seed).choice(len(chosen), size=most, replace=False)
        chosen = [pairs[index] for index in sorted(picks)]
    first = 1 if reduce_zero_label else 0
    counts: np.ndarray = np.zeros(256, dtype=np.int64)
    unreadable: list[Unreadable] = []
    for pair in chosen:
        labels = _read_label_map(pair.label_map)
        try:
            _check_size(pair, labels)
        except _BadImage as error:
            if on_error == "raise":
                raise UserError(
                    f"image {pair.image} cannot be read ({error}); mend or remove it, or set on_error=skip"
                ) from None
            unreadable.append(Unreadable(str(pair.image), str(error)))
        values, pixels = np.unique(labels, return_counts=True)
        allowed = (values >= 0) & ((values < first + num_classes) | (values == IGNORED))
        if not allowed.all():
            raise UserError(_out_of_range(pair.label_map, values[~allowed], num_classes, reduce_zero_label))
        if not unreadable or unreadable[-1].path != str(pair.image):
            counts[values] += pixels
    if len(unreadable) == len(chosen):
        raise UserError(
            f"none of the {len(chosen)} images can be read, such as {unreadable[0].path} ({unreadable[0].reason}); "
            "set data_root to a folder of images"
        )
    classes = counts[first : first + num_classes]
    if not classes.any():
        raise UserError(
            f"every pixel of the {len(chosen)} label maps beside {pairs[0].label_map} is ignored; "
            "check reduce_zero_label and the folder"
        )
    return LabelCheck(classes, int(counts.sum() - classes.sum()), len(chosen), len(pairs), tuple(unreadable))


def _out_of_range(path: Path, values: np.ndarray, num_classes: int, reduce_zero_label: bool) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    first = 1 if reduce_zero_label else 0
    zero = ", 0 = ignored" if reduce_zero_label else ""
    return (
        f"label map {path} holds the value {shown}{', ...' if len(values) > 5 else ''}, but num_classes={num_classes} "
        f"allows {first}..{first + num_classes - 1}{zero} and {IGNORED} = ignored; correct the map, num_classes or "
        "reduce_zero_label"
    )


class _BadImage(Exception):
    """An image cannot be decoded; says why."""


def _check_size(pair: LabelledImage, labels: np.ndarray) -> None:
    """Raise ``UserError`` unless the image is as large as its label map, and ``_BadImage`` where it cannot be read."""
    try:
        with Image.open(pair.image) as image:
            image.load()
            width, height = ImageOps.exif_transpose(image).size  # mmcv turns images as their EXIF tag says
    except Exception as error:  # Pillow's decoders raise what they like
        raise _BadImage(first_line(error)) from None
    if labels.shape != (height, width):
        raise UserError(
            f"image {pair.image} has {height}x{width} pixels and its label map {pair.label_map} "
            f"{labels.shape[0]}x{labels.shape[1]}; give both the same size"
        )


def _read_label_map(path: Path) -> np.ndarray:
    """Label values (H, W), int64."""
    try:
        with Image.open(path) as label_map:
            mode, labels = label_map.mode, np.asarray(label_map)
    except Exception as error:
        raise UserError(f"label map {path} cannot be read ({error}); replace it or take it out") from None
    if mode not in ONE_CHANNEL_MODES:
        raise UserError(f"label map {path} is a colour picture (mode {mode}); write one channel that holds the classes")
    return labels.astype(np.int64)
