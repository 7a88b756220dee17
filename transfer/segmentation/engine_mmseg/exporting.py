"""A trained segmenter for other programs: ONNX or torch.export at a fixed size, or a checkpoint and config of mmseg."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mae_core import convert
from mae_core.atomic import atomic_path, write_text
from mae_core.errors import UserError
from mae_core.models.exporting import FORMATS, TOLERANCE, check_out, export_model
from transfer.segmentation.config import BACKBONE, LABEL_READERS, READERS, inference_mode
from transfer.segmentation.engine_mmseg.data import ManyChannelPreProcessor
from transfer.segmentation.engine_mmseg.segmenter import build_segmenter, fill_segmenter
from transfer.segmentation.segmenter_file import SegmenterFile

MOST_GIGABYTES = 2.0
NAMES_OF_LAYER_SCALE = ((".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2"))


def write_program(file: SegmenterFile, size: tuple[int, int], out: Path, *, half: bool = False) -> str:
    """Write the segmenter for images of ``size`` (height, width), as ONNX or for torch.export as ``out`` ends -> a line
    to print, with the parity of the logits.

    ``images`` (1, C, H, W) float32, pixels 0 to 255, RGB -> ``logits`` (1, classes, H, W), ``labels`` (1, H, W) int64.
    Normalising and padding are inside; classes, palette and reduce_zero_label are metadata. ``half``: see
    ``export_model``. Raises ``UserError`` as ``export_model`` does, and for a model that ONNX cannot hold.
    """
    check_out(out, *FORMATS)
    model = WholeImage(file).eval()
    weight = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e9
    if out.suffix == ".onnx" and weight > MOST_GIGABYTES:
        raise UserError(
            f"{file.path} takes {weight:.1f} GB, but an ONNX file holds {MOST_GIGABYTES:g}; export it --to torch-export"
        )
    images = 255 * torch.rand((1, model.channels, *size), generator=torch.Generator().manual_seed(0))
    facts = {"classes": file.classes, "palette": file.palette, "reduce_zero_label": file.reduce_zero_label}
    # fused attention promises other strides than what the exporter takes it apart into
    with sdpa_kernel(SDPBackend.MATH):
        found = export_model(model, images, out, ["logits", "labels"], facts, half=half, any_batch=False)
    return f"wrote {out} for images of {size[0]}x{size[1]}; its logits differ from torch's by {found:.1e} at most"


def compare(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The largest difference of two models' logits. Raises ``UserError`` where it exceeds ``TOLERANCE``."""
    with torch.no_grad():
        expected, found = ours(images), theirs(images)
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(f"the exported model's logits differ by {difference:.1e}, so nothing was written")
    return difference


