"""Size, channels and orientation of an image file, decoded or not, and whether they match the record of a json."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mae_core.data.decoding import read_image, size_of, to_tensor
from mae_core.data.orientation import ON_THEIR_SIDE, UPRIGHT, orientation_in, orientation_of


class Header(NamedTuple):
    """Height and width in pixels of the upright picture, channels as stored, and the orientation tag, 1 to 8."""

    height: int
    width: int
    channels: int
    orientation: int = UPRIGHT

    def annotated_as_stored(self, height: int, width: int) -> bool:
        """Whether a json's sides are those of the stored pixels and not of the upright picture: its boxes were drawn
        without regard to the tag, and fit the pixels as they are stored."""
        turned = self.orientation in ON_THEIR_SIDE and self.height != self.width
        return turned and (height, width) == (self.width, self.height)


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
                    orientation = orientation_in(image)
                    height, width = image.size if orientation in ON_THEIR_SIDE else image.size[::-1]
                    channels_there = 3 if image.mode == "P" else len(image.getbands())
                    return Header(height, width, channels_there, orientation)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        pass  # no picture for Pillow: an array, or nothing
    return header_of_pixels(path, channels)


def header_of_pixels(path: Path, channels: int | None = None) -> Header:
    """The same of a file that is decoded whole. Raises ``UnreadableImage`` for one that is no image, or is cut."""
    pixels = to_tensor(read_image(path, channels))
    return Header(*size_of(pixels), len(pixels), orientation_of(path))
