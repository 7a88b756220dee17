"""Folders of images and label maps: pairing, class names, and the one reader of label maps.

A label map is a one-channel image of the same size as its image; what its values mean is said by a ``LabelCoding``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mae_core.data.images import IMAGE_SUFFIXES
from mae_core.data.orientation import UPRIGHT, orientation_in, orientation_of_page, upright
from mae_core.errors import UserError, first_line
from mae_core.texts import read_lines

ONE_CHANNEL_MODES = ("1", "L", "P", "I", "F")
MOST_COMPARED = 2000
"""Names that are compared to find the suffix of label maps."""
LOSSY = {"JPEG", "MPO", "JPEG2000"}
"""Formats of Pillow's whose compression changes values."""
LOSSY_IN_TIFF = {6, 7, 33003, 33004, 33005, 34712, 34887}
"""TIFF's numbers for JPEG, JPEG 2000 and LERC."""
WIDENED = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies the values of PNG with 2 and 4 bits by, so that they span a byte."""

Colour = tuple[int, int, int]


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
    missing = missing_maps(pairs)
    if missing:
        more = f" ({len(missing) - 1} more like it; mae check labels lists them)" if len(missing) > 1 else ""
        raise UserError(missing[0][1] + more)


def missing_maps(pairs: Sequence[LabelledImage]) -> list[tuple[LabelledImage, str]]:
    """The images that have no label map, each with a sentence that says which suffix would match, where one would."""
    missing = [pair for pair in pairs if not pair.label_map.is_file()]
    wanted = {pair.label_map for pair in pairs}
    beside: dict[Path, list[str]] = {}
    suffixes: Counter[str] = Counter()
    for pair in missing[:MOST_COMPARED]:
        folder, stem = pair.label_map.parent, pair.image.stem
        if folder not in beside:
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            found = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path not in wanted]
            beside[folder] = [path.name for path in found[:MOST_COMPARED]]
        suffixes.update(
            name[len(stem) :]
            for name in beside[folder]
            if name.startswith(stem) and name != stem and not name[len(stem)].isalnum()
        )
    ((suffix, count),) = suffixes.most_common(1) or [("", 0)]
    remedy = f"set seg_map_suffix={suffix}" if count > len(missing) / 2 else "add it, or remove the image"
    return [(pair, f"image {pair.image} has no label map {pair.label_map}; {remedy}") for pair in missing]


def read_classes(
    path: Path | str, values: Sequence[int] | None = None, *, reduce_zero_label: bool = False
) -> list[str]:
    """Class names from lines of ``value<TAB>name``, ordered as ``values``, the value of each class in the label maps.

    Without ``values`` they count from 0, or from 1 with ``reduce_zero_label``, where a name of the value 0 is left out.
    Raises ``UserError`` for a missing file, another layout, and values without a name or without a class.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"class file {path} does not exist; write a line value<TAB>name for each class")
    names: dict[int, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
        value, _, name = line.partition("\t")
        if not line.strip():
            continue
        if not value.strip().removeprefix("-").isdigit() or not name.strip() or int(value) in names:
            raise UserError(f"{path}, line {number}: {line!r} is not value<TAB>name with a unique value")
        if name.strip() in names.values():
            raise UserError(
                f"{path}, line {number}: a second class {name.strip()!r}; give it another name, or join the values of "
                "one class with label_values=[[0,1],2]"
            )
        names[int(value)] = name.strip()
    if values is not None:
        if missing := [value for value in values if value not in names]:
            named = f"names the values {sorted(names)}, and label_values holds {missing[0]} too"
            raise UserError(f"{path} {named}; write a line {missing[0]}<TAB>name")
        return [names[value] for value in values]
    first = 1 if reduce_zero_label else 0
    if reduce_zero_label:
        names.pop(0, None)
    if sorted(names) != list(range(first, first + len(names))):
        raise UserError(f"{path} names the values {sorted(names)}; they must run from {first} without gaps")
    return [names[value] for value in sorted(names)]


class LabelMap(NamedTuple):
    """What a file of labels holds.

    values   (H, W) int64, as stored: the index of a palette, not its colour; upright as images are
    palette  the colour of each index, None where there is no palette
    """

    values: np.ndarray
    palette: tuple[Colour, ...] | None = None

    def colours(self) -> dict[int, Colour]:
        """The palette's colours of the values that occur."""
        palette = self.palette or ()
        return {value: palette[value] for value in np.unique(self.values).tolist() if 0 <= value < len(palette)}


def read_label_map(path: Path) -> LabelMap:
    """The label map in a PNG, TIFF, PGM, BMP or .npy file: integers of any width, 1 to 64 bits, and whole numbers that
    are stored as floats.

    Raises ``UserError`` for a broken file and for what holds no classes: a colour picture, fractions, several pages,
    lossy compression.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            head = file.read(8)
        read = _from_array if head.startswith(b"\x93NUMPY") else _from_tiff if head[:4] in TIFF_MARKS else _from_picture
        values, palette = read(path)
    except UserError:
        raise
    except Exception as error:  # Pillow's and tifffile's decoders raise what they like
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"label map {path} cannot be read ({reason}); replace or remove it") from None
    return LabelMap(_whole_numbers(path, values), palette)


TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _from_array(path: Path) -> tuple[np.ndarray, None]:
    values = np.load(path, allow_pickle=False)
    _check_plane(path, values.shape)
    return values.reshape(_plane(values.shape)), None


def _from_picture(path: Path) -> tuple[np.ndarray, tuple[Colour, ...] | None]:
    with path.open("rb") as file, Image.open(file) as image:
        if image.format in LOSSY:
            raise UserError(_lossy(path, str(image.format)))
        if not image.mode.startswith(ONE_CHANNEL_MODES) or image.mode.endswith(("a", "A")) or "LAB" in image.mode:
            raise UserError(_colour(path, f"mode {image.mode}", image))
        _check_pages(path, getattr(image, "n_frames", 1))
        (_, _, _, arguments), *_ = image.tile
        found = image.getpalette("RGB") if image.mode == "P" else None
        palette = tuple(zip(found[::3], found[1::3], found[2::3], strict=True)) if found else None
        return _turned(_as_stored(np.asarray(image), image.mode, arguments), orientation_in(image)), palette


def _as_stored(values: np.ndarray, mode: str, arguments: Any) -> np.ndarray:
    """Undo what Pillow does to few bits: it spreads the values of PNG with 2 or 4 bits, and of PGM with another maximum
    than 255 and 65535, over the range of 8 or 16 bits."""
    if arguments in WIDENED:
        return values // WIDENED[arguments]
    if isinstance(arguments, tuple) and len(arguments) == 2 and mode in ("L", "I"):
        most, full = arguments[1], 255 if mode == "L" else 65535
        return np.rint(values * (most / full)).astype(np.int64)
    return values


def _from_tiff(path: Path) -> tuple[np.ndarray, tuple[Colour, ...] | None]:
    """The stored numbers, whatever the photometric interpretation says about black and white."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        _check_pages(path, sum(not other.is_reduced for other in tiff.pages))
        if page.samplesperpixel != 1:
            raise UserError(_colour(path, f"{page.samplesperpixel} channels", None))
        if page.compression in LOSSY_IN_TIFF:
            raise UserError(_lossy(path, tifffile.COMPRESSION(page.compression).name))
        _check_plane(path, page.shape)
        table = page.colormap
        palette = tuple((int(r), int(g), int(b)) for r, g, b in (table // 257).T) if table is not None else None
        try:
            return _turned(page.asarray().reshape(_plane(page.shape)), orientation_of_page(tiff)), palette
        except ValueError as error:  # a compression that needs the package imagecodecs
            with path.open("rb") as file, Image.open(file) as image:  # which turns the pixels by itself
                if (image.mode == "L" and page.photometric != 1) or not image.mode.startswith(ONE_CHANNEL_MODES):
                    raise error
                return np.asarray(image), palette


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == UPRIGHT:
        return values
    return upright(torch.from_numpy(values.astype(np.int64)), orientation).numpy()  # type: ignore[union-attr]


def _plane(shape: Sequence[int]) -> tuple[int, int]:
    height, width = [side for side in shape if side != 1] if len(shape) > 2 else shape
    return height, width


def _check_plane(path: Path, shape: Sequence[int]) -> None:
    wide = [side for side in shape if side != 1] if len(shape) > 2 else shape
    if len(wide) != 2:
        raise UserError(f"label map {path} has the shape {tuple(shape)}; write one channel, (height, width)")


def _check_pages(path: Path, number: int) -> None:
    if number > 1:
        raise UserError(f"label map {path} has {number} pages; write one page to a file")


def _lossy(path: Path, kind: str) -> str:
    return f"label map {path} is compressed with loss ({kind}), which changes its values; write the classes as PNG"


def _colour(path: Path, what: str, image: Image.Image | None) -> str:
    """Why a picture of several channels is no label map, and what to do."""
    remedy = "write one channel that holds the classes"
    if image is not None and image.mode in ("RGB", "RGBA", "LA"):
        planes = np.asarray(image)
        if all(np.array_equal(planes[..., 0], planes[..., index]) for index in range(1, min(planes.shape[2], 3))):
            remedy = "its channels are equal, so write one of them, in Pillow image.getchannel(0)"
    return f"label map {path} is a colour picture ({what}); {remedy}"


def _whole_numbers(path: Path, values: np.ndarray) -> np.ndarray:
    """int64. Raises ``UserError`` for fractions, NaN and what is not a number."""
    if values.dtype.kind not in "buif":
        raise UserError(f"label map {path} holds {values.dtype}, not numbers; write one channel of integers")
    if values.dtype.kind == "f":
        wrong = values[~(np.isfinite(values) & (values == np.rint(values)))]
        if wrong.size:
            raise UserError(
                f"label map {path} holds the value {wrong[0]:g}; a class is a whole number, so write integers"
            )
    return values.astype(np.int64)
