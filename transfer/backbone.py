"""DenseViT: the pre-trained trunk as a backbone for images of any size. No engine in it.

Four-stage use: the quarter taps, one stride, ``transfer.pyramid`` makes the strides. Window attention with a few global
blocks follows "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv 2111.11429, 2.1) and ViTDet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import SIZES
from mae_core.pos_embed import resize_pos_embed


class Level(NamedTuple):
    """One feature map a backbone or a pyramid emits: its stride is in pixels of the input."""

    name: str
    channels: int
    stride: int


class DenseViT(ViTEncoder):
    """A ViT that maps (B, C, H, W) to one (B, D, ceil(H/patch), ceil(W/patch)) map per tapped block.

    taps           0-based blocks whose output is emitted, ascending; the last block of each quarter when None
    window         side of the attention windows in patches, None for global attention everywhere
    global_blocks  blocks that attend globally although ``window`` is set; the taps when None
    cls_token      keep the cls token in the sequence (it never reaches the maps); needs global attention
    tap_norm       standardise each emitted map per channel (BatchNorm without affine, as the paper's linear probe
    does):
                   the raw maps of a pre-trained trunk differ a hundredfold in scale between channels, which costs a
                   short training dear; the published recipes do without
    checkpointing  recompute each block in the backward pass: less memory, about a third more time

    The stored position table belongs to ``image_size``; it is resized (bicubic) to the input's grid on every call. No
    final
    norm is applied. Images are padded with zeros at the right and the bottom to whole patches.
    """

    def __init__(
        self,
        size: str = "base",
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int | None = None,
        in_chans: int = 3,
        taps: Sequence[int] | None = None,
        window: int | None = None,
        global_blocks: Sequence[int] | None = None,
        cls_token: bool = False,
        drop_path: float = 0.0,
        tap_norm: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(size, image_size=image_size, patch_size=patch_size, in_chans=in_chans, drop_path=drop_path)
        if window is not None and cls_token:
            raise ValueError("window attention has no place for a cls token; use cls_token=False or window=None")
        self.taps = tuple(SIZES[size].quarter_taps if taps is None else taps)
        if list(self.taps) != sorted(set(self.taps)) or not 0 <= self.taps[0] <= self.taps[-1] < len(self.blocks):
            raise ValueError(f"taps {self.taps} must ascend within the {len(self.blocks)} blocks, counted from 0")
        self.window = window
        self.global_blocks = frozenset(self.taps if global_blocks is None else global_blocks)
        self.checkpointing = checkpointing
        if not cls_token:
            self.cls_token = None
        self.norm = nn.Identity()
        self.tap_norms = nn.ModuleList(
            nn.BatchNorm2d(self.embed_dim, eps=1e-6, affine=False) if tap_norm else nn.Identity() for _ in self.taps
        )

    @property
    def levels(self) -> tuple[Level, ...]:
        """What ``forward`` emits, in its order."""
        return tuple(Level(f"block{tap}", self.embed_dim, self.grid.patch) for tap in self.taps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> one (B, D, ceil(H/patch), ceil(W/patch)) map per tap."""
        patch = self.grid.patch
        H, W = images.shape[-2:]
        images = F.pad(images, (0, -W % patch, 0, -H % patch))
        x = self.patch_embed.proj(images)
        rows, cols = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        positions = resize_pos_embed(self.pos_embed, self.grid[:2], (rows, cols))
        x = x + positions[:, 1:]
        prefix = 0
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token + positions[:, :1]).expand(len(x), -1, -1), x], dim=1)
            prefix = 1
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks[: self.taps[-1] + 1]):
            window = None if index in self.global_blocks else self.window
            if self.checkpointing and self.training:
                x = checkpoint(_run_block, block, x, (rows, cols), window, use_reentrant=False)
            else:
                x = _run_block(block, x, (rows, cols), window)
            if index in self.taps:
                tapped = x[:, prefix:].transpose(1, 2).unflatten(2, (rows, cols))
                maps.append(self.tap_norms[len(maps)](tapped))
        return maps


def _run_block(block: nn.Module, x: Tensor, grid: tuple[int, int], window: int | None) -> Tensor:
    """One transformer block on (B, N, D) tokens, its attention inside windows of ``window`` x ``window`` patches if
    given."""
    if window is None:
        return block(x)
    normed, layout = partition_windows(block.norm1(x), grid, window)
    attended = merge_windows(block.attn(normed), grid, window, layout)
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def partition_windows(x: Tensor, grid: tuple[int, int], window: int) -> tuple[Tensor, tuple[int, int]]:
    """(B, rows*cols, D) -> (B*windows, window*window, D) and the padded (rows, cols).

    The grid is padded with zeros at the right and the bottom; padded tokens take part in attention, as in ViTDet.
    """
    B, _, D = x.shape
    rows, cols = grid
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, -cols % window, 0, -rows % window))
    down, across = x.shape[1] // window, x.shape[2] // window
    x = x.reshape(B, down, window, across, window, D).transpose(2, 3)
    return x.reshape(B * down * across, window * window, D), (down * window, across * window)


def merge_windows(x: Tensor, grid: tuple[int, int], window: int, padded: tuple[int, int]) -> Tensor:
    """The inverse of ``partition_windows``: padding is cut off again."""
    down, across = padded[0] // window, padded[1] // window
    x = x.reshape(-1, down, across, window, window, x.shape[-1]).transpose(2, 3)
    x = x.reshape(x.shape[0], *padded, x.shape[-1])
    return x[:, : grid[0], : grid[1]].flatten(1, 2)
