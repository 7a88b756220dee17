"""COCO jsons as tools export them: without a split, in folders of other names, with paths of another machine (CVAT,
Label Studio, Roboflow)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from mae_core.data.decoding import UnreadableImage
from mae_core.errors import UserError
from mae_core.texts import find_named
from transfer.detection.annotations import NoMask, categories_of, checked_coco, instance_of, typed_image
from transfer.detection.headers import header_of
from transfer.detection.labels.records import LabelledImage, LabelledObject, Labels, add_object
from transfer.detection.masks import encode_shape, mask_coder

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LISTS = {"images", "annotations", "categories"}


def finds(root: Path) -> bool:
    """Whether a file, or a folder, holds a COCO json of instances."""
    return next(_jsons(root), None) is not None


def _jsons(root: Path) -> Iterator[Path]:
    if root.is_file():
        if root.suffix == ".json" and _is_coco(root):
            yield root
        return
    for pattern in ("*.json", "annotations/*.json", "*/*.json"):
        found = False
        for path in sorted(root.glob(pattern)):
            if _is_coco(path):
                found = True
                yield path
        if found:
            return


def _is_coco(path: Path) -> bool:
    content = _content(path)
    return isinstance(content, dict) and LISTS <= content.keys()


@lru_cache(maxsize=4)
def _content(path: Path) -> Any:
    """What a json holds, None where it is none. Kept until it has been read: a folder is asked what it is first, and
    large jsons take seconds to parse."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def read(root: Path, images: Path | None = None) -> Labels:
    """One json, or all of a folder; ``images``: their folder, found from the file names where None.

    A json whose name, or folder, says train, val or test is that split. Raises ``UserError`` where no image is found.
    """
    labels = Labels("COCO")
    jsons = list(_jsons(root))
    if not jsons:
        raise UserError(f"{root} holds no COCO json with images, annotations and categories; give the file itself")
    try:
        for path in jsons:
            split = _split_of(path) if len(jsons) > 1 else ""
            _read(path, root if root.is_dir() else root.parent, images, split, labels)
    finally:
        _content.cache_clear()
    if not any(labels.images.values()):
        first = labels.examples.get("images that are not there", jsons[0])
        raise UserError(f"no image of {jsons[0]} was found, such as {first}; give their folder with --image-folder")
    return labels


def _split_of(path: Path) -> str:
    words = path.stem.lower().replace("-", "_").split("_") + [path.parent.name.lower()]
    for word in words:
        stem = word.rstrip("0123456789")
        if stem in SPLITS:
            return SPLITS[stem]
    return ""


def _read(path: Path, root: Path, images: Path | None, split: str, labels: Labels) -> None:
    content = checked_coco(path, _content(path))
    categories = categories_of(path, content["categories"])
    label_of = {category.id: number for number, category in enumerate(categories, start=1)}
    for category in categories:
        labels.class_named(category.name)
    found: dict[Any, LabelledImage] = {}
    records: dict[Any, Any] = {}
    for given in content["images"]:
        try:
            record = _completed(path, root, images, given)
        except UserError as error:
            labels.drop("records of images that are broken", error)
            continue
        except UnreadableImage as error:
            labels.drop(f"images that cannot be read ({error.unreadable.reason})", error.unreadable.path)
            continue
        found_as = _file_of(path, root, images, record["file_name"])
        if found_as is None:
            labels.drop("images that are not there", record["file_name"])
            continue
        records[record["id"]] = record
        image = LabelledImage(*found_as, record["height"], record["width"])
        found[record["id"]] = image
        labels.images.setdefault(split, []).append(image)
    known = {record.get("id") for record in content["images"] if isinstance(record, dict)}
    for number, annotation in enumerate(content["annotations"], start=1):
        where = f"{path}, annotation {annotation.get('id', number)}"
        identity = annotation.get("image_id")
        if isinstance(identity, int | float | str) and identity in known and identity not in found:
            labels.drop("objects of images that are left out", where)
            continue
        if not annotation.get("bbox") and annotation.get("segmentation"):
            annotation = {**annotation, "bbox": [0, 0, 0, 0]}
        try:
            instance = instance_of(path, annotation, number, records, label_of, masks=False)
        except NoMask as error:
            labels.drop("objects without a mask", error)
            continue
        except UserError as error:
            labels.drop("annotations that are broken", error)
            continue
        name = categories[instance.label - 1].name
        one = LabelledObject(name, tuple(float(v) for v in instance.box), crowd=instance.crowd)  # type: ignore[arg-type]
        if instance.shape is not None:
            one.coco = _shape(instance.shape, found[identity], one)
        add_object(labels, found[identity], one, where)


def _shape(shape: Any, image: LabelledImage, found: LabelledObject) -> tuple[Any, float]:
    """COCO's segmentation and area; a box that the json lacks comes from it."""
    coder, code = mask_coder(), encode_shape(shape, image.height, image.width)
    if found.box is not None and found.box[2] * found.box[3] == 0:
        found.box = tuple(float(value) for value in coder.toBbox(code))  # type: ignore[assignment]
    if isinstance(shape, tuple):
        return [polygon.tolist() for polygon in shape], float(coder.area(code))
    return {"size": [image.height, image.width], "counts": shape.decode()}, float(coder.area(code))


def _completed(path: Path, root: Path, images: Path | None, given: Any) -> dict[str, Any]:
    """The record of an image; sides that the json lacks come from its file."""
    if isinstance(given, dict) and given.get("file_name") and not (given.get("height") and given.get("width")):
        found = _file_of(path, root, images, str(given["file_name"]))
        if found is not None:
            header = header_of(found[0])
            given = {**given, "height": header.height, "width": header.width}
    return typed_image(path, given)


def _short(name: str) -> str:
    """A file name below its folder of images: without the folders that exports put before it."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    while len(parts) > 1 and (parts[0].lower() in ("images", "data", "img") or parts[0].endswith(":")):
        parts = parts[1:]
    return "/".join(parts)


def _file_of(path: Path, root: Path, images: Path | None, name: str) -> tuple[Path, str] | None:
    """The file of a record and its name below the images: in the usual folders by its path, then by its name alone."""
    name, split = name.replace("\\", "/"), path.stem.removeprefix("instances_")
    above = path.parent.parent
    places = [images] if images is not None else []
    places += [path.parent, root, above, *(folder / "images" for folder in (path.parent, root, above))]
    places += [above / split, root / split, above / "images" / split]
    for wanted in (name, _short(name), name.rpartition("/")[2]):
        if Path(wanted).is_absolute():
            if Path(wanted).is_file():
                return Path(wanted), Path(wanted).name
            continue
        for folder in places:
            found = find_named(folder, wanted) if folder.is_dir() else None
            if found is not None and found.is_file():
                return found, _short(wanted)
    return None
