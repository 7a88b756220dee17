"""Pictures of more than 8 bits a channel that Pillow would reduce to 8: PNG and PPM read in full, others named."""

from __future__ import annotations

import importlib.util
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

_HEADER = 8192
"""Bytes in which JPEG 2000 and AVIF say their depth."""


def read_deep(file: BinaryIO, image: ImageFile.ImageFile) -> np.ndarray | None:
    """(H, W, C) of 16 bits, or float64 in 0..1, of an opened picture in ``file`` whose channels have more than 8 bits;
    None where Pillow keeps all bits.

    Raises ``ValueError`` for formats of which it cannot.
    """
    if image.format == "PNG" and image.tile and str(image.tile[0].args).endswith(";16B"):
        return _png(file, str(image.tile[0].args))
    if image.format == "PPM" and image.mode == "RGB" and image.tile:
        return _ppm(file, image)
    if image.format == "JPEG2000" and not image.mode.startswith("I;16"):
        return _jpeg_2000(file)
    if image.format == "AVIF":
        file.seek(0)
        header = file.read(_HEADER)
        place = header.find(b"av1C")  # AV1 Codec ISO Media File Format Binding, 2.3.3: bit high_bitdepth
        if 0 <= place < len(header) - 6 and header[place + 6] & 0x40:
            raise ValueError("its 10 or 12 bits per channel would be reduced to 8; save it as 16-bit PNG or TIFF")
    return None


def _png(file: BinaryIO, stored: str) -> np.ndarray | None:
    """Pillow's decoder with other readers of the same bytes: those of RGB with big- and with little-endian numbers take
    the first and the second byte of each; grey and alpha of 16 bits are the four bytes of RGBA."""
    if stored in ("RGB;16B", "RGBA;16B"):
        first, second = (_decoded_as(file, stored[:-1] + end) for end in "BL")
        return first * 256 + second
    if stored == "LA;16B":
        data = _decoded_as(file, "RGBA")
        return data[..., ::2] * 256 + data[..., 1::2]
    return None  # grey: all bits are kept


def _decoded_as(file: BinaryIO, rawmode: str) -> np.ndarray:
    file.seek(0)
    image = Image.open(file)
    image.tile = [tile._replace(args=rawmode) for tile in image.tile]
    return np.asarray(image).astype(np.uint16)


def _ppm(file: BinaryIO, image: ImageFile.ImageFile) -> np.ndarray | None:
    codec, _, offset, arguments = image.tile[0]
    largest = arguments[-1] if isinstance(arguments, tuple) else 255
    if not isinstance(largest, int) or largest <= 255:
        return None
    if codec != "ppm":
        raise ValueError("its numbers are written as text and have more than 8 bits; save it as PNG or TIFF")
    file.seek(offset)
    count = image.height * image.width * 3
    content = file.read(2 * count)
    if len(content) < 2 * count:
        raise ValueError("image file is truncated")
    shares: np.ndarray = np.frombuffer(content, dtype=">u2").reshape(image.height, image.width, 3) / largest
    return shares


def _jpeg_2000(file: BinaryIO) -> np.ndarray | None:
    file.seek(0)
    content = file.read(_HEADER)
    place = content.find(b"\xff\x4f\xff\x51")  # SOC and SIZ, ISO 15444-1 A.5.1; the depth of a component at 40 of SIZ
    bits = (content[place + 42] & 0x7F) + 1 if 0 <= place < len(content) - 42 else 8
    if bits <= 8:
        return None
    if importlib.util.find_spec("imagecodecs") is None:
        raise ValueError(
            f"its {bits} bits per channel need imagecodecs; run: pip install 'mae-transfer[tiff]', or save it as PNG"
        )
    import imagecodecs

    file.seek(0)
    data = np.asarray(imagecodecs.jpeg2k_decode(file.read()))
    shares: np.ndarray = data / (2**bits - 1)
    return shares
