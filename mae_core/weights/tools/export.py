"""Folders that timm and transformers open by themselves, ONNX, and programs of ``torch.export``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_core.atomic import atomic_folder
from mae_core.data.config import usual_test_crop
from mae_core.errors import UserError
from mae_core.layout import EXPORT_CONFIG, MODEL, PREPROCESSOR_CONFIG
from mae_core.models.exporting import FORMATS, check_out, export_model
from mae_core.models.sizes import ViTSize
from mae_core.weights.catalogue import LICENCE
from mae_core.weights.classifier import classifier_of, read_classifier
from mae_core.weights.files import write_weights
from mae_core.weights.load import OFFICIAL_DECODER_HEADS, load_encoder
from mae_core.weights.parts import Parts
from mae_core.weights.tools.check import TRANSFORMERS_NAMES
from mae_core.weights.writing import Converted

TIMM_NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
"""Width -> timm's architecture of that width; every number of it is stated again in ``model_args``."""
TIMM_WITH_EPSILON = {1e-5: "vit_base_patch16_clip_224"}
"""Epsilon of the norms other than 1e-6 -> an architecture of timm's that has it: no JSON file can ask for one."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CARD = "README.md"


def write_folder(converted: Converted, folder: Path) -> None:
    """Write what ``from_pretrained`` (transformers) or ``timm.create_model("local-dir:...")`` opens, atomically. Raises
    ``UserError`` where the format has no such folder, or its library cannot hold the model."""
    if folder.exists():
        raise UserError(f"{folder} exists; choose another --out")
    config = config_of(converted)
    card = model_card(converted, config)
    with atomic_folder(folder) as temporary:
        write_weights(temporary / MODEL, converted.tensors, {"format": "pt"})
        for name, content in processor_of(converted).items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (temporary / EXPORT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / CARD).write_text(card, encoding="utf-8")


def config_of(converted: Converted) -> dict[str, Any]:
    """config.json of the folder. Raises ``UserError`` where the format has none, or its library cannot hold the
    model."""
    name, parts = converted.reading.format.name, converted.parts
    if name not in ("huggingface", "huggingface_5", "timm"):
        raise UserError(f"{name} is written as a file; end --out in .safetensors or .pth")
    if parts.info.image_size is None:
        raise UserError(
            "the grid of the positions is not known and not square; name it with mae convert --grid ROWS COLS"
        )
    return timm_config(parts) if name == "timm" else transformers_config(converted)


def processor_of(converted: Converted) -> dict[str, dict[str, Any]]:
    """File name -> content of transformers' image processor, where the statistics of the pixels are known."""
    info = converted.parts.info
    if converted.reading.format.name == "timm" or not (info.mean and info.std):
        return {}
    height, width = info.image_size
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(info.mean),
        "image_std": list(info.std),
    }
    return {PREPROCESSOR_CONFIG: processor}


def transformers_config(converted: Converted) -> dict[str, Any]:
    """config.json of a ViTMAE (with a decoder) or a ViT. Raises ``UserError`` for what transformers cannot build."""
    parts, info, tensors = converted.parts, converted.parts.info, converted.parts.tensors
    trunk, (rows, cols) = info.trunk, info.grid
    config: dict[str, Any] = {
        "hidden_size": trunk.width,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.heads,
        "intermediate_size": len(tensors["blocks.0.mlp.fc1.bias"]),
        "image_size": info.image_size[0] if rows == cols else list(info.image_size),
        "patch_size": trunk.patch_size,
        "num_channels": info.in_chans,
        "layer_norm_eps": trunk.norm_eps,
        "hidden_act": TRANSFORMERS_NAMES.get(trunk.activation, trunk.activation),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
        "initializer_range": 0.02,
        "torch_dtype": str(tensors["patch_embed.proj.weight"].dtype).removeprefix("torch."),
    }
    if any(name.startswith("decoder.") for name in converted.tensors):
        if int((rows * cols) ** 0.5) ** 2 != rows * cols:
            raise UserError(
                f"transformers' ViTMAE builds its position tables for a square number of patches, not {rows}x{cols}; "
                f"leave the decoder out with {parts.fit.reading.without_decoder()}, for its ViT takes any grid"
            )
        if info.target not in (None, "pixels", "normalized_pixels"):
            raise UserError(f"transformers' ViTMAE predicts pixels; this decoder predicts {info.target}")
        if info.target is None:
            parts.report.notes.append("the file does not say what it predicts; norm_pix_loss is written as true")
        return {
            **config,
            "model_type": "vit_mae",
            "architectures": ["ViTMAEForPreTraining"],
            "mask_ratio": 0.75 if info.mask_ratio is None else info.mask_ratio,
            "norm_pix_loss": info.target in (None, "normalized_pixels"),
            "decoder_hidden_size": len(tensors["decoder_embed.bias"]),
            "decoder_num_hidden_layers": len({n.split(".")[1] for n in tensors if n.startswith("decoder_blocks.")}),
            "decoder_num_attention_heads": info.decoder_heads or OFFICIAL_DECODER_HEADS,
            "decoder_intermediate_size": len(tensors["decoder_blocks.0.mlp.fc1.bias"]),
        }
    headed = "classifier.weight" in converted.tensors  # not the head of a classifier on mean-pooled patches
    if headed:
        labels = info.classes or [f"LABEL_{index}" for index in range(len(tensors["head.bias"]))]
        config["id2label"] = {str(index): str(label) for index, label in enumerate(labels)}
        config["label2id"] = {str(label): index for index, label in enumerate(labels)}
    return {**config, "model_type": "vit", "architectures": ["ViTForImageClassification" if headed else "ViTModel"]}


