"""The records of a COCO json, one by one: of the right types, complete, and consistent with each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_core.errors import UserError
from mae_core.texts import decode_text, shortened
from transfer.detection.masks import Shape, mask_coder, pixels_of

LARGEST = 2**31
"""Sides, coordinates and runs stay below this."""
LONGEST_NAME = 255
"""Bytes in the name of a file, on every usual file system."""


class NoMask(UserError):
    """An annotation without a segmentation, where one is needed."""


class Category(NamedTuple):
    """A class; ``id`` is the json's, any whole number."""

    id: int
    name: str


class Instance(NamedTuple):
    """One annotated object.

    label  1..K, the position of its category among the sorted category ids
    box    (x, y, width, height) in pixels, as the json says
    shape  polygons, each (2 * points,) of x, y; or a compressed run-length code; None where there is no mask
    """

    id: int
    label: int
    box: tuple[float, float, float, float]
    shape: Shape | None
    area: float | None
    crowd: bool


def read_json(path: Path) -> dict[str, Any]:
    """The content of a COCO instances file, with its three lists of records. Raises ``UserError`` for another file."""
    if not path.is_file():
        raise UserError(
            f"annotation file {path} does not exist; give a COCO json, which a training finds by data.path, or by "
            "data.train_annotations and data.val_annotations"
        )
    raw = path.read_bytes()
    try:
        content = json.loads(raw)  # of bytes: it knows UTF-8, UTF-16 and byte order marks
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError) and raw.lstrip().startswith((b"{", b"[")):
            decode_text(raw, path)  # raises, with the encoding
        raise UserError(f"{path} is not JSON ({error}); give a COCO instances file") from None
    return checked_coco(path, content)


def checked_coco(path: Path, content: Any) -> dict[str, Any]:
    """The content of a json, which is a COCO instances file's. Raises ``UserError`` for that of another file."""
    wanted = ("images", "annotations", "categories")
    missing = [key for key in wanted if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if missing:
        lacks = ", ".join(missing)
        raise UserError(f"{path} is JSON but not COCO: it has no list of {lacks}; give a COCO instances file")
    for key in ("images", "annotations", "categories"):
        odd = next((entry for entry in content[key] if not isinstance(entry, dict)), None)
        if odd is not None:
            raise UserError(f"{path} is not COCO, {key} holds {odd!r} in place of a record; give a COCO instances file")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{path} has an empty list of {key}; there is nothing to learn from")
    return content


def categories_of(path: Path, entries: list[dict[str, Any]]) -> tuple[Category, ...]:
    """The categories by ascending id. Raises ``UserError`` for a missing id or name, and for duplicate ids."""
    try:
        categories = sorted(Category(_whole(as_whole_number(entry["id"])), _name(entry["name"])) for entry in entries)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path}: a category without a whole-number id and a name; COCO categories need both") from None
    ids = [category.id for category in categories]
    for one, other in pairwise(ids):
        if one == other:
            raise UserError(f"{path}: category id {one} appears twice; ids must be unique")
    return tuple(categories)


def as_whole_number(value: Any) -> Any:
    """A category id written as a string, such as "1", as the number it is; anything else as it is."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _whole(value: Any) -> int:
    """``value`` as a whole number, which 3.0 and "3" are. Raises ``ValueError`` for 3.5 and for true."""
    number = int(value)
    if isinstance(value, bool) or (isinstance(value, float) and number != value):
        raise ValueError(value)
    return number


def _name(value: Any) -> str:
    """The name of a category. Raises ``ValueError`` for an empty one and for null."""
    if value is None or not str(value).strip():
        raise ValueError(value)
    return str(value)


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number of a size that occurs in images."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_file_name(given: Any) -> bool:
    """Whether a file can have this name, which may begin with folders."""
    name = Path(given).name if isinstance(given, str) and "\0" not in given else ""
    return 0 < len(name.encode(errors="surrogateescape")) <= LONGEST_NAME


def _check_id(path: Path, kind: str, identity: Any) -> None:
    if not isinstance(identity, int | float | str) or isinstance(identity, bool):
        raise UserError(f"{path}: {kind} id {identity!r} is not a number; give every {kind} a unique whole number")


def typed_image(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an image with its sides as whole numbers. Raises ``UserError`` for what is missing or no number."""
    missing = [key for key in ("id", "file_name", "height", "width") if key not in record]
    if missing:
        identity = record.get("id", record.get("file_name"))
        raise UserError(f"{path}: image {identity} has no {', '.join(missing)}; COCO images need them")
    _check_id(path, "image", record["id"])
    where, sides = f"{path}: image {record['id']}", {}
    if not _is_file_name(record["file_name"]):
        given = repr(record["file_name"])
        given = given if len(given) <= LONGEST_NAME else f"{given[:40]}..., {len(given)} characters"
        raise UserError(f"{where} has file_name {given}; it must be a string, the name of a file")
    for name in ("height", "width"):
        try:
            sides[name] = _whole(record[name])
        except (TypeError, ValueError, OverflowError):
            sides[name] = 0
        if not 0 < sides[name] < LARGEST:
            raise UserError(f"{where} has {name} {record[name]!r}; it must be a number of pixels, 1 or more")
    return {**record, **sides}


