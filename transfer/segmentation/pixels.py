"""The pixels of an image as a training reads them: by the decoder of the pre-training, in the encoder's channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_core.data.decoding import (
    Pixels,
    UnreadableImage,
    fill_no_data,
    read_image,
    to_picture,
    to_tensor,
    with_channels,
)
from mae_core.data.given import AnyImage, pixels_of
from mae_core.data.images import ImageFiles
from mae_core.errors import UserError

TIFF_SUFFIXES = (".tif", ".tiff")
OPAQUE = 255


class WrongChannels(UserError):
    """An image whose channels are not those that the encoder takes."""


def read_pixels(path: Path | str, channels: int) -> Pixels:
    """A picture, or a tensor (C, H, W), upright; see ``mae_core.data.decoding.Pixels``.

    1 is greyscale, 3 is RGB, where grey becomes RGB and RGB grey; any other number is as stored. The alpha channel of a
    picture is left out; the further band of a TIFF is data, unless it is opaque everywhere. Raises ``UnreadableImage``
    for a file that is no image, and ``WrongChannels``.
    """
    path = Path(path)
    stored = _bands_with_alpha(path) if channels in (1, 3) else None
    try:
        if stored is None:
            return read_image(path, channels)
        bands = to_tensor(read_image(path, stored))
        if bool((bands[-1] == (OPAQUE if bands.dtype == torch.uint8 else 1)).all()):
            return with_channels(bands[:-1], channels)
        found = stored
    except UnreadableImage:
        found = len(to_tensor(read_image(path, None)))
        if found == channels or (channels in (1, 3) and found in (1, 3)):
            raise
    raise WrongChannels(
        f"image {path} has {found} channel{'s' * (found > 1)}, and the encoder takes {channels}; use weights for "
        f"{found}, or set model.backbone.in_chans={found} to train from scratch"
    )


class SegmentationImages(ImageFiles):
    """Image files by their paths, with ``read_pixels`` in the encoder's channels: what statistics are measured on."""

    read_as: int

    def read(self, index: int) -> Pixels:
        """See ``read_pixels``."""
        return read_pixels(self.paths[index], self.read_as)


def _bands_with_alpha(path: Path) -> int | None:
    """How many bands a TIFF has, where its header says that the last is transparency: many writers say so of any band
    after red, green and blue."""
    if path.suffix.lower() not in TIFF_SUFFIXES:
        return None
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            return page.samplesperpixel if page.extrasamples and page.samplesperpixel in (2, 4) else None
    except Exception:  # a damaged header ends in errors of any kind, which the decoder names
        return None


def as_mmseg_reads(pixels: Pixels, no_data: Sequence[float] | None = None) -> np.ndarray:
    """(H, W) or (H, W, C), three channels in the order blue, green, red: uint8 as stored, or float32 where a channel
    has more than 8 bits, in units of 1/255 like the means and deviations of mmseg's configs.

    no_data  the value per channel, in the same units, of pixels without data
    """
    if no_data is not None:
        pixels = fill_no_data(pixels, [value / 255 for value in no_data])
    if not isinstance(pixels, Tensor):
        array = np.asarray(pixels)
    else:
        array = pixels.permute(1, 2, 0).numpy()
        array = array[..., 0] if array.shape[2] == 1 else array
    if array.dtype != np.uint8:
        array = array.astype(np.float32) * np.float32(255)
    return np.ascontiguousarray(array[..., ::-1] if array.ndim == 3 and array.shape[2] == 3 else array)


def picture_of(image: AnyImage) -> Image.Image:
    """An image as something to look at: RGB, upright."""
    return to_picture(pixels_of(image, None, "given")).convert("RGB")
