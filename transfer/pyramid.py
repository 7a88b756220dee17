"""From a ViT's maps of one stride to maps of many. No engine in it.

``four_stage`` is that of "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv 2111.11429, section
2.1), which the MAE paper's detection results use: the outputs of the trunk's four quarters become maps of a quarter, a
half, one and two patches per cell, and an FPN goes on top. ``simple`` is ViTDet's simple feature pyramid (arXiv
2203.16527, 3): the last map alone becomes all four. ``single`` has no pyramid, the ablation of both papers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from math import gcd
from typing import NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from mae_core.errors import UserError
from mae_core.models.sizes import ViTSize
from mae_core.training.distributed import world_size
from transfer.backbone import Level, to_convolve
from transfer.timm_backbone import Dense

Norm = Callable[[int], nn.Module]

CANONICAL_SIDE, CANONICAL_STRIDE = 224, 16
"""A box of this side is read from the level of this stride; half the side, half the stride (FPN, equation 1)."""
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


class LayerNorm2d(timm.layers.LayerNorm2d):
    """timm's norm over the channels of (B, C, H, W), which leaves them together in memory, as convolutions want it."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return to_convolve(super().forward(x))


NORMS: dict[str, Norm | None] = {
    "sync_bn": sync_batch_norm,
    "bn": nn.BatchNorm2d,
    "gn": group_norm,
    "ln": partial(LayerNorm2d, eps=1e-6),
    "none": None,
}
"""Name in a configuration -> channels -> norm of (B, C, H, W) maps; with ``none`` the convolutions have a bias."""


def check_patch(patch: int) -> None:
    """Raise ``UserError`` unless strides of a quarter and a half of ``patch`` are whole numbers."""
    if patch % 4:
        raise UserError(
            f"a pyramid needs a patch size divisible by 4, not {patch}; resize the patch embedding, with model.trunk "
            "by model.patch_size=16, else by mae convert FILE --to mae_core --patch-size 16 --out NEW"
        )


