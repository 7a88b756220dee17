"""The pixels of an image as a training reads them: by the decoder of the pre-training, in the encoder's channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mae_core.data.decoding import Pixels, UnreadableImage, read_image, to_picture, to_tensor, with_channels
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
    try:
        if channels in (1, 3) and path.suffix.lower() in TIFF_SUFFIXES:
            return with_channels(_without_opaque(read_image(path, None)), channels)
        return read_image(path, channels)
    except (UnreadableImage, ValueError) as error:
        found = len(to_tensor(read_image(path, None)))
        if found == channels or (isinstance(error, UnreadableImage) and channels in (1, 3) and found in (1, 3)):
            raise
        raise WrongChannels(
            f"image {path} has {found} channel{'s' * (found > 1)}, and the encoder takes {channels}; use weights for "
            f"{found}, or set model.backbone.in_chans={found} to train from scratch"
        ) from None


def _without_opaque(pixels: Pixels) -> Pixels:
    """Without a last band that is opaque everywhere: what writers of TIFF add to grey and RGB."""
    if isinstance(pixels, Tensor) and len(pixels) in (2, 4) and bool((pixels[-1] == OPAQUE).all()):
        return pixels[:-1]
    return pixels


def as_mmseg_reads(pixels: Pixels) -> np.ndarray:
    """(H, W) or (H, W, C), three channels in the order blue, green, red: uint8 as stored, or float32 where a channel
    has more than 8 bits, in units of 1/255 like the means and deviations of mmseg's configs."""
    if not isinstance(pixels, Tensor):
        array = np.asarray(pixels)
    else:
        array = pixels.permute(1, 2, 0).numpy()
        array = array[..., 0] if array.shape[2] == 1 else array
    if array.dtype != np.uint8:
        array = array.astype(np.float32) * np.float32(255)
    return np.ascontiguousarray(array[..., ::-1] if array.ndim == 3 and array.shape[2] == 3 else array)


def picture_of(path: Path | str) -> Image.Image:
    """An image file as something to look at: RGB, upright."""
    return to_picture(read_image(Path(path), None)).convert("RGB")
