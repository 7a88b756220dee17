"""TIFF of any depth, honouring its tags: what its numbers mean, how pages and samples make one image, missing data."""

from __future__ import annotations

import importlib.util
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from mae_core.data.orientation import orientation_of_page
from mae_core.data.reading import ALPHA, NO_DATA, NO_DATA_SHARE, Reading, note

MOST_CHANNELS = 16
_NO_DATA_TAG = 42113  # GDAL_NODATA: text
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType: an overview, a transparency mask
MASK_OR_OVERVIEW = _REDUCED | _MASK
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_COLOURS = {4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32803: "a colour filter array"}
JPEG = (6, 7, 34892)
"""Numbers of JPEG among the compressions."""
_EXACT_MODES = ("I", "F", "L", "RGB")


class TiffImage(NamedTuple):
    """planes (C, H, W) of any number type, NaN where there is no data; bits of an unsigned integer; orientation tag."""

    planes: np.ndarray
    bits: int
    orientation: int


def read_tiff(file: BinaryIO, reading: Reading) -> TiffImage | Image.Image:
    """The image in a TIFF; an opened picture of Pillow where that reads it exactly.

    Raises ``ValueError`` for a file that is damaged, whose tags ask for what is not supported, or that has several
    pages and ``reading`` does not say what they are.
    """
    import tifffile

    try:
        with tifffile.TiffFile(file) as tiff:
            return _read(tiff, file, reading)
    except MemoryError:
        raise ValueError("damaged TIFF: its header names a size that does not fit into memory") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a damaged directory ends in errors of any kind
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"not a TIFF that can be read: {first}") from None


class _Refused(ValueError):
    """A reason that is a sentence already."""


def _read(tiff: Any, file: BinaryIO, reading: Reading) -> TiffImage | Image.Image:
    series = [s for s in tiff.series if not s.keyframe.subfiletype & MASK_OR_OVERVIEW] or list(tiff.series[:1])
    axes, shape = _significant(series[0], reading.channels)
    page = series[0].keyframe
    pages = 1
    for axis, length in zip(axes, shape, strict=True):
        pages *= length if axis not in "YXSC" else 1
    bands = shape[axes.index("S")] if "S" in axes else 1
    bands *= shape[axes.index("C")] if "C" in axes else 1
    first_only = reading.pages == "first" and (pages > 1 or len(series) > 1 or "C" in axes)
    if not first_only:
        _check_pages(pages, len(series), bands, reading)
        bands *= pages
    try:
        height, width = (shape[axes.index(axis)] for axis in "YX")
        reading.check_size(height, width, page.samplesperpixel if first_only else bands)
    except ValueError as error:
        raise _Refused(str(error)) from None
    check_stored(page, tiff)
    masks = [p for p in tiff.pages if p.subfiletype & _MASK and p.shape[:2] == page.shape[:2]]
    single = first_only or len(series[0].pages) == 1
    if single and not masks and _NO_DATA_TAG not in page.tags and (picture := _by_pillow(page, file)) is not None:
        return picture
    if not single and page.photometric in (_PALETTE, _WHITE_IS_ZERO):
        raise _Refused("its pages have a palette or white as zero; save them as one image of plain channels")
    array = _decoded(page if first_only else series[0], page, file)
    if first_only:
        axes = page.axes
    planes, bits = as_meant(_planes(array, axes), page, reading, masks[0].asarray() == 0 if masks else None)
    return TiffImage(planes, bits, orientation_of_page(tiff))


def _significant(series: Any, channels: int | None) -> tuple[str, tuple[int, ...]]:
    """Axes and lengths without those of length 1 other than rows and columns.

    An array (H, W, C) that tifffile was given without a word on its axes is in the file as H pages of W x C. It is read
    as (H, W, C) where C is the requested number of channels or, with none requested, where C alone is at most 16.
    """
    kept = [
        (axis, length) for axis, length in zip(series.axes, series.shape, strict=True) if length > 1 or axis in "YX"
    ]
    axes, shape = "".join(axis for axis, _ in kept), tuple(length for _, length in kept)
    if len(axes) == 3 and axes[0] in "QI":
        requested = channels not in (1, 3, shape[0]) and channels == shape[2]
        if requested or (channels is None and shape[2] <= MOST_CHANNELS < min(shape[:2])):
            axes = "YXS"
    return axes, shape


def _check_pages(pages: int, images: int, bands: int, reading: Reading) -> None:
    if images > 1:
        raise _Refused(f"it holds {images} images of different sizes; set data.pages=first to read the first alone")
    asked = reading.channels is not None and reading.channels not in (1, 3) and reading.channels == pages * bands
    if pages > 1 and reading.pages != "bands" and not asked:
        raise _Refused(
            f"it has {pages} pages; set data.pages=bands to read them as the {pages * bands} channels of one "
            "image, "
            "or data.pages=first to read the first alone"
        )


def plain_colours(page: Any) -> bool:
    """Whether a window of its samples can be read alone: grey and RGB, and YCbCr that JPEG decodes to RGB."""
    kind = page.photometric
    return kind in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB) or (kind == _YCBCR and page.compression in JPEG)