def check_canvas(kind: str, canvas: tuple[int, int], patch: int) -> None:
    """Raise ``UserError`` where a ``canvas`` of (height, width) leaves the coarsest map of a pyramid without two cells:
    a norm of one is not defined."""
    coarsest = strides_of(patch)[-1]
    if kind != "single" and (canvas[0] // coarsest) * (canvas[1] // coarsest) < 2:
        raise UserError(
            f"data.image_size is {canvas[0]}x{canvas[1]}, too small for patches of {patch}: the coarsest map of "
            f"model.pyramid={kind} has cells of {coarsest} pixels; set data.image_size={2 * coarsest} or more"
        )


def strides_of(patch: int) -> tuple[int, int, int, int]:
    """The strides of the four maps of a pyramid, in pixels."""
    return patch // 4, patch // 2, patch, 2 * patch


class FourStagePyramid(nn.Module):
    """Four maps of stride ``patch`` -> strides patch/4, patch/2, patch and 2 * patch; the width stays the ViT's.

    ``levels`` of the maps go in, ``levels`` of the output come out. Raises ``UserError`` unless 4 divides the patch.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        if len(levels) != 4:
            raise UserError(f"a four-stage pyramid takes four maps, not {len(levels)}; tap four blocks")
        widths, patch = [level.channels for level in levels], levels[0].stride
        check_patch(patch)
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
                nn.MaxPool2d(2, stride=2),
            ]
        )
        pairs = enumerate(zip(widths, strides_of(patch), strict=True), start=1)
        self.levels = tuple(Level(f"stage{n}", width, stride) for n, (width, stride) in pairs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h // 2, w // 2)."""
        return [stage(x) for stage, x in zip(self.stages, maps, strict=True)]


class FourStageFPN(nn.Module):
    """``FourStagePyramid`` and a feature pyramid network of ``channels`` on top, ``norm`` behind each convolution."""

    def __init__(self, levels: Sequence[Level], channels: int, norm: Norm | None) -> None:
        super().__init__()
        self.pyramid = FourStagePyramid(levels)
        stages = self.pyramid.levels
        self.fpn = FeaturePyramidNetwork([s.channels for s in stages], channels, None, norm)
        self.levels = tuple(Level(f"p{n}", channels, s.stride) for n, s in enumerate(stages, start=2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four (B, D, h, w) -> four (B, channels, ., .), finest first."""
        stages = zip(self.pyramid.levels, self.pyramid(maps), strict=True)
        return list(self.fpn(OrderedDict((level.name, x) for level, x in stages)).values())


def to_channels(width: int, channels: int, norm: Norm | None) -> list[nn.Module]:
    """A 1x1 and a 3x3 convolution, each with its norm, or with a bias in its place."""
    one = nn.Conv2d(width, channels, 1, bias=norm is None)
    three = nn.Conv2d(channels, channels, 3, padding=1, bias=norm is None)
    return [one, three] if norm is None else [one, norm(channels), three, norm(channels)]


class SimpleFeaturePyramid(nn.Module):
    """The last map of stride ``patch`` -> strides patch/4, patch/2, patch and 2 * patch, all of ``channels``.

    Transposed convolutions halve the width as they double the map (arXiv 2203.16527, A.2). Raises ``UserError`` unless
    4 divides the patch.
    """

    def __init__(self, levels: Sequence[Level], channels: int, norm: Norm | None) -> None:
        super().__init__()
        _, width, patch = levels[-1]
        check_patch(patch)
        half, quarter = width // 2, width // 4
        scales: list[tuple[list[nn.Module], int]] = [
            (
                [
                    nn.ConvTranspose2d(width, half, 2, stride=2),
                    *([] if norm is None else [norm(half)]),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ],
                quarter,
            ),
            ([nn.ConvTranspose2d(width, half, 2, stride=2)], half),
            ([], width),
            ([nn.MaxPool2d(2, stride=2)], width),
        ]
        self.stages = nn.ModuleList(
            nn.Sequential(*resize, *to_channels(resized, channels, norm)) for resize, resized in scales
        )
        self.levels = tuple(Level(f"p{n}", channels, s) for n, s in enumerate(strides_of(patch), start=2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, D, h, w), the last of ``maps`` -> four (B, channels, ., .), finest first."""
        return [stage(maps[-1]) for stage in self.stages]


class SingleScale(nn.Module):
    """The last map alone, brought to ``channels``: one level that all boxes are read from."""

    def __init__(self, levels: Sequence[Level], channels: int, norm: Norm | None) -> None:
        super().__init__()
        _, width, patch = levels[-1]
        self.stages = nn.Sequential(*to_channels(width, channels, norm))
        self.levels = (Level("p4", channels, patch),)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(B, D, h, w), the last of ``maps`` -> one (B, channels, h, w)."""
        return [self.stages(maps[-1])]


class Pyramid(NamedTuple):
    """What makes the maps of a detector: the blocks of the trunk it reads, and a module with ``levels``."""

    taps: Callable[[ViTSize], tuple[int, ...]]
    build: Callable[[Sequence[Level], int, Norm | None], nn.Module]


PYRAMIDS = {
    "four_stage": Pyramid(lambda size: size.quarter_taps, FourStageFPN),
    "simple": Pyramid(lambda size: (size.depth - 1,), SimpleFeaturePyramid),
    "single": Pyramid(lambda size: (size.depth - 1,), SingleScale),
}
"""Name in a configuration -> pyramid."""


class PyramidBackbone(nn.Module):
    """``DenseViT`` and a row of ``PYRAMIDS``: images -> p2, p3, p4, p5 and p6, finest first, or p4 alone.

    p2 has a quarter of the patch as its stride (4 with patch 16); p6 is every second cell of p5. ``norm`` follows each
    convolution of the pyramid (SyncBN in the MAE paper's detector, LayerNorm in ViTDet). ``levels`` are all maps,
    ``box_levels`` those that boxes are read from; ``anchor_strides`` holds the strides of the five anchor sizes, by
    level.
    """

    def __init__(
        self, vit: Dense, *, kind: str = "four_stage", channels: int = 256, norm: Norm | None = sync_batch_norm
    ) -> None:
        super().__init__()
        self.vit = vit
        self.pyramid = PYRAMIDS[kind].build(vit.levels, channels, norm)
        self.box_levels: tuple[Level, ...] = self.pyramid.levels
        patch = vit.grid.patch
        five = (*strides_of(patch), 4 * patch)
        several = len(self.box_levels) > 1
        self.levels = (*self.box_levels, Level("p6", channels, 4 * patch)) if several else self.box_levels
        self.anchor_strides: tuple[tuple[int, ...], ...] = tuple((s,) for s in five) if several else (five,)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, C, H, W) -> {"p2": (B, channels, H / stride, W / stride), ...} for ``levels``.

        Of an image that does not fill whole cells, the patches are rounded up, p5 is rounded down, as in detectron2.
        """
        maps = self.pyramid(self.vit(images))
        if len(self.levels) > len(self.box_levels):
            maps = [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]
        return OrderedDict((level.name, x) for level, x in zip(self.levels, maps, strict=True))
