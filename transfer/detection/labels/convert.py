"""``mae labels convert``: annotations of other tools become the folder that a detector trains on, and what was left out
is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.atomic import atomic_folder, check_new_folder, write_json
from mae_core.config.schema import hint
from mae_core.data.check import shared_images
from mae_core.errors import UserError
from transfer.detection.data_sets import chosen_for_val
from transfer.detection.labels import coco_files, instance_maps, labelme, voc, yolo
from transfer.detection.labels.records import SPLITS, LabelledImage, Labels, coco_of

RECORD = "conversion.json"
VAL_SHARE = 0.15


class Format(NamedTuple):
    """A kind of annotations: whether a path holds it, and what reads it, of a path and the options it takes."""

    finds: Callable[[Path], bool]
    read: Callable[..., Labels]
    options: tuple[str, ...] = ()


FORMATS = {
    "coco": Format(coco_files.finds, coco_files.read, ("images",)),
    "yolo": Format(yolo.finds, yolo.read),
    "voc": Format(voc.finds, voc.read),
    "labelme": Format(labelme.finds, labelme.read),
    "maps": Format(instance_maps.finds, instance_maps.read, ("class_name",)),
}
"""In the order in which they are looked for."""


def read_labels(source: Path, kind: str = "auto", **options: Any) -> Labels:
    """The annotations in ``source``. ``options``: those of the format, ``None`` where not given.

    Raises ``UserError`` where the format is not known or not found, or does not take an option.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; give a folder of annotations, or a json or data.yaml file")
    if kind != "auto" and kind not in FORMATS:
        raise UserError(f"--format {kind} is unknown; {hint(kind, ['auto', *FORMATS])}")
    if kind == "auto":
        kind = next((name for name, row in FORMATS.items() if row.finds(source)), "")
        if not kind:
            raise UserError(
                f"{source} holds no annotations that are known: a COCO json, YOLO's .txt with data.yaml, Pascal VOC's "
                ".xml, labelme's .json, or images/ beside masks/; give the folder that holds them, or --format"
            )
    given = {name: value for name, value in options.items() if value is not None}
    if strange := sorted(given.keys() - set(FORMATS[kind].options)):
        option = {"images": "image-folder", "class_name": "class-name"}[strange[0]]
        raise UserError(f"--{option} is not for {kind}; leave it out")
    return FORMATS[kind].read(source, **given)


