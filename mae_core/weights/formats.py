"""Checkpoint formats as tables: how each one names the parts of a ViT. Nothing but data; ``rename`` reads it.

A part is named as in the released MAE files and in timm: ``attn.qkv`` is one matrix whose rows are query, key and
value, each head by head. A row is (our part, their part); three parts on their side mean that they keep query, key and
value apart. To add a format: one table of names and one row in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Part = str | tuple[str, ...]

TENSORS = frozenset({"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"})
"""Parts that are a tensor; every other part is a layer with ``.weight`` and ``.bias``."""

BLOCK_EXTRAS = ("gamma_1", "gamma_2", "attn.relative_position_bias_table", "attn.rel_pos_h", "attn.rel_pos_w")
"""Tensors of a block that MAE pre-training does not have and transfer adds: layer scale and relative positions."""

OWN_BLOCK: dict[str, Part] = {name: name for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
OPENMMLAB_BLOCK: dict[str, Part] = {
    "norm1": "ln1",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm2": "ln2",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
}
TRANSFORMERS_4_BLOCK: dict[str, Part] = {
    "norm1": "layernorm_before",
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
TRANSFORMERS_5_BLOCK: dict[str, Part] = {
    "norm1": "layernorm_before",
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

TORCHVISION_BLOCK: dict[str, Part] = {
    "norm1": "ln_1",
    "attn.qkv": "self_attention.in_proj_",
    "attn.proj": "self_attention.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}

OWN_TOP = {name: name for name in ("cls_token", "pos_embed", "patch_embed.proj", "norm", "fc_norm")}
TRANSFORMERS_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
OPENMMLAB_TOP = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj": "patch_embed.projection",
    "norm": "ln1",
}
DECODER_PARTS = ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")
OWN_DECODER = {name: name for name in DECODER_PARTS}
TRANSFORMERS_DECODER = {name: f"decoder.{name}" for name in DECODER_PARTS}


@dataclass(frozen=True)
class Layout:
    """One way in which a format names its tensors.

    top             parts of the encoder outside its blocks; named behind the prefix, like the blocks
    blocks, block   where the blocks are and how the parts of one are named; a name that ends in ``_`` goes on without
                    a dot
    decoder         parts of the decoder outside its blocks, full names; none: the layout holds no decoder
    decoder_blocks  where the decoder's blocks are; their parts are named as the encoder's
    head            full name of the classifier, where the layout holds one
    prefixes        what may stand before the encoder's names; the first is written
    bare_prefix     what is written before the names of an encoder alone, where that differs
    extras          tensors of a block that MAE does not have -> their names here
    aliases         second names of parts outside the blocks, read and never written
    signs           at least one of these extras tells the layout from a damaged file of another
    """

    about: str
    top: Mapping[str, str]
    blocks: str
    block: Mapping[str, Part]
    decoder: Mapping[str, str] = field(default_factory=dict)
    decoder_blocks: str = ""
    head: str | None = None
    prefixes: tuple[str, ...] = ("",)
    bare_prefix: str | None = None
    extras: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    signs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    layouts       the ways its files come in, the one that is written first
    bare          the layout of an encoder or a classifier without a decoder, where it is another
    lacks         parts that it does not have -> why
    drops         patterns of other tensors in its files -> why a conversion leaves them out
    separate_bias query and value bias are tensors of their own and there is no key bias
    fills         extras that are written although MAE has none -> their one value
    wrapper       key under which its torch files hold the weights; None: at the top level
    starts        extras of its models that are not written -> what a model makes of them
    """

    name: str
    about: str
    layouts: tuple[Layout, ...]
    bare: Layout | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    drops: Mapping[str, str] = field(default_factory=dict)
    separate_bias: bool = False
    fills: Mapping[str, float] = field(default_factory=dict)
    starts: Mapping[str, str] = field(default_factory=dict)
    wrapper: str | None = "model"


