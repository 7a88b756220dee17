"""DenseViT: the pre-trained trunk as a backbone for images of any size. No engine in it.

Four-stage use: the quarter taps, one stride, ``transfer.pyramid`` makes the strides. Window attention with a few global
blocks follows "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv 2111.11429, 2.1) and ViTDet
(arXiv 2203.16527), which reads the last block alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_core.errors import UserError
from mae_core.models.classifier import freeze_below
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import SIZES, AnySize
from mae_core.patches import PatchGrid
from mae_core.pos_embed import resize_pos_embed
from transfer.attention import RELATIVE_POSITIONS, Grid, SharedTable, merge_windows, partition_windows


class Level(NamedTuple):
    """One feature map a backbone or a pyramid emits: its stride is in pixels of the input."""

    name: str
    channels: int
    stride: int


ADDED = ("*relative_position_bias_table", "*.rel_pos_h", "*.rel_pos_w", "*.ls1.gamma", "*.ls2.gamma")
"""Tensors that a dense task adds to an encoder."""


class DenseViT(ViTEncoder):
    """A ViT that maps (B, C, H, W) to one (B, D, ceil(H/patch), ceil(W/patch)) map per tapped block.

    image_size          what the stored position table belongs to; it is resized (bicubic) to each input's grid
    taps                0-based blocks whose output is emitted, ascending; the last block of each quarter when None
    window              side of the attention windows in patches, None for global attention everywhere
    global_blocks       blocks that attend globally although ``window`` is set; the last of each quarter when None
    relative_positions  a row of ``RELATIVE_POSITIONS``, learned from zero
    relative_size       image size that the tables of global blocks are made for, ``image_size`` when None; another
                        size is resized on the fly
    layer_scale         initial value of a learned factor per channel on each residual branch (BEiT), None for none
    cls_token           keep the cls token in the sequence (it never reaches the maps); needs global attention
    checkpointing       recompute each block in the backward pass: less memory, about a third more time

    ``freeze`` keeps the blocks below as they are, and runs them without gradients.
    Blocks behind the last tap do not exist, as nothing would train them. No final norm is applied. Images are padded
    with zeros at the right and the bottom to whole patches. Raises ``UserError`` for options that exclude each other.
    """

    def __init__(
        self,
        size: AnySize = "base",
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int | None = None,
        in_chans: int = 3,
        taps: Sequence[int] | None = None,
        window: int | None = None,
        global_blocks: Sequence[int] | None = None,
        relative_positions: str = "none",
        relative_size: int | Sequence[int] | None = None,
        layer_scale: float | None = None,
        cls_token: bool = False,
        drop_path: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        if not 0 <= drop_path < 1:
            raise UserError(f"drop_path is {drop_path}; give a rate from 0 up to but not including 1")
        super().__init__(size, image_size=image_size, patch_size=patch_size, in_chans=in_chans, drop_path=drop_path)
        if relative_positions not in RELATIVE_POSITIONS:
            known = ", ".join(RELATIVE_POSITIONS)
            raise UserError(f"unknown relative positions {relative_positions!r}; known: {known}")
        if cls_token and (window is not None or relative_positions == "decomposed"):
            cause = "window attention" if window is not None else "decomposed relative positions"
            raise UserError(f"a cls token does not go with {cause}; set cls_token=False, or turn {cause} off")
        quarters = self.shape.quarter_taps
        self.taps = tuple(quarters if taps is None else taps)
        if list(self.taps) != sorted(self.taps) or not self.taps or not 0 <= self.taps[0]:
            raise UserError(f"taps {self.taps} must ascend and count blocks from 0")
        if self.taps[-1] >= len(self.blocks):
            raise UserError(f"taps {self.taps} must lie within the {len(self.blocks)} blocks, counted from 0")
        self.blocks: nn.Sequential = self.blocks[: self.taps[-1] + 1]  # a block without gradients stops several ranks
        self.window = window
        self.global_blocks = frozenset(quarters if global_blocks is None else global_blocks)
        self.relative_positions = relative_positions
        self.checkpointing = checkpointing
        self.frozen_blocks = 0
        cls_token = cls_token and self.shape.cls_token
        if not cls_token:
            self.cls_token, self.num_prefix_tokens = None, 0
        self.norm = nn.Identity()
        prefix = int(cls_token)
        tables = PatchGrid.of(image_size if relative_size is None else relative_size, self.grid.patch)
        for index, block in enumerate(self.blocks):
            block.attn = RELATIVE_POSITIONS[relative_positions](block.attn, self._table_size(index, tables), prefix)
            if layer_scale is not None:
                block.ls1, block.ls2 = (LayerScale(self.embed_dim, layer_scale) for _ in range(2))
        if relative_positions == "shared_table":
            heads, kinds = self.shape.heads, {self._window(index) for index in range(len(self.blocks))}
            self.shared_tables = nn.ModuleDict(
                {_kind(w): SharedTable(heads, (w, w) if w else (tables.rows, tables.cols), prefix) for w in kinds}
            )

    may_be_new = ADDED
    """Patterns of tensors that a pre-trained encoder does not have."""

    @property
    def section(self) -> dict[str, Any]:
        """The trunk in the words of a ``model`` section: its name, or its numbers where it has none."""
        shape = self.shape
        named = shape.name in SIZES
        numbers = {name: getattr(shape, name) for name in ("width", "depth", "heads", "mlp_ratio")}
        return {
            "size": shape.name if named else None,
            "patch_size": shape.patch_size,
            **{name: None if named else value for name, value in numbers.items()},
        }

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
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        positions = resize_pos_embed(self.pos_embed, self.grid[:2], grid)
        x = x + positions[:, 1:]
        prefix = 0
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token + positions[:, :1]).expand(len(x), -1, -1), x], dim=1)
            prefix = 1
        biases = self._shared_biases(grid)
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            window = self._window(index)
            arguments = (block, x, grid, window, biases.get(_kind(window)))
            if self.training and index < self.frozen_blocks:
                with torch.no_grad():  # a bias that other blocks learn must keep nothing of these
                    x = _run_block(*arguments)
            elif self.checkpointing and self.training:
                x = checkpoint(_run_block, *arguments, use_reentrant=False)
            else:
                x = _run_block(*arguments)
            maps += [to_convolve(x[:, prefix:].transpose(1, 2).unflatten(2, grid))] * self.taps.count(index)
        return maps

    def freeze(self, trainable_blocks: int | None) -> None:
        """Let the last ``trainable_blocks`` blocks alone learn; 0 freezes all, None nothing. Biases that blocks share
        learn where a learning block has them. Raises ``UserError`` where there are fewer blocks."""
        self.frozen_blocks = freeze_below(self, trainable_blocks)
        if self.relative_positions == "shared_table":
            learning = {_kind(self._window(index)) for index in range(self.frozen_blocks, len(self.blocks))}
            for kind, table in self.shared_tables.items():
                table.requires_grad_(kind in learning)

    def _window(self, index: int) -> int | None:
        return None if index in self.global_blocks else self.window

    def _table_size(self, index: int, tables: PatchGrid) -> Grid:
        window = self._window(index)
        return (tables.rows, tables.cols) if window is None else (window, window)

    def _shared_biases(self, grid: Grid) -> dict[str, Tensor]:
        """The biases that many blocks share, made once a pass: by kind of block, (heads, N, N)."""
        if self.relative_positions != "shared_table":
            return {}
        sizes = {_kind(None): grid} | ({_kind(self.window): (self.window, self.window)} if self.window else {})
        return {kind: table(sizes[kind]) for kind, table in self.shared_tables.items()}


WIDE = 256
"""Channels from which on a CPU's convolutions learn slower where channels lie together (``channels_last``): forward and
backward take 1.7 to 2.1 times as long with 256 to 2048 channels in, one or two images, and 0.8 to 1.0 times with 64 or
192 in, eight images (oneDNN, float32, AVX2)."""


def to_convolve(x: Tensor) -> Tensor:
    """A (B, C, H, W) map, whose channels may lie together, as the convolutions behind it are fastest: on a CPU with
    ``WIDE`` channels or more pixel by pixel, otherwise as it is."""
    return x.contiguous() if x.device.type == "cpu" and x.shape[1] >= WIDE else x


def _kind(window: int | None) -> str:
    return "global" if window is None else "window"


def _run_block(block: nn.Module, x: Tensor, grid: Grid, window: int | None, bias: Tensor | None) -> Tensor:
    """One transformer block on (B, N, D) tokens, its attention inside windows of ``window`` x ``window`` patches if
    given; ``bias`` is added to its logits."""
    normed = block.norm1(x)
    if window is None:
        attended = block.attn(normed, grid, bias)
    else:
        inside, padded = partition_windows(normed, grid, window)
        attended = merge_windows(block.attn(inside, (window, window), bias), grid, window, padded)
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
