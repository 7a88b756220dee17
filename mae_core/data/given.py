"""The images that a user hands over: files and folders on a command line; paths, pictures and arrays in Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from mae_core.data.decoding import (
    Pixels,
    Unreadable,
    UnreadableImage,
    from_array,
    from_picture,
    read_image,
    with_channels,
)
from mae_core.data.images import list_images
from mae_core.data.reading import ReadAs, Reading, reading_of
from mae_core.errors import UserError

AnyImage: TypeAlias = Path | str | Image.Image | np.ndarray | Tensor
"""A file; a PIL image; an array (H, W) or (H, W, C) of uint8, uint16 or floats of 0..1; a tensor (C, H, W) alike."""


def refusal(unreadable: Unreadable) -> UserError:
    """Of an image that was handed over and cannot be read."""
    return UserError(f"image {unreadable.path} cannot be read ({unreadable.reason}); repair it or leave it out")


def named_images(images: Sequence[Path | str]) -> Iterator[tuple[str, Path]]:
    """(name below the output folders, file) of every image; folders keep their sub-folders.

    Raises ``UserError`` for a missing path and for two images of one name.
    """
    taken: dict[str, Path] = {}
    for given in map(Path, images):
        if not given.exists():
            raise UserError(f"image {given} does not exist; give image files or folders of them")
        for path in _images_below(given) if given.is_dir() else [given]:
            name = path.relative_to(given).with_suffix("").as_posix() if given.is_dir() else path.stem
            if name in taken:
                raise UserError(f"{taken[name]} and {path} would both be written as {name}.png; give them one by one")
            taken[name] = path
            yield name, path


def _images_below(folder: Path) -> list[Path]:
    """``list_images``, whose error names an option of a run."""
    try:
        return list_images(folder)
    except UserError as error:
        raise UserError(f"{str(error).partition(';')[0]}; give image files or folders of them") from None


def as_list(images: AnyImage | Sequence[AnyImage]) -> tuple[list[AnyImage], bool]:
    """The images as a list, and whether there are several: one alone gets one answer, a list a list of them.

    Raises ``UserError`` for an empty list.
    """
    batch = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
    if isinstance(images, Path | str | Image.Image) or (isinstance(images, np.ndarray | Tensor) and not batch):
        return [images], False
    several = list(images)
    if not several:
        raise UserError("no images given; give a file, a PIL image, an array, or a list of them")
    return several, True


def name_of(image: AnyImage, number: int) -> str:
    """What a message calls an image: its path, or its place among those given, counted from 0."""
    return str(image) if isinstance(image, Path | str) else f"number {number} ({type(image).__name__})"


def pixels_of(image: AnyImage, read_as: ReadAs, name: str) -> Pixels:
    """The pixels of an image, as ``read_image`` gives them of a file with the same content.

    Arrays of two or four 8-bit channels count as grey or RGB with alpha, as in a picture. Raises ``UnreadableImage``.
    """
    if isinstance(image, Path | str):
        return read_image(Path(image), read_as)
    reading = reading_of(read_as)
    try:
        return with_channels(_as_stored(image, reading), reading.channels)
    except ValueError as error:
        raise UnreadableImage(name, str(error)) from None


def _as_stored(image: Image.Image | np.ndarray | Tensor, reading: Reading) -> Pixels:
    if isinstance(image, Image.Image):
        return from_picture(image, reading)
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (2, 3, 4))):
        return from_picture(Image.fromarray(np.ascontiguousarray(image)), reading)
    return from_array(image, image.shape[2] if image.ndim == 3 else None)
