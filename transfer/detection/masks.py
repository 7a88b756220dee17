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
    runs = runs_of(counts.encode())
    return None if runs is None else int(runs.sum())


def runs_of(counts: bytes) -> np.ndarray | None:
    """The lengths of the runs of a compressed code, (n,) int64, the first outside of the mask; None where it is no
    code. See ``pixels_of``."""
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
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
    return runs if runs.min() >= 0 else None


def part_of_code(code: dict[str, Any]) -> tuple[tuple[int, int], np.ndarray]:
    """A run-length code -> the (row, column) of the first pixel of its bounds, and the mask (h, w) bool inside them;
    the whole image is never decoded."""
    height = int(code["size"][0])
    runs = runs_of(code["counts"] if isinstance(code["counts"], bytes) else code["counts"].encode())
    assert runs is not None, "pycocotools wrote the code"
    ends = runs.cumsum()
    starts, stops = ends[0::2][: len(ends) // 2], ends[1::2]
    kept = stops > starts
    starts, stops = starts[kept], stops[kept]
    if not len(starts):
        return (0, 0), np.zeros((0, 0), dtype=bool)
    left, right = int(starts[0] // height), int((stops[-1] - 1) // height) + 1
    steps: np.ndarray = np.zeros((right - left) * height + 1, dtype=np.int8)
    steps[starts - left * height] += 1
    steps[stops - left * height] -= 1
    columns = steps[:-1].cumsum(dtype=np.int8).astype(bool).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    return (int(rows[0]), left), np.ascontiguousarray(columns[:, rows[0] : rows[-1] + 1].T)


def cut_part(
    corner: tuple[int, int], mask: np.ndarray, region: tuple[int, int, int, int]
) -> tuple[tuple[int, int], np.ndarray]:
    """The corner (row, column) and the pixels of what ``region`` (top, left, height, width) shows of a mask (h, w)
    whose first pixel lies at ``corner``; without pixels where they do not meet."""
    (row, col), (rows, cols), (up, start, height, width) = corner, mask.shape, region
    top, left = max(row, up), max(col, start)
    bottom, right = max(top, min(row + rows, up + height)), max(left, min(col + cols, start + width))
    return (top, left), mask[top - row : bottom - row, left - col : right - col]


def code_of_part(mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """The run-length code in an image of ``size`` (height, width) of a mask (h, w) bool whose first pixel lies at
    ``corner`` (row, column); the inverse of ``part_of_code``."""
    height, width = size
    steps = np.diff(np.pad(mask.T, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (first, up), (last, down) = np.nonzero(steps == 1), np.nonzero(steps == -1)
    starts, stops = ((corner[1] + cols) * height + corner[0] + rows for cols, rows in ((first, up), (last, down)))
    apart = starts[1:] != stops[:-1]  # a full column goes on in the next one
    starts, stops = starts[np.append(True, apart)[: len(starts)]], stops[np.append(apart, True)[: len(stops)]]
    edges = np.stack([starts, stops], axis=1).ravel()
    counts = np.diff(np.concatenate([[0], edges, [height * width] if height * width > edges.max(initial=0) else []]))
    counts = counts.astype(np.int64)
    return mask_coder().frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
