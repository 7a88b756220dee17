"""Label maps whose every value, or colour, is an object: images/ and masks/ with files of the same name; 0 is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mae_core.data.images import files_below
from mae_core.errors import UserError, first_line
from transfer.detection.labels.records import LabelledObject, Labels, add_object, masks_of

IMAGE_FOLDERS = ("images", "image", "imgs")
MAP_FOLDERS = ("masks", "mask", "labels", "label", "instances", "annotations")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SUFFIXES = ("", "_mask", "_masks", "_label", "_labels", "_instances")


def finds(root: Path) -> bool:
    """Whether a folder has images and maps beside each other."""
    return _folders(root) is not None


def _folders(root: Path) -> tuple[Path, Path] | None:
    if not root.is_dir():
        return None
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    maps = [root / name for name in MAP_FOLDERS if (root / name).is_dir()]
    found = next((folder for folder in maps if next(files_below(folder), None) is not None), None)
    return None if images is None or found is None else (images, found)


def read(root: Path, class_name: str = "object") -> Labels:
    """A folder with images/ and masks/: each value of a map but 0 is one object of the only class, ``class_name``.

    Raises ``UserError`` where a map has another size than its image, and where no map is found.
    """
    folders = _folders(root)
    if folders is None:
        raise UserError(f"{root} has no images/ beside masks/; give the folder that holds both")
    images, maps = folders
    labels = Labels("label maps", classes=[class_name])
    of_stem = {path.relative_to(maps).with_suffix("").as_posix(): path for path in files_below(maps)}
    for path in sorted(files_below(images)):
        stem = path.relative_to(images).with_suffix("").as_posix()
        file = next((of_stem[stem + suffix] for suffix in SUFFIXES if stem + suffix in of_stem), None)
        if file is None:
            labels.drop("images without a label map", path)
            continue
        parts = path.relative_to(images).parts
        split = next((SPLITS[part.lower()] for part in parts[:-1] if part.lower() in SPLITS), "")
        name = "/".join(part for part in parts if part.lower() not in SPLITS)
        image = labels.add_image(path, name, split)
        if image is None:
            continue
        values = read_map(file)
        if values.shape != (image.height, image.width):
            sides = f"{values.shape[1]}x{values.shape[0]}"
            raise UserError(f"label map {file} is {sides}, its image {image.width}x{image.height}; correct the map")
        for value, mask in masks_of(values):
            add_object(labels, image, LabelledObject(class_name, mask=mask), f"{file}, {value}")
    if not any(labels.images.values()):
        raise UserError(f"no image in {images} has a map of its name in {maps}; name them alike")
    return labels


def read_map(path: Path) -> np.ndarray:
    """(H, W) whole numbers as stored: a palette's indices, 8 to 32 bits, or a number for each colour of RGB, 0 for
    black. Raises ``UserError``."""
    try:
        array = _stored(path)
    except Exception as error:  # decoders answer damaged files with errors of any kind
        raise UserError(f"label map {path} cannot be read ({first_line(error)}); repair or remove it") from None
    if array.ndim == 3 and array.shape[2] in (3, 4):
        bands: np.ndarray = array[..., :3].astype(np.int64)
        array = (bands[..., 0] << 16) + (bands[..., 1] << 8) + bands[..., 2]
    array = array.squeeze()
    if array.ndim != 2:
        raise UserError(f"label map {path} has the shape {array.shape}; it needs one number for each pixel")
    return array.astype(np.int64)


def _stored(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        array: np.ndarray = np.load(path, allow_pickle=False)
        return array
    if path.suffix.lower() in (".tif", ".tiff"):
        import tifffile

        return tifffile.imread(path)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB") if picture.mode in ("RGBA", "CMYK") else picture)
