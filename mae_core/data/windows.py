"""Windows of images that are too large to be read whole: TIFF of tiles or strips, and NumPy arrays on disk.

Only the tiles or strips below a window are decoded; the last used ones are kept. A file of another kind, or whose
pixels cannot be read in parts, is read whole, once.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from mae_core.data.decoding import (
    Pixels,
    UnreadableImage,
    from_array,
    from_planes,
    read_image,
    size_of,
    to_picture,
    to_tensor,
    with_channels,
)
from mae_core.data.given import AnyImage, pixels_of
from mae_core.data.orientation import UPRIGHT, orientation_of_page
from mae_core.data.reading import ReadAs, Reading, reading_of
from mae_core.data.tiff import JPEG, MASK_OR_OVERVIEW, as_meant, check_stored, plain_colours
from mae_core.errors import UserError, first_line

KEPT = 256 * 2**20
"""Bytes of decoded tiles or strips that are kept."""
TIFF_SUFFIXES, ARRAY_SUFFIX = (".tif", ".tiff"), ".npy"
OVERVIEW = 2048
"""Longest side of the picture that a large image is shown as."""


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The first row below it."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The first column to the right of it."""
        return self.left + self.width


class WindowedImage:
    """An image of (``height``, ``width``) pixels in memory; sub-classes read it from disk."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels
        self.height, self.width = size_of(pixels)

    def read(self, window: Window) -> Pixels:
        """The pixels of a window that lies in the image. Raises ``UnreadableImage``."""
        if isinstance(self._pixels, Tensor):
            return self._pixels[:, window.top : window.bottom, window.left : window.right].clone()
        return self._pixels.crop((window.left, window.top, window.right, window.bottom))


class _ArrayFile(WindowedImage):
    """A .npy file, mapped."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        array = self._open()
        self.height, self.width = (int(side) for side in array.shape[:2])

    def _open(self) -> np.ndarray:
        array: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] > min(array.shape[:2])):
            raise ValueError(f"an array {array.shape}; windows need (H, W) or (H, W, C)")
        return array

    def read(self, window: Window) -> Pixels:
        """See ``WindowedImage``; the file is mapped anew, so that no page of it stays in memory."""
        part = np.array(self._open()[window.top : window.bottom, window.left : window.right])
        try:
            return with_channels(from_array(part, part.shape[2] if part.ndim == 3 else None), self.reading.channels)
        except ValueError as error:
            raise UnreadableImage(self.path, str(error)) from None


