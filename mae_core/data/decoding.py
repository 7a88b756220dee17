"""From the bytes of one image file to pixels: pictures, TIFF of 8, 16 and 32 bits, NumPy arrays; 1 to 16 channels."""

from __future__ import annotations

import logging
import math
import re
import stat
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mae_core.data.deep_pictures import read_deep
from mae_core.data.jpeg import JPEG, read_jpeg
from mae_core.data.orientation import UPRIGHT, orientation_in, upright
from mae_core.data.reading import ALPHA, ReadAs, Reading, note, reading_of, turned
from mae_core.data.tiff import read_tiff

Pixels: TypeAlias = Image.Image | Tensor
"""A PIL image of mode L or RGB, or a tensor (C, H, W): uint8, or float32 where a channel has more than 8 bits or
some pixels have no data, which are NaN (see ``fill_no_data``).

Unsigned integers become 0..1 by the range of their type, so that 16 bits keep theirs; signed integers and floats stay
as they are. torchvision's transforms take both.
"""

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""ITU-R 601, as Pillow weighs red, green and blue."""

STRETCH = (2, 98)
"""Percentiles shown as black and white where numbers are no picture by themselves."""

_NUMPY, _TIFFS = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LARGEST = 1e18
"""Values of a larger size overflow float32 where they are squared, as every loss on pixels does."""

LARGEST_PIXEL = 1e9
"""Size of a standardised pixel from which on it is no picture's: squared and summed it leaves no digits of others."""

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said by UnreadableImage


class Unreadable(NamedTuple):
    """An image file that could not be used, and why."""

    path: str
    reason: str


class UnreadableImage(Exception):
    """Raised by the functions of this module that read; carries the ``Unreadable``."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)
        self.unreadable = Unreadable(str(path), reason)


def read_image(path: Path, read_as: ReadAs) -> Pixels:
    """The pixels of a file in the channels asked for: 1 is greyscale, 3 is RGB, any other number is as stored.

    ``None`` is as stored too. Pictures are upright, as the orientation tag of EXIF or TIFF says. Grey becomes RGB and
    RGB grey, alpha is left out unless a fourth (second) channel is asked for; no other number of channels is made of
    another. Raises ``UnreadableImage`` for a file that is no image, is truncated or too large (see ``Reading``), has
    other channels or colours, or holds NaN, infinity or numbers above ``LARGEST`` that no tag declares as no data.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableImage(path, "not a regular file")
        with path.open("rb") as file:
            return decode_image(file, str(path), read_as)
    except OSError as error:
        raise UnreadableImage(path, _first_line(error)) from None


def read_content(path: Path) -> bytes:
    """The bytes of a file. Raises ``UnreadableImage`` where it is missing or no regular file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableImage(path, "not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(path, _first_line(error)) from None


def decode_image(file: BinaryIO, name: str, read_as: ReadAs) -> Pixels:
    """Like ``read_image``, of an open file that can seek; ``name`` is for the error."""
    reading = reading_of(read_as)
    if reading.max_pixels > 2 * (Image.MAX_IMAGE_PIXELS or reading.max_pixels):
        Image.MAX_IMAGE_PIXELS = reading.max_pixels  # asked for, and never lowered: other threads may be reading
    try:
        head = file.read(12)
        file.seek(0)
        pixels = _jpeg(file, reading) if head.startswith(JPEG) else None
        if pixels is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = _as_stored(file, head, reading)
        pixels = with_channels(pixels, reading.channels)
        return to_tensor(pixels) if reading.tensors else pixels
    except UnidentifiedImageError:
        raise UnreadableImage(name, "not an image") from None
    except Image.DecompressionBombError as error:
        pixels = max(map(int, re.findall(r"\d+", str(error))), default=0)
        raise UnreadableImage(
            name, f"it has {pixels} pixels, more than data.max_pixels allows; set data.max_pixels={pixels} to read it"
        ) from None
    except Exception as error:  # decoders answer damaged files with errors of any kind
        raise UnreadableImage(name, _first_line(error)) from None


def decode_bytes(content: bytes, name: str, read_as: ReadAs) -> Pixels:
    """Like ``read_image``, of the content of a file."""
    return decode_image(BytesIO(content), name, read_as)


def to_tensor(pixels: Pixels) -> Tensor:
    """(C, H, W), uint8 or float32; of a picture with its channels last in memory, as torch resizes it fastest."""
    return pixels if isinstance(pixels, Tensor) else _channels_first(np.array(pixels))


def _channels_first(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def to_picture(pixels: Pixels) -> Image.Image:
    """Something to look at: a PIL image as it is; of a tensor the first three bands (the first of two), each from its
    2nd to its 98th percentile."""
    if isinstance(pixels, Image.Image):
        return pixels
    bands: Tensor = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    low, high = np.nanpercentile(bands.numpy(), STRETCH, axis=(1, 2), keepdims=True)
    values = np.nan_to_num(np.clip((bands.numpy() - low) / np.maximum(high - low, 1e-12), 0, 1))
    return F.to_pil_image(torch.from_numpy((values * 255).round().astype(np.uint8)))


def fill_no_data(pixels: Pixels, values: Sequence[float]) -> Pixels:
    """Pixels without data as a value per channel, such as the mean, which becomes 0 when it is standardised."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or not bool(pixels.isnan().any()):
        return pixels
    return torch.where(pixels.isnan(), torch.tensor(values, dtype=pixels.dtype)[:, None, None], pixels)


