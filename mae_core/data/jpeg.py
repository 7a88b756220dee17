"""JPEG straight through libjpeg-turbo: by simplejpeg (the extra ``fast``) where it is installed, else by Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from types import ModuleType
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from mae_core.data.orientation import ON_THEIR_SIDE, UPRIGHT, orientation_in
from mae_core.data.reading import Reading

try:
    import simplejpeg

    LIBRARY: ModuleType | None = simplejpeg
except ImportError:
    LIBRARY = None

JPEG = b"\xff\xd8\xff"
_PLAIN = ("YCbCr", "Gray", "RGB")
_APP1, _SCAN = 0xE1, 0xDA

ChooseFactor: TypeAlias = Callable[[int, int], int]
"""(height, width) of an upright image -> 1, 2, 4 or 8: decode to one so many-th of each side."""
_choose: ContextVar[ChooseFactor | None] = ContextVar("choose_factor", default=None)


@contextmanager
def scaled_decoding(choose: ChooseFactor) -> Iterator[None]:
    """Decode the JPEGs that are read inside at the scale that ``choose`` gives for their size, which libjpeg does in
    its inverse transform (ITU-T T.81): a side becomes its part rounded up. Other files are read in whole."""
    token = _choose.set(choose)
    try:
        yield
    finally:
        _choose.reset(token)


def describe_decoder() -> str:
    """Which library decodes JPEG, for the start of a run."""
    if LIBRARY is not None:
        return f"simplejpeg {LIBRARY.__version__}"
    return f"Pillow {Image.__version__}; pip install 'mae-transfer[fast]' for simplejpeg, which is faster"


class Jpeg(NamedTuple):
    """pixels (H, W, 3) or (H, W, 1) uint8 as they are stored, and how they lie."""

    pixels: np.ndarray
    orientation: int


def read_jpeg(file: BinaryIO, reading: Reading) -> Jpeg | None:
    """The picture in an open file, which is left at its start; None for what is left to Pillow: other colours, damage,
    and all whole pictures where simplejpeg is missing. Raises ``ValueError`` for an image that is too large."""
    choose = _choose.get()
    if LIBRARY is None and choose is None:
        return None
    content = file.read()
    file.seek(0)
    if LIBRARY is None:
        assert choose is not None
        return _drafted(content, reading, choose)
    try:
        height, width, colours, _ = LIBRARY.decode_jpeg_header(content)
    except ValueError:
        return None
    if colours not in _PLAIN:
        return None
    reading.check_size(height, width)
    orientation = _orientation(content)
    factor = _factor(height, width, orientation, choose)
    try:
        pixels = LIBRARY.decode_jpeg(
            content,
            "GRAY" if colours == "Gray" and reading.channels != 3 else "RGB",
            min_height=-(-height // factor),
            min_width=-(-width // factor),
            min_factor=factor,
        )
    except ValueError:  # Pillow reads some damaged files, and says what is wrong with the others
        return None
    return Jpeg(pixels, orientation)


def _drafted(content: bytes, reading: Reading, choose: ChooseFactor) -> Jpeg | None:
    """The same by Pillow's draft mode."""
    with Image.open(BytesIO(content)) as image:
        if image.mode not in ("RGB", "L"):
            return None
        width, height = image.size
        reading.check_size(height, width)
        orientation = orientation_in(image)
        factor = _factor(height, width, orientation, choose)
        if factor > 1:
            image.draft(image.mode, (max(1, width // factor), max(1, height // factor)))
        pixels = np.array(image.convert("RGB") if reading.channels == 3 else image)
    return Jpeg(pixels if pixels.ndim == 3 else pixels[:, :, None], orientation)


def _factor(height: int, width: int, orientation: int, choose: ChooseFactor | None) -> int:
    if choose is None:
        return 1
    return choose(width, height) if orientation in ON_THEIR_SIDE else choose(height, width)


def _orientation(content: bytes) -> int:
    """What EXIF or XMP say, which only a segment APP1 can hold; Pillow reads it."""
    if not _has_app1(content):
        return UPRIGHT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(content)) as image:
                return orientation_in(image)
    except Exception:  # what Pillow cannot open and libjpeg can has no orientation that anyone could read
        return UPRIGHT


def _has_app1(content: bytes) -> bool:
    """Whether a segment APP1 comes before the first scan, or the segments are not where they should be."""
    place = 2
    while content[place : place + 1] == b"\xff" and place + 4 <= len(content):
        marker = content[place + 1]
        if marker in (_APP1, _SCAN):
            return marker == _APP1
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return True
