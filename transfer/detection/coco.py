"""COCO annotations: read, checked, and kept small in memory.

Polygons stay coordinates and masks stay run-length codes until a sample is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mae_core.errors import UserError
from transfer.engines import ENGINES, installed

LARGEST = 2**31
"""Sides, coordinates and runs stay below this."""
MOST_GROUPS = 7
"""Characters of a number in a compressed code; 7 hold 34 bits and a sign."""


class Part(NamedTuple):
    """One half of a data set: a folder of images and a COCO json."""

    images: Path
    annotations: Path


class Category(NamedTuple):
    """A class; ``id`` is the json's, any whole number."""

    id: int
    name: str


class Instance(NamedTuple):
    """One annotated object.

    label  1..K, the position of its category among the sorted category ids
    box    (x, y, width, height) in pixels, as the json says
    shape  polygons, each (2 * points,) of x, y; or a compressed run-length code
    """

    id: int
    label: int
    box: tuple[float, float, float, float]
    shape: tuple[np.ndarray, ...] | bytes
    area: float | None
    crowd: bool


class CocoImage(NamedTuple):
    """An image of the json and its objects; height and width in pixels."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]


def mask_coder() -> ModuleType:
    """``pycocotools.mask``. Raises ``UserError`` with the line that installs it where it is missing."""
    if not installed("pycocotools"):
        raise UserError(f"COCO masks and scores need pycocotools, not installed here; {ENGINES['torchvision'].install}")
    from pycocotools import mask

    return mask


def encode_shape(shape: tuple[np.ndarray, ...] | bytes, height: int, width: int) -> dict[str, Any]:
    """Polygons or a code -> pycocotools' run-length code {"size": [height, width], "counts": bytes}."""
    if isinstance(shape, bytes):
        return {"size": [height, width], "counts": shape}
    coder = mask_coder()
    return coder.merge(coder.frPyObjects([polygon.tolist() for polygon in shape], height, width))


def decode_masks(image: CocoImage, instances: Sequence[Instance]) -> np.ndarray:
    """(n, height, width) bool, one mask per instance."""
    codes = [encode_shape(instance.shape, image.height, image.width) for instance in instances]
    return decode_codes(codes, image.height, image.width)


def decode_codes(codes: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """n run-length codes of pycocotools -> (n, height, width) bool."""
    if not codes:
        return np.zeros((0, height, width), dtype=bool)
    return mask_coder().decode(codes).astype(bool).transpose(2, 0, 1)


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """(n, height, width) bool -> n run-length codes of pycocotools."""
    return mask_coder().encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))


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

    def category_id(self, label: int) -> int:
        """The json's id of label 1..K."""
        return self.categories[label - 1].id

    def truth(self) -> dict[str, Any]:
        """The annotations in COCO format, complete, for scoring; areas that the json lacks come from the masks.

        Annotations are numbered from 1, whatever the json calls them: pycocotools reads a match with id 0 as none.
        """
        coder = mask_coder()
        annotations: list[dict[str, Any]] = []
        for image in self.images:
            for instance in image.instances:
                code = encode_shape(instance.shape, image.height, image.width)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image.id,
                        "category_id": self.category_id(instance.label),
                        "bbox": list(instance.box),
                        "segmentation": code,
                        "area": float(coder.area(code)) if instance.area is None else instance.area,
                        "iscrowd": int(instance.crowd),
                    }
                )
        images = [{"id": i.id, "file_name": i.path.name, "height": i.height, "width": i.width} for i in self.images]
        return {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [category._asdict() for category in self.categories],
        }