OWN_BARE = Layout(
    "encoder", OWN_TOP, "blocks", OWN_BLOCK, OWN_DECODER, "decoder_blocks", head="head", prefixes=("", "backbone.")
)
MAE_CORE_FULL = Layout(
    "encoder and decoder of a run",
    OWN_TOP,
    "blocks",
    OWN_BLOCK,
    {"mask_token": "decoder.mask_token", **{n: f"decoder.{n.removeprefix('decoder_')}" for n in DECODER_PARTS[1:]}},
    "decoder.blocks",
    prefixes=("encoder.",),
)
TIMM = Layout(
    "VisionTransformer",
    OWN_TOP,
    "blocks",
    OWN_BLOCK,
    head="head",
    extras={"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"},
)
DEIT_3 = replace(TIMM, extras={name: name for name in BLOCK_EXTRAS[:2]}, signs=BLOCK_EXTRAS[:1])
TORCHVISION = Layout(
    "VisionTransformer",
    {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "norm": "encoder.ln",
    },
    "encoder.layers.encoder_layer_",
    TORCHVISION_BLOCK,
    head="heads.head",
)
TORCHVISION_0_12 = replace(
    TORCHVISION,
    about="the published files, which torchvision renames as it reads them",
    block={**TORCHVISION_BLOCK, "mlp.fc1": "mlp.linear_1", "mlp.fc2": "mlp.linear_2"},
)
NO_DECODER = {"decoder": "the format holds no decoder"}
SEGMENTATION_EXTRAS = {name: name for name in BLOCK_EXTRAS[:3]}
SEGMENTATION_DROPS = {
    "*.relative_position_index": "a buffer that the model makes itself",
    **dict.fromkeys(("fpn[0-9].*", "backbone.fpn[0-9].*", "neck.*"), "the segmenter's pyramid, not the encoder"),
    **dict.fromkeys(("decode_head.*", "auxiliary_head.*"), "the segmenter's head, not the encoder"),
}
DENSE_LACKS = {
    **NO_DECODER,
    "norm": "dense maps take no final norm",
    "fc_norm": "a classifier's norm",
    "head": "a classifier's head",
}
RELATIVE_START = "relative positions, which start at zero"
SEGMENTER: dict[str, Any] = {
    "lacks": DENSE_LACKS,
    "drops": SEGMENTATION_DROPS,
    "fills": {"gamma_1": 1.0, "gamma_2": 1.0},
    "starts": {"attn.relative_position_bias_table": RELATIVE_START},
}
"""What the formats of segmenters have in common."""


def _transformers(about: str, blocks: str, block: Mapping[str, Part], decoder_blocks: str) -> Layout:
    return Layout(
        about,
        TRANSFORMERS_TOP,
        blocks,
        block,
        TRANSFORMERS_DECODER,
        decoder_blocks,
        head="classifier",
        prefixes=("vit.", ""),
        bare_prefix="",
    )


TRANSFORMERS_4 = _transformers(
    "names of transformers 4", "encoder.layer", TRANSFORMERS_4_BLOCK, "decoder.decoder_layers"
)
TRANSFORMERS_5 = _transformers("names of transformers 5", "layers", TRANSFORMERS_5_BLOCK, "decoder.decoder_layers")
TRANSFORMERS_5_SAVED = _transformers(
    "written by transformers 5, which renames the decoder's layers too",
    "encoder.layer",
    TRANSFORMERS_4_BLOCK,
    "decoder.decoder_encoder.layer",
)
TRANSFORMERS: dict[str, Any] = {
    "lacks": {"fc_norm": "its classifier reads the normalised cls token, not the mean of the patches"},
    "drops": dict.fromkeys(("pooler.*", "vit.pooler.*"), "a pooler that MAE does not train"),
    "wrapper": None,
}


def _openmmlab(about: str, top: Mapping[str, str], **more: Any) -> Layout:
    return Layout(about, top, "layers", OPENMMLAB_BLOCK, **more)


MMSEG_MAE = _openmmlab(
    "backbone MAE", OPENMMLAB_TOP, extras=SEGMENTATION_EXTRAS, prefixes=("", "backbone."), aliases={"norm": "norm"}
)
MMSEG_BEIT = _openmmlab(
    "backbone BEiT",
    {name: theirs for name, theirs in OPENMMLAB_TOP.items() if name != "pos_embed"},
    extras=SEGMENTATION_EXTRAS,
    prefixes=("", "backbone."),
    aliases={"norm": "norm"},
    signs=BLOCK_EXTRAS[2:3],
)
MMPRETRAIN = _openmmlab(
    "MAE or VisionTransformer",
    {**OPENMMLAB_TOP, "fc_norm": "ln2"},
    decoder={**{name: f"neck.{name}" for name in DECODER_PARTS}, "decoder_norm": "neck.ln1"},
    decoder_blocks="neck.decoder_blocks",
    head="head.fc",
    prefixes=("backbone.", ""),
)
DETECTRON2 = Layout(
    "ViTDet",
    {name: name for name in ("pos_embed", "patch_embed.proj")},
    "blocks",
    OWN_BLOCK,
    prefixes=("backbone.net.", "net.", "backbone.bottom_up.net.", ""),
    extras={name: name for name in BLOCK_EXTRAS[3:]},
)
MAE_SEGMENTATION = Layout(
    "UperNet on BEiT's code",
    {name: name for name in ("cls_token", "pos_embed", "patch_embed.proj", "norm")},
    "blocks",
    OWN_BLOCK,
    extras=SEGMENTATION_EXTRAS,
    prefixes=("", "backbone."),
)
UNILM_BEIT = Layout(
    "BEiT of unilm, without absolute positions",
    {name: name for name in ("cls_token", "patch_embed.proj", "norm", "fc_norm")},
    "blocks",
    OWN_BLOCK,
    extras=SEGMENTATION_EXTRAS,
    head="head",
    prefixes=("", "backbone."),
    signs=BLOCK_EXTRAS[2:3],
)

