"""Patch geometry. The only place that knows in which order patches, and the values inside a patch, are stored.

Patches are in raster order (row by row). Inside a patch vector the order is (row, column, channel), as in the official
MAE code (``patchify``); note that the weights of the patch embedding, a convolution, are (channel, row, column).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mae_core.errors import UserError


class PatchGrid(NamedTuple):
    """How an image is cut into square patches of ``patch`` pixels: ``rows`` x ``cols`` of them."""

    rows: int
    cols: int
    patch: int

    @property
    def num_patches(self) -> int:
        """Patches in an image."""
        return self.rows * self.cols

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.rows * self.patch, self.cols * self.patch

    @classmethod
    def of(cls, image_size: int | Sequence[int], patch: int) -> PatchGrid:
        """The grid of an image of ``image_size`` (side, or (height, width)) pixels.

        Raises ``UserError`` for a patch that has no pixels, and where the image does not split into whole patches.
        """
        height, width = as_pair(image_size)
        if not isinstance(patch, int) or patch < 1:
            raise UserError(f"a patch has a side of 1 or more whole pixels; patch_size={patch!r} was asked for")
        if height < patch or width < patch or height % patch or width % patch:
            up = [max(patch, -(-side // patch) * patch) for side in (height, width)]
            raise UserError(
                f"image size {height}x{width} does not split into {patch}x{patch} patches; "
                f"use {up[0]}x{up[1]} or change patch_size"
            )
        return cls(height // patch, width // patch, patch)


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """``size`` as (height, width): one number means a square. Raises ``UserError`` for what is neither."""
    if isinstance(size, int):
        return size, size
    try:
        height, width = map(int, size)
    except (TypeError, ValueError):
        raise UserError(f"an image size is one whole number or (height, width); got {size!r}") from None
    return height, width


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, rows*patch, cols*patch) -> (B, rows*cols, patch*patch*C)."""
    B, C, H, W = images.shape
    rows, cols, _ = PatchGrid.of((H, W), patch)
    x = images.reshape(B, C, rows, patch, cols, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, rows * cols, patch * patch * C)


def unpatchify(patches: Tensor, grid: PatchGrid) -> Tensor:
    """(B, rows*cols, patch*patch*C) -> (B, C, rows*patch, cols*patch): the inverse of ``patchify``."""
    B, N, values = patches.shape
    rows, cols, patch = grid
    if rows * cols != N or values % (patch * patch):
        raise ValueError(f"{N} patches of {values} values do not fill a {rows}x{cols} grid of {patch}x{patch} patches")
    C = values // (patch * patch)
    x = patches.reshape(B, rows, cols, patch, patch, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows * patch, cols * patch)