def usable(pixels: Tensor, name: Path | str) -> Tensor:
    """Standardised ``pixels`` (C, H, W) as they are. Raises ``UnreadableImage`` where one is not finite or larger than
    ``LARGEST_PIXEL``."""
    largest = float(pixels.abs().max()) if pixels.numel() else 0.0
    if not largest <= LARGEST_PIXEL:
        raise UnreadableImage(name, TOO_LARGE.format(largest))
    return pixels


TOO_LARGE = "its pixels reach {:.2g} after standardising with mean and std, too large to compute with"


def size_of(pixels: Pixels) -> tuple[int, int]:
    """(height, width)."""
    height, width = F.get_size(pixels)
    return height, width


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def with_channels(pixels: Pixels, channels: int | None) -> Pixels:
    """``pixels`` in the channels asked for. Raises ``ValueError`` where they cannot be made of those that are there."""
    if not isinstance(pixels, Tensor):
        if channels in (1, 3):
            return pixels.convert("L" if channels == 1 else "RGB")
        if channels is None and pixels.mode in ("L", "RGB"):
            return pixels
        pixels = to_tensor(pixels)
    if len(pixels) == 1 and channels == 3:
        return pixels.repeat(3, 1, 1)
    if len(pixels) == 3 and channels == 1:
        grey = torch.tensordot(torch.tensor(GREY_WEIGHTS), pixels.float(), dims=1)[None]
        return grey if pixels.is_floating_point() else grey.round().to(torch.uint8)
    if channels not in (None, len(pixels)):
        raise ValueError(f"it has {len(pixels)} channels, data.channels is {channels}")
    return pixels


def _as_stored(file: BinaryIO, head: bytes, reading: Reading) -> Pixels:
    """All bands of a file; the channels asked for only say which axis of an array they may be."""
    if head.startswith(_NUMPY):
        return from_array(_load_array(file, reading), reading.channels)
    if head.startswith(_TIFFS):
        tiff = read_tiff(file, reading)
        if isinstance(tiff, Image.Image):
            with tiff:
                return from_picture(tiff, reading)
        return _turned(from_planes(tiff.planes, tiff.bits), tiff.orientation)
    with Image.open(file) as image:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a phone's photo with its preview
        if frames > 1 and reading.pages != "first":
            raise ValueError(f"it holds {frames} frames; set data.pages=first to read the first alone")
        reading.check_size(image.height, image.width)
        deep = read_deep(file, image)
        if deep is None:
            return from_picture(image, reading)
        orientation = orientation_in(image)
    planes = np.moveaxis(deep, -1, 0) if deep.ndim == 3 else deep[None]
    if len(planes) in (2, 4) and reading.channels != len(planes):
        note(ALPHA)
        planes = planes[:-1]
    return _turned(from_planes(planes), orientation)


def _jpeg(file: BinaryIO, reading: Reading) -> Pixels | None:
    """See ``read_jpeg``; a tensor where one is asked for in the channels that there are."""
    found = read_jpeg(file, reading)
    if found is None:
        return None
    stored = found.pixels
    if reading.tensors and reading.channels in (None, stored.shape[2]):
        return _turned(_channels_first(stored), found.orientation)
    return _turned(Image.fromarray(stored[:, :, 0] if stored.shape[2] == 1 else stored), found.orientation)