PROJECTION = "a projection head of the pre-training, not the encoder"
SELF_DISTILLED = {
    **dict.fromkeys(("head.[0-9]*", "head.mlp*", "head.last_*"), PROJECTION),
    "*masked_embed": "iBOT's token for hidden patches, which no encoder takes",
}
"""MoCo v3's, DINO's and iBOT's parts beside the encoder."""

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "official",
            "facebookresearch/mae: pre-train, _full, visualize and fine-tuned files",
            (OWN_BARE,),
            drops=SELF_DISTILLED,
        ),
        Format(
            "mae_core",
            "this toolkit's encoder.safetensors, classifier.safetensors and model.safetensors",
            (MAE_CORE_FULL, OWN_BARE),
            bare=OWN_BARE,
            drops={"distillation.*": "what mixed the heads for a teacher, of use in that training alone"},
        ),
        Format(
            "timm",
            "timm's VisionTransformer, DINOv2",
            (TIMM,),
            lacks=NO_DECODER,
            drops={"mask_token": "DINOv2's token for hidden patches, which no encoder takes"},
            wrapper=None,
        ),
        Format(
            "torchvision",
            "torchvision's VisionTransformer",
            (TORCHVISION, TORCHVISION_0_12),
            lacks={**NO_DECODER, "fc_norm": "its classifier reads the normalised cls token, not the mean"},
            wrapper=None,
        ),
        Format(
            "huggingface",
            "transformers' ViTMAE and ViT under the names of transformers 4, which 5 opens too",
            (TRANSFORMERS_4, TRANSFORMERS_5, TRANSFORMERS_5_SAVED),
            **TRANSFORMERS,
        ),
        Format(
            "huggingface_5",
            "transformers' ViTMAE and ViT under the names that transformers 5 has in memory",
            (TRANSFORMERS_5,),
            **TRANSFORMERS,
        ),
        Format(
            "mmpretrain", "mmpretrain's MAE and its VisionTransformer classifier", (MMPRETRAIN,), wrapper="state_dict"
        ),
        Format("mmseg", "mmseg's MAE backbone", (MMSEG_MAE,), wrapper="state_dict", **SEGMENTER),
        Format(
            "mmseg_beit",
            "mmseg's BEiT backbone: query and value bias apart, no absolute positions",
            (MMSEG_BEIT,),
            separate_bias=True,
            wrapper="state_dict",
            **SEGMENTER,
        ),
        Format(
            "detectron2",
            "detectron2's ViTDet backbone",
            (DETECTRON2,),
            lacks={**DENSE_LACKS, "cls_token": "ViTDet has no cls token"},
            drops={
                "backbone.simfp_*": "the detector's pyramid, not the encoder",
                **dict.fromkeys(("proposal_generator.*", "roi_heads.*"), "the detector's head, not the encoder"),
                **dict.fromkeys(("pixel_mean", "pixel_std"), "the detector's normalisation, not the encoder"),
            },
            starts=dict.fromkeys(BLOCK_EXTRAS[3:], RELATIVE_START),
        ),
        Format(
            "mae_segmentation",
            "implus/mae_segmentation and BEiT's segmentation code",
            (MAE_SEGMENTATION, UNILM_BEIT),
            **SEGMENTER,
        ),
        Format("deit_3", "DeiT III's own files, with layer scale", (DEIT_3,), lacks=NO_DECODER),
    )
}
"""Name on the command line -> format. Where two formats name an encoder alike, the first row is the one recognised."""

