"""Any plain ViT of timm as a trunk: timm's own model under timm's own names, with what the toolkit asks of an encoder.

Positions (learned, relative, rotary), prefix tokens, layer scale and gated MLPs are timm's; nothing of them is written
again here.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from mae_core.errors import UserError
from mae_core.models.block import Block, blocks_of
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import Pooling, ViTSize
from mae_core.patches import PatchGrid, as_pair

MARK = "timm:"
"""What a trunk's name begins with in ``model.trunk``."""
FAMILIES = (VisionTransformer, Beit, Eva, VisionTransformerRelPos, VisionTransformerSAM)
"""timm's classes of plain ViTs: one stride, blocks that follow one another."""
TIMM_POOLINGS: dict[str | None, str] = {"mean": "avg", "cls": "token", "map": "map", None: ""}
"""Our name -> timm's."""


class Described(NamedTuple):
    """What timm says of a name, without building its weights."""

    family: type[nn.Module]
    pooling: Pooling
    image_size: tuple[int, int]
    patch_size: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def bare_name(trunk: str) -> str:
    """``timm:NAME`` -> NAME, which timm knows. Raises ``UserError`` for another mark, and for what timm lacks."""
    name = trunk.removeprefix(MARK)
    if not trunk.startswith(MARK) or not name:
        raise UserError(f"model.trunk={trunk} names no trunk; give timm:NAME, such as timm:vit_small_patch14_dinov2")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models('*vit*') lists its names"
        raise UserError(f"model.trunk={trunk}: timm {timm.__version__} has no model {name}; {hint}")
    return name


@cache
def described(trunk: str) -> Described:
    """What timm says of ``timm:NAME``. Raises ``UserError`` where the name is unknown or is not of a plain ViT."""
    name = bare_name(trunk)
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
    except NotImplementedError:  # some stems cannot be built without memory
        model = timm.create_model(name, num_classes=0)
    plain = isinstance(model, FAMILIES) and hasattr(model.patch_embed, "proj")
    if not plain or model.patch_embed.patch_size[0] != model.patch_embed.patch_size[1]:
        raise UserError(
            f"model.trunk={trunk} is a {type(model).__name__}, not a plain ViT with square patches; take a vit_, deit, "
            "beit, eva or samvit model"
        )
    pools = {theirs: ours for ours, theirs in TIMM_POOLINGS.items() if ours is not None}
    config = model.pretrained_cfg
    return Described(
        type(model),
        pools.get(model.global_pool, "mean"),  # type: ignore[arg-type]
        as_pair(config["input_size"][1:]),
        model.patch_embed.patch_size[0],
        model.embed_dim,
        tuple(config["mean"]),
        tuple(config["std"]),
    )


