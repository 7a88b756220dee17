"""Label maps of images that are too large to be labelled at once: windows, and the average of their answers.

The windows and their average are those of mmseg's sliding inference over the whole image (``mode: slide``), computed a
stripe of the image at a time, so that memory depends on the windows and not on the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_core.data.decoding import Pixels
from mae_core.data.windows import Window, WindowedImage, steps_over
from transfer.segmentation.label_coding import as_values

MOST_SUMS = 2**29
"""Bytes of the sums of class scores that are in memory; a wider image is labelled in several stripes."""
TIFF_TILE = 256


class Layout(NamedTuple):
    """Windows of (height, width) pixels every (down, right) pixels, over an image padded to multiples of ``divisor``.

    own  whether a window is labelled like an image of its own, resized where the config resizes test images
    """

    window: tuple[int, int]
    stride: tuple[int, int]
    divisor: int
    own: bool

    def padded(self, image: WindowedImage) -> tuple[int, int]:
        """(height, width) of an image with its padding."""
        rows, cols = (-(-side // self.divisor) * self.divisor for side in (image.height, image.width))
        return rows, cols

    def window_in(self, image: WindowedImage) -> tuple[int, int]:
        """(height, width) of every window, its padding included."""
        rows, cols = (min(sides) for sides in zip(self.window, self.padded(image), strict=True))
        return rows, cols


def layout_of(config: Mapping[str, Any], section: Mapping[str, Any], tile: int, overlap: float) -> Layout:
    """The windows of a large image, for an inference as in ``section``, a ``test_cfg``.

    A segmenter that slides its window over images of their own size does so over the large one: ``tile`` and
    ``overlap`` change nothing. One that sees images whole slides a window of ``tile`` pixels. One that sees images
    resized sees such tiles as images of their own.
    """
    stride = max(1, round(tile * (1 - overlap)))
    steps = (config.get("val_dataloader") or config["test_dataloader"])["dataset"]["pipeline"]
    if any(step["type"] == "Resize" for step in steps):
        return Layout((tile, tile), (stride, stride), 1, own=True)
    preprocessor = config["model"].get("data_preprocessor") or config.get("data_preprocessor") or {}
    divisor = int((preprocessor.get("test_cfg") or {}).get("size_divisor") or 1)
    if section["mode"] == "slide":
        return Layout(tuple(section["crop_size"]), tuple(section["stride"]), divisor, own=False)
    return Layout((tile, tile), (stride, stride), divisor, own=False)


def seamless(
    source: WindowedImage,
    scores_of: Callable[[Pixels], np.ndarray],
    layout: Layout,
    classes: int,
    *,
    most: int = MOST_SUMS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Window, np.ndarray]]:
    """(window of the image, (K, height, width) float32: the mean of the class scores of all windows over each pixel).

    ``scores_of``: pixels -> (K, height, width) scores of ``classes`` K, before a softmax. The results cover the image
    once, from top to bottom, a stripe after another. ``on_progress`` gets the windows done and all of them.
    """
    rows, cols = (steps_over(*sides) for sides in zip(layout.padded(source), layout.window, layout.stride, strict=True))
    size = layout.window
    width = max(size[1], most // (4 * (classes + 1) * 2 * size[0]))
    stripes = [Window(0, x, source.height, min(width, source.width - x)) for x in range(0, source.width, width)]
    total = len(rows) * sum(len(touching(cols, size[1], stripe)) for stripe in stripes)
    done = count(1)

    def counted(pixels: Pixels) -> np.ndarray:
        scores = scores_of(pixels)
        if on_progress is not None:
            on_progress(next(done), total)
        return scores

    for stripe in stripes:
        yield from _stripe(source, counted, classes, rows, cols, size, stripe)


def touching(cols: Sequence[int], width: int, stripe: Window) -> list[int]:
    """Where the windows of ``width`` begin that share pixels with a stripe."""
    return [col for col in cols if col < stripe.right and col + width > stripe.left]


def _stripe(
    source: WindowedImage,
    scores_of: Callable[[Pixels], np.ndarray],
    classes: int,
    rows: Sequence[int],
    cols: Sequence[int],
    size: tuple[int, int],
    stripe: Window,
) -> Iterator[tuple[Window, np.ndarray]]:
    """The results of a stripe from the top to the bottom of the image."""
    sums: np.ndarray = np.zeros((classes + 1, 0, stripe.width), np.float32)  # the last one counts the windows
    for row, following in zip(rows, [*rows[1:], source.height], strict=True):
        bottom = min(row + size[0], source.height)
        new = bottom - row - sums.shape[1]
        sums = np.concatenate([sums, np.zeros((classes + 1, max(0, new), stripe.width), np.float32)], axis=1)
        for col in touching(cols, size[1], stripe):
            window = Window(row, col, bottom - row, min(size[1], source.width - col))
            scores = scores_of(source.read(window))
            start, stop = max(col, stripe.left), min(window.right, stripe.right)
            there = sums[:, : window.height, start - stripe.left : stop - stripe.left]
            there[:-1] += scores[:, :, start - col : stop - col]
            there[-1] += 1
        done = min(following, source.height) - row
        finished, sums = sums[:, :done], sums[:, done:]
        if done:
            yield Window(row, stripe.left, done, stripe.width), finished[:-1] / finished[-1]


def write_label_tiff(path: Path, indices: np.ndarray, values: Sequence[int]) -> None:
    """The classes (H, W) of a label map, in memory or mapped, as a TIFF of compressed tiles with the ``values`` of the
    classes."""
    import tifffile

    def tiles() -> Iterator[np.ndarray]:
        for top in range(0, indices.shape[0], TIFF_TILE):
            for left in range(0, indices.shape[1], TIFF_TILE):
                part = as_values(np.array(indices[top : top + TIFF_TILE, left : left + TIFF_TILE]), values)
                yield np.pad(part, [(0, TIFF_TILE - side) for side in part.shape])

    tifffile.imwrite(
        path,
        tiles(),
        shape=indices.shape,
        dtype=as_values(np.zeros((1, 1), np.uint16), values).dtype,
        tile=(TIFF_TILE, TIFF_TILE),
        compression="zlib",
        photometric="minisblack",
    )
