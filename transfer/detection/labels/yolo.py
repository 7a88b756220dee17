"""YOLO: a text file beside each image, in shares of its sides: boxes, or polygons; classes in data.yaml or a list.

A row is ``class x y width height`` (the centre of the box), or ``class x1 y1 x2 y2 x3 y3 ...``, a polygon; a sixth
number after a box is the score of a prediction and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mae_core.data.images import files_below
from mae_core.errors import UserError
from mae_core.texts import read_lines, read_text
from transfer.detection.labels.records import LabelledImage, LabelledObject, Labels, add_object

NAME_FILES = ("classes.txt", "obj.names", "names.txt")
SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def finds(root: Path) -> bool:
    """Whether a folder, or a data.yaml, is a YOLO set."""
    if root.is_file():
        return root.suffix in (".yaml", ".yml")
    if _yaml_in(root) is not None:
        return True
    texts = [path for path in root.rglob("*.txt") if path.name not in NAME_FILES]
    return any(_looks_like_labels(path) for path in texts[:20])


def _yaml_in(root: Path) -> Path | None:
    candidates = [path for suffix in ("*.yaml", "*.yml") for path in sorted(root.glob(suffix))]
    return next((path for path in candidates if "names" in (_content(path) or {})), None)


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None


def _looks_like_labels(path: Path) -> bool:
    try:
        rows = [line.split() for line in read_lines(path) if line.strip()]
        return bool(rows) and all(len(row) >= 5 and row[0].isdigit() and [float(x) for x in row] for row in rows[:5])
    except (ValueError, UserError):
        return False


def read(root: Path) -> Labels:
    """A data.yaml, a folder with one, or a folder with images, their .txt and a list of classes.

    Raises ``UserError`` where classes are not named, or no image is found.
    """
    labels = Labels("YOLO")
    description = root if root.is_file() else _yaml_in(root)
    folder = root.parent if root.is_file() else root
    if description is not None:
        content = _content(description) or {}
        names = _names(content.get("names"), description)
        base = folder
        if content.get("path"):
            stated = Path(str(content["path"]))
            base = next((p for p in (stated, folder / stated) if p.is_dir()), folder)
        for key, split in SPLIT_KEYS.items():
            for place in _as_list(content.get(key)):
                for path in _images_of(base, folder, str(place), description):
                    _read_image(path, _name(path, base), split, names, labels)
    else:
        names = _listed_names(folder)
        for path in sorted(files_below(folder)):
            parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
            split = next((SPLIT_KEYS[part] for part in parts if part in SPLIT_KEYS), "")
            _read_image(path, _name(path, folder), split, names, labels)
    labels.classes = list(names.values())
    if not any(labels.images.values()):
        raise UserError(f"{root} has no images of a YOLO set; give the folder with data.yaml, or images/ and labels/")
    return labels


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _names(given: Any, path: Path) -> dict[int, str]:
    if isinstance(given, dict):
        return {int(number): str(name) for number, name in sorted(given.items(), key=lambda pair: int(pair[0]))}
    if isinstance(given, list):
        return {number: str(name) for number, name in enumerate(given)}
    raise UserError(f"{path} has no list of class names; write names: [first, second, ...] into it")


def _listed_names(folder: Path) -> dict[int, str]:
    places = [path for name in NAME_FILES for path in (folder / name, folder / "labels" / name)]
    file = next((path for path in places if path.is_file()), None)
    if file is None:
        raise UserError(
            f"{folder} names no classes; write them into {folder / 'classes.txt'}, one a line, class 0 first"
        )
    return {number: line.strip() for number, line in enumerate(read_lines(file)) if line.strip()}


def _images_of(base: Path, folder: Path, place: str, description: Path) -> list[Path]:
    """The images that an entry of data.yaml means: a folder, a list of files, or the ``../train/images`` that Roboflow
    writes, which is below the folder."""
    tried = [base / place, folder / place, folder / place.removeprefix("../")]
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        raise UserError(f"{description} names {place}, which does not exist below {base}; correct its path")
    if found.is_dir():
        return sorted(files_below(found))
    lines = [line.strip() for line in read_lines(found) if line.strip()]
    places = [(Path(line), base / line, found.parent / line) for line in lines]
    return [next((path for path in tried if path.is_file()), tried[1]) for tried in places]


def _name(path: Path, base: Path) -> str:
    """The path below the folder of images."""
    parts = path.relative_to(base).parts if path.is_relative_to(base) else (path.name,)
    kept = [part for part in parts[:-1] if part.lower() not in ("images", *SPLIT_KEYS)]
    return "/".join([*kept, path.name])


def _label_file(image: Path) -> Path:
    """labels/ in place of the last images/ in the path, or beside the image."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            candidate = Path(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
            if candidate.is_file():
                return candidate
            break
    return image.with_suffix(".txt")


def _read_image(path: Path, name: str, split: str, names: dict[int, str], labels: Labels) -> None:
    image = labels.add_image(path, name, split)
    if image is None:
        return
    file = _label_file(path)
    if not file.is_file():
        labels.drop("label files that are missing; their images are kept, without objects", path)
        return
    for found, where in _rows(file, image, names, labels):
        add_object(labels, image, found, where)


def _rows(
    file: Path, image: LabelledImage, names: dict[int, str], labels: Labels
) -> Iterator[tuple[LabelledObject, str]]:
    for number, line in enumerate(read_lines(file), start=1):
        words, where = line.split(), f"{file}, line {number}"
        if not words:
            continue
        try:
            label, values = int(float(words[0])), np.array([float(word) for word in words[1:]])
        except ValueError:
            labels.drop("rows that are not numbers", where)
            continue
        if label not in names:
            labels.drop(f"objects of the class {label}, which has no name", where)
            continue
        sides = np.array([image.width, image.height], dtype=float)
        if len(values) in (4, 5):
            if len(values) == 5:
                labels.drop("scores of predictions; their boxes are kept", where)
            size = values[2:4] * sides
            x, y = (values[:2] * sides - size / 2).tolist()
            yield LabelledObject(names[label], (x, y, float(size[0]), float(size[1]))), where
        elif len(values) >= 6 and len(values) % 2 == 0:
            yield LabelledObject(names[label], polygons=[values.reshape(-1, 2) * sides]), where
        else:
            labels.drop("rows that are neither a box nor a polygon", where)