class TimmTrunk(nn.Module):
    """What the toolkit asks of a trunk, mixed into one of timm's classes by ``build_timm``: a frozen trunk gives
    normalised tokens, or features with ``pooling``; with ``num_classes`` it is a classifier. The names of its tensors
    are timm's.

    trunk    ``timm:NAME``
    grid     rows, columns and side of the patches of the images that it takes
    pooling  what features and classes are read from: mean, cls, map (attention pooling), or None for all tokens
    """

    trunk: str
    grid: PatchGrid
    pooling: Pooling | None
    transform: Any

    if TYPE_CHECKING:  # of timm's class

        def __getattr__(self, name: str) -> Any: ...

    @property
    def size(self) -> str:
        """Its name in messages."""
        return self.trunk

    @property
    def in_channels(self) -> int:
        """Channels of the images it takes."""
        return int(self.patch_embed.proj.in_channels)

    @property
    def prefix(self) -> int:
        """Class and register tokens before the patch tokens."""
        return int(getattr(self, "num_prefix_tokens", 0))

    @property
    def shape(self) -> ViTSize:
        """Width, depth, heads and patch, as far as they describe it: what taps are counted in."""
        heads = self.blocks[0].attn.num_heads
        return ViTSize(self.embed_dim, len(self.blocks), heads, patch_size=self.grid.patch)

    @property
    def facts(self) -> dict[str, Any]:
        """What the metadata of a file says, so that it can be built again."""
        size = self.shape
        return {"timm": self.trunk, "width": size.width, "depth": size.depth, "patch_size": size.patch_size}

    def check_images(self, images: Tensor) -> None:
        """Raise ``UserError`` unless ``images`` is (B, C, H, W) of this trunk's channels and size."""
        wanted = (self.in_channels, *self.grid.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise UserError(
                f"this trunk takes images (B, {wanted[0]}, {wanted[1]}, {wanted[2]}), got {tuple(images.shape)}; "
                "resize them, or build the trunk with image_size=(H, W) and in_chans=C"
            )

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, prefix + N, D): prefix tokens and patch tokens in raster order, after timm's last norm;
        of SAM's encoder, which has no prefix, after its neck."""
        self.check_images(images)
        tokens: Tensor = self.forward_features(images)
        return tokens.flatten(2).transpose(1, 2) if isinstance(self, VisionTransformerSAM) else tokens

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> tokens (B, prefix + N, D), features (B, D) or logits (B, classes)."""
        if self.pooling is None:
            return self.encode(images)
        self.check_images(images)
        answer: Tensor = super().forward(images)
        return answer

    def layer_of(self, name: str) -> int:
        """Layer of a parameter by timm's ``group_matcher``: 0 for the embeddings, i + 1 for block i, the last block's
        for what timm counts to it (the final norm), depth + 1 for everything else."""
        depth = len(self.blocks)
        for part, patterns in enumerate(self.group_matcher(coarse=False).values()):
            for pattern, place in [(patterns, None)] if isinstance(patterns, str) else patterns:
                found = re.match(pattern, name)
                if found and part == 0:
                    return 0
                if found:
                    return depth if place is not None else int(found[1]) + 1
        return depth + 1


Encoder: TypeAlias = ViTEncoder | TimmTrunk
"""What a command trains or freezes."""


_MIXED: dict[tuple[type, type], type] = {}


def _mixed(surface: type, family: type) -> type:
    return _MIXED.setdefault((surface, family), type(f"{surface.__name__}{family.__name__}", (surface, family), {}))


def build_timm(
    trunk: str,
    *,
    image_size: Any = None,
    patch_size: int | None = None,
    in_chans: int = 3,
    num_classes: int = 0,
    pooling: Pooling | None = None,
    drop_path: float = 0.0,
    surface: type[TimmTrunk] = TimmTrunk,
    **options: Any,
) -> TimmTrunk:
    """timm's model ``timm:NAME``, newly initialised, for images of ``image_size`` and patches of ``patch_size`` (the
    name's own when None).

    ``pooling``: see ``TimmTrunk``. ``surface``: the class that is mixed in. ``options``: what else timm's constructor
    takes, such as depth. Raises ``UserError`` where timm cannot build that.
    """
    found = described(trunk)
    if pooling == "map" and found.pooling != "map":
        raise UserError(f"model.pooling=map: {trunk} has no attention pooling; set model.pooling={found.pooling}")
    grid = PatchGrid.of(found.image_size if image_size is None else image_size, patch_size or found.patch_size)
    if issubclass(found.family, VisionTransformerSAM):
        pooled = {} if pooling in (None, "mean") else {"global_pool": TIMM_POOLINGS[pooling]}
        sized: dict[str, Any] = {}  # its positions stay those of its own size, and are resized on every pass
        if pooled:
            raise UserError(f"model.pooling={pooling}: {trunk} has patch tokens alone; set model.pooling=mean")
    else:
        tokens = pooling is None and found.pooling == "cls"  # which are the same, and DeiT's distilled ViT has no other
        pooled = {} if tokens else {"global_pool": TIMM_POOLINGS[pooling]}
        sized = {"img_size": grid.image_size}
    if grid.patch != found.patch_size:
        sized["patch_size"] = grid.patch
    try:
        model = timm.create_model(
            bare_name(trunk),
            in_chans=in_chans,
            num_classes=num_classes,
            drop_path_rate=drop_path,
            **pooled,
            **sized,
            **options,
        )
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        if pooling == found.pooling:
            raise UserError(f"timm cannot build {trunk} for {grid.image_size} images: {error}") from None
        own = found.pooling
        raise UserError(
            f"model.pooling={pooling} does not go with {trunk}, which pools by {own}; set model.pooling={own}"
        ) from None
    model.__class__ = _mixed(surface, type(model))
    model.trunk, model.grid, model.pooling = trunk, grid, pooling
    built: TimmTrunk = model
    return built


def _timm_trunks(model: nn.Module) -> list[TimmTrunk]:
    """All trunks of timm in a model, whose blocks are timm's."""
    return [module for module in model.modules() if isinstance(module, TimmTrunk)]


def compile_blocks(model: nn.Module) -> None:
    """torch.compile the blocks of a model, which hold nearly all of its work. Those of one shape share their code, so
    that this takes seconds where the whole model takes minutes."""
    for trunk in _timm_trunks(model):
        for block in trunk.blocks:
            block.compile(dynamic=False)
    for block in blocks_of(model):
        block.compile(dynamic=False)
        block.only_at = torch.compile(block.only_at, dynamic=False)  # type: ignore[method-assign]


def checkpoint_blocks(model: nn.Module, on: bool = True) -> list[Block]:
    """Switch activation checkpointing on or off in all blocks of a model; those of ours are returned."""
    for trunk in _timm_trunks(model):
        trunk.set_grad_checkpointing(on)
    blocks = blocks_of(model)
    for block in blocks:
        block.checkpointing = on
    return blocks