def convert(
    source: Path | str,
    out: Path | str,
    *,
    kind: str = "auto",
    val_share: float = VAL_SHARE,
    seed: int = 0,
    image_folder: Path | None = None,
    class_name: str | None = None,
    copy: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Convert annotations to COCO in the new folder ``out``: train/, val/, annotations/instances_{train,val}.json, and
    conversion.json, which says how.

    val_share  of the images for validation where the source has no split, chosen by ``seed`` and file name
    copy       copy the images; else they are hard links where the disk has them, which take no space

    Raises ``UserError`` for what cannot be read, and for a folder that is not empty.
    """
    source, out = Path(source), Path(out)
    check_new_folder(out)
    if not 0 < val_share < 1:
        raise UserError(f"--val-share is {val_share}; give a share of the images between 0 and 1")
    labels = read_labels(source, kind, images=image_folder, class_name=class_name)
    splits, how = with_split(labels.images, val_share, seed)
    for images in splits.values():
        name_apart(images, labels)
    objects = [found for images in splits.values() for image in images for found in image.objects]
    if not objects:
        raise UserError(f"no object of {source} can be used; {'; '.join(labels.described()) or 'the set is empty'}")
    record = {
        "source": str(source),
        "format": labels.format,
        "split": how,
        "classes": labels.classes,
        "left_out": dict(labels.dropped),
        "splits": {split: [image.name for image in images] for split, images in splits.items()},
    }
    with atomic_folder(out) as folder:
        for split, images in splits.items():
            place_files(folder / split, images, copy=copy)
        write_splits(folder, splits, labels.classes, record)
    for line in summary(labels, splits, how):
        say(line)
    for problem in shared_images(*([image.path for image in splits.get(split, ())] for split in ("train", "val"))):
        say(f"note: {problem.sentence}")
    boxes = sum(not found.has_mask for found in objects)
    flag = ""
    if boxes:
        flag = " --boxes-only"
        say(f"{boxes} of {len(objects)} objects have a box and no mask; train with model.head=faster_rcnn")
    say(f"wrote {out}; check it with: mae check coco {out}{flag}")
    return out


def with_split(
    images: Mapping[str, Sequence[LabelledImage]], val_share: float, seed: int
) -> tuple[dict[str, list[LabelledImage]], str]:
    """The images as train, val and, where the source has it, test; and how they were split, for the record."""
    splits = {split: list(images.get(split, ())) for split in SPLITS}
    undecided = list(images.get("", ()))
    how = "as in the source"
    if not splits["val"]:
        pool = [*splits["train"], *undecided]
        if len(pool) < 2:
            raise UserError(f"there are {len(pool)} images to split; training and validation need one each")
        chosen = chosen_for_val([image.name for image in pool], val_share, seed)
        splits["train"] = [image for image, val in zip(pool, chosen, strict=True) if not val]
        splits["val"] = [image for image, val in zip(pool, chosen, strict=True) if val]
        how = f"{val_share:g} of the images for validation, seed {seed}"
    else:
        splits["train"] += undecided
    if not splits["train"]:
        raise UserError("the source has validation images and no training images; give the whole set")
    return {split: found for split, found in splits.items() if found}, how


def name_apart(images: Sequence[LabelledImage], labels: Labels, *, by_stem: bool = False) -> None:
    """Number the images of a split that would have one name; with ``by_stem`` one name without the suffix."""
    taken: set[str] = set()

    def compared(name: str) -> str:
        return name.rpartition(".")[0] or name if by_stem else name

    for image in images:
        name, number = image.name, 1
        while compared(image.name) in taken:
            number += 1
            head, dot, suffix = name.rpartition(".")
            image.name = f"{head}_{number}{dot}{suffix}"
        if number > 1:
            labels.notes.append(f"a second image is called {name}; it is written as {image.name}")
        taken.add(compared(image.name))


def place_files(folder: Path, images: Sequence[LabelledImage], *, copy: bool) -> None:
    """The image files of a split, linked, copied, or written where they were inside of the annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        target = folder / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if image.content is not None:
            target.write_bytes(image.content)
            continue
        try:
            if copy:
                raise OSError
            os.link(image.path.resolve(), target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(image.path, target)


def write_splits(
    folder: Path, splits: Mapping[str, Sequence[LabelledImage]], classes: Sequence[str], record: dict[str, Any]
) -> None:
    """annotations/instances_<split>.json of every split, and the record of how they came about."""
    for split, images in splits.items():
        info: dict[str, Any] = {key: record[key] for key in ("source", "format", "split") if key in record}
        write_json(folder / "annotations" / f"instances_{split}.json", coco_of(images, classes, info))
    write_json(folder / RECORD, record)


def summary(labels: Labels, splits: Mapping[str, Sequence[LabelledImage]], how: str) -> list[str]:
    """What was read, and what was left out."""
    numbers = [
        f"{split} {len(images)} images with {sum(len(image.objects) for image in images)} objects"
        for split, images in splits.items()
    ]
    shown = ", ".join(labels.classes[:10]) + (", ..." if len(labels.classes) > 10 else "")
    plural = "" if len(labels.classes) == 1 else "es"
    return [
        f"{labels.format}: {len(labels.classes)} class{plural}: {shown}",
        f"{'; '.join(numbers)}; split: {how}",
        *labels.described(),
        *(f"note: {note}" for note in labels.notes),
    ]