def read_coco(part: Part) -> CocoSet:
    """Read and check a COCO json and the folder of its images.

    Raises ``UserError`` naming file, id and remedy: no such file, not JSON, not COCO, an image that is not in the
    folder, an annotation of an unknown image or category, a mask of another size than its image, doubled ids, values
    of another type than COCO's.
    """
    images_folder, path = part
    content = _read_json(path)
    categories = _categories(path, content["categories"])
    label_of = {category.id: label for label, category in enumerate(categories, start=1)}
    if not images_folder.is_dir():
        raise UserError(
            f"image folder {images_folder} of {path} does not exist; "
            "set data.path, or data.train_images and data.val_images"
        )
    records: dict[int, Mapping[str, Any]] = {}
    for record in content["images"]:
        missing = [key for key in ("id", "file_name", "height", "width") if key not in record]
        if missing:
            identity = record.get("id", record.get("file_name"))
            raise UserError(f"{path}: image {identity} has no {', '.join(missing)}; COCO images need them")
        _check_id(path, "image", record["id"])
        if record["id"] in records:
            raise UserError(f"{path}: image id {record['id']} appears twice; ids must be unique")
        records[record["id"]] = _typed_image(path, record)
    strings = [image_id for image_id in records if isinstance(image_id, str)]
    if strings and len(strings) < len(records):
        raise UserError(
            f"{path}: image id {strings[0]!r} is a string, but others are numbers; give all images ids of one type"
        )
    _check_files(path, images_folder, records)
    instances: dict[int, list[Instance]] = {image_id: [] for image_id in records}
    seen: set[int] = set()
    for number, annotation in enumerate(content["annotations"], start=1):
        instance = _instance(path, annotation, number, records, label_of)
        if instance.id in seen:
            raise UserError(f"{path}: annotation id {instance.id} appears twice; ids must be unique")
        seen.add(instance.id)
        instances[annotation["image_id"]].append(instance)
    images = tuple(
        CocoImage(i, images_folder / r["file_name"], r["height"], r["width"], tuple(instances[i]))
        for i, r in records.items()
    )
    return CocoSet(path, images, categories)


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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"annotation file {path} does not exist; set data.path, or data.train_annotations and data.val_annotations"
        )
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); give a COCO instances file") from None
    wanted = ("images", "annotations", "categories")
    missing = [key for key in wanted if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if missing:
        lacks = ", ".join(missing)
        raise UserError(f"{path} is JSON but not COCO, it has no list of {lacks}; give a COCO instances file")
    for key in ("images", "annotations", "categories"):
        odd = next((entry for entry in content[key] if not isinstance(entry, dict)), None)
        if odd is not None:
            raise UserError(f"{path} is not COCO, {key} holds {odd!r} in place of a record; give a COCO instances file")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{path} has an empty list of {key}; there is nothing to learn from")
    return content


def _categories(path: Path, entries: list[dict[str, Any]]) -> tuple[Category, ...]:
    try:
        categories = sorted(Category(int(entry["id"]), str(entry["name"])) for entry in entries)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path}: a category without a whole-number id and a name; COCO categories need both") from None
    ids = [category.id for category in categories]
    for one, other in pairwise(ids):
        if one == other:
            raise UserError(f"{path}: category id {one} appears twice; ids must be unique")
    return tuple(categories)


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number of a size that occurs in images."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def _check_id(path: Path, kind: str, identity: Any) -> None:
    if not isinstance(identity, int | float | str):
        raise UserError(f"{path}: {kind} id {identity!r} is no number; give every {kind} a whole number of its own")