class _TiffFile(WindowedImage):
    """A TIFF of one page. Raises ``ValueError`` where it cannot be read in parts."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self._process, self._first, self._tiff = 0, cast(Any, None), cast(Any, None)
        self._kept: OrderedDict[int, tuple[np.ndarray, tuple[int, ...]]] = OrderedDict()
        page = self._page()
        if not plain_colours(page):
            raise ValueError("its colours are not stored as grey or RGB")
        if page.imagedepth > 1 or orientation_of_page(page.parent) != UPRIGHT:
            raise ValueError("it is turned, or a volume")
        check_stored(page, page.parent)
        self._separate, _, self.height, self.width, self._samples = (int(n) for n in page.shaped)
        self._rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, self.height)
        self._cols = page.tilewidth if page.is_tiled else self.width
        reading.check_size(self._rows, self._cols, self._samples)
        self._plain = page.compression == 1 and page.is_contiguous and self._separate == 1 and page.bitspersample >= 8

    def _page(self) -> Any:
        """The page; opened anew in a process that was forked: two would move the position of one file."""
        if self._process != os.getpid():
            import tifffile

            tiff = tifffile.TiffFile(self.path)
            pages = [page for page in tiff.pages if not getattr(page, "subfiletype", 0) & MASK_OR_OVERVIEW]
            if len(pages) != 1 or len(tiff.series) > 1 + len(tiff.pages) - len(pages):
                raise ValueError("it has several pages")
            self._process, self._first, self._tiff = os.getpid(), pages[0], tiff
        return self._first

    def read(self, window: Window) -> Pixels:
        """See ``WindowedImage``."""
        page = self._page()
        try:
            planes = self._rows_of(window) if self._plain else self._segments_of(window)
            pixels = _as_picture(from_planes(*as_meant(planes, page, self.reading)))
            return with_channels(pixels, self.reading.channels)
        except UnreadableImage:
            raise
        except Exception as error:  # decoders answer damaged files with errors of any kind
            raise UnreadableImage(self.path, first_line(error)) from None

    def _rows_of(self, window: Window) -> np.ndarray:
        """(C, height, width) of samples that lie in the file one after another."""
        page, file = self._first, self._tiff.filehandle
        dtype = np.dtype(page.dtype).newbyteorder(self._tiff.byteorder)
        found = np.empty((window.height, window.width, self._samples), dtype)
        size = self._samples * dtype.itemsize
        for row in range(window.height):
            file.seek(page.dataoffsets[0] + ((window.top + row) * self.width + window.left) * size)
            found[row] = np.frombuffer(file.read(window.width * size), dtype).reshape(found.shape[1:])
        return np.moveaxis(found.astype(page.dtype), -1, 0)

    def _segments_of(self, window: Window) -> np.ndarray:
        """(C, height, width) from the tiles or strips below the window."""
        found = np.zeros((self._separate, window.height, window.width, self._samples), self._first.dtype)
        for index in self._below(window):
            segment, (plane, _, top, left, _) = self._segment(index)
            up, down = max(window.top, top), min(window.bottom, top + segment.shape[0])
            start, stop = max(window.left, left), min(window.right, left + segment.shape[1])
            if up < down and start < stop:
                found[plane, up - window.top : down - window.top, start - window.left : stop - window.left] = segment[
                    up - top : down - top, start - left : stop - left
                ]
        return np.moveaxis(found, -1, 1).reshape(-1, window.height, window.width)

    def _below(self, window: Window) -> Iterator[int]:
        """The numbers of the segments that a window touches."""
        across, down = -(-self.width // self._cols), -(-self.height // self._rows)
        for plane in range(self._separate):
            for row in range(window.top // self._rows, -(-window.bottom // self._rows)):
                for col in range(window.left // self._cols, -(-window.right // self._cols)):
                    yield (plane * down + row) * across + col

    def _segment(self, index: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """A decoded tile or strip (rows, cols, samples), and where it lies."""
        if index not in self._kept:
            page, file = self._first, self._tiff.filehandle
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index]) if page.databytecounts[index] else None
            more = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEG else {}
            decoded, position, shape = page.decode(data, index, **more)
            if decoded is None:  # a segment that was never written
                decoded = np.full(shape, page.nodata, page.dtype)
            self._kept[index] = decoded[0], tuple(position)
            while len(self._kept) > 1 and sum(array.nbytes for array, _ in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(index)
        return self._kept[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": 0, "_tiff": None, "_first": None, "_kept": OrderedDict()}


def _as_picture(planes: Tensor) -> Pixels:
    """8-bit grey and RGB as the pictures that they are."""
    if planes.dtype != torch.uint8 or len(planes) not in (1, 3):
        return planes
    return F.to_pil_image(planes)


def open_windows(image: AnyImage, read_as: ReadAs, name: str) -> WindowedImage:
    """An image to be read by windows. Raises ``UnreadableImage``, also where it has to be read whole and is too
    large."""
    reading = reading_of(read_as)
    if not isinstance(image, Path | str):
        return WindowedImage(pixels_of(image, reading, name))
    path = Path(image)
    kinds = {ARRAY_SUFFIX: _ArrayFile, **dict.fromkeys(TIFF_SUFFIXES, _TiffFile)}
    kind = kinds.get(path.suffix.lower())
    if kind is not None and path.is_file():
        try:
            return kind(path, reading)
        except Exception:  # what cannot be read in parts, or is damaged, is read whole, which says what is wrong
            pass
    return WindowedImage(read_image(path, reading))


def steps_over(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover ``length`` pixels; the last one is moved back to end with it."""
    if length <= window:
        return [0]
    number = -(-(length - window) // stride) + 1
    return [min(place * stride, length - window) for place in range(number)]


def tiles_of(height: int, width: int, tile: int, overlap: float) -> list[Window]:
    """Square tiles that cover an image, row by row, neighbours sharing ``overlap`` of a side; the image itself where it
    is smaller. Raises ``UserError`` for an overlap that is no share, or a tile without pixels."""
    if tile < 1 or not 0 <= overlap < 1:
        raise UserError(f"tile {tile}, overlap {overlap}; give a tile of 1 pixel or more, and an overlap from 0 to 0.9")
    stride = max(1, round(tile * (1 - overlap)))
    rows, cols = steps_over(height, tile, stride), steps_over(width, tile, stride)
    return [Window(row, col, min(tile, height), min(tile, width)) for row in rows for col in cols]


def overview(image: WindowedImage, side: int = OVERVIEW) -> tuple[Image.Image, float]:
    """The whole image as a picture of at most ``side`` pixels, RGB, and its scale; read by windows."""
    scale = min(1.0, side / max(image.height, image.width))
    rows, cols = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    sheet, is_picture = torch.zeros(0), True
    for part in tiles_of(image.height, image.width, 1024, 0.0):
        pixels = image.read(part)
        is_picture = not isinstance(pixels, Tensor)
        values = to_tensor(pixels)
        if not len(sheet):
            sheet = torch.zeros(len(values), rows, cols)
        top, bottom = (round(edge * rows / image.height) for edge in (part.top, part.bottom))
        left, right = (round(edge * cols / image.width) for edge in (part.left, part.right))
        if bottom > top and right > left:
            sheet[:, top:bottom, left:right] = interpolate(
                values[None].float(), (bottom - top, right - left), mode="area"
            )[0]
    if is_picture:
        return F.to_pil_image(sheet.round().to(torch.uint8)).convert("RGB"), scale
    return to_picture(sheet).convert("RGB"), scale
