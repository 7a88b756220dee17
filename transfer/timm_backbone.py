"""Any ViT of timm as a backbone for images of any size: the surface of ``DenseViT`` on timm's own model.

Attention stays as timm has it (SAM's windows and BEiT's tables too); windows and relative positions that a dense task
adds are ``DenseViT``'s alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor

from mae_core.errors import UserError
from mae_core.models.classifier import freeze_below
from mae_core.models.sizes import ViTSize
from mae_core.models.timm_trunk import TimmTrunk, build_timm, described
from transfer.backbone import DenseViT, Level

RESIZE_THEMSELVES = (VisionTransformer, Eva)
"""Families whose forward pass resizes positions to the image (``dynamic_img_size``); SAM's always does."""


class DenseTimm(TimmTrunk):
    """A trunk of timm that maps (B, C, H, W) to one (B, D, ceil(H/patch), ceil(W/patch)) map per tapped block.

    As in ``DenseViT``, blocks behind the last tap do not exist, no final norm is applied, and images are padded with
    zeros at the right and the bottom to whole patches.
    """

    taps: tuple[int, ...]
    frozen_blocks: int
    whole: ViTSize
    window = None
    may_be_new = ()
    """Patterns of tensors that a pre-trained encoder does not have."""

    @property
    def shape(self) -> ViTSize:
        """Of the whole trunk, the blocks behind the last tap too."""
        return self.whole

    @property
    def section(self) -> dict[str, Any]:
        """The trunk in the words of a ``model`` section."""
        return {"trunk": self.trunk, "patch_size": self.grid.patch}

    @property
    def levels(self) -> tuple[Level, ...]:
        """What ``forward`` emits, in its order."""
        return tuple(Level(f"block{tap}", self.embed_dim, self.grid.patch) for tap in self.taps)

    @property
    def checkpointing(self) -> bool:
        """Whether each block is recomputed in the backward pass."""
        return bool(self.grad_checkpointing)

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.set_grad_checkpointing(on)

    def tap(self, taps: Sequence[int]) -> None:
        """Emit the outputs of ``taps`` (0-based, ascending), and drop what lies behind. Raises ``UserError`` where
        there is no such block."""
        if list(taps) != sorted(taps) or not taps or taps[0] < 0 or taps[-1] >= len(self.blocks):
            raise UserError(f"taps {tuple(taps)} must ascend and lie within the {len(self.blocks)} blocks, from 0")
        self.taps = tuple(taps)
        self.prune_intermediate_layers(sorted(set(taps)), prune_norm=True, prune_head=True)

    def freeze(self, trainable_blocks: int | None) -> None:
        """Let the last ``trainable_blocks`` blocks alone learn; 0 freezes all, None nothing. Raises ``UserError`` where
        there are fewer blocks."""
        self.frozen_blocks = freeze_below(self, trainable_blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> one (B, D, ceil(H/patch), ceil(W/patch)) map per tap."""
        patch = self.grid.patch
        H, W = images.shape[-2:]
        images = F.pad(images, (0, -W % patch, 0, -H % patch))
        several = sorted(set(self.taps))
        model = self._for(images.shape[-2], images.shape[-1])
        maps = model.forward_intermediates(images, indices=several, output_fmt="NCHW", intermediates_only=True)
        return [maps[several.index(tap)] for tap in self.taps]

    def _for(self, height: int, width: int) -> Any:
        """This trunk, or, where timm's class has positions of one size alone, one of this size that shares its weights.

        Raises ``UserError`` in training: the resized positions would not learn.
        """
        own = isinstance(self, (*RESIZE_THEMSELVES, VisionTransformerSAM)) or (height, width) == self.grid.image_size
        if own:
            return self
        if self.training and torch.is_grad_enabled():
            raise UserError(
                f"{self.trunk} trains on images of one size, {self.grid.image_size}, and got {(height, width)}; use a "
                "size of whole patches"
            )
        weights = {id(parameter): parameter for parameter in self.parameters()}
        other = copy.deepcopy(self, weights)  # what deepcopy finds in its memo, it does not copy
        other.set_input_size(img_size=(height, width))
        return other


Dense: TypeAlias = DenseViT | DenseTimm
"""A trunk of a dense task."""


def dense_timm(
    trunk: str,
    *,
    image_size: int | Sequence[int],
    taps: Callable[[ViTSize], Sequence[int]],
    patch_size: int | None = None,
    in_chans: int = 3,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    surface: type[DenseTimm] = DenseTimm,
    **options: Any,
) -> DenseTimm:
    """``timm:NAME`` as a dense trunk, newly initialised; ``image_size``: what its positions are stored for; ``taps``:
    from the trunk's size to the blocks that are read. ``surface``: the class that is mixed in. ``options``: as
    ``build_timm``. Raises ``UserError`` where timm cannot build it."""
    resizing: dict[str, Any] = (
        {"dynamic_img_size": True} if issubclass(described(trunk).family, RESIZE_THEMSELVES) else {}
    )
    vit = build_timm(
        trunk,
        image_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        drop_path=drop_path,
        surface=surface,
        **resizing,
        **options,
    )
    assert isinstance(vit, DenseTimm)
    vit.whole, vit.frozen_blocks = TimmTrunk.shape.fget(vit), 0  # type: ignore[attr-defined]
    vit.tap(taps(vit.whole))
    vit.checkpointing = checkpointing
    return vit
