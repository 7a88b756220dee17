"""What every reader of annotations gives: images with their objects, in splits, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_core.data.decoding import UnreadableImage
from transfer.detection.headers import header_of
from transfer.detection.masks import code_of_part, encode_shape, mask_coder

SPLITS = ("train", "val", "test")


class Mask(NamedTuple):
    """A mask (h, w) bool whose first pixel lies at ``corner`` (row, column) of its image."""

    corner: tuple[int, int]
    pixels: np.ndarray


def mask_of(pixels: np.ndarray) -> Mask | None:
    """The mask of (H, W) bool pixels, cut to its bounds; None where none is set."""
    rows, cols = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not len(rows):
        return None
    part = pixels[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    return Mask((int(rows[0]), int(cols[0])), np.ascontiguousarray(part))


def masks_of(values: np.ndarray) -> Iterator[tuple[int, Mask]]:
    """(value, its mask) for each number but 0 in (H, W): one sort of the pixels, however many numbers there are."""
    width, flat = values.shape[1], values.ravel()
    order = np.argsort(flat, kind="stable")
    found, starts = np.unique(flat[order], return_index=True)
    for value, places in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        if value:
            rows, cols = np.divmod(places, width)
            top, left = int(rows.min()), int(cols.min())
            pixels: np.ndarray = np.zeros((int(rows.max()) - top + 1, int(cols.max()) - left + 1), dtype=bool)
            pixels[rows - top, cols - left] = True
            yield value, Mask((top, left), pixels)


@dataclass
class LabelledObject:
    """An object of class ``name``: polygons (each (points, 2) of x, y), a mask, COCO's own segmentation, or a box alone
    (x, y, width, height); a crowd is neither learned nor counted as missed."""

    name: str
    box: tuple[float, float, float, float] | None = None
    polygons: list[np.ndarray] = field(default_factory=list)
    mask: Mask | None = None
    coco: Any = None
    crowd: bool = False

    @property
    def has_mask(self) -> bool:
        """Whether its pixels are known, and not its box alone."""
        return bool(self.polygons) or self.mask is not None or self.coco is not None


@dataclass
class LabelledImage:
    """An image file, its name below a split's folder, its size, and its objects."""

    path: Path
    name: str
    height: int
    width: int
    objects: list[LabelledObject] = field(default_factory=list)
    content: bytes | None = None
    """The file itself, where it lies in the annotations and not beside them."""


@dataclass
class Labels:
    """All that was read: images by split (under "" where the source has none), classes in their order, and what was
    left out: reason -> how often, and an example."""

    format: str
    images: dict[str, list[LabelledImage]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: object) -> None:
        """Remember something that is left out."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, str(where))

    def add_image(self, path: Path, name: str, split: str) -> LabelledImage | None:
        """The image file ``path`` in ``split``, of the size it has; None, and left out, where it cannot be read."""
        try:
            header = header_of(path)
        except UnreadableImage as error:
            self.drop(f"images that cannot be read ({error.unreadable.reason})", path)
            return None
        image = LabelledImage(path, name, header.height, header.width)
        self.images.setdefault(split, []).append(image)
        return image

    def class_named(self, name: str) -> str:
        """The class of that name, appended where it is new."""
        if name not in self.classes:
            self.classes.append(name)
        return name

    def described(self) -> list[str]:
        """A line for each reason."""
        return [
            f"left out: {count} x {reason}, the first in {self.examples[reason]}"
            for reason, count in self.dropped.most_common()
        ]


def add_object(labels: Labels, image: LabelledImage, found: LabelledObject, where: object) -> None:
    """Append an object that has pixels inside of its image; boxes are cut to the image. Others are left out."""
    if found.polygons:
        found.polygons = [np.clip(polygon, 0, [image.width, image.height]) for polygon in found.polygons]
        kept = [polygon for polygon in found.polygons if len(polygon) >= 3 and np.ptp(polygon, axis=0).min() > 0]
        if not kept:
            labels.drop("polygons of fewer than three points, without area or outside the image", where)
            return
        found.polygons = kept
        corners = np.concatenate(kept)
        (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        found.box = (x1, y1, x2 - x1, y2 - y1)
    elif found.mask is not None:
        (top, left), (height, width) = found.mask.corner, found.mask.pixels.shape
        found.box = (float(left), float(top), float(width), float(height))
        found.coco, found.mask = _segmentation(found, image), None  # some hundred bytes, for sets of many large objects
    if found.box is None:
        labels.drop("objects without a box", where)
        return
    x, y, width, height = found.box
    x1, y1 = max(0.0, x), max(0.0, y)
    x2, y2 = min(float(image.width), x + width), min(float(image.height), y + height)
    if x2 - x1 <= 0 or y2 - y1 <= 0:
        labels.drop("boxes without area, or outside the image", where)
        return
    found.box = (x1, y1, x2 - x1, y2 - y1)
    labels.class_named(found.name)
    image.objects.append(found)


def coco_of(images: Sequence[LabelledImage], classes: Sequence[str], info: dict[str, Any]) -> dict[str, Any]:
    """A COCO instances file; ids count from 1."""
    place = {name: number for number, name in enumerate(classes, start=1)}
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        records.append({"id": number, "file_name": image.name, "height": image.height, "width": image.width})
        for found in image.objects:
            assert found.box is not None
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": place[found.name],
                "bbox": [round(value, 3) for value in found.box],
                "area": round(found.box[2] * found.box[3], 3),
                "iscrowd": int(found.crowd),
            }
            if found.has_mask:
                annotation["segmentation"], annotation["area"] = _segmentation(found, image)
            annotations.append(annotation)
    categories = [{"id": number, "name": name} for name, number in place.items()]
    return {"info": info, "images": records, "annotations": annotations, "categories": categories}


def _segmentation(found: LabelledObject, image: LabelledImage) -> tuple[Any, float]:
    """COCO's segmentation of an object, and its area in pixels."""
    size = (image.height, image.width)
    if found.coco is not None:
        return found.coco
    if found.polygons:
        flat: tuple[np.ndarray, ...] = tuple(polygon.astype(np.float64).ravel() for polygon in found.polygons)
        area = float(mask_coder().area(encode_shape(flat, *size)))
        return [[round(value, 3) for value in polygon.tolist()] for polygon in flat], area
    assert found.mask is not None
    code = code_of_part(found.mask.pixels, found.mask.corner, size)
    return {"size": list(size), "counts": code["counts"].decode()}, float(found.mask.pixels.sum())