class WholeImage(nn.Module):
    """A segmenter from pixels to labels, its image taken whole: what the evaluation does with ``mode="whole"``."""

    def __init__(self, file: SegmenterFile) -> None:
        super().__init__()
        self.segmentor = build_segmenter(file)
        preprocessor = self.segmentor.data_preprocessor
        section = file.config["model"].get("data_preprocessor") or {}
        self.channels = self.segmentor.backbone.in_channels
        self.divisor = (section.get("test_cfg") or {}).get("size_divisor") or 1
        self.padding = float(section.get("pad_val", 0))
        self.register_buffer("mean", preprocessor.mean if preprocessor._enable_normalize else torch.zeros(1))
        self.register_buffer("std", preprocessor.std if preprocessor._enable_normalize else torch.ones(1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(1, C, H, W) -> (1, classes, H, W), (1, H, W)."""
        H, W = images.shape[-2:]
        images = (images - self.mean) / self.std
        images = F.pad(images, (0, -W % self.divisor, 0, -H % self.divisor), value=self.padding)
        logits = self.segmentor.decode_head.forward(self.segmentor.extract_feat(images))
        aligned = self.segmentor.align_corners
        logits = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=aligned)
        logits = logits[..., :H, :W]
        return logits, logits.argmax(1)


def write_mmseg(file: SegmenterFile, out: Path) -> str:
    """Write a checkpoint (``out``, .pth) and a config beside it (.py) that mmseg runs without this package, with its
    own ``MAE`` backbone -> a line to print, with the parity of the logits on an image of the training's crop.

    mmseg's backbone takes images of that one size, so the config slides windows of it. mmseg normalises grey and RGB
    alone: of other channels mean and std go into the first layer, for which the padding below an image is black then.
    Raises ``UserError`` where the segmenter has another backbone or the logits differ; nothing is written then.
    """
    register_all_modules()
    ours = build_segmenter(file)
    if trunk := file.config["model"]["backbone"].get("trunk"):
        raise UserError(f"{file.path} has the trunk {trunk}, and mmseg's MAE backbone is the toolkit's own ViT alone")
    if file.config["model"]["backbone"]["type"] != BACKBONE:
        raise UserError(f"{file.path} has a {file.config['model']['backbone']['type']} backbone, not a {BACKBONE}")
    backbone = ours.backbone
    if backbone.grid.rows != backbone.grid.cols:
        raise UserError(f"{file.path} was trained on crops that are not square; mmseg slides square windows here")
    model = {
        **file.config["model"],
        "backbone": mmseg_backbone(backbone),
        "test_cfg": inference_mode(file.config, mode="slide", crop_size=backbone.grid.image_size[0]),
    }
    mean, std = torch.zeros(1), torch.ones(1)
    if folded := isinstance(ours.data_preprocessor, ManyChannelPreProcessor):
        mean, std = ours.data_preprocessor.mean, ours.data_preprocessor.std
        rest = {key: value for key, value in model["data_preprocessor"].items() if key not in ("mean", "std")}
        model["data_preprocessor"] = {**rest, "type": "SegDataPreProcessor"}
    theirs = MODELS.build(Config({"model": model}).model)
    fill_segmenter(theirs, mmseg_state(ours, theirs.state_dict()), str(file.path))
    if folded:
        fold_normalisation(theirs.backbone.patch_embed.projection, mean, std)
    theirs.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((1, backbone.in_channels, *backbone.grid.image_size), generator=generator)
    difference = compare(
        lambda given: ours.decode_head.forward(ours.extract_feat(given)),
        lambda given: theirs.decode_head.forward(theirs.extract_feat(given * std + mean)),
        images,
    )
    steps = file.config["val_dataloader"]["dataset"]["pipeline"]
    pipeline = [mmcv_reader(backbone.in_channels) if step["type"] in READERS else step for step in steps]
    config = Config(
        {
            "default_scope": "mmseg",
            "model": model,
            "test_pipeline": [step for step in pipeline if step["type"] not in LABEL_READERS],
        }
    )
    meta = {"dataset_meta": {"classes": file.classes, "palette": [list(colour) for colour in file.palette]}}
    with atomic_path(out) as temporary:
        torch.save({"meta": meta, "state_dict": theirs.state_dict()}, temporary)
    write_text(out.with_suffix(".py"), config.pretty_text)
    return (
        f"wrote {out} and {out.with_suffix('.py')}; mmseg's logits differ from ours by {difference:.1e} at most; "
        "its reader takes 8 bits per channel: images of more must be converted"
    )


@torch.no_grad()
def fold_normalisation(projection: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    """Make a first layer take pixels as it took ``(pixels - mean) / std``; mean and std are (C, 1, 1)."""
    projection.weight /= std
    assert projection.bias is not None
    projection.bias -= (projection.weight * mean).sum(dim=(1, 2, 3))


def mmcv_reader(channels: int) -> dict[str, str]:
    """The step by which mmcv reads images: what is neither grey nor RGB from TIFF of 8 bits."""
    if channels == 3:
        return {"type": "LoadImageFromFile"}
    if channels == 1:
        return {"type": "LoadImageFromFile", "color_type": "grayscale"}
    return {"type": "LoadImageFromFile", "color_type": "unchanged", "imdecode_backend": "tifffile"}


def mmseg_backbone(backbone: Any) -> dict[str, Any]:
    """The section of mmseg's ``MAE`` for a ``MAECoreViT`` of the same shape."""
    shape = backbone.shape
    return {
        "type": "MAE",
        "img_size": tuple(backbone.grid.image_size),
        "patch_size": backbone.grid.patch,
        "in_channels": backbone.in_channels,
        "embed_dims": shape.width,
        "num_layers": len(backbone.blocks),
        "num_heads": shape.heads,
        "out_indices": list(backbone.taps),
        "init_values": 1.0,
        "mlp_ratio": int(shape.mlp_ratio),
        "norm_cfg": {"type": "LN", "eps": shape.norm_eps},
    }


def mmseg_state(ours: nn.Module, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our segmenter's tensors by mmseg's names; what mmseg has in any case (tables, their index) is taken from
    ``wanted``, a new model's, where ours has none: a table of zeros."""
    trunk = dict(ours.backbone.state_dict())
    for timm, beit in NAMES_OF_LAYER_SCALE:
        trunk = {name.replace(timm, beit): tensor for name, tensor in trunk.items()}
    converted, _ = convert(trunk, "mae_segmentation", "mmseg")
    rest = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("backbone.")}
    named = {f"backbone.{name.removeprefix('backbone.')}": tensor for name, tensor in converted.items()}
    made = {name: tensor for name, tensor in wanted.items() if "relative_position" in name}
    return {**made, **named, **rest}
