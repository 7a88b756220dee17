"""Images that are copies of one another though their files differ: smaller, re-encoded, or the next frame of a video.

An image is compared by its thumbnail, grey, ``SIDE`` x ``SIDE`` pixels, standardised: two thumbnails are alike where
their correlation is ``ALIKE`` or more. Difference hashes of 256 bits do not see re-encoded microscope images, whose
background is noise: their bits there flip as often as between two images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mae_core.data.decoding import GREY_WEIGHTS, Pixels, UnreadableImage, read_image, to_tensor
from mae_core.data.images import in_threads, spread_indices
from mae_core.data.orientation import orientation_in, upright

SIDE = 16
ALIKE = 0.98
"""Correlation from which on thumbnails are those of one image. Of 45 million pairs of 9,469 photos one reaches it, two
crops of one photo; JPEG of quality 20 and copies of a quarter of the side stay above it."""
FLAT = 1e-3
"""Spread of a thumbnail, as a share of its mean, below which there is nothing to compare."""
MOST_COMPARED = 20_000
"""Images of a set that are compared, spread over it: a few seconds."""
MOST_DECODED = 5_000
"""The same where files are opened for it alone."""
ROWS_AT_ONCE = 1024


class Copy(NamedTuple):
    """An image, one before it (or in the other half) that it is most alike, and their correlation."""

    name: str
    of: str
    similarity: float


class Fingerprints:
    """Thumbnails of the images of a set: ``total`` images in it, those of ``chosen`` are to be added."""

    def __init__(self, total: int, most: int = MOST_COMPARED) -> None:
        self.total = total
        self.chosen = frozenset(spread_indices(total, most))
        self.names: list[str] = []
        self._rows: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: Path | str, row: np.ndarray | None) -> None:
        """Keep a fingerprint; None, of an image without structure, is left out."""
        if row is not None:
            self.names.append(str(name))
            self._rows.append(row)

    @property
    def rows(self) -> Tensor:
        """(n, SIDE * SIDE) float32, each of length 1."""
        return torch.from_numpy(np.array(self._rows, dtype=np.float32).reshape(-1, SIDE * SIDE))

    @property
    def extent(self) -> str:
        """Which images were compared, for a sentence; empty where all were."""
        return "" if len(self.chosen) == self.total else f" ({len(self.chosen)} of {self.total} compared)"


def fingerprint(pixels: Pixels) -> np.ndarray | None:
    """(SIDE * SIDE,) float16 of length 1; None where the image has no structure to compare."""
    x = to_tensor(pixels).float()
    grey = torch.tensordot(torch.tensor(GREY_WEIGHTS), x, dims=1) if len(x) == 3 else x.mean(dim=0)
    small = adaptive_avg_pool2d(grey.nan_to_num()[None], SIDE).flatten()
    centred = small - small.mean()
    length = float(centred.norm())
    if not length > FLAT * SIDE * float(small.mean().abs()):
        return None
    return (centred / length).numpy().astype(np.float16)


def fingerprint_of(path: Path) -> np.ndarray | None:
    """The same of a file, a JPEG decoded at an eighth of its side; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.format == "JPEG" and image.mode in ("L", "RGB") and min(image.size) >= 16 * SIDE:
                image.draft("L", (2 * SIDE, 2 * SIDE))
                return fingerprint(upright(image.convert("L"), orientation_in(image)))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        pass  # not a JPEG, or a damaged one: what reads every image decides
    try:
        return fingerprint(read_image(path, None))
    except UnreadableImage:
        return None


def fingerprints_of(paths: Sequence[Path], most: int = MOST_DECODED) -> Fingerprints:
    """Of image files, at most ``most`` of them."""
    found = Fingerprints(len(paths), most)
    places = sorted(found.chosen)
    rows = in_threads(lambda place: fingerprint_of(paths[places[place]]), len(places))
    for place, row in zip(places, rows, strict=True):
        found.add(paths[place], row)
    return found


def copies_within(images: Fingerprints) -> list[Copy]:
    """The images that are alike an earlier one, with the one they are most alike."""
    rows, found = images.rows, []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[first : first + ROWS_AT_ONCE]
        similarity = part @ rows[: first + len(part)].T
        similarity = similarity.tril(first - 1)  # column < row: earlier images alone
        found += _alike(similarity, images.names[first:], images.names)
    return found


def copies_across(images: Fingerprints, others: Fingerprints) -> list[Copy]:
    """The ``images`` that are alike one of ``others``, with the one they are most alike."""
    rows, bank, found = images.rows, others.rows, []
    if not len(bank):
        return []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        found += _alike(rows[first : first + ROWS_AT_ONCE] @ bank.T, images.names[first:], others.names)
    return found


def _alike(similarity: Tensor, names: Sequence[str], others: Sequence[str]) -> list[Copy]:
    best, place = similarity.max(dim=1)
    pairs = zip(names, best.tolist(), place.tolist(), strict=False)
    return [Copy(name, others[other], round(value, 4)) for name, value, other in pairs if value >= ALIKE]
