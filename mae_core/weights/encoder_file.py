"""What a weights file says of its encoder, in one typed record. The only file that spells the keys of the metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import get_act_layer
from torch import Tensor

from mae_core.atomic import read_json
from mae_core.errors import UserError, naming
from mae_core.layout import EXPORT_CONFIG, PREPROCESSOR_CONFIG
from mae_core.models.encoder import ViTEncoder
from mae_core.models.mae import MaskedAutoencoder
from mae_core.models.sizes import ACTIVATIONS, Pooling, ViTSize, alike
from mae_core.models.timm_trunk import Encoder
from mae_core.pos_embed import resize_pos_embed
from mae_core.weights.report import LoadReport

TRANSFORMERS_WORDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "decoder_num_attention_heads": "decoder_heads",
    "mask_ratio": "mask_ratio",
    "norm_pix_loss": "target",
}
"""A key of transformers' configuration -> ours."""
TRAINER_WORDS = {"norm_pix_loss": "target", "mask_ratio": "mask_ratio", "epochs": "epochs"}
"""An argument of the official trainer -> ours."""
TRANSFORMERS_ACTIVATIONS = {
    **{name: name for name in ("gelu", "relu", "silu", "quick_gelu")},
    **{"gelu_python": "gelu", "swish": "silu"},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
}
"""``hidden_act`` of transformers -> a row of ``ACTIVATIONS``."""


@dataclass(frozen=True)
class EncoderInfo:
    """What is known of an encoder and of how it was trained; None: not stated.

    format            of the names in the file; ``converted_from``: of the file it was made from
    timm              ``timm:NAME`` of a trunk of timm's; None: the toolkit's own ViT
    size              the named size, where it has one
    image_size, grid  (height, width) in pixels and (rows, columns) of the stored positions
    mean, std         of the pixels, channel by channel, after scaling to [0, 1]
    pooling           what a classifier reads
    decoder_heads     attention heads of the decoder; masking, mask_ratio, target ...: of the pre-training
    fuse_blocks       encoder blocks that the decoder reads beside the last one
    other             keys that this version does not know, kept as they are
    """

    format: str | None = None
    converted_from: str | None = None
    timm: str | None = None
    size: str | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    norm_eps: float | None = None
    activation: str | None = None
    cls_token: bool | None = None
    patch_size: int | None = None
    image_size: Any = None
    grid: Any = None
    in_chans: int | None = None
    target: str | None = None
    target_options: Mapping[str, Any] | None = None
    masking: str | None = None
    masking_options: Mapping[str, Any] | None = None
    mask_ratio: float | None = None
    decoder_heads: int | None = None
    fuse_blocks: Sequence[int] | None = None
    mask_tokens_in_encoder: bool | None = None
    loss_on_all_patches: bool | None = None
    mean: Any = None
    std: Any = None
    pooling: str | None = None
    classes: Any = None
    multi_label: bool | None = None
    epochs: float | None = None
    step: int | None = None
    test_crop: float | None = None
    licence: str | None = None
    pos_embed_layout: str | None = None
    decoder_pos_embed_layout: str | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> EncoderInfo:
        """The record in a file of ours; ``format: pt``, which other libraries write, says nothing."""
        known = {name: value for name, value in metadata.items() if name in KEYS and (name, value) != ("format", "pt")}
        return cls(**known, other={name: value for name, value in metadata.items() if name not in KEYS})

    @classmethod
    def from_foreign(cls, config: Mapping[str, Any], words: Mapping[str, str]) -> EncoderInfo:
        """What another program's configuration says; ``words``: its key -> ours. Raises ``UserError`` for an activation
        that is not supported."""
        facts = {ours: config[theirs] for theirs, ours in words.items() if config.get(theirs) is not None}
        if "target" in facts:
            facts["target"] = "normalized_pixels" if facts["target"] else "pixels"
        if "activation" in facts:
            if facts["activation"] not in TRANSFORMERS_ACTIVATIONS:
                known = ", ".join(TRANSFORMERS_ACTIVATIONS)
                raise UserError(f"hidden_act is {facts['activation']!r}, which is not supported; supported: {known}")
            facts["activation"] = TRANSFORMERS_ACTIVATIONS[facts["activation"]]
        return cls(**facts)

    def to_metadata(self) -> dict[str, Any]:
        """JSON values of all that is stated."""
        return {name: value for name in KEYS if (value := getattr(self, name)) is not None} | dict(self.other)

    def completed(self, other: EncoderInfo) -> EncoderInfo:
        """This record, and what ``other`` states where this one does not."""
        filled = {name: getattr(other, name) for name in KEYS if getattr(self, name) is None}
        return dataclasses.replace(self, **filled, other={**other.other, **self.other})

    def with_facts(self, **facts: Any) -> EncoderInfo:
        """A copy with ``facts`` in it."""
        return dataclasses.replace(self, **facts)

    @property
    def trunk(self) -> ViTSize:
        """The trunk, where every number of it is known. Raises ``UserError`` otherwise."""
        known: dict[str, Any] = {n: value for n in TRUNK if (value := getattr(self, n)) or value is False}
        if {"width", "depth", "heads"} - known.keys():
            numbers = (self.width, self.depth, self.heads)
            raise UserError(
                f"width, depth and heads of the encoder must all be known, found {numbers}; state the missing ones"
            )
        return ViTSize(**known)

    @classmethod
    def of(cls, model: Encoder | MaskedAutoencoder, **more: Any) -> EncoderInfo:
        """The record of a model of ours, or of a trunk of timm; ``more``: further facts."""
        encoder = model.encoder if isinstance(model, MaskedAutoencoder) else model
        grid = encoder.grid
        return cls(
            format="mae_core",
            image_size=list(grid.image_size),
            grid=[grid.rows, grid.cols],
            in_chans=encoder.in_channels,
            **encoder.facts,
        ).with_facts(**more)


