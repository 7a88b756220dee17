"""What every engine starts from: the two halves of a data set, and the pre-trained trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from mae_core.config.schema import Size
from mae_core.data.images import ImageFiles, Statistics, UnreadableImage, check_all, refuse_unreadable, statistics_of
from mae_core.errors import UserError
from mae_core.models.sizes import size_of
from mae_core.training.groups import layer_decay_groups
from mae_core.training.progress import Counter
from mae_core.weights.load import LoadReport, read_encoder
from transfer.backbone import DenseViT
from transfer.detection.coco import CocoSet, Part, check_same_categories, read_coco
from transfer.detection.config import DetectionConfig, DetectionData, DetectionOptim, DetectorConfig
from transfer.detection.headers import header_of
from transfer.detection.samples import check_size, read_checked
from transfer.pyramid import PYRAMIDS
from transfer.weights import load_pretrained

MOST_LOOKED_AT = 2000
"""A set of more images is not compared with its json before the run; what does not fit is found as it comes."""


def locate(data: DetectionData, name: Literal["train", "val"]) -> Part:
    """Where half ``name`` of the data lies. Raises ``UserError`` where the configuration does not say."""
    named = {
        "train": (data.train_images, data.train_annotations),
        "val": (data.val_images, data.val_annotations),
    }
    images, annotations = named[name]
    if data.path is not None:
        images = images or data.path / name
        annotations = annotations or data.path / "annotations" / f"instances_{name}.json"
    if images is None or annotations is None:
        raise UserError(
            f"no {name} set given; set data.path to a folder with {name}/ and annotations/instances_{name}.json, "
            f"or data.{name}_images and data.{name}_annotations"
        )
    return Part(images, annotations)


def read_data(config: DetectionConfig) -> tuple[CocoSet, CocoSet]:
    """The training and the validation set, checked. Raises ``UserError`` for what is wrong with or between them."""
    train, val = (read_coco(locate(config.data, "train")), read_coco(locate(config.data, "val")))
    check_same_categories(train.categories, train.path, val.categories, val.path)
    check_images(config.data, train, val)
    return train, val


def files_of(config: DetectionConfig, *sets: CocoSet) -> list[Path]:
    """The images of ``sets``, as the run's data.json counts and names them: below data.path, or else by name alone."""
    root = config.data.path
    paths = [image.path for coco in sets for image in coco.images]
    below = root is not None and all(path.is_relative_to(root) for path in paths)
    return paths if below or root is None else [root / path.name for path in paths]


def check_images(data: DetectionData, *sets: CocoSet) -> None:
    """Raise ``UserError`` for images that the run could not use, before it starts.

    With ``on_error=raise`` every file is decoded, and the first that is unreadable or has another size than its json
    says is refused; otherwise only a set without a single usable image. Sizes are compared in sets of up to
    ``MOST_LOOKED_AT`` images.
    """
    if data.on_error == "raise":
        paths = [image.path for coco in sets for image in coco.images]
        check_all(ImageFiles(paths, data.channels), on_progress=Counter("checking images"))
    for coco in sets:
        if len(coco.images) > MOST_LOOKED_AT:
            continue
        first = None
        for image in coco.images:
            try:
                if data.on_error == "skip":
                    read_checked(image, data.channels)
                else:  # every file was decoded above
                    check_size(image, header_of(image.path, data.channels))
            except UnreadableImage as error:
                if data.on_error == "raise":
                    refuse_unreadable([error.unreadable])
                first = first or error.unreadable
            else:
                if data.on_error == "skip":
                    break
        else:
            if first is not None:
                raise UserError(
                    f"no image of {coco.path} can be used, the first is {first.path} ({first.reason}); "
                    "check the images and their json"
                )


PLAIN_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm)
"""What ViTDet's optimizer takes for a norm; ``LayerNorm2d`` is none of them."""
PRETRAINED_SIZE = 224
"""Images that the positions of a trunk from scratch belong to where ``model.positions=weights``; the paper's."""


class Trunk(NamedTuple):
    """The backbone, the report of its weights (None from scratch), and the pixel statistics it was trained with."""

    vit: DenseViT
    report: LoadReport | None
    statistics: Statistics


def parameter_groups(model: nn.Module, optim: DetectionOptim) -> list[dict[str, Any]]:
    """Groups of a detector with ``backbone.vit`` for AdamW: layer-wise rates, and what is not decayed.

    ``optim.decayed`` says what is decayed. "weights": no bias, norm or position is. "vitdet" repeats ViTDet's code for
    ViT-B and ViT-L, where the exemption of norms knows torch's own classes alone: the channel norms of pyramid and
    heads, all biases of other layers, and relative positions are decayed. "all" repeats its code for ViT-H, which
    exempts nothing.
    """
    options: dict[str, Any] = {"layer_decay": optim.layer_decay, "weight_decay": optim.weight_decay}
    groups = layer_decay_groups(model, len(model.backbone.vit.blocks), trunk="backbone.vit.", **options)
    if optim.decayed == "weights":
        return groups
    exempt: set[int] = set()
    if optim.decayed == "vitdet":
        exempt = {id(p) for m in model.modules() if type(m) in PLAIN_NORMS for p in m.parameters(recurse=False)}
        exempt |= {id(p) for name, p in model.named_parameters() if name.endswith("pos_embed")}
    split: list[dict[str, Any]] = []
    for group in groups:
        for free in (False, True):
            kept = [n for n, parameter in enumerate(group["params"]) if (id(parameter) in exempt) == free]
            if kept:
                chosen = {key: [group[key][n] for n in kept] for key in ("params", "param_names")}
                split.append({**group, **chosen, "weight_decay": 0.0 if free else optim.weight_decay})
    return split


def trunk_options(model: DetectorConfig, size: str, canvas: Size, stored: Size) -> dict[str, Any]:
    """Arguments of ``DenseViT`` for a trunk of ``size`` whose weights have the positions of ``stored`` images."""
    return {
        "image_size": canvas if model.positions == "canvas" else stored,
        "relative_size": canvas,
        "taps": PYRAMIDS[model.pyramid].taps(size_of(size)),
        "window": model.window,
        "relative_positions": model.relative_positions,
        "drop_path": model.drop_path,
        "checkpointing": model.checkpointing,
    }


def build_trunk(config: DetectionConfig) -> Trunk:
    """The ``DenseViT`` of the configuration: from the weights file, or random.

    Raises ``UserError`` where the configuration contradicts the file, or the canvas does not split into patches.
    """
    model, data = config.model, config.data
    if config.weights is None:
        size = model.size or "base"
        options = trunk_options(model, size, data.image_size, PRETRAINED_SIZE)
        vit = DenseViT(size, patch_size=model.patch_size, in_chans=data.channels, **options)
        return Trunk(vit, None, statistics_of(data))
    source = read_encoder(config.weights)
    source.check_asked(size=model.size, patch_size=model.patch_size, in_chans=data.channels)
    options = trunk_options(model, source.size, data.image_size, source.image_size)
    vit = DenseViT(source.size, patch_size=source.patch_size, in_chans=source.in_chans, **options)
    report = load_pretrained(vit, config.weights, allow_missing=config.allow_missing)
    return Trunk(vit, report, statistics_of(data, source.metadata))
