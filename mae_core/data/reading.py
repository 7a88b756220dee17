"""How the files of a run are read: channels, pages, the largest size; and what was noticed while they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

Pages = Literal["auto", "bands", "first"]

TIMEOUT = 600.0
"""Seconds in which the reading processes must give a batch, unless an option says otherwise."""
MAX_PIXELS = 178_956_970
"""Height times width of the largest image read by default, Pillow's limit: 13,377 x 13,377, 0.5 GB as RGB."""


class Reading(NamedTuple):
    """How image files become pixels.

    channels    1 is greyscale, 3 is RGB, any other number, and None, is as stored
    max_pixels  an image of more is refused before it is decoded
    pages       of a file of several pages: "bands" are the channels of one image, "first" reads the first alone; "auto"
                takes them for bands where ``channels`` is their number and neither 1 nor 3
    tensors     pictures of 8 bits are tensors too, not PIL images: the fast way to a view of torchvision's
    """

    channels: int | None = None
    max_pixels: int = MAX_PIXELS
    pages: Pages = "auto"
    tensors: bool = False

    def check_size(self, height: int, width: int, channels: int = 1) -> None:
        """Raise ``ValueError`` for an image that is too large, with the option that allows it."""
        pixels = height * width * max(1, -(-channels // 4))
        if pixels > self.max_pixels:
            raise ValueError(
                f"it has {width} x {height} pixels of {channels} channels, more than data.max_pixels allows; "
                f"set data.max_pixels={pixels} to read it, or cut it into tiles"
            )


class ShardCache(NamedTuple):
    """Where remote shards are kept, and at most how many bytes of them."""

    folder: Path | None = None
    limit: int = 50_000_000_000


ReadAs: TypeAlias = "Reading | int | None"
"""A ``Reading``, or only its channels."""


def reading_of(read_as: ReadAs) -> Reading:
    """The ``Reading`` that is meant."""
    return read_as if isinstance(read_as, Reading) else Reading(read_as)


class Notes(Counter[str]):
    """What was noticed while images were decoded: images by what was noticed, and under "pixels without data" the sum
    of their shares."""

    def sentences(self, images: int) -> list[str]:
        """What a user should know of ``images`` decoded images."""
        told = []
        if self[ALPHA]:
            told.append(f"{self[ALPHA]} of {images} images have an alpha channel, which is left out")
        if self[NO_DATA]:
            share = 100 * self[NO_DATA_SHARE] / images
            told.append(
                f"{self[NO_DATA]} of {images} images have pixels without data ({share:.2g} % of all pixels); they are "
                "left out of mean and std, and become the mean"
            )
        return told

    @property
    def orientation(self) -> int | None:
        """The orientation tag of one decoded image, where it was turned upright."""
        return next((tag for tag in range(2, 9) if self[turned(tag)]), None)


def turned(orientation: int) -> str:
    """The note of an image with this orientation tag."""
    return f"orientation {orientation}"


ALPHA, NO_DATA, NO_DATA_SHARE = "alpha left out", "no data", "pixels without data"
_notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


@contextmanager
def notes_taken() -> Iterator[Notes]:
    """Collect what is noticed of the images that are decoded inside, also in threads that got a copy of the context."""
    notes = Notes()
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note(what: str, amount: float = 1) -> None:
    """Remember something of the image that is being decoded, where somebody collects it."""
    notes = _notes.get()
    if notes is not None:
        notes[what] += amount  # type: ignore[assignment]  # shares are floats
