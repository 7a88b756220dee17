"""labelme: a json for each image with polygons, rectangles, circles and masks; shapes of one group are one object."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_core.data.decoding import UnreadableImage, decode_bytes, size_of
from mae_core.errors import UserError
from mae_core.texts import find_named
from transfer.detection.headers import header_of
from transfer.detection.labels.records import LabelledImage, LabelledObject, Labels, add_object, mask_of

CIRCLE_POINTS = 64


def finds(root: Path) -> bool:
    """Whether a folder holds labelme's files."""
    return root.is_dir() and any(_content(path) is not None for path in _jsons(root)[:20])


def _jsons(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.json") if not path.name.startswith("."))


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError):
        return None
    return content if isinstance(content, dict) and "shapes" in content and "imagePath" in content else None


def read(root: Path) -> Labels:
    """A folder of labelme's files, anywhere below it. Raises ``UserError`` where none has an image."""
    labels = Labels("labelme")
    for path in _jsons(root):
        content = _content(path)
        if content is None:
            labels.drop("json files that are not labelme's", path)
            continue
        image = _image(root, path, content, labels)
        if image is None:
            continue
        labels.images.setdefault("", []).append(image)
        groups: dict[tuple[str, Any], LabelledObject] = {}
        for number, shape in enumerate(content["shapes"], start=1):
            where = f"{path}, shape {number}"
            found = _object(shape, labels, where)
            if found is None:
                continue
            key = (found.name, shape.get("group_id"))
            if shape.get("group_id") is not None and found.polygons and key in groups:
                groups[key].polygons += found.polygons
                continue
            groups[key if shape.get("group_id") is not None else (found.name, where)] = found
        for (_, where), found in groups.items():
            add_object(labels, image, found, where if isinstance(where, str) else path)
    if not any(labels.images.values()):
        raise UserError(f"no labelme file below {root} has its image; put the images beside their json files")
    return labels


def _image(root: Path, path: Path, content: dict[str, Any], labels: Labels) -> LabelledImage | None:
    """The image beside a file, or the one inside of it."""
    name = str(content["imagePath"]).replace("\\", "/")
    places = [(path.parent, name), (path.parent, name.rpartition("/")[2]), (root, name.rpartition("/")[2])]
    file = next((f for folder, n in places if (f := find_named(folder, n)) is not None and f.is_file()), None)
    below = path.parent.relative_to(root).as_posix()
    prefix = "" if below == "." else f"{below}/"
    try:
        if file is not None:
            header = header_of(file)
            return LabelledImage(file, f"{prefix}{file.name}", header.height, header.width)
        if content.get("imageData"):
            inside = base64.b64decode(content["imageData"])
            height, width = size_of(decode_bytes(inside, str(path), None))
            with Image.open(io.BytesIO(inside)) as picture:
                suffix = {"JPEG": ".jpg"}.get(picture.format or "", f".{(picture.format or 'png').lower()}")
            return LabelledImage(path, f"{prefix}{path.stem}{suffix}", height, width, content=inside)
    except (UnreadableImage, ValueError, OSError) as error:
        reason = error.unreadable.reason if isinstance(error, UnreadableImage) else str(error)
        labels.drop(f"images that cannot be read ({reason})", path)
        return None
    labels.drop("files whose image is neither beside them nor inside", path)
    return None


def _object(shape: dict[str, Any], labels: Labels, where: str) -> LabelledObject | None:
    name, kind = str(shape.get("label", "")), shape.get("shape_type", "polygon")
    try:
        points = np.array(shape.get("points"), dtype=float).reshape(-1, 2)
    except (TypeError, ValueError):
        points = np.zeros((0, 2))
    if not name or not len(points):
        labels.drop("shapes without a label or points", where)
    elif kind == "polygon":
        return LabelledObject(name, polygons=[points])
    elif kind == "rectangle" or kind == "rotation":
        if len(points) == 2:
            (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
            points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        return LabelledObject(name, polygons=[points])
    elif kind == "circle" and len(points) == 2:
        radius = float(np.linalg.norm(points[1] - points[0]))
        turns = np.linspace(0, 2 * np.pi, CIRCLE_POINTS, endpoint=False)
        return LabelledObject(name, polygons=[points[0] + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)])
    elif kind == "mask" and shape.get("mask"):
        return _masked(name, points, shape["mask"], labels, where)
    else:
        labels.drop(f"shapes of the kind {kind}, which has no area", where)
    return None


def _masked(name: str, points: np.ndarray, encoded: str, labels: Labels, where: str) -> LabelledObject | None:
    """A mask that is kept as a PNG of its bounds."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            pixels = np.asarray(picture.convert("L")) > 0
    except (ValueError, OSError):
        labels.drop("masks that cannot be read", where)
        return None
    mask = mask_of(pixels)
    if mask is None:
        labels.drop("masks without a pixel", where)
        return None
    left, top = (int(value) for value in points.min(axis=0).round())
    return LabelledObject(name, mask=mask._replace(corner=(top + mask.corner[0], left + mask.corner[1])))
