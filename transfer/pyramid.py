"""From a ViT's maps of one stride to maps of many. No engine in it.

The four-stage pyramid is that of "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv
2111.11429, section 2.1), which the MAE paper's detection results use: the outputs of the trunk's four quarters become
maps of a quarter, a half, one and two patches per cell, and an FPN goes on top.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from math import gcd

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mae_core.errors import UserError
from mae_core.training.distributed import world_size
from transfer.backbone import DenseViT, Level

Norm = Callable[[int], nn.Module]

NORM_GROUPS = 32
"""Groups of a GroupNorm (MIMDet's re-implementation); a width that 32 does not divide gets their common divisor."""


def group_norm(channels: int) -> nn.Module:
    """GroupNorm with 32 groups, or as many as divide ``channels``."""
    return nn.GroupNorm(gcd(NORM_GROUPS, channels), channels)


def sync_batch_norm(channels: int) -> nn.Module:
    """BatchNorm over all ranks in a distributed run on GPUs, otherwise over the batch of this process.

    Networks are built before the ranks join: what ``torchrun`` announces decides.
    """
    spread = world_size() > 1 and torch.cuda.is_available()
    return nn.SyncBatchNorm(channels) if spread else nn.BatchNorm2d(channels)


NORMS: dict[str, Norm | None] = {
    "sync_bn": sync_batch_norm,
    "bn": nn.BatchNorm2d,
    "gn": group_norm,
    "ln": partial(LayerNorm2d, eps=1e-6),
    "none": None,
}
"""Name in a configuration -> channels -> norm of (B, C, H, W) maps; with ``none`` the convolutions have a bias."""


class FourStagePyramid(nn.Module):
    """Four maps of stride ``patch`` -> strides patch/4, patch/2, patch and 2 * patch; the width stays the ViT's.

    ``levels`` of the maps go in, ``levels`` of the output come out. Raises ``UserError`` unless 4 divides the patch.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        if len(levels) != 4:
            raise ValueError(f"a four-stage pyramid takes four maps, not {len(levels)}")
        widths, patch = [level.channels for level in levels], levels[0].stride
        if patch % 4:
            raise UserError(
                f"a four-stage pyramid needs a patch size that 4 divides, not {patch}; use one such as 8, 12 or 16"
            )
        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(widths[0], widths[0], 2, stride=2),
                    group_norm(widths[0]),
                    nn.GELU(),
                    nn.ConvTranspose2d(widths[0], widths[0], 2, stride=2),
                ),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2, stride=2, ceil_mode=True),
            ]
        )
        strides = (patch // 4, patch // 2, patch, 2 * patch)
        pairs = enumerate(zip(widths, strides, strict=True), start=1)
        self.levels = tuple(Level(f"stage{n}", width, stride) for n, (width, stride) in pairs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, ceil(h/2), ceil(w/2))."""
        return [stage(x) for stage, x in zip(self.stages, maps, strict=True)]


class PyramidBackbone(nn.Module):
    """``DenseViT`` + four-stage pyramid + FPN: images -> p2, p3, p4, p5 and p6, finest first.

    p2 has a quarter of the patch as its stride (4 with patch 16), p6 is every second cell of p5. ``norm`` follows each
    convolution of the FPN (SyncBN in the published detector).
    """

    def __init__(self, vit: DenseViT, *, channels: int = 256, norm: Norm | None = sync_batch_norm) -> None:
        super().__init__()
        self.vit = vit
        self.pyramid = FourStagePyramid(vit.levels)
        stages = self.pyramid.levels
        self.fpn = FeaturePyramidNetwork([s.channels for s in stages], channels, LastLevelMaxPool(), norm)
        strides = [stage.stride for stage in stages]
        self.levels = tuple(Level(f"p{n}", channels, s) for n, s in enumerate([*strides, 2 * strides[-1]], start=2))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, C, H, W) -> {"p2": (B, channels, H / stride, W / stride), ...}, rounded up, for ``levels``."""
        stages = self.pyramid(self.vit(images))
        maps = self.fpn(OrderedDict((level.name, x) for level, x in zip(self.pyramid.levels, stages, strict=True)))
        return OrderedDict((level.name, x) for level, x in zip(self.levels, maps.values(), strict=True))