def _load_array(file: BinaryIO, reading: Reading) -> np.ndarray:
    """A .npy file, whose header is compared with its size before memory is taken. Raises ``ValueError``."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    start = file.tell()
    there, named = file.seek(0, 2) - start, math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and named > there:
        raise ValueError(f"its header names {named} bytes of numbers, the file has {there}; it is damaged or cut off")
    if len(shape) in (2, 3):
        smallest = min(shape) if len(shape) == 3 else 1
        reading.check_size(math.prod(shape) // max(1, smallest), 1, smallest)
    file.seek(0)
    array: np.ndarray = np.load(file, allow_pickle=False)
    return array


def from_picture(image: Image.Image, reading: Reading) -> Pixels:
    """The pixels of an opened picture, upright, with its alpha where so many channels are asked for.

    Raises ``ValueError`` where it is too large or has colours that are not read.
    """
    reading.check_size(image.height, image.width)
    in_file = orientation_in(image)
    image.load()
    left = orientation_in(image)  # none of TIFF, which Pillow has turned
    if left == UPRIGHT != in_file:
        note(turned(in_file))
    return _turned(_pixels_of(image, reading), left)


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    if orientation != UPRIGHT:
        note(turned(orientation))
    return upright(pixels, orientation)


def _pixels_of(image: Image.Image, reading: Reading) -> Pixels:
    mode = image.mode
    if mode.startswith("I"):  # 16 bits in a PNG or PGM; Pillow calls them I;16 or I
        return from_array(np.asarray(image).astype(np.uint16), None)
    if mode == "F":
        return from_array(np.asarray(image), None)
    alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if mode == "P":  # through RGBA where a colour of the palette is transparent: Pillow asks for that
        image = image.convert("RGBA") if alpha else image.convert("RGB")
    if alpha and reading.channels == len(image.getbands()) and mode != "P":
        return image.copy()
    if alpha and image.mode != "L":
        note(ALPHA)
    if image.mode in ("L", "1", "LA", "La"):
        return image.convert("L")
    if image.mode in ("LAB", "HSV"):
        raise ValueError(f"its colours are {image.mode}; save it as RGB or grey")
    return image.convert("RGB")


def from_array(array: np.ndarray, channels: int | None) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) -> (C, H, W); see ``Pixels`` for the type and ``read_image`` for the errors."""
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"an array {tuple(array.shape)} of {array.dtype}; numbers (H, W), (H, W, C) or (C, H, W) are needed"
        )
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, _channel_axis(array.shape, channels), 0)
    values = from_planes(planes)
    if bool(values.isnan().any()):
        raise ValueError("it holds NaN; replace them, or save it as TIFF with the tag GDAL_NODATA=nan")
    return values


def _channel_axis(shape: tuple[int, ...], channels: int | None) -> int:
    """The last axis where it is as long as asked, else the first where that is, else the shorter of the two."""
    for axis in (2, 0):
        if shape[axis] == channels:
            return axis
    return 0 if shape[0] < shape[2] else 2


def from_planes(planes: np.ndarray, bits: int | None = None) -> Tensor:
    """(C, H, W): uint8 as it is; wider unsigned integers as shares of the largest that ``bits`` (or else their type)
    can be; the rest as it is, in float32, NaN where it was.

    Raises ``ValueError`` for numbers that cannot be computed with.
    """
    if planes.dtype == np.uint8 and bits in (None, 8):
        return torch.from_numpy(np.ascontiguousarray(planes))
    if planes.dtype.kind == "u":
        values = planes / (2 ** (bits or 8 * planes.dtype.itemsize) - 1)
    elif planes.dtype.kind in "bif":
        values = planes
    else:
        raise ValueError(f"its numbers are {planes.dtype}; whole numbers or floats are needed")
    size = np.nanmax(np.abs(values), initial=0) if values.dtype.kind == "f" else 0
    if size > LARGEST:
        raise ValueError(
            f"it holds {'infinite values' if np.isinf(size) else f'the value {size:.2g}'}, too large to compute with; "
            "where it marks missing data, say so with the tag GDAL_NODATA, or replace it"
        )
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
