"""Pascal VOC: an XML for each image, with boxes whose pixels count from 1, and masks where SegmentationObject/ is."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from mae_core.data.images import IMAGE_SUFFIXES
from mae_core.errors import UserError
from mae_core.texts import find_named, read_lines
from transfer.detection.labels.instance_maps import read_map
from transfer.detection.labels.records import LabelledObject, Labels, add_object, masks_of

SPLITS = {"train": "train", "val": "val", "test": "test"}


def finds(root: Path) -> bool:
    """Whether a folder holds VOC's XML files."""
    return root.is_dir() and any("<annotation" in path.read_text(errors="ignore")[:500] for path in _xmls(root)[:5])


def _xmls(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.xml") if not path.name.startswith("."))


def read(root: Path) -> Labels:
    """A folder with Annotations/ and JPEGImages/, split by ImageSets/Main/*.txt where they are there; or of XML files
    beside their images, as LabelImg writes them. Raises ``UserError`` where no image is found."""
    labels = Labels("Pascal VOC")
    split_of: dict[str, str] = {}
    for name, split in SPLITS.items():
        lists = [root / "ImageSets" / kind / f"{name}.txt" for kind in ("Main", "Segmentation")]
        file = next((path for path in lists if path.is_file()), None)
        if file is not None:
            split_of.update({line.split()[0]: split for line in read_lines(file) if line.strip()})
    for path in _xmls(root):
        if split_of and path.stem not in split_of:
            labels.drop("images that no list of ImageSets names", path)
            continue
        _read(root, path, split_of.get(path.stem, ""), labels)
    if not any(labels.images.values()):
        raise UserError(f"no XML file below {root} has an image beside it or in JPEGImages/; give the folder with both")
    if any(found.crowd for images in labels.images.values() for image in images for found in image.objects):
        labels.notes.append("objects that are marked as difficult are crowds in COCO: not learned, and not missed")
    return labels


def _read(root: Path, path: Path, split: str, labels: Labels) -> None:
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        labels.drop(f"XML files that are broken ({error})", path)
        return
    stated = (tree.findtext("filename") or "").strip()
    file = _image_of(root, path, stated)
    if file is None:
        labels.drop("annotations without their image", path)
        return
    image = labels.add_image(file, file.name, split)
    if image is None:
        return
    segmentation = root / "SegmentationObject" / f"{path.stem}.png"
    instances = read_map(segmentation) if segmentation.is_file() else None
    fits = instances is not None and instances.shape == (image.height, image.width)
    masks = dict(masks_of(instances)) if instances is not None and fits else None
    for number, entry in enumerate(tree.iter("object"), start=1):
        where = f"{path}, object {number}"
        name, box = (entry.findtext("name") or "").strip(), entry.find("bndbox")
        try:
            assert box is not None
            x1, y1, x2, y2 = (float(box.findtext(key) or "nan") for key in ("xmin", "ymin", "xmax", "ymax"))
        except (AssertionError, ValueError):
            x1 = y1 = x2 = y2 = float("nan")
        if not name or np.isnan([x1, y1, x2, y2]).any():
            labels.drop("objects without a name or a box", where)
            continue
        crowd = (entry.findtext("difficult") or "0").strip() == "1"
        found = LabelledObject(name, (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1), crowd=crowd)
        if masks is not None:
            found.mask = masks.get(number)
        add_object(labels, image, found, where)


def _image_of(root: Path, path: Path, stated: str) -> Path | None:
    """The image that an XML is of: by the name in it, or by its own."""
    name = stated.replace("\\", "/").rpartition("/")[2]
    for folder in (root / "JPEGImages", path.parent, root / "images", path.parent.parent / "images", root):
        if not folder.is_dir():
            continue
        if name and (found := find_named(folder, name)) is not None and found.is_file():
            return found
        for suffix in sorted(IMAGE_SUFFIXES):
            if (folder / f"{path.stem}{suffix}").is_file():
                return folder / f"{path.stem}{suffix}"
    return None
