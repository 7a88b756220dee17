"""COCO annotations: read, checked, and kept small in memory. As a command, ``mae check coco``:

    python transfer/detection/coco.py DATA/annotations/instances_train.json [DATA/train]

Polygons stay coordinates and masks stay run-length codes until a sample is asked for.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_core.data.check import Problem, Tell, refuse
from mae_core.errors import UserError
from mae_core.texts import find_named, missing_hint
from transfer.detection.annotations import (
    Category,
    Instance,
    NoMask,
    categories_of,
    instance_of,
    read_json,
    typed_image,
)
from transfer.detection.masks import decode_codes, encode_shape, mask_coder


class Part(NamedTuple):
    """One half of a data set: a folder of images and a COCO json."""

    images: Path
    annotations: Path


class CocoImage(NamedTuple):
    """An image of the json and its objects; height and width in pixels."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]


def decode_masks(image: CocoImage, instances: Sequence[Instance]) -> np.ndarray:
    """(n, height, width) bool, one mask per instance, none of which lacks its shape."""
    codes = [encode_shape(i.shape, image.height, image.width) for i in instances if i.shape is not None]
    return decode_codes(codes, image.height, image.width)


@dataclass(frozen=True)
class CocoSet:
    """A checked COCO data set."""

    path: Path
    images: tuple[CocoImage, ...]
    categories: tuple[Category, ...]

    @property
    def names(self) -> list[str]:
        """Class names, in the order of labels 1..K."""
        return [category.name for category in self.categories]

    def check_scorable(self) -> None:
        """Raise ``UserError`` where no detection could be right or wrong: without an object, or with crowds alone."""
        instances = [instance for image in self.images for instance in image.instances]
        if all(instance.crowd for instance in instances):
            found = "marks every object as a crowd" if instances else "has no annotations"
            raise UserError(f"{self.path} {found}; there is nothing to score against")

    def category_id(self, label: int) -> int:
        """The json's id of label 1..K."""
        return self.categories[label - 1].id

    def truth(self) -> dict[str, Any]:
        """The annotations in COCO format, complete, for scoring; areas that the json lacks come from the masks,
        or, of annotations without one, from the boxes.

        Annotations are numbered from 1, whatever the json calls them: pycocotools reads a match with id 0 as none.
        """
        coder = mask_coder()
        annotations: list[dict[str, Any]] = []
        for image in self.images:
            for instance in image.instances:
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image.id,
                    "category_id": self.category_id(instance.label),
                    "bbox": list(instance.box),
                    "area": instance.box[2] * instance.box[3] if instance.area is None else instance.area,
                    "iscrowd": int(instance.crowd),
                }
                if instance.shape is not None:
                    code = encode_shape(instance.shape, image.height, image.width)
                    annotation["segmentation"] = code
                    if instance.area is None:
                        annotation["area"] = float(coder.area(code))
                annotations.append(annotation)
        images = [{"id": i.id, "file_name": i.path.name, "height": i.height, "width": i.width} for i in self.images]
        return {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [category._asdict() for category in self.categories],
        }


