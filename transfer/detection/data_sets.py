"""The two halves of a detector's data: where they lie, read, and checked before a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mae_core.counting import Counter
from mae_core.data.images import ImageFiles, UnreadableImage, check_all, refuse_unreadable
from mae_core.errors import UserError
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
    if data.path is not None and (images is None or annotations is None):
        _check_folder(data.path)
        found = whole_in(data.path) if data.val_share is not None else half_in(data.path, name)
        images, annotations = images or found.images, annotations or found.annotations
    if images is None or annotations is None:
        raise UserError(
            f"no {name} set given; set data.path to a folder with {name}/ and annotations/instances_{name}.json, "
            f"or data.{name}_images and data.{name}_annotations"
        )
    return Part(images, annotations)


def _check_folder(path: Path) -> None:
    """Raise ``UserError`` where ``data.path`` is no folder."""
    if path.is_dir():
        return
    if path.suffix == ".json" and path.is_file():
        raise UserError(
            f"data.path={path} is a file; for one json set data.train_annotations={path}, data.train_images to the "
            "folder of its images, and data.val_share=0.15"
        )
    found = "is a file" if path.is_file() else "does not exist"
    raise UserError(f"data.path={path} {found}; set it to the folder that holds train/, val/ and annotations/")


def half_in(folder: Path, name: str) -> Part:
    """A half of a data folder: ``name``/ and annotations/instances_``name``.json, or both with a year behind the name,
    as COCO has them; the images may lie in images/``name``.

    Where nothing is there, the places where it should be. Raises ``UserError`` for several years.
    """
    jsons = [folder / "annotations" / f"instances_{name}.json"]
    if not jsons[0].is_file():
        years = sorted((folder / "annotations").glob(f"instances_{name}[0-9]*.json"))
        if len(years) > 1:
            raise UserError(
                f"{folder / 'annotations'} holds {' and '.join(path.name for path in years)}; say which with "
                f"data.{name}_annotations and data.{name}_images"
            )
        jsons = years or jsons
    called = jsons[0].stem.removeprefix("instances_")
    places = [above / stem for stem in (called, name) for above in (folder, folder / "images")]
    return Part(next((place for place in places if place.is_dir()), folder / name), jsons[0])


def whole_in(folder: Path) -> Part:
    """The only COCO json in a folder, or in its annotations/, and its images. Raises ``UserError`` where there is
    another number of them."""
    jsons = [path for place in (folder, folder / "annotations") for path in sorted(place.glob("*.json"))]
    if len(jsons) != 1:
        found = ", ".join(path.name for path in jsons[:5]) or "none"
        raise UserError(
            f"data.val_share needs one COCO json in {folder} or its annotations/, found {found}; set "
            "data.train_annotations and data.train_images"
        )
    return Part(images_beside(jsons[0], folder), jsons[0])


def images_beside(path: Path, folder: Path) -> Path:
    """The folder of the images of a json in ``folder`` or below it, where it usually is."""
    name = path.stem.removeprefix("instances_")
    usual = (folder / name, folder / "images" / name, path.parent / name, folder / "images", path.parent / "images")
    return next((place for place in usual if place.is_dir()), path.parent)


def chosen_for_val(names: Sequence[str], share: float, seed: int) -> list[bool]:
    """Which images validate: a ``share`` of them, one at least and not all, chosen by their names and ``seed``, so that
    an image keeps its side when others are added or the folder moves."""
    places = [hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogateescape")).digest() for name in names]
    number = min(max(1, round(share * len(names))), max(1, len(names) - 1))
    limit = sorted(places)[number - 1]
    return [place <= limit for place in places]


def read_halves(config: DetectionConfig, halves: Sequence[Half], *, masks: bool) -> list[CocoSet]:
    """The training or the validation set, or both. With ``data.val_share`` they come from the training set, split by
    image."""
    share = config.data.val_share
    if share is None:
        return [read_coco(locate(config.data, half), masks=masks) for half in halves]
    whole = read_coco(locate(config.data, "train"), masks=masks)
    if len(whole.images) < 2:
        raise UserError(f"{whole.path} has {len(whole.images)} images; data.val_share needs two or more")
    chosen = chosen_for_val([image.path.name for image in whole.images], share, config.seed)
    sides = {"train": False, "val": True}
    return [
        replace(whole, images=tuple(i for i, val in zip(whole.images, chosen, strict=True) if val == sides[half]))
        for half in halves
    ]


def read_data(config: DetectionConfig) -> tuple[CocoSet, CocoSet]:
    """The training and the validation set, checked. Raises ``UserError`` for what is wrong with or between them."""
    masks = HEADS[config.model.head].learns_masks
    train, val = read_halves(config, HALVES, masks=masks)
    check_same_categories(train.categories, train.path, val.categories, val.path)
    val.check_scorable()
    if config.data.filter_empty:
        train = with_objects(train)
    check_images(config.data, train, val)
    return train, val


def shared_files(train: CocoSet, val: CocoSet) -> str:
    """A sentence where files are in both halves; empty where none is. ``mae check coco`` compares what is in them."""
    paths = {image.path.resolve() for image in train.images}
    both = [image.path for image in val.images if image.path.resolve() in paths]
    if not both:
        return ""
    return (
        f"{len(both)} of {len(val.images)} validation images are in the training set too, such as {both[0]}; scores on "
        "them do not hold for new images; data.val_share=0.15 splits one json by image"
    )


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
