"""The ViT encoder: timm's ``VisionTransformer`` with MAE's positions, initialisation and a pass over visible patches
only.

The parameter names are timm's, which are the official MAE names, so that fine-tuning, layer-wise decay, export and
conversion need no second ViT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.masking import PatchMask
from mae_core.models.block import Block
from mae_core.models.sizes import SIZES, AnySize, Pooling, size_of
from mae_core.patches import PatchGrid, patchify
from mae_core.pos_embed import sincos_2d

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
"""With the epsilon that the released weights were trained with, in encoder and decoder."""

POOLINGS: dict[str | None, str] = {"mean": "avg", "cls": "token", None: ""}
"""Our name -> timm's."""


class ViTEncoder(VisionTransformer):
    """A ViT of a named size or of a ``ViTSize``; with ``num_classes`` it is a classifier.

    Sequence layout: cls token, then patches in raster order; of a ``ViTSize`` without ``cls_token`` the patches alone,
    while ``pos_embed`` keeps its first row, which nothing reads. ``pooling="mean"`` averages the patch tokens of the
    last block and normalises after (``fc_norm``), as the paper's fine-tuning does; ``"cls"`` takes the normalised cls
    token.
    ``load_encoder`` sets ``transform``: a file, PIL image or tensor -> (C, H, W) as the encoder expects it.
    """

    transform: Callable[[Any], Tensor]

    def __init__(
        self,
        size: AnySize = "base",
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int | None = None,
        in_chans: int = 3,
        num_classes: int = 0,
        pooling: Pooling | None = None,
        drop_path: float = 0.0,
    ) -> None:
        shape = size_of(size)
        patch = shape.patch_size if patch_size is None else patch_size
        grid = PatchGrid.of(image_size, patch)
        if in_chans < 1:
            raise UserError(f"an image has at least one channel; in_chans={in_chans} was asked for")
        if pooling == "cls" and not shape.cls_token:
            raise UserError("this encoder has no cls token to pool by; pool by the mean of the patches")
        if pooling not in POOLINGS:
            raise UserError(
                f"unknown pooling {pooling!r}; known: 'mean', 'cls', or None for all tokens (map: of timm alone)"
            )
        super().__init__(
            img_size=grid.image_size,
            patch_size=patch,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=POOLINGS[pooling],
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=shape.mlp_ratio,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=shape.norm_eps),
            act_layer=get_act_layer(shape.activation),
            block_fn=Block,
            weight_init="skip",
        )
        self.shape = replace(shape, patch_size=patch)
        self.size = shape.name
        self.grid = grid
        if not shape.cls_token:
            self.cls_token, self.has_class_token, self.num_prefix_tokens = None, False, 0
        self.initialize()

    def initialize(self) -> None:
        """MAE's initialisation (official ``initialize_weights``): xavier-uniform weights, zero biases, sine-cosine
        positions.

        The patch embedding counts as one linear layer over its patch; its bias keeps the convolution's default.
        """
        init_linear_and_norm(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_2d(self.embed_dim, self.grid.rows, self.grid.cols))
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=2e-5)

    @property
    def in_channels(self) -> int:
        """Channels of the images it takes."""
        return self.patch_embed.proj.in_channels

    @property
    def prefix(self) -> int:
        """Tokens before the patch tokens: the cls token, or none."""
        return int(self.num_prefix_tokens)

    @property
    def facts(self) -> dict[str, Any]:
        """What the metadata of a file says of the trunk, so that it can be built again."""
        stated = {"cls_token": None if self.shape.cls_token else False}  # older versions read the files that have one
        return {"size": self.shape.name if self.shape.name in SIZES else None, **asdict(self.shape), **stated}

    def layer_of(self, name: str) -> int:
        """Layer of a parameter: 0 for the embeddings, i + 1 for block i, depth + 1 for everything else."""
        first, _, rest = name.partition(".")
        if first == "blocks":
            return int(rest.partition(".")[0]) + 1
        return 0 if first in ("cls_token", "pos_embed", "patch_embed") else len(self.blocks) + 1

    def check_images(self, images: Tensor) -> None:
        """Raise ``UserError`` unless ``images`` is (B, C, H, W) of this encoder's channels and size."""
        wanted = (self.in_channels, *self.grid.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise UserError(
                f"this encoder takes images (B, {wanted[0]}, {wanted[1]}, {wanted[2]}), got {tuple(images.shape)}; "
                "resize them, or load the encoder with image_size=(H, W) and in_chans=C"
            )
        if not images.is_floating_point():
            raise UserError(
                f"images are {images.dtype}; give floating-point pixels, standardised with the mean and std that the "
                "encoder's file names"
            )

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D): patch embeddings with their positions, no cls token."""
        self.check_images(images)
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, prefix + N, D): cls and patch tokens in raster order, normalised; nothing is masked."""
        self.check_images(images)
        return self.forward_features(images)

    def encode_visible(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, C, H, W) and a mask -> (B, prefix + V, D): the encoder's pass over the visible patches alone (paper,
        section 3)."""
        return self.norm(self.visible_outputs(images, mask)[len(self.blocks) - 1])

    def visible_outputs(self, images: Tensor, mask: PatchMask, blocks: Sequence[int] = ()) -> dict[int, Tensor]:
        """(B, C, H, W) and a mask -> (B, prefix + V, D) of each of ``blocks`` (0-based; -1 is what the first block
        takes) and of the last block, not normalised, by number."""
        tokens = self._visible(images, mask)
        found = {-1: tokens} if -1 in blocks else {}
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in blocks:
                found[number] = tokens
        return {**found, len(self.blocks) - 1: tokens}

    def _visible(self, images: Tensor, mask: PatchMask) -> Tensor:
        """(B, prefix + V, D): cls token and visible patches as the first block takes them."""
        self.check_images(images)
        pixels, positions = patchify(images, self.grid.patch), self.pos_embed[:, 1:].expand(len(images), -1, -1)
        pixels, positions = (
            x.gather(1, mask.visible_ids[:, :, None].expand(-1, -1, x.shape[2])) for x in (pixels, positions)
        )
        projection = self.patch_embed.proj  # a convolution whose windows do not overlap: one product per patch
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        return self._with_cls(F.linear(pixels, weight, projection.bias) + positions)

    def encode_with_mask_tokens(self, images: Tensor, mask: PatchMask, mask_token: Tensor) -> Tensor:
        """(B, C, H, W), a mask and a token (1, 1, D) -> (B, prefix + N, D): all patches, the token in place of the
        hidden ones (paper, Table 1c)."""
        self.check_images(images)
        patches = self.patch_embed(images)
        tokens = torch.where(mask.hidden[:, :, None], mask_token.to(patches.dtype), patches)
        return self.norm(self.blocks(self._with_cls(tokens + self.pos_embed[:, 1:])))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, prefix + N, D): timm's hook of ``forward_features``."""
        return super()._pos_embed(x) if self.cls_token is not None else x + self.pos_embed[:, 1:]

    def _with_cls(self, tokens: Tensor) -> Tensor:
        """(B, n, D), positions added -> (B, prefix + n, D)."""
        if self.cls_token is None:
            return tokens
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([cls, tokens], dim=1)


def init_linear_and_norm(module: nn.Module) -> None:
    """Xavier-uniform for every linear layer (fused qkv as one matrix), zero biases, LayerNorm at identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