def check_stored(page: Any, tiff: Any) -> None:
    """Raise for an uncompressed image that is larger than its file: before memory is taken for it."""
    size = page.imagelength * (-(-page.imagewidth * page.samplesperpixel * page.bitspersample // 8))
    if page.compression == 1 and size > tiff.filehandle.size:
        raise _Refused(f"damaged TIFF: its header names {size} bytes of pixels, the file has {tiff.filehandle.size}")


def _by_pillow(page: Any, file: BinaryIO) -> Image.Image | None:
    """The opened picture where Pillow has a mode for all samples of up to 8 bits: it knows all their compressions and
    colours."""
    if page.bitspersample > 8 or page.sampleformat not in (1, None):
        return None
    file.seek(0)
    try:
        image = Image.open(file)
    except Exception:  # channels that Pillow has no mode for
        return None
    whole = page.samplesperpixel == len(image.getbands()) or image.mode in ("P", "PA")
    return image if whole and sorted(image.size) == sorted((page.imagewidth, page.imagelength)) else None


def _decoded(pages: Any, page: Any, file: BinaryIO) -> np.ndarray:
    """All samples as stored; through Pillow where tifffile needs imagecodecs, which is not there, and Pillow is as
    exact."""
    try:
        array: np.ndarray = pages.asarray()
        return array
    except Exception as error:
        needs_codecs = "imagecodecs" in str(error) and importlib.util.find_spec("imagecodecs") is None
        if not needs_codecs:
            raise
    file.seek(0)
    try:
        image = Image.open(file)
        exact = image.mode in _EXACT_MODES or image.mode.startswith("I;16")
        if exact and getattr(image, "n_frames", 1) == 1 and page.samplesperpixel == 1 and page.bitspersample > 8:
            return np.asarray(image)
    except Exception:
        pass
    kind = getattr(page.compression, "name", page.compression)
    raise _Refused(
        f"its {page.bitspersample} bits with {kind} compression need imagecodecs; run: pip install 'mae-transfer[tiff]'"
    ) from None


def _planes(array: np.ndarray, axes: str) -> np.ndarray:
    """Pages, channels and samples first: (C, H, W)."""
    if array.ndim != len(axes):
        array = array.reshape([n for n in array.shape if n > 1] if len(axes) == sum(n > 1 for n in array.shape) else -1)
    order = [place for place, axis in enumerate(axes) if axis not in "YX"]
    moved = array.transpose([*order, axes.index("Y"), axes.index("X")])
    return moved.reshape(-1, *moved.shape[-2:])


def as_meant(
    planes: np.ndarray, page: Any, reading: Reading, hidden: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Stored samples (C, H, W) as the tags say they are meant, without alpha, and their bits; NaN where there is no
    data, by the tag or ``hidden`` (H, W). Raises ``ValueError`` for colours and tags that are not supported."""
    planes = planes[_without_alpha(len(planes), page, reading)]
    missing = _missing_pixels(planes, page)
    planes, bits = _meant(planes, page)
    if hidden is not None:
        missing = missing | hidden
    if missing.any():
        note(NO_DATA)
        note(NO_DATA_SHARE, float(missing.mean()))
        planes = np.where(missing, np.nan, planes / (2**bits - 1) if planes.dtype.kind == "u" else planes)
    return planes, bits


def _without_alpha(samples: int, page: Any, reading: Reading) -> list[int]:
    """The samples that are no alpha; all of them where so many channels are asked for."""
    first_extra = samples - len(page.extrasamples)
    alphas = [first_extra + n for n, kind in enumerate(page.extrasamples) if kind in (1, 2)]
    if not alphas or reading.channels == samples:
        return list(range(samples))
    note(ALPHA)
    return [sample for sample in range(samples) if sample not in alphas]


def _meant(planes: np.ndarray, page: Any) -> tuple[np.ndarray, int]:
    """What the photometric interpretation says that the samples are, and their bits: brighter is larger, colours are
    RGB."""
    kind, bits = page.photometric, page.bitspersample
    if kind in _COLOURS and not (kind == _YCBCR and page.compression in JPEG):
        raise _Refused(f"its colours are {_COLOURS[kind]} with {bits} bits; save it as RGB or grey")
    if kind not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR):
        raise _Refused(f"its photometric interpretation is {getattr(kind, 'name', kind)}; save it as RGB or grey")
    if kind == _PALETTE:
        return np.asarray(page.colormap)[:, planes[0]], 16
    if kind == _WHITE_IS_ZERO:
        if planes.dtype.kind not in "ub":
            raise _Refused("its white is zero, in numbers without a maximum; save it with black as zero")
        planes = (2**bits - 1 - planes.astype(np.uint64)).astype(planes.dtype)
    return planes, bits


def _missing_pixels(planes: np.ndarray, page: Any) -> np.ndarray:
    """(C, H, W) bool: the pixels that GDAL's tag says are no data."""
    tag = page.tags.get(_NO_DATA_TAG)
    if tag is None:
        return np.zeros_like(planes, dtype=bool)
    text = str(tag.value).strip("\0 ")
    try:
        value = float(text)
    except ValueError:
        raise _Refused(f"its tag GDAL_NODATA is {text!r}, not a number; correct the tag") from None
    if np.isnan(value):
        return np.isnan(planes)
    if planes.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return planes == planes.dtype.type(value)
    return planes == value
