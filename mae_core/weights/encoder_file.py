"""What is known of a weights file beside its tensors: our metadata, a trainer's arguments, the config.json of a folder
of timm or transformers. All in the words of our own metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_core.layout import EXPORT_CONFIG
from mae_core.models.sizes import SIZES
from mae_core.weights.files import WeightsFile, read_file

TRANSFORMERS_WORDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "num_attention_heads": "heads",
    "decoder_num_attention_heads": "decoder_heads",
    "mask_ratio": "mask_ratio",
    "layer_norm_eps": "norm_eps",
}
"""A key of transformers' configuration -> ours."""


def read_described(path: Path, *, mapped: bool = False) -> WeightsFile:
    """Read a weights file with all that the file or a config.json beside it says. Raises ``UserError`` as ``read_file``
    does."""
    file = read_file(path, mapped=mapped)
    beside = path.parent / EXPORT_CONFIG
    if beside.is_file():
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = None
        if isinstance(config, Mapping):
            file.metadata = {**metadata_of_config(config), **file.metadata}
    file.metadata.pop("format", None) if file.metadata.get("format") == "pt" else None
    return file


def metadata_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json of an exported folder says."""
    metadata: dict[str, Any] = {}
    if config.get("model_type") in ("vit_mae", "vit"):
        metadata = {ours: config[theirs] for theirs, ours in TRANSFORMERS_WORDS.items() if config.get(theirs)}
        if "norm_pix_loss" in config:
            metadata["target"] = "normalized_pixels" if config["norm_pix_loss"] else "pixels"
    elif "architecture" in config:
        arguments = config.get("model_args") or {}
        pixels = config.get("pretrained_cfg") or {}
        if arguments.get("img_size"):
            metadata["image_size"] = arguments["img_size"]
        for name in ("mean", "std"):
            if pixels.get(name):
                metadata[name] = pixels[name]
    return metadata


def heads_of(width: int, metadata: Mapping[str, Any]) -> int:
    """Attention heads of an encoder: as its metadata says, as its size has, or one for every 64 channels."""
    stated = metadata.get("heads")
    if isinstance(stated, int) and stated > 0 and width % stated == 0:
        return stated
    known = {size.width: size.heads for size in SIZES.values()}
    return known.get(width) or max(1, width // 64)