def timm_config(parts: Parts) -> dict[str, Any]:
    """config.json of timm's VisionTransformer."""
    info, trunk, channels = parts.info, parts.info.trunk, parts.info.in_chans
    classes = len(parts.tensors.get("head.bias", ()))
    pooling = "avg" if "fc_norm.weight" in parts.tensors else "token"
    grey = [0.5] * (channels or 0)
    return {
        "architecture": TIMM_WITH_EPSILON.get(trunk.norm_eps) or TIMM_NAMES.get(trunk.width, TIMM_NAMES[192]),
        "num_classes": classes,
        "num_features": trunk.width,
        "global_pool": pooling,
        "model_args": {
            "img_size": list(info.image_size),
            "patch_size": trunk.patch_size,
            "in_chans": channels,
            "embed_dim": trunk.width,
            "depth": trunk.depth,
            "num_heads": trunk.heads,
            "mlp_ratio": trunk.mlp_ratio,
            **timm_layers(trunk),
            "global_pool": pooling,
        },
        "pretrained_cfg": {
            "tag": "mae",
            "input_size": [channels, *info.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": info.test_crop or usual_test_crop(info.image_size),
            "mean": list(info.mean or (IMAGENET_MEAN if channels == 3 else grey)),
            "std": list(info.std or (IMAGENET_STD if channels == 3 else grey)),
            "num_classes": classes,
            # timm adapts a stem that it finds here to in_chans, and knows only stems of three channels
            "first_conv": "patch_embed.proj" if channels == 3 else None,
            "classifier": "head",
        },
        **({"label_names": info.classes} if classes and info.classes else {}),
    }


def timm_layers(trunk: ViTSize) -> dict[str, Any]:
    """``model_args`` for an activation or an epsilon that is not timm's default for a ViT, which is MAE's. Raises
    ``UserError`` for an epsilon that no JSON file can ask timm for: its norms are named without one."""
    layers = {} if trunk.activation == "gelu" else {"act_layer": trunk.activation}
    if trunk.norm_eps == ViTSize.norm_eps:
        return layers
    if trunk.norm_eps not in TIMM_WITH_EPSILON:
        known = ", ".join(f"{eps:g}" for eps in (ViTSize.norm_eps, *TIMM_WITH_EPSILON))
        raise UserError(
            f"its norms have the epsilon {trunk.norm_eps:g}, which a timm folder cannot state (only {known}); "
            "write a file that ends in .safetensors, and build timm's VisionTransformer with "
            "norm_layer=partial(nn.LayerNorm, eps=...)"
        )
    return {**layers, "pre_norm": False}


def model_card(converted: Converted, config: Mapping[str, Any]) -> str:
    """README.md of an exported folder: what it is, how it was trained as far as that is known, how to open it."""
    info, trunk = converted.parts.info, converted.parts.info.trunk
    library = "timm" if converted.reading.format.name == "timm" else "transformers"
    if library == "timm":
        opening = 'timm.create_model("local-dir:FOLDER", pretrained=True)'
    else:
        opening = f'transformers.{config["architectures"][0]}.from_pretrained("FOLDER")'
    known = {key: getattr(info, key) for key in ("target", "mask_ratio", "epochs", "mean", "std") if getattr(info, key)}
    training = "\n".join(f"- {key}: {value}" for key, value in known.items()) or "- not stated in the source"
    height, width = info.image_size
    licence = info.licence or "other"
    return f"""---
library_name: {library}
tags: [masked-autoencoder, vit]
license: {licence.lower().replace(" ", "-")}
---
# Vision transformer pre-trained with a masked autoencoder

Width {trunk.width}, depth {trunk.depth}, {trunk.heads} heads, patches of {trunk.patch_size} pixels,
images of {height}x{width} pixels and {info.in_chans} channels. Converted from the format {converted.parts.format};
LayerNorm epsilon {trunk.norm_eps:g}, activation {trunk.activation}.

Training:
{training}

```python
import {library}
model = {opening}
```

Weights that come from the released MAE files are under {LICENCE}, whatever they were converted or trained into.
"""


def export_as_program(source: Path, out: Path, *, half: bool = False, **asked: Any) -> str:
    """``mae export --onnx`` and ``--torch-export``: a classifier as ``images`` (B, C, H, W) -> ``logits`` (B, classes),
    an encoder as ``images`` -> ``tokens`` (B, 1 + N, D), from any weights file -> a line to print.

    Images are pixels of 0..1, standardised with ``mean`` and ``std`` of the metadata. ``out`` ends in .onnx or .pt2;
    ``half``: see ``export_model``; ``asked``: heads, branch and asked_as, see ``read_encoder``. Raises ``UserError`` as
    ``export_model``, ``classifier_of`` and ``load_encoder`` do.
    """
    check_out(out, *FORMATS)
    file = read_classifier(source, **asked)
    info = file.info
    facts = {"mean": info.mean, "std": info.std, "image_size": list(file.image_size)}
    if file.num_classes:
        model, output = classifier_of(file)[0], "logits"
        what = f"a classifier: images to the logits of {file.num_classes} classes"
        facts |= {"classes": info.classes, "multi_label": bool(info.multi_label), "test_crop": info.test_crop}
    else:
        model, output = _Encode(load_encoder(file)).eval(), "tokens"
        what = "an encoder: images to normalised tokens"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, file.in_chans, *file.image_size, generator=generator)
    known = {name: value for name, value in facts.items() if value is not None}
    difference = export_model(model, images, out, [output], known, half=half)
    runtime = "onnxruntime" if out.suffix == ".onnx" else "the written program"
    return f"wrote {out}, {what}; largest difference from torch {difference:.1e}, by {runtime}"


class _Encode(nn.Module):
    """``encode`` as a forward pass."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D)."""
        return self.encoder.forward_features(images)
