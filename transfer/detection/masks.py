"""Masks as COCO keeps them: polygons and run-length codes, and the pixels they stand for."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from mae_core.errors import UserError
from transfer.engines import ENGINES, installed

Shape = tuple[np.ndarray, ...] | bytes
"""Polygons, each (2 * points,) of x, y; or a compressed run-length code."""
MOST_GROUPS = 7
"""Characters of a number in a compressed code; 7 hold 34 bits and a sign."""


def mask_coder() -> ModuleType:
    """``pycocotools.mask``. Raises ``UserError`` with the install command if it is missing."""
    if not installed("pycocotools"):
        raise UserError(f"COCO masks and scores need pycocotools, not installed here; {ENGINES['torchvision'].install}")
    from pycocotools import mask

    return mask


def encode_shape(shape: Shape, height: int, width: int) -> dict[str, Any]:
    """Polygons or a code -> pycocotools' run-length code {"size": [height, width], "counts": bytes}."""
    if isinstance(shape, bytes):
        return {"size": [height, width], "counts": shape}
    coder = mask_coder()
    return coder.merge(coder.frPyObjects([polygon.tolist() for polygon in shape], height, width))


def decode_codes(codes: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """n run-length codes of pycocotools -> (n, height, width) bool."""
    if not codes:
        return np.zeros((0, height, width), dtype=bool)
    return mask_coder().decode(codes).astype(bool).transpose(2, 0, 1)


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """(n, height, width) bool -> n run-length codes of pycocotools."""
    return mask_coder().encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))


def pixels_of(counts: str) -> int | None:
    """How many pixels the runs of a compressed code cover; None where it is no code.

    pycocotools checks little of this itself and would read beyond a code that is cut. A number is groups of 5 bits,
    lowest first, each a character from "0" on; 32 says that more follow, 16 in the last is the sign. From the fourth
    on, numbers are differences to the last but one.
    """
    codes = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - ord("0")
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MOST_GROUPS:
        return None
    place = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << place, starts)
    runs = np.where(codes[ends] & 16, runs - (1 << 5 * lengths), runs)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return int(runs.sum()) if runs.min() >= 0 else None
