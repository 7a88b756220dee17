"""Attention of tokens that lie on a grid: windows of it, and relative positions. No engine in it.

Every kind goes through ``attend``, which chooses the kernel: a table of biases is added to its logits. ViTDet's
decomposed positions are biases too where attention is computed as products; elsewhere they are extra entries of queries
and keys, whose products are the biases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from mae_core.models.block import as_products, attend, products

Grid = tuple[int, int]
"""(rows, cols) of tokens."""


class GridAttention(nn.Module):
    """timm's attention, whose layers it takes over, without relative positions of its own.

    ``size`` is the grid that tables are made for, ``prefix`` the number of tokens before those of the grid.
    """

    def __init__(self, attention: Attention, size: Grid, prefix: int = 0) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.size, self.prefix = size, prefix

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.proj.in_features // self.num_heads

    def forward(self, x: Tensor, grid: Grid, bias: Tensor | None = None) -> Tensor:
        """(B, prefix + rows*cols, D) -> the same; ``bias`` (heads, N, N) is added to the attention's logits."""
        B, N, _ = x.shape
        query, key, value = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(query, key, value, grid, bias).transpose(1, 2).reshape(B, N, -1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, bias: Tensor | None) -> Tensor:
        """Three (B, heads, N, head_size) -> (B, heads, N, head_size)."""
        return attend(query, key, value, None if bias is None else bias.to(query.dtype)[None])


def bias_table(heads: int, size: Grid, prefix: int = 0) -> nn.Parameter:
    """One learned bias per offset and head (BEiT, Swin), zero at first; with ``prefix`` 1, three for the cls token.

    Laid out as BEiT's: row ``(dy + rows - 1) * (2 * cols - 1) + dx + cols - 1`` is the bias of a query that lies
    (dy, dx) below and to the right of its key; then cls to patch, patch to cls, cls to cls.
    """
    rows, cols = size
    return nn.Parameter(torch.zeros((2 * rows - 1) * (2 * cols - 1) + 3 * prefix, heads))


class SharedTable(nn.Module):
    """A ``bias_table`` for the blocks of a kind."""

    def __init__(self, heads: int, size: Grid, prefix: int = 0) -> None:
        super().__init__()
        self.size, self.prefix = size, prefix
        self.relative_position_bias_table = bias_table(heads, size, prefix)

    def forward(self, grid: Grid) -> Tensor:
        """-> (heads, N, N) biases of N = prefix + rows*cols tokens; a grid of another size gets a resized table."""
        return table_biases(self.relative_position_bias_table, self.size, grid, self.prefix)


class TableAttention(GridAttention):
    """Attention with a ``bias_table`` of its own."""

    def __init__(self, attention: Attention, size: Grid, prefix: int = 0) -> None:
        super().__init__(attention, size, prefix)
        self.relative_position_bias_table = bias_table(self.num_heads, size, prefix)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, bias: Tensor | None) -> Tensor:
        """As in ``GridAttention``, with the biases of the table."""
        own = table_biases(self.relative_position_bias_table, self.size, grid, self.prefix)
        return super().attend(query, key, value, grid, own if bias is None else own + bias)


class DecomposedAttention(GridAttention):
    """Attention with ViTDet's decomposed relative positions (MViTv2, equation 4): one vector per vertical and one per
    horizontal offset, shared by the heads, zero at first; the bias is their product with the unscaled query."""

    def __init__(self, attention: Attention, size: Grid, prefix: int = 0) -> None:
        super().__init__(attention, size, prefix)
        if prefix:
            raise ValueError("decomposed relative positions do not support a cls token; use cls_token=False")
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size[0] - 1, self.head_size))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size[1] - 1, self.head_size))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, bias: Tensor | None) -> Tensor:
        """As in ``GridAttention``: as products, or with each key's one-hot row and column behind it, so that a kernel
        that knows of no bias finds it in q . k."""
        rows, cols = grid
        by_place, scale = query.unflatten(2, grid), self.head_size**-0.5
        vertical = torch.einsum("bhyxc,ykc->bhyxk", by_place, of_offsets(self.rel_pos_h, rows).to(query.dtype))
        horizontal = torch.einsum("bhyxc,xkc->bhyxk", by_place, of_offsets(self.rel_pos_w, cols).to(query.dtype))
        if as_products(query, key, special=True):
            biases = [vertical.flatten(2, 3)[..., None], horizontal.flatten(2, 3)[..., None, :]]
            if bias is not None:
                biases.append(bias.to(query.dtype)[None].unflatten(-1, grid))
            return products(query, key, value, *biases, scale=scale, grid=grid)
        row = torch.eye(rows, dtype=key.dtype, device=key.device)[:, None].expand(-1, cols, -1)
        col = torch.eye(cols, dtype=key.dtype, device=key.device)[None].expand(rows, -1, -1)
        place = torch.cat([row, col], dim=-1).flatten(0, 1).expand(*key.shape[:2], -1, -1)
        query = torch.cat([by_place * scale, vertical, horizontal], dim=-1).flatten(2, 3)
        key = torch.cat([key, place], dim=-1)
        return attend(query, key, value, None if bias is None else bias.to(query.dtype)[None], scale=1.0)


