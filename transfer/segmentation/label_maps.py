"""Folders of images and label maps: pairing, class names, reading.

A label map is a one-channel image of the same size as its image; a pixel's value is its class, 255 means ignored. With
``reduce_zero_label`` the value 0 is ignored as well and the classes count from 1, as in ADE20K.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mae_core.data.images import IMAGE_SUFFIXES
from mae_core.errors import UserError
from mae_core.texts import read_lines

IGNORED = 255
ONE_CHANNEL_MODES = ("1", "L", "P", "I", "I;16")


class LabelledImage(NamedTuple):
    """An image file and its label map."""

    image: Path
    label_map: Path


def pair_files(images: Path | str, label_maps: Path | str, *, map_suffix: str = ".png") -> list[LabelledImage]:
    """Every image below ``images`` with the label map of the same relative name below ``label_maps``, sorted; hidden
    files are left out.

    Raises ``UserError`` for a missing folder, a folder without images and images without a label map.
    """
    pairs = possible_pairs(images, label_maps, map_suffix=map_suffix)
    check_maps_exist(pairs)
    return pairs


def possible_pairs(images: Path | str, label_maps: Path | str, *, map_suffix: str = ".png") -> list[LabelledImage]:
    """As ``pair_files``; the label maps may be missing."""
    images, label_maps = Path(images), Path(label_maps)
    for what, folder in (("image", images), ("label map", label_maps)):
        if not folder.is_dir():
            raise UserError(
                f"{what} folder {folder} does not exist; set data_root to the folder with images/ and annotations/"
            )
    found = files_below(images)
    if not found:
        raise UserError(f"image folder {images} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); set data_root")
    return [
        LabelledImage(path, label_maps / f"{path.relative_to(images).with_suffix('')}{map_suffix}") for path in found
    ]


def files_below(folder: Path) -> list[Path]:
    """Image files at any depth, sorted, hidden ones left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


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
    for number, line in enumerate(read_lines(path), start=1):
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


def read_label_map(path: Path) -> np.ndarray:
    """Label values (H, W), int64, upright as images are. Raises ``UserError`` for a broken file and for a colour
    picture."""
    try:
        with path.open("rb") as file, Image.open(file) as label_map:  # Pillow garbles TIFF on their side by their name
            mode, labels = label_map.mode, np.asarray(ImageOps.exif_transpose(label_map))
    except Exception as error:
        raise UserError(f"label map {path} cannot be read ({error}); replace it or take it out") from None
    if mode not in ONE_CHANNEL_MODES:
        raise UserError(f"label map {path} is a colour picture (mode {mode}); write one channel that holds the classes")
    return labels.astype(np.int64)
