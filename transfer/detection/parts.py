"""What every engine starts from: the two halves of a data set, and the pre-trained trunk."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

from PIL import Image

from mae_core.conversion.loading import LoadReport, read_encoder
from mae_core.data.images import Statistics, UnreadableImage, check_all, refuse_unreadable, statistics_of
from mae_core.errors import UserError
from mae_core.training.progress import Counter
from transfer.backbone import DenseViT
from transfer.detection.coco import CocoImage, CocoSet, Part, check_same_categories, read_coco
from transfer.detection.config import DetectionConfig, DetectionData
from transfer.detection.samples import read_checked
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


def check_images(data: DetectionData, *sets: CocoSet) -> None:
    """Raise ``UserError`` for images that the run could not use, before it starts.

    With ``on_error=raise`` every file is decoded, and the first that is unreadable or has another size than its json
    says is refused; otherwise only a set without a single usable image. Sizes are compared in sets of up to
    ``MOST_LOOKED_AT`` images.
    """
    if data.on_error == "raise":
        paths = [image.path for coco in sets for image in coco.images]
        check_all(paths, data.channels, on_progress=Counter("checking images"))
    for coco in sets:
        if len(coco.images) > MOST_LOOKED_AT:
            continue
        first = None
        for image in coco.images:
            try:
                if data.on_error == "skip" or not _size_in_header_fits(image):
                    read_checked(image, data.channels)
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


def _size_in_header_fits(record: CocoImage) -> bool:
    """Whether the file, by its header alone, has the size that the json says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(record.path) as image:
                return image.size == (record.width, record.height)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return False


class Trunk(NamedTuple):
    """The backbone, the report of its weights (None from scratch), and the pixel statistics it was trained with."""

    vit: DenseViT
    report: LoadReport | None
    statistics: Statistics


def build_trunk(config: DetectionConfig) -> Trunk:
    """A ``DenseViT`` whose position table has the canvas' grid: from the weights file, or random.

    Raises ``UserError`` where the configuration contradicts the file, or the canvas does not split into patches.
    """
    model, data = config.model, config.data
    if config.weights is None:
        vit = DenseViT(
            model.size or "base",
            image_size=data.image_size,
            patch_size=model.patch_size,
            in_chans=data.channels,
            window=model.window,
            drop_path=model.drop_path,
            tap_norm=model.tap_norm,
            checkpointing=model.checkpointing,
        )
        return Trunk(vit, None, statistics_of(data))
    source = read_encoder(config.weights)
    source.check_asked(size=model.size, patch_size=model.patch_size, in_chans=data.channels)
    vit = DenseViT(
        source.size,
        image_size=data.image_size,
        patch_size=source.patch_size,
        in_chans=source.in_chans,
        window=model.window,
        drop_path=model.drop_path,
        tap_norm=model.tap_norm,
        checkpointing=model.checkpointing,
    )
    report = load_pretrained(vit, config.weights)
    return Trunk(vit, report, statistics_of(data, source.metadata))
