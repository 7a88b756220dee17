"""MAE's light decoder (paper, section 3): visible tokens and mask tokens in, a prediction per patch out.

For pre-training only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from timm.layers import get_act_layer
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.masking import PatchMask
from mae_core.models.block import Block
from mae_core.models.encoder import init_linear_and_norm
from mae_core.patches import PatchGrid
from mae_core.pos_embed import sincos_2d


class BlockFusion(nn.Module):
    """What the decoder reads where it reads more than the last block (MFF, arXiv 2308.00261): the outputs of
    ``blocks``, each through a linear layer, and that of the last block as it is, averaged with learned weights that
    add up to 1.

    ``blocks`` are 0-based. The weights are equal at the start. Belongs to pre-training alone: the encoder is the same
    with and without it. Raises ``UserError`` where ``blocks`` do not ascend below the last block of ``depth``.
    """

    def __init__(self, width: int, depth: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        if list(self.blocks) != sorted({*self.blocks}) or not all(0 <= block < depth - 1 for block in self.blocks):
            raise UserError(
                f"decoder.fuse_blocks={list(blocks)}: give blocks from 0 to {depth - 2}, ascending; the decoder reads "
                f"the last of the {depth} blocks in any case"
            )
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in self.blocks)
        self.logits = nn.Parameter(torch.zeros(len(self.blocks) + 1))
        init_linear_and_norm(self)

    def forward(self, outputs: Mapping[int, Tensor]) -> Tensor:
        """(B, n, D) of at least ``blocks`` and the last block, by number -> (B, n, D), not normalised."""
        weights = self.logits.softmax(dim=0)
        fused = weights[-1] * outputs[max(outputs)]
        for weight, project, block in zip(weights, self.project, self.blocks, strict=False):
            fused = fused + weight * project(outputs[block])
        return fused


class MAEDecoder(nn.Module):
    """A few transformer blocks on all patches of ``grid``, ending in a linear prediction of ``target_dim`` numbers a
    patch. ``mask_tokens=False``: for an encoder that has put mask tokens in already (paper, Table 1c). ``prefix``: how
    many tokens precede the patches'; 0 or 1."""

    def __init__(
        self,
        encoder_width: int,
        grid: PatchGrid,
        target_dim: int,
        *,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        activation: str = "gelu",
        mask_tokens: bool = True,
        prefix: int = 1,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads or width % 4:
            raise UserError(f"decoder width {width} must be divisible by its heads ({heads}) and by 4")
        if depth < 1:
            raise UserError(f"a decoder has at least one block; depth {depth} was asked for")
        self.heads, self.prefix = heads, prefix
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_tokens else None
        self.pos_embed = nn.Parameter(sincos_2d(width, grid.rows, grid.cols), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=norm_eps)
        options = {"mlp_ratio": mlp_ratio, "norm_layer": norm, "act_layer": get_act_layer(activation)}
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, **options) for _ in range(depth)))
        self.norm = norm(width)
        self.pred = nn.Linear(width, target_dim)
        init_linear_and_norm(self)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, mask: PatchMask, *, only_hidden: bool = False) -> Tensor:
        """(B, prefix + V, encoder_width), or (B, prefix + N, ...) with ``mask_tokens=False`` -> (B, N, target_dim) in
        raster order; ``only_hidden``: (B, n, target_dim) of ``mask.hidden_ids``, for less work in the last block."""
        x, prefix = self.embed(tokens), self.prefix
        if self.mask_token is not None:
            B, _, D = x.shape
            canvas = self.mask_token.to(x.dtype).expand(B, mask.hidden.shape[1], D)
            canvas = canvas.scatter(1, mask.visible_ids[:, :, None].expand(-1, -1, D), x[:, prefix:])
            x = torch.cat([x[:, :prefix], canvas], dim=1)
        *first, last = self.blocks
        x = x + self.pos_embed[:, 1 - prefix :]
        for block in first:
            x = block(x)
        x = last.only_at(x, mask.hidden_ids + prefix) if only_hidden else last(x)[:, prefix:]
        return self.pred(self.norm(x))