HEADS = ("head.", "head_dist.", "lm_head.")
"""How the names of classifiers' heads begin: DeiT's second one, and that of BEiT's pre-training."""
KEYS = tuple(each.name for each in dataclasses.fields(EncoderInfo) if each.name != "other")
TRUNK = tuple(each.name for each in dataclasses.fields(ViTSize))


def describe_encoder(model: ViTEncoder | MaskedAutoencoder) -> dict[str, Any]:
    """The metadata every weights file of ours carries about its encoder."""
    return EncoderInfo.of(model).to_metadata()


class Adapted(NamedTuple):
    """An encoder's tensors as a model takes them, the names they have in the file, what was done to them, patterns of
    what the model does not take -> why, and what to do where they do not fit."""

    tensors: dict[str, Tensor]
    names: dict[str, list[str]]
    report: LoadReport
    unused: Mapping[str, str]
    remedy: str


@dataclass(frozen=True)
class EncoderFile:
    """An encoder's tensors under the official names, and what is known of them: read once a command, then passed on.

    info         every fact of the trunk decided
    tensors      by official name; of a full MAE those of the decoder too
    names        official name -> the names its values have in the file
    report       what the reader took off or put right, and what no encoder takes
    assumptions  what the file does not say and was assumed, a sentence each; they are among the report's notes
    """

    path: Path
    info: EncoderInfo
    tensors: dict[str, Tensor]
    names: dict[str, list[str]]
    report: LoadReport
    assumptions: tuple[str, ...] = ()

    @property
    def shape(self) -> ViTSize:
        """Width, depth, heads and the like."""
        return self.info.trunk

    @property
    def size(self) -> str:
        """The named size, or ``<width>x<depth>``."""
        return self.shape.name

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.shape.patch_size

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return int(self.info.in_chans or 0)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the stored positions."""
        return self.info.grid[0], self.info.grid[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) it was trained at."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def metadata(self) -> dict[str, Any]:
        """``info`` as JSON values."""
        return self.info.to_metadata()

    @property
    def has_norm(self) -> bool:
        """Whether it has the norm that follows the last block; classifiers on mean-pooled patches and the backbones of
        detectors and segmenters have none."""
        return "norm.weight" in self.tensors

    @property
    def num_classes(self) -> int:
        """Classes of its head; 0 where it has none."""
        return len(self.tensors.get("head.weight", ()))

    def check_pretrained(self) -> None:
        """Raise ``UserError`` where the file is a classifier: a pre-training starts from an encoder."""
        if self.num_classes:
            raise UserError(
                f"{self.path} is a fine-tuned classifier of {self.num_classes} classes, not a pre-trained encoder; "
                "give the encoder it was fine-tuned from, or evaluate it with mae evaluate"
            )

    def headless(self) -> EncoderFile:
        """The encoder without the head of a classifier, for a new one; its report says so."""
        heads = [name for name in self.tensors if name.startswith(HEADS)]
        why = {theirs: "a classifier's head; a new one learns" for name in heads for theirs in self.names[name]}
        report = dataclasses.replace(self.report, unused={**self.report.unused, **why})
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in heads}
        return dataclasses.replace(self, tensors=tensors, report=report)

    @property
    def classifier_pooling(self) -> Pooling:
        """What its head reads."""
        return "cls" if self.has_norm else "mean"

    def check_pooling(self, pooling: Pooling | None) -> None:
        """Raise ``UserError`` where the normalised cls token is asked of a classifier on mean-pooled patches, or of an
        encoder that has none."""
        if pooling == "cls" and not self.shape.cls_token:
            raise UserError(f"{self.path} has no cls token; set model.pooling=mean")
        if pooling != "mean" and "fc_norm.weight" in self.tensors and not self.has_norm:
            raise UserError(
                f"{self.path} is a classifier on mean-pooled patches and has no norm of its tokens; set "
                "model.pooling=mean, or give the encoder it was fine-tuned from"
            )

    def model_facts(self, model: Any) -> dict[str, Any]:
        """The file's trunk in the words of the ``model`` section: its name where it has one, its numbers otherwise, and
        what the section gives of them; nothing for a section that has no words for it."""
        if not hasattr(model, "size"):
            return {}
        trunk = self.shape
        numbers = {name: getattr(trunk, name) for name in ("width", "depth", "heads", "mlp_ratio")}
        # a recorded config.yaml names every option, those without a value too
        given = {name for name in model.model_fields_set if getattr(model, name) is not None}
        if self.info.size is not None:
            facts = {"size": self.info.size, **{name: value for name, value in numbers.items() if name in given}}
        elif "size" in given and {"width", "depth"} - given:
            facts = {**numbers, "size": model.size if alike(model.size, trunk) else trunk.name}
        else:
            facts = numbers
        stated = {"patch_size"} & given | ({"cls_token"} if "cls_token" in given or not trunk.cls_token else set())
        stated &= set(type(model).model_fields)
        return {**facts, **{name: getattr(trunk, name) for name in stated}}

    def model_defaults(self, model: Any) -> dict[str, Any]:
        """What holds of the ``model`` section where the user said nothing."""
        return {} if self.shape.cls_token or not hasattr(model, "pooling") else {"pooling": "mean"}

    def build(self, image_size: int | Sequence[int] | None = None, **options: Any) -> Encoder:
        """An untrained model of the file's architecture, by default at its image size."""
        size = self.image_size if image_size is None else image_size
        return ViTEncoder(self.shape, image_size=size, in_chans=self.in_chans, **options)

    def adapted(self, trunk: Any, grid: tuple[int, int], rename: Mapping[str, str]) -> Adapted:
        """The tensors with positions resized to ``grid``; ``rename``: where they go in a larger model than the
        ``trunk``."""
        before = self.report
        resized = {rename.get(name, name): how for name, how in before.resized.items()}
        report = LoadReport(before.path, resized=resized, unused={**before.unused}, notes=[*before.notes])
        tensors = dict(self.tensors)
        for name in {"pos_embed", "decoder_pos_embed"} & tensors.keys() if self.grid != tuple(grid) else ():
            if name == "pos_embed" or name in rename:
                tensors[name] = resize_pos_embed(tensors[name], self.grid, grid)
                report.resized[rename.get(name, name)] = f"{self.grid[0]}x{self.grid[1]} -> {grid[0]}x{grid[1]}"
        remedy = f"the file holds a {self.size} encoder with patch {self.patch_size} and {self.in_chans} channels"
        return Adapted(tensors, self.names, report, {}, remedy)