def instance_of(
    path: Path,
    annotation: Mapping[str, Any],
    number: int,
    records: Mapping[int, Any],
    label_of: Mapping[int, int],
    *,
    masks: bool = True,
) -> Instance:
    """The ``number``-th annotation, of an image in ``records`` and a category in ``label_of``; without ``masks`` it may
    lack its segmentation.

    Raises ``UserError``, naming its id, for what is missing, of another type, or does not fit its image.
    """
    identity = annotation.get("id", number)
    _check_id(path, "annotation", identity)
    where = f"{path}: annotation {identity}"
    missing = [key for key in ("image_id", "category_id", "bbox") if key not in annotation]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}; COCO annotations need them")
    category = as_whole_number(annotation["category_id"])
    if isinstance(category, list | dict) or category not in label_of:
        raise UserError(
            f"{where} has category_id {annotation['category_id']!r}, which is not among the categories "
            f"({shortened(list(label_of), 10)}); add the category, or correct the annotation"
        )
    if isinstance(annotation["image_id"], list | dict) or annotation["image_id"] not in records:
        raise UserError(
            f"{where} has image_id {annotation['image_id']!r}, which is not among the images "
            f"({shortened(list(map(repr, records)), 3)}); correct or remove it"
        )
    record = records[annotation["image_id"]]
    box = annotation["bbox"]
    numbers = isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)
    if not numbers or min(box[2:]) < 0:
        raise UserError(f"{where} has bbox {box!r}; COCO boxes are [x, y, width, height]")
    segmentation = annotation.get("segmentation")
    shape = _shape(where, segmentation, record["height"], record["width"]) if masks or segmentation else None
    area, crowd = annotation.get("area"), annotation.get("iscrowd", 0)
    if area is not None and not (_is_number(area) and area >= 0):
        raise UserError(f"{where} has area {area!r}; it must be a number of pixels, or absent")
    if crowd not in (0, 1, None):
        raise UserError(f"{where} has iscrowd {crowd!r}; it must be 0 or 1")
    return Instance(identity, label_of[category], tuple(box), shape, area, bool(crowd))


def _flat_polygons(segmentation: list[Any]) -> list[Any]:
    """Polygons as COCO has them, [x, y, x, y, ...] each. Other tools write points as pairs, [[x, y], ...] or
    [[[x, y], ...], ...], or one polygon without the list around it."""
    if all(_is_number(value) for value in segmentation) or all(_is_pair(entry) for entry in segmentation):
        segmentation = [segmentation]
    return [
        [value for pair in polygon for value in pair]
        if isinstance(polygon, list) and polygon and all(_is_pair(entry) for entry in polygon)
        else polygon
        for polygon in segmentation
    ]


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(_is_number(value) for value in entry)


def _shape(where: str, segmentation: Any, height: int, width: int) -> tuple[np.ndarray, ...] | bytes:
    if not segmentation:
        raise NoMask(
            f"{where} has no segmentation, which Mask R-CNN learns from; add polygons or a run-length "
            "mask, or train on boxes alone with model.head=faster_rcnn"
        )
    if isinstance(segmentation, list):
        segmentation = _flat_polygons(segmentation)
        if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
            raise UserError(f"{where} has a polygon that is not a list of three or more x, y pairs; correct it")
        odd = [value for polygon in segmentation for value in polygon if not _is_number(value)]
        if odd:
            raise UserError(f"{where} has a polygon with {odd[0]!r} in place of a number; correct or remove it")
        return tuple(np.asarray(polygon, dtype=np.float64) for polygon in segmentation)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise UserError(f"{where} has a segmentation that is neither polygons nor a run-length code; correct it")
    if segmentation["size"] != [height, width]:
        raise UserError(
            f"{where} has a mask of {segmentation['size']} (height, width), but its image has [{height}, {width}]; "
            "correct one of them"
        )
    counts = segmentation["counts"]
    total: int | None = None
    if isinstance(counts, list) and all(_is_number(run) and run >= 0 and run == int(run) for run in counts):
        total = sum(counts)
    elif isinstance(counts, str):
        total = pixels_of(counts)
    if total is None:
        raise UserError(f"{where} has run-length counts that are broken or cut off; correct or remove the mask")
    if total != height * width:
        raise UserError(f"{where} has runs of {total} pixels in all, but its image has {height * width}; correct it")
    if isinstance(counts, list):
        counts = mask_coder().frPyObjects(segmentation, height, width)["counts"]
    return counts.encode() if isinstance(counts, str) else counts
