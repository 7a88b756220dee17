"""Regions of interest: features of a box, a mask in its box, and a box's mask back in the image.

Coordinates are continuous: a pixel reaches from its index to the next, and its centre is half-way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from transfer.backbone import Level
from transfer.pyramid import CANONICAL_SIDE, CANONICAL_STRIDE

MASKS_AT_ONCE = 16
"""Masks that are numbers at the same time: 64 MiB of 1024 x 1024 pixels."""


class LevelPool(nn.Module):
    """RoIAlign (half-pixel offsets, adaptive sampling) on the level that fits a box's size."""

    def __init__(self, levels: Sequence[Level], cells: int) -> None:
        super().__init__()
        self.levels, self.cells = tuple(levels), cells

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """Boxes (n, 4) in pixels, per image -> (all n, C, cells, cells), in their order."""
        every = torch.cat(boxes)
        image = torch.cat([torch.full_like(b[:, :1], number) for number, b in enumerate(boxes)])
        rois = torch.cat([image, every], dim=1)
        sides = ((every[:, 2] - every[:, 0]) * (every[:, 3] - every[:, 1])).clamp(min=1e-6).sqrt()
        finest = self.levels[0].stride
        wanted = (sides / CANONICAL_SIDE * CANONICAL_STRIDE / finest + 1e-8).log2().floor()
        chosen = wanted.clamp(0, len(self.levels) - 1)
        pooled = rois.new_zeros(rois.shape[0], self.levels[0].channels, self.cells, self.cells)
        for number, level in enumerate(self.levels):
            here = torch.where(chosen == number)[0]
            part = roi_align(features[level.name], rois[here], self.cells, 1 / level.stride, aligned=True)
            pooled = pooled.index_copy(0, here, part.to(pooled))
        return pooled


def mask_targets(masks: Tensor, boxes: Tensor, index: Tensor, cells: int) -> Tensor:
    """Masks (n, H, W) bool, boxes (m, 4), the mask of each box (m,) -> (m, cells, cells) in {0, 1}.

    RoIAlign needs numbers in place of bits, four bytes a pixel: so many masks at once as ``MASKS_AT_ONCE`` says.
    """
    targets = boxes.new_zeros(len(boxes), cells, cells)
    for first in range(0, len(masks), MASKS_AT_ONCE):
        here = torch.where((index >= first) & (index < first + MASKS_AT_ONCE))[0]
        if len(here):
            part = masks[first : first + MASKS_AT_ONCE, None].to(boxes)
            rois = torch.cat([(index[here] - first)[:, None].to(boxes), boxes[here]], dim=1)
            targets[here] = (roi_align(part, rois, cells, aligned=True)[:, 0] >= 0.5).to(boxes)
    return targets


def paste_mask(probability: Tensor, box: Sequence[float], height: int, width: int) -> Tensor:
    """A mask (m, m) in 0..1 over its box x1 y1 x2 y2 -> (height, width) bool: bilinear, at least one half."""
    x1, y1, x2, y2 = box
    left, top = max(0, int(x1)), max(0, int(y1))
    right, bottom = min(width, int(-(-x2 // 1))), min(height, int(-(-y2 // 1)))
    mask = torch.zeros(height, width, dtype=torch.bool)
    if right <= left or bottom <= top:
        return mask
    x = (torch.arange(left, right) + 0.5 - x1) / max(x2 - x1, 1e-6) * 2 - 1
    y = (torch.arange(top, bottom) + 0.5 - y1) / max(y2 - y1, 1e-6) * 2 - 1
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].to(probability)
    mask[top:bottom, left:right] = F.grid_sample(probability[None, None], places, align_corners=False)[0, 0] >= 0.5
    return mask
