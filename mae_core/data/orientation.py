"""How a photo lies in its file: the orientation tag of EXIF and TIFF, and the pixels turned upright and back."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image
from torch import Tensor

UPRIGHT = 1
ON_THEIR_SIDE = frozenset({5, 6, 7, 8})
"""Orientations whose stored pixels have height and width exchanged."""

_TAG = 274  # 0x0112, Orientation: of TIFF 6.0, section 8, which EXIF 2.3 takes over
_BACK = {6: 8, 8: 6}  # the other orientations undo themselves
_MIRRORED_ROWS, _MIRRORED_COLUMNS = frozenset({3, 4, 7, 8}), frozenset({2, 3, 6, 7})
_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(pixels: Image.Image | Tensor, orientation: int) -> Image.Image | Tensor:
    """Stored pixels, a picture or (..., H, W), turned upright as ``orientation`` says; without an effect for 1 and
    for values that the standard does not have."""
    if orientation not in _METHODS:
        return pixels
    if not isinstance(pixels, Tensor):
        return pixels.transpose(_METHODS[orientation])
    turned = pixels.transpose(-2, -1) if orientation in ON_THEIR_SIDE else pixels
    axes = [axis for axis, mirrored in ((-2, _MIRRORED_ROWS), (-1, _MIRRORED_COLUMNS)) if orientation in mirrored]
    return turned.flip(axes).contiguous()


def as_stored(pixels: Image.Image | Tensor, orientation: int) -> Image.Image | Tensor:
    """The inverse of ``upright``."""
    return upright(pixels, _BACK.get(orientation, orientation))


def orientation_in(image: Image.Image) -> int:
    """What the tag of an opened picture says, 1 to 8; 1 where there is none, or one that cannot be read.

    Pillow turns TIFF by itself as it loads them, and takes the tag away: afterwards this is 1.
    """
    try:
        value = image.tag_v2.get(_TAG) if hasattr(image, "tag_v2") else image.getexif().get(_TAG)
    except Exception:  # a damaged block of EXIF ends in errors of any kind, and the picture may be sound
        return UPRIGHT
    return value if value in _METHODS else UPRIGHT


def orientation_of(path: Path) -> int:
    """The same of a file; 1 where it is not an image that Pillow or tifffile can open."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return orientation_in(image)
    except Exception:  # channels that Pillow has no mode for; an array; no image at all
        return _orientation_of_tiff(path)


def _orientation_of_tiff(path: Path) -> int:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            return orientation_of_page(tiff)
    except Exception:
        return UPRIGHT


def orientation_of_page(tiff: object) -> int:
    """The tag of the first page of a ``tifffile.TiffFile``, 1 to 8."""
    value = tiff.pages[0].tags.valueof(_TAG, UPRIGHT)  # type: ignore[attr-defined]
    return int(value) if value in _METHODS else UPRIGHT
