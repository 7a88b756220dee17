"""Classifiers: which part learns (partial fine-tuning: paper, section 4.3 and Figure 9), and another start."""

from __future__ import annotations

from timm.layers import DropPath
from torch import nn

from mae_core.errors import UserError
from mae_core.models.encoder import ViTEncoder
from mae_core.models.timm_trunk import Encoder

HALF_BLOCK = 0.5
"""The MLP sub-block of the last block alone."""
BEHIND_BLOCKS = ("norm", "fc_norm", "attn_pool", "neck", "head", "head_dist")
"""Parts of a trunk and classifier that read the last block."""
MLP_PARTS = ("norm2", "mlp", "ls2", "gamma_2")
"""Parts of a block that make its MLP sub-block."""


def freeze_below(model: Encoder, trainable_blocks: float | None) -> int:
    """Freeze all of ``model`` below its last ``trainable_blocks`` blocks; the head and the norm before it always learn.
    Returns the number of blocks that are frozen in whole.

    ``HALF_BLOCK`` leaves the MLP of the last block with the norm before it; None and all blocks are full fine-tuning,
    embeddings included (the paper's right-most point). What is frozen needs no gradients, so that nothing is kept for a
    backward pass through it, and drops no paths: the paper does not say, and a frozen trunk is best read as it was
    trained.
    Raises ``UserError`` where the model has fewer blocks.
    """
    depth = len(model.blocks)
    if trainable_blocks is None or trainable_blocks == depth:
        return 0
    if trainable_blocks > depth:
        raise UserError(f"trainable_blocks={trainable_blocks:g} was asked for, but ViT-{model.size} has {depth} blocks")
    below = depth - (1 if trainable_blocks == HALF_BLOCK else int(trainable_blocks))
    half = f"blocks.{below}." if trainable_blocks == HALF_BLOCK else None
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        place, _, part = rest.partition(".")
        learns = int(place) >= below if first == "blocks" else first in BEHIND_BLOCKS
        if half is not None and name.startswith(half):
            learns = part.startswith(MLP_PARTS)
        if not learns:
            parameter.requires_grad_(False)
    for owner in [module for block in model.blocks[:below] for module in block.modules()]:
        for name, child in owner.named_children():
            if isinstance(child, DropPath):
                setattr(owner, name, nn.Identity())
    if half is not None:
        model.blocks[-1].drop_path1 = nn.Identity()
    return below


def learning_line(model: nn.Module, trainable_blocks: float | None) -> str:
    """How much of ``model`` learns, for the start of a run; empty where all does."""
    if trainable_blocks is None:
        return ""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = learning / sum(p.numel() for p in model.parameters())
    return f"trainable_blocks={trainable_blocks:g}: {learning:,} parameters learn, {share:.1%} of the model"


def initialize_as_timm(model: ViTEncoder) -> None:
    """Start ``model`` as the authors' fine-tuning code does without weights: timm's initialisation of its release
    0.3.2 (normal of std 0.02, cut at 2, for linear layers, positions and the cls token; the patch embedding as torch's
    convolutions), and the head near zero. The positions learn, as in all fine-tuning."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for table in (model.pos_embed, model.cls_token):
        nn.init.trunc_normal_(table, std=0.02)
    model.patch_embed.proj.reset_parameters()
    if isinstance(model.head, nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