def of_offsets(table: Tensor, length: int) -> Tensor:
    """(2 * stored - 1, D) -> (length, length, D): the row of offset i - j at [i, j]; resized linearly where needed."""
    if len(table) != 2 * length - 1:
        table = F.interpolate(table.float().t()[None], size=2 * length - 1, mode="linear")[0].t()
    return table.unfold(0, length, 1).flip(-1).transpose(1, 2)


def table_biases(table: Tensor, stored: Grid, grid: Grid, prefix: int) -> Tensor:
    """A table of ``bias_table``'s layout -> (heads, N, N), resized (bicubic) from the ``stored`` grid where needed."""
    offsets = (2 * stored[0] - 1) * (2 * stored[1] - 1)
    image = table[:offsets].t().unflatten(1, (2 * stored[0] - 1, 2 * stored[1] - 1))
    if stored != grid:
        size = (2 * grid[0] - 1, 2 * grid[1] - 1)
        image = F.interpolate(image.float()[None], size=size, mode="bicubic", align_corners=False)[0]
    # windows of the table are what one query sees, the keys from last to first
    biases = image.unfold(1, grid[0], 1).unfold(2, grid[1], 1).flip(-2, -1).flatten(3).flatten(1, 2)
    if prefix:
        from_cls, to_cls, itself = table[offsets:, :, None, None].to(biases.dtype)
        patches = biases.shape[1]
        below = torch.cat([to_cls.expand(-1, patches, 1), biases], dim=2)
        biases = torch.cat([torch.cat([itself, from_cls.expand(-1, 1, patches)], dim=2), below], dim=1)
    return biases


RELATIVE_POSITIONS: dict[str, type[GridAttention]] = {
    "none": GridAttention,
    "table": TableAttention,
    "shared_table": GridAttention,
    "decomposed": DecomposedAttention,
}
"""Name in a configuration -> attention of a block. ``table`` is BEiT's for segmentation, one per block; with
``shared_table`` all blocks with windows share one, all global blocks another (arXiv 2111.11429, 3.1); ``decomposed`` is
ViTDet's."""


def partition_windows(x: Tensor, grid: Grid, window: int) -> tuple[Tensor, Grid]:
    """(B, rows*cols, D) -> (B*windows, window*window, D) and the padded (rows, cols).

    The grid is padded with zeros at the right and the bottom; padded tokens take part in attention, as in ViTDet.
    """
    B, _, D = x.shape
    rows, cols = grid
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, -cols % window, 0, -rows % window))
    down, across = x.shape[1] // window, x.shape[2] // window
    x = x.reshape(B, down, window, across, window, D).transpose(2, 3)
    return x.reshape(B * down * across, window * window, D), (down * window, across * window)


def merge_windows(x: Tensor, grid: Grid, window: int, padded: Grid) -> Tensor:
    """The inverse of ``partition_windows``: padding is cut off again."""
    down, across = padded[0] // window, padded[1] // window
    x = x.reshape(-1, down, across, window, window, x.shape[-1]).transpose(2, 3)
    x = x.reshape(x.shape[0], *padded, x.shape[-1])
    return x[:, : grid[0], : grid[1]].flatten(1, 2)
