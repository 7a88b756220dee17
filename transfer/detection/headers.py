"""What an image file says of itself, decoded or not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mae_core.data.decoding import read_image, size_of, to_tensor


class Header(NamedTuple):
    """Height and width in pixels, and channels as stored."""

    height: int
    width: int
    channels: int


def header_of(path: Path, channels: int | None = None) -> Header:
    """From the header of a picture; of other files, and of TIFF whose channels Pillow does not know, from the pixels,
    decoded with ``channels`` as in ``read_image``.

    Raises ``UnreadableImage`` for a file that is no image. A picture that is cut after its header is not found.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.format != "TIFF":
                    return Header(image.height, image.width, 3 if image.mode == "P" else len(image.getbands()))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        pass  # no picture for Pillow: an array, or nothing
    return header_of_pixels(path, channels)


def header_of_pixels(path: Path, channels: int | None = None) -> Header:
    """The same of a file that is decoded whole. Raises ``UnreadableImage`` for one that is no image, or is cut."""
    pixels = to_tensor(read_image(path, channels))
    return Header(*size_of(pixels), len(pixels))
