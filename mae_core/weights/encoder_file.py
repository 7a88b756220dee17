"""What a weights file says of its encoder, in one typed record. The only file that spells the keys of the metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_core.errors import UserError
from mae_core.layout import EXPORT_CONFIG, PREPROCESSOR_CONFIG
from mae_core.models.encoder import ViTEncoder
from mae_core.models.mae import MaskedAutoencoder
from mae_core.models.sizes import SIZES, ViTSize
from mae_core.weights.report import LoadReport

TRANSFORMERS_WORDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "layer_norm_eps": "norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "decoder_num_attention_heads": "decoder_heads",
    "mask_ratio": "mask_ratio",
}
"""A key of transformers' configuration -> ours."""
TRANSFORMERS_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""``hidden_act`` of transformers -> a row of ``ACTIVATIONS``."""


@dataclass(frozen=True)
class EncoderInfo:
    """What is known of an encoder and of how it was trained; None: not stated.

    format            of the names in the file; ``converted_from``: of the file it was made from
    size              the named size, where it has one
    image_size, grid  (height, width) in pixels and (rows, columns) of the stored positions
    mean, std         of the pixels, channel by channel, after scaling to [0, 1]
    pooling           what a classifier reads
    decoder_heads     attention heads of the decoder; masking, mask_ratio, target ...: of the pre-training
    other             keys that this version does not know, kept as they are
    """

    format: str | None = None
    converted_from: str | None = None
    size: str | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    norm_eps: float | None = None
    activation: str | None = None
    patch_size: int | None = None
    image_size: Any = None
    grid: Any = None
    in_chans: int | None = None
    prefix_tokens: int | None = None
    target: str | None = None
    target_options: Mapping[str, Any] | None = None
    masking: str | None = None
    masking_options: Mapping[str, Any] | None = None
    mask_ratio: float | None = None
    decoder_heads: int | None = None
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
        known = {name: value for name, value in metadata.items() if name in KEYS and value is not None}
        if known.get("format") == "pt":
            del known["format"]
        return cls(**known, other={name: value for name, value in metadata.items() if name not in KEYS})

    def to_metadata(self) -> dict[str, Any]:
        """JSON values of all that is stated."""
        stated = {name: getattr(self, name) for name in KEYS if getattr(self, name) is not None}
        return {**stated, **self.other}

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
        numbers = (self.width, self.depth, self.heads)
        if None in numbers:
            raise UserError(f"width, depth and heads of the encoder are not all known, but {numbers}")
        return ViTSize(
            *numbers,  # type: ignore[arg-type]
            mlp_ratio=self.mlp_ratio or ViTSize.mlp_ratio,
            patch_size=self.patch_size or ViTSize.patch_size,
            norm_eps=self.norm_eps or ViTSize.norm_eps,
            activation=self.activation or ViTSize.activation,
        )

    @classmethod
    def of_trunk(cls, trunk: ViTSize) -> EncoderInfo:
        """The facts of a trunk."""
        named = trunk.name if trunk.name in SIZES else None
        facts = {**dataclasses.asdict(trunk), "size": named}
        return cls(**facts)

    @classmethod
    def of(cls, model: ViTEncoder | MaskedAutoencoder, **more: Any) -> EncoderInfo:
        """The record of a model of ours; ``more``: further facts."""
        encoder = model.encoder if isinstance(model, MaskedAutoencoder) else model
        grid = encoder.grid
        facts: dict[str, Any] = {
            "format": "mae_core",
            "image_size": list(grid.image_size),
            "grid": [grid.rows, grid.cols],
            "in_chans": encoder.in_channels,
        }
        return cls.of_trunk(encoder.shape).with_facts(**facts, **more)


KEYS = tuple(each.name for each in dataclasses.fields(EncoderInfo) if each.name != "other")


def describe_encoder(model: ViTEncoder | MaskedAutoencoder) -> dict[str, Any]:
    """The metadata every weights file of ours carries about its encoder."""
    return EncoderInfo.of(model).to_metadata()


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
        rows, cols = self.info.grid
        return rows, cols

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) it was trained at."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def state(self) -> dict[str, Tensor]:
        """``tensors``."""
        return self.tensors

    @property
    def metadata(self) -> dict[str, Any]:
        """``info`` as JSON values."""
        return self.info.to_metadata()

    @property
    def format(self) -> str:
        """Name of the format the file is in."""
        return str(self.info.format)

    @property
    def has_norm(self) -> bool:
        """Whether it has the norm that follows the last block; classifiers on mean-pooled patches and the backbones of
        detectors and segmenters have none."""
        return "norm.weight" in self.tensors

    @property
    def num_classes(self) -> int:
        """Classes of its head; 0 where it has none."""
        return len(self.tensors["head.weight"]) if "head.weight" in self.tensors else 0

    def check_pretrained(self) -> None:
        """Raise ``UserError`` where the file is a classifier: what trains a new head starts from an encoder."""
        if self.num_classes:
            raise UserError(
                f"{self.path} is a fine-tuned classifier of {self.num_classes} classes, not a pre-trained encoder; "
                "give the encoder it was fine-tuned from, or evaluate it with mae evaluate"
            )


def info_of_arguments(arguments: Mapping[str, Any]) -> EncoderInfo:
    """What the arguments of the official trainer say."""
    facts: dict[str, Any] = {}
    if isinstance(arguments.get("norm_pix_loss"), bool):
        facts["target"] = "normalized_pixels" if arguments["norm_pix_loss"] else "pixels"
    for name, kind in (("mask_ratio", float), ("epochs", int)):
        if isinstance(arguments.get(name), kind):
            facts[name] = arguments[name]
    return EncoderInfo(**facts)


# What lies beside a weights file: the configuration of a folder of transformers or timm.


def read_json_beside(path: Path, name: str) -> Mapping[str, Any] | None:
    """The JSON object ``name`` beside a weights file; None where there is none."""
    try:
        content = json.loads((path.parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, Mapping) else None


def info_beside(path: Path) -> EncoderInfo:
    """What config.json and preprocessor_config.json beside a weights file say.

    Raises ``UserError`` where they ask for what no encoder of ours computes.
    """
    config = read_json_beside(path, EXPORT_CONFIG)
    if config is None:
        return EncoderInfo()
    try:
        if "num_attention_heads" in config:
            return info_of_transformers(config, read_json_beside(path, PREPROCESSOR_CONFIG) or {})
        return info_of_timm(config) if "architecture" in config else EncoderInfo()
    except UserError as error:
        raise UserError(f"{path.parent / EXPORT_CONFIG}: {error}") from None


def info_of_transformers(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> EncoderInfo:
    """What transformers' configuration of a ViT, and that of its image processor, say."""
    facts = {ours: config[theirs] for theirs, ours in TRANSFORMERS_WORDS.items() if config.get(theirs) is not None}
    activation = config.get("hidden_act")
    if activation is not None:
        if activation not in TRANSFORMERS_ACTIVATIONS:
            known = ", ".join(TRANSFORMERS_ACTIVATIONS)
            raise UserError(f"hidden_act is {activation!r}, which is not supported; supported: {known}")
        facts["activation"] = TRANSFORMERS_ACTIVATIONS[activation]
    if "norm_pix_loss" in config:
        facts["target"] = "normalized_pixels" if config["norm_pix_loss"] else "pixels"
    return EncoderInfo(**facts, **_statistics_of_processor(preprocessor, config.get("num_channels", 3)))


def _statistics_of_processor(preprocessor: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Mean and std in units of pixels in [0, 1], of transformers' ``(pixels * rescale_factor - mean) / std``."""
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if preprocessor.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    if mean is None or std is None:
        return {}
    factor = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1.0
    scale = 255 * factor
    columns = {"mean": mean, "std": std}
    lists = {name: [each] * channels if isinstance(each, int | float) else each for name, each in columns.items()}
    return {name: [round(value / scale, 9) for value in values] for name, values in lists.items()}


def info_of_timm(config: Mapping[str, Any]) -> EncoderInfo:
    """What timm's configuration of a ViT says: its own model is built, without memory for its weights, and asked.

    A configuration of something else says nothing. Raises ``UserError`` for an activation that is not supported.
    """
    import timm
    import torch
    from timm.layers import get_act_layer
    from timm.models.vision_transformer import VisionTransformer

    from mae_core.models.sizes import ACTIVATIONS

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
    block = model.blocks[0]
    if type(block.mlp.act) not in activations:
        raise UserError(f"its activation is {type(block.mlp.act).__name__}; supported: {', '.join(ACTIVATIONS)}")
    pixels = config.get("pretrained_cfg") or {}
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
