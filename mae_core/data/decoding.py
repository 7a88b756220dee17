"""From the bytes of one image file to pixels: pictures, TIFF of 8, 16 and 32 bits, NumPy arrays; 1 to 16 channels."""

from __future__ import annotations

import logging
import struct
import warnings
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mae_core.data.orientation import orientation_in, orientation_of_page, upright

Pixels: TypeAlias = Image.Image | Tensor
"""A PIL image of mode L or RGB, or a tensor (C, H, W): uint8, or float32 where a channel has more than 8 bits.

Unsigned integers become 0..1 by the range of their type, so that 16 bits keep theirs; signed integers and floats stay
as they are. torchvision's transforms take both.
"""

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""ITU-R 601, as Pillow weighs red, green and blue."""

STRETCH = (2, 98)
"""Percentiles shown as black and white where numbers are no picture by themselves."""

_NUMPY, _TIFFS = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS_PER_SAMPLE, _SAMPLES, _SAMPLE_FORMAT = 258, 277, 339

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


def read_image(path: Path, channels: int | None) -> Pixels:
    """The pixels of a file in ``channels`` channels: 1 is greyscale, 3 is RGB, any other number is as stored.

    ``None`` is as stored too. Pictures are upright, as the orientation tag of EXIF or TIFF says. Grey becomes RGB and
    RGB grey; no other number of channels is made of another. Raises ``UnreadableImage`` for a file that is no image, is
    truncated, has other channels, or holds NaN or infinity.
    """
    try:
        with path.open("rb") as file:
            return decode_image(file, str(path), channels)
    except OSError as error:
        raise UnreadableImage(path, _first_line(error)) from None


def decode_image(file: BinaryIO, name: str, channels: int | None) -> Pixels:
    """Like ``read_image``, of an open file that can seek; ``name`` is for the error."""
    try:
        head = file.read(8)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return with_channels(_as_stored(file, head, channels), channels)
    except UnidentifiedImageError:
        raise UnreadableImage(name, "not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(name, _first_line(error)) from None


def decode_bytes(content: bytes, name: str, channels: int | None) -> Pixels:
    """Like ``read_image``, of the content of a file."""
    return decode_image(BytesIO(content), name, channels)


def to_tensor(pixels: Pixels) -> Tensor:
    """(C, H, W), uint8 or float32."""
    return pixels if isinstance(pixels, Tensor) else F.pil_to_tensor(pixels)


def to_picture(pixels: Pixels) -> Image.Image:
    """Something to look at: a PIL image as it is; of a tensor the first three bands (the first of two), each from its
    2nd to its 98th percentile."""
    if not isinstance(pixels, Tensor):
        return pixels
    bands = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    low, high = np.percentile(bands.numpy(), STRETCH, axis=(1, 2), keepdims=True)
    values = np.clip((bands.numpy() - low) / np.maximum(high - low, 1e-12), 0, 1)
    return F.to_pil_image(torch.from_numpy((values * 255).round().astype(np.uint8)))


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
        pixels = F.pil_to_tensor(pixels)
    if len(pixels) == 1 and channels == 3:
        return pixels.repeat(3, 1, 1)
    if len(pixels) == 3 and channels == 1:
        grey = torch.tensordot(torch.tensor(GREY_WEIGHTS), pixels.float(), dims=1)[None]
        return grey if pixels.is_floating_point() else grey.round().to(torch.uint8)
    if channels not in (None, len(pixels)):
        raise ValueError(f"it has {len(pixels)} channels, data.channels is {channels}")
    return pixels


def _as_stored(file: BinaryIO, head: bytes, channels: int | None) -> Pixels:
    """All bands of a file; ``channels`` only says which axis of an array they may be."""
    if head.startswith(_NUMPY):
        return _from_array(np.load(file, allow_pickle=False), channels)
    if head.startswith(_TIFFS):
        return _read_tiff(file, channels)
    with Image.open(file) as image:
        return _from_picture(image)


def _from_picture(image: Image.Image) -> Pixels:
    image.load()
    return upright(_pixels_of(image), orientation_in(image))


def _pixels_of(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16 bits in a PNG or PGM; Pillow calls them I;16 or I
        return _from_array(np.asarray(image).astype(np.uint16), None)
    if image.mode == "F":
        return _from_array(np.asarray(image), None)
    if image.mode == "P":  # through RGBA where a colour of the palette is transparent: Pillow asks for that
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image.copy()


def _read_tiff(file: BinaryIO, channels: int | None) -> Pixels:
    """One picture of 8 bits a channel through Pillow, which knows all compressions; all else through tifffile."""
    try:
        with Image.open(file) as image:
            bits, kinds = (image.tag_v2.get(tag, (1,)) for tag in (_BITS_PER_SAMPLE, _SAMPLE_FORMAT))
            whole = image.tag_v2.get(_SAMPLES, 1) == len(image.getbands()) and getattr(image, "n_frames", 1) == 1
            if max(bits) <= 8 and set(kinds) == {1} and whole:
                return _from_picture(image)
    except (UnidentifiedImageError, TypeError, KeyError, IndexError, struct.error):
        pass  # channels that Pillow has no mode for, or a damaged directory
    file.seek(0)
    import tifffile

    try:
        with tifffile.TiffFile(file) as tiff:
            array, orientation = tiff.asarray(), orientation_of_page(tiff)
    except MemoryError:
        raise ValueError("damaged TIFF: its header names a size that does not fit into memory") from None
    except Exception as error:  # a damaged directory ends in errors of any kind
        raise ValueError(f"not a TIFF that can be read: {_first_line(error)}") from None
    return upright(_from_array(array, channels), orientation)


def _from_array(array: np.ndarray, channels: int | None) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) -> (C, H, W); see ``Pixels`` for the type and ``read_image`` for the errors."""
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"an array {tuple(array.shape)} of {array.dtype}; numbers (H, W), (H, W, C) or (C, H, W) are needed"
        )
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, _channel_axis(array.shape, channels), 0)
    return torch.from_numpy(np.ascontiguousarray(_in_range(planes)))


def _channel_axis(shape: tuple[int, ...], channels: int | None) -> int:
    """The last axis where it is as long as asked, else the first where that is, else the shorter of the two."""
    for axis in (2, 0):
        if shape[axis] == channels:
            return axis
    return 0 if shape[0] < shape[2] else 2


def _in_range(planes: np.ndarray) -> np.ndarray:
    """uint8 as it is; wider unsigned integers as shares of their type's range; the rest as it is, in float32."""
    if planes.dtype == np.uint8:
        return planes
    if planes.dtype.kind == "u":
        return (planes / np.iinfo(planes.dtype).max).astype(np.float32)
    with np.errstate(over="ignore"):
        values: np.ndarray = planes.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values; replace them, for example by the channel's mean")
    return values