def read_coco(part: Part, *, masks: bool = True, tell: Tell = refuse) -> CocoSet:
    """Read and check a COCO json and the folder of its images.

    Without ``masks`` an annotation may lack its segmentation (its shape is None then): boxes are enough. ``tell`` gets
    what is broken, with file and id: an image that is not in the folder, an annotation of an unknown image or category,
    a mask of another size than its image, doubled ids, values of another type than COCO's. Training raises the first; a
    check collects them all, and the set holds the rest.

    Raises ``UserError`` where there is no such file, it is not JSON or not COCO, or there is no folder.
    """
    images_folder, path = part
    content = read_json(path)
    categories = categories_of(path, content["categories"])
    label_of = {category.id: label for label, category in enumerate(categories, start=1)}
    if not images_folder.is_dir():
        raise UserError(
            f"image folder {images_folder} of {path} does not exist; "
            "set data.path, or data.train_images and data.val_images"
        )
    records = _records(path, content["images"], tell)
    _check_files(path, images_folder, records, tell)
    instances: dict[Any, list[Instance]] = {image_id: [] for image_id in records}
    seen: set[Any] = set()
    for number, annotation in enumerate(content["annotations"], start=1):
        try:
            instance = instance_of(path, annotation, number, records, label_of, masks=masks)
        except UserError as error:
            kind = "objects without a mask" if isinstance(error, NoMask) else "broken records"
            record = records.get(identity) if isinstance(identity := annotation.get("image_id"), int | str) else None
            tell(Problem(kind, str(error), str(path if record is None else file_of(images_folder, record))))
            continue
        if instance.id in seen:
            sentence = f"{path}: annotation id {instance.id} appears twice; ids must be unique"
            tell(Problem("doubled ids", sentence, str(path)))
        seen.add(instance.id)
        instances[annotation["image_id"]].append(instance)
    images = tuple(
        CocoImage(i, file_of(images_folder, r), r["height"], r["width"], tuple(instances[i]))
        for i, r in records.items()
    )
    return CocoSet(path, images, categories)


def _records(path: Path, given: Iterable[Mapping[str, Any]], tell: Tell) -> dict[Any, Mapping[str, Any]]:
    """The sound records of images by id."""
    records: dict[Any, Mapping[str, Any]] = {}
    files: dict[str, Any] = {}
    for entry in given:
        try:
            record = typed_image(path, entry)
        except UserError as error:
            tell(Problem("broken records", str(error), str(path)))
            continue
        identity, name = record["id"], record["file_name"]
        if identity in records:
            both = f"{records[identity]['file_name']} and {name}"
            sentence = f"{path}: image id {identity} appears twice, {both}; ids must be unique"
            tell(Problem("doubled ids", sentence, str(path)))
            continue
        if name in files:
            sentence = f"{path}: images {files[name]} and {identity} are both {name}; annotate a file once"
            tell(Problem("doubled objects", sentence, str(path), "wrong"))
        files[name], records[identity] = identity, record
    strings = [identity for identity in records if isinstance(identity, str)]
    if strings and len(strings) < len(records):
        sentence = (
            f"{path}: image id {strings[0]!r} is a string, but others are numbers; give all images ids of one type"
        )
        tell(Problem("broken records", sentence, str(path)))
    return records


def check_same_categories(
    ours: Sequence[Category], our_path: Path, theirs: Sequence[Category], their_path: Path
) -> None:
    """Raise ``UserError``, naming the first difference, unless both files have the same categories."""
    one, other = dict(ours), dict(theirs)
    differing = [i for i in sorted(one.keys() | other.keys()) if one.get(i) != other.get(i)]
    if differing:
        first = differing[0]
        raise UserError(
            f"{their_path} and {our_path} differ in {len(differing)} categories (id {first} is "
            f"{other.get(first, 'absent')!r} in the one, {one.get(first, 'absent')!r} in the other); "
            "give both the same list of categories"
        )


def file_of(folder: Path, record: Mapping[str, Any]) -> Path:
    """The image of a record in ``folder``; where there is none, the path that the record names."""
    return find_named(folder, record["file_name"]) or folder / record["file_name"]


def _check_files(path: Path, folder: Path, records: Mapping[Any, Mapping[str, Any]], tell: Tell) -> None:
    """Tell the records whose file is not in ``folder``."""
    present = {entry.name for entry in folder.iterdir()}
    missing = [r for r in records.values() if r["file_name"] not in present and not file_of(folder, r).is_file()]
    for record in missing:
        file, hint = folder / record["file_name"], missing_hint(folder, record["file_name"])
        sentence = (
            f"{path}: image id {record['id']} is {file}, which does not exist{hint} "
            f"({len(missing)} of {len(records)} images are missing); set the image folder, or correct the json"
        )
        tell(Problem("missing files", sentence, str(file)))


if __name__ == "__main__":
    runpy.run_module("transfer.detection.check_data", run_name="__main__")