# What lies beside a weights file: the configuration of a folder of transformers or timm.


def read_json_beside(path: Path, name: str) -> Mapping[str, Any] | None:
    """The JSON object ``name`` beside a weights file; None where there is none."""
    return read_json(path.parent / name)


def info_beside(path: Path) -> EncoderInfo:
    """What config.json and preprocessor_config.json beside a weights file say. Raises ``UserError`` where they ask for
    what no encoder of ours computes."""
    config = read_json_beside(path, EXPORT_CONFIG) or {}
    with naming(path.parent / EXPORT_CONFIG):
        if "num_attention_heads" in config:
            pixels = _pixels_of_processor(read_json_beside(path, PREPROCESSOR_CONFIG) or {}, config)
            return EncoderInfo.from_foreign(config, TRANSFORMERS_WORDS).with_facts(**pixels)
        return info_of_timm(config) if "architecture" in config else EncoderInfo()


def _pixels_of_processor(processor: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and std in units of pixels in [0, 1], of transformers' ``(pixels * rescale_factor - mean) / std``."""
    channels = config.get("num_channels", 3)
    stated: dict[str, Any] = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    if processor.get("do_normalize") is False:
        stated = {"mean": 0.0, "std": 1.0}
    if None in stated.values():
        return {}
    scale = 255 * (processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0)
    lists = {name: [each] * channels if isinstance(each, int | float) else each for name, each in stated.items()}
    return {name: [round(value / scale, 9) for value in values] for name, values in lists.items()}


def info_of_timm(config: Mapping[str, Any]) -> EncoderInfo:
    """What timm's configuration of a ViT says: its own model is built, without memory for its weights, and asked; of
    something else it says nothing. Raises ``UserError`` for an activation that is not supported."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    name = str(config["architecture"]).split(".")[0]
    if not timm.is_model(name):
        return EncoderInfo()
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **(config.get("model_args") or {}))
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise UserError(f"timm cannot build the {name} it describes: {error}") from None
    if not isinstance(model, VisionTransformer):
        return EncoderInfo()
    activations = {get_act_layer(each): each for each in ACTIVATIONS} | {torch.nn.GELU: "gelu"}
    block, pixels = model.blocks[0], config.get("pretrained_cfg") or {}
    if type(block.mlp.act) not in activations:
        raise UserError(f"its activation is {type(block.mlp.act).__name__}; supported: {', '.join(ACTIVATIONS)}")
    return EncoderInfo(
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        norm_eps=block.norm1.eps,
        activation=activations[type(block.mlp.act)],
        patch_size=model.patch_embed.patch_size[0],
        image_size=list(model.patch_embed.img_size),
        mean=pixels.get("mean") or None,
        std=pixels.get("std") or None,
    )