def _typed_image(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its sides as whole numbers."""
    where, sides = f"{path}: image {record['id']}", {}
    if not isinstance(record["file_name"], str):
        raise UserError(f"{where} has file_name {record['file_name']!r}; it must be a string, the name of a file")
    for name in ("height", "width"):
        try:
            sides[name] = int(record[name])
        except (TypeError, ValueError, OverflowError):
            sides[name] = 0
        if not 0 < sides[name] < LARGEST:
            raise UserError(f"{where} has {name} {record[name]!r}; it must be a number of pixels, 1 or more")
    return {**record, **sides}


def _check_files(path: Path, folder: Path, records: Mapping[int, Mapping[str, Any]]) -> None:
    present = {entry.name for entry in folder.iterdir()}
    missing = [
        record
        for record in records.values()
        if record["file_name"] not in present and not (folder / record["file_name"]).is_file()
    ]
    if missing:
        first = missing[0]
        raise UserError(
            f"{path}: image id {first['id']} is {folder / first['file_name']}, which does not exist "
            f"({len(missing)} of {len(records)} images are missing); set the image folder, or mend the json"
        )


def _instance(
    path: Path, annotation: Mapping[str, Any], number: int, records: Mapping[int, Any], label_of: Mapping[int, int]
) -> Instance:
    identity = annotation.get("id", number)
    _check_id(path, "annotation", identity)
    where = f"{path}: annotation {identity}"
    missing = [key for key in ("image_id", "category_id", "bbox") if key not in annotation]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}; COCO annotations need them")
    if isinstance(annotation["category_id"], list | dict) or annotation["category_id"] not in label_of:
        known = ", ".join(str(i) for i in list(label_of)[:10]) + (", ..." if len(label_of) > 10 else "")
        raise UserError(
            f"{where} has category_id {annotation['category_id']!r}, which is not among the categories ({known}); "
            "add the category, or mend the annotation"
        )
    if isinstance(annotation["image_id"], list | dict) or annotation["image_id"] not in records:
        raise UserError(
            f"{where} has image_id {annotation['image_id']!r}, which is not among the images; mend or remove it"
        )
    record = records[annotation["image_id"]]
    box = annotation["bbox"]
    numbers = isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)
    if not numbers or min(box[2:]) < 0:
        raise UserError(f"{where} has bbox {box!r}; COCO boxes are [x, y, width, height]")
    shape = _shape(where, annotation.get("segmentation"), record["height"], record["width"])
    area, crowd = annotation.get("area"), annotation.get("iscrowd", 0)
    if area is not None and not _is_number(area):
        raise UserError(f"{where} has area {area!r}; it must be a number of pixels, or absent")
    if crowd not in (0, 1, None):
        raise UserError(f"{where} has iscrowd {crowd!r}; it must be 0 or 1")
    return Instance(identity, label_of[annotation["category_id"]], tuple(box), shape, area, bool(crowd))


def _shape(where: str, segmentation: Any, height: int, width: int) -> tuple[np.ndarray, ...] | bytes:
    if not segmentation:
        raise UserError(f"{where} has no segmentation, which Mask R-CNN learns from; add polygons or a run-length mask")
    if isinstance(segmentation, list):
        if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
            raise UserError(f"{where} has a polygon that is not a list of three or more x, y pairs; mend or remove it")
        odd = [value for polygon in segmentation for value in polygon if not _is_number(value)]
        if odd:
            raise UserError(f"{where} has a polygon with {odd[0]!r} in place of a number; mend or remove it")
        return tuple(np.asarray(polygon, dtype=np.float64) for polygon in segmentation)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise UserError(f"{where} has a segmentation that is neither polygons nor a run-length code; mend or remove it")
    if segmentation["size"] != [height, width]:
        raise UserError(
            f"{where} has a mask of {segmentation['size']} (height, width), but its image has [{height}, {width}]; "
            "mend one of them"
        )
    counts = segmentation["counts"]
    total: int | None = None
    if isinstance(counts, list) and all(_is_number(run) and run >= 0 for run in counts):
        total = sum(counts)
    elif isinstance(counts, str):
        total = _pixels_of(counts)
    if total is None:
        raise UserError(f"{where} has run-length counts that are broken or cut off; mend or remove the mask")
    if total != height * width:
        raise UserError(f"{where} has runs of {total} pixels in all, but its image has {height * width}; mend the mask")
    if isinstance(counts, list):
        counts = mask_coder().frPyObjects(segmentation, height, width)["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def _pixels_of(counts: str) -> int | None:
    """How many pixels the runs of a compressed code cover; None where it is no code.

    pycocotools checks little of this itself and would read beyond a code that is cut. A number is groups of 5 bits,
    lowest first, each a character from "0" on; 32 says that more follow, 16 in the last is the sign. From the fourth
    on, numbers are differences to the last but one.
    """
    codes = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - ord("0")
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MOST_GROUPS:
        return None
    place = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << place, starts)
    runs = np.where(codes[ends] & 16, runs - (1 << 5 * lengths), runs)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return int(runs.sum()) if runs.min() >= 0 else None
