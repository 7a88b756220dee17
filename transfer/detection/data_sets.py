"""The two halves of a detector's data: where they lie, read, and checked before a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from mae_core.data.images import ImageFiles, UnreadableImage, check_all, refuse_unreadable
from mae_core.errors import UserError
from mae_core.training.progress import Counter
from transfer.detection.coco import CocoSet, Part, check_same_categories, read_coco
from transfer.detection.config import DetectionConfig, DetectionData
from transfer.detection.headers import header_of
from transfer.detection.heads import HEADS
from transfer.detection.samples import check_size, read_checked

Half = Literal["train", "val"]
HALVES: tuple[Half, Half] = ("train", "val")
MOST_LOOKED_AT = 2000
"""A set of more images is not compared with its json before the run; what does not fit is found as it comes."""


def locate(data: DetectionData, name: Half) -> Part:
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
    masks = HEADS[config.model.head].learns_masks
    train, val = (read_coco(locate(config.data, half), masks=masks) for half in HALVES)
    check_same_categories(train.categories, train.path, val.categories, val.path)
    if config.data.filter_empty:
        train = with_objects(train)
    check_images(config.data, train, val)
    return train, val


def with_objects(coco: CocoSet) -> CocoSet:
    """The set without the images that have nothing to learn: no object, or crowds alone. Raises ``UserError`` where no
    image is left."""
    kept = tuple(image for image in coco.images if not all(instance.crowd for instance in image.instances))
    if not kept:
        raise UserError(
            f"no image of {coco.path} has an object to learn; annotate some, or set data.filter_empty=false"
        )
    return replace(coco, images=kept)


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
        check_all(ImageFiles(paths, data.reading), on_progress=Counter("checking images"))
    for coco in sets:
        if len(coco.images) > MOST_LOOKED_AT:
            continue
        first = None
        for image in coco.images:
            try:
                if data.on_error == "skip":
                    read_checked(image, data.reading)
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