WRAPPERS = (
    "model", "state_dict", "model_state_dict", "module", "net", "network", "model_ema", "state_dict_ema",
    "ema_state_dict", "ema_model", "ema", "teacher", "student", "base_encoder", "momentum_encoder", "encoder_q",
    "encoder_k", "backbone", "momentum_backbone", "backbone_momentum", "student_backbone", "teacher_backbone",
    "encoder", "_forward_module",
)  # fmt: skip
"""Keys under which trainers put the weights, and first words of names: distributed training, averaged weights,
Lightning, the two networks of MoCo, DINO and iBOT, and of solo-learn's and lightly's versions of them."""
INNER_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_fpw_module.", "_orig_mod.")
"""What FSDP, activation checkpointing and torch.compile put anywhere into a name."""
BESIDE = {
    **dict.fromkeys(("predictor.*", "*projector.*", "*projection_head*", "prototypes.*"), "of the pre-training alone"),
    **dict.fromkeys(("head.*", "*_head.*", "classifier.*"), "a head, not the encoder"),
    **dict.fromkeys(("queue", "queue_ptr"), "MoCo's queue of negatives"),
    **dict.fromkeys(("n_averaged", "steps"), "a counter of averaged weights"),
}
"""Names beside those of wrapped encoders -> why they are left out."""
MOCO_V3 = ("base_encoder", "momentum_encoder")
MOCO_V3_HEADS = {384: 12}
"""Width of a MoCo v3 encoder -> its attention heads, where they are not those of the size of that width."""

BEIT = "*rel_pos_bias.relative_position_bias_table"
OTHER_TRUNKS = {
    BEIT: ("its attention has relative positions and it has no absolute ones, as BEiT", "beit_{}_patch16_224"),
    "*dist_token": ("it has a distillation token, as DeiT's distilled models", "deit_{}_distilled_patch16_224"),
    "*register_tokens": ("it has register tokens, as DINOv2", "vit_{}_patch14_reg4_dinov2"),
    "*reg_token": ("it has register tokens, as DINOv2", "vit_{}_patch14_reg4_dinov2"),
    "*storage_tokens": ("it has register tokens and rotary positions, as DINOv3", "vit_{}_patch16_dinov3"),
    "*.mlp.w12.weight": ("its MLP is a SwiGLU, as in DINOv2's largest model", "vit_giant_patch14_dinov2"),
}
"""Name of a tensor that our ViT does not have -> what it shows, and the models of timm that have it, by size."""
TIMM_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1536: "giant"}
"""Width -> timm's word for it."""

KEPT_APART = {"q_bias": 0, "v_bias": 2}
"""BEiT's biases beside ``qkv.weight`` -> their place among query, key and value; its key bias is zero."""

OWN_ONLY = "own."
"""Before our names of what only our own format carries: see ``OWN_TENSORS``."""

OWN_TENSORS = ("target.", "mask_token", "fusion.")
"""Beginnings of names in a run's model.safetensors that belong to neither encoder nor decoder: what was fitted for its
target (PCA axes, a tokenizer), the mask token of an encoder that sees hidden patches, and what fuses blocks for the
decoder."""

LAYERS: dict[str, tuple[str, ...]] = {
    "patch_embed.proj": ("D", "C", "P", "P"),
    "norm": ("D",),
    "fc_norm": ("D",),
    "head": ("K", "D"),
    "decoder_embed": ("E", "D"),
    "decoder_norm": ("E",),
    "decoder_pred": ("T", "E"),
    **{
        f"{blocks}.{{}}.{part}": tuple(side.format(width) for side in sides)
        for blocks, width in (("blocks", "D"), ("decoder_blocks", "E"))
        for part, sides in {
            "norm1": ("{}",),
            "attn.qkv": ("3{}", "{}"),
            "attn.proj": ("{}", "{}"),
            "norm2": ("{}",),
            "mlp.fc1": ("H{}", "{}"),
            "mlp.fc2": ("{}", "H{}"),
        }.items()
    },
}
"""Our layer -> the shape of its weight, whose first side is its bias's."""
SHAPES: dict[str, tuple[str, ...]] = {
    **{f"{name}.weight": sides for name, sides in LAYERS.items()},
    **{f"{name}.bias": sides[:1] for name, sides in LAYERS.items()},
    "cls_token": ("1", "1", "D"),
    "pos_embed": ("1", "N", "D"),
    "mask_token": ("1", "1", "E"),
    "decoder_pos_embed": ("1", "N", "E"),
    "blocks.{}.gamma_1": ("D",),
    "blocks.{}.gamma_2": ("D",),
}
"""Our name -> its shape; a letter is one number throughout a file (D width, N positions with the cls token's, C
channels, P patch, H hidden units of a block, K classes, E width of the decoder, T numbers predicted for a patch)."""
