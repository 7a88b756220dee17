"""The check and the training agree: small random data sets, each with at most one fault, are checked and then read as a
training's set-up and its first batches read them. What training refuses, the check refuses; what training leaves out or
would learn wrongly, the check reports; a sound set is clean."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
from PIL import Image

from mae_core.data.check import Report
from mae_core.data.config import FinetuneData, PretrainData
from mae_core.data.decoding import UnreadableImage, size_of
from mae_core.data.images import Statistics
from mae_core.data.labelled import TestImages, read_image_folder
from mae_core.data.sources import open_source
from mae_core.data.survey import check_folders, check_images
from mae_core.errors import UserError
from transfer.detection.check_data import check_parts, parts_of
from transfer.detection.coco import check_same_categories, decode_masks, read_coco
from transfer.detection.config import DetectionData
from transfer.detection.data_sets import HALVES, locate
from transfer.detection.data_sets import check_images as check_coco_images
from transfer.detection.samples import read_checked
from transfer.segmentation.check_data import LabelledFolders, folders_of_set
from transfer.segmentation.check_data import check_parts as check_labels
from transfer.segmentation.label_check import check_label_maps
from transfer.segmentation.label_maps import pair_files, read_label_map
from transfer.segmentation.pixels import read_pixels

PLAIN = Statistics((0.0,) * 3, (1.0,) * 3)


class Fault(NamedTuple):
    """plant(root, generator) makes a sound set wrong; training then ``refuses``, ``skips``, or learns ``nonsense``
    without a word (which only the check can say), or takes it, for which a ``note`` is enough."""

    plant: Callable[[Path, random.Random], Any]
    outcome: str


def some_image(root: Path, generator: random.Random) -> Path:
    return generator.choice(sorted(p for p in root.rglob("*.png") if "annotations" not in p.parts))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(path: Path, orientation: int) -> None:
    """Give a picture the tag, its stored pixels so that it looks as before."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    with Image.open(path) as image:
        stored = image.transpose(Image.Transpose(back))
    stored.save(path, exif=exif)


def five_bands(path: Path) -> None:
    path.unlink()
    bands = np.zeros((9, 9, 5), np.uint8)
    tifffile.imwrite(path.with_suffix(".tif"), bands, photometric="minisblack", planarconfig="contig")


def a_huge_value(path: Path) -> None:
    path.unlink()
    np.save(path.with_suffix(".npy"), np.full((9, 9, 3), 1e30, np.float32))


def with_alpha(path: Path) -> None:
    with Image.open(path) as image:
        image.load()
    image.putalpha(128)
    image.save(path)


def frames(path: Path) -> None:
    images = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    path.unlink()
    images[0].save(path.with_suffix(".gif"), save_all=True, append_images=images[1:])


def lab(path: Path) -> None:
    path.unlink()
    tifffile.imwrite(path.with_suffix(".tif"), np.zeros((9, 9, 3), np.uint8), photometric="cielab")


def not_finite(path: Path) -> None:
    path.unlink()
    np.save(path.with_suffix(".npy"), np.full((9, 9, 3), np.nan, np.float32))


def rename(path: Path, ending: str) -> None:
    path.rename(path.with_suffix(ending))


OF_FILES = {
    "a cut file": Fault(lambda root, g: cut(some_image(root, g)), "skips"),
    "no image": Fault(lambda root, g: some_image(root, g).write_text("words"), "skips"),
    "an empty file": Fault(lambda root, g: some_image(root, g).write_bytes(b""), "skips"),
    "other channels": Fault(lambda root, g: five_bands(some_image(root, g)), "skips"),
    "nan": Fault(lambda root, g: not_finite(some_image(root, g)), "skips"),
    "a huge value": Fault(lambda root, g: a_huge_value(some_image(root, g)), "skips"),
    "several frames": Fault(lambda root, g: frames(some_image(root, g)), "skips"),
    "other colours": Fault(lambda root, g: lab(some_image(root, g)), "skips"),
    "alpha": Fault(lambda root, g: with_alpha(some_image(root, g)), "note"),
    "a turned photo": Fault(lambda root, g: turn(some_image(root, g), g.randrange(2, 9)), "note"),
    "another ending": Fault(lambda root, g: rename(some_image(root, g), ".jxl"), "note"),
}


# ---- images without labels


def write_unlabelled(root: Path, generator: random.Random) -> None:
    write_pictures(root, generator.randrange(3, 6), generator)


def write_pictures(folder: Path, count: int, generator: random.Random) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(generator.randrange(10**6)).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def pretrain_on(root: Path) -> str:
    source = open_source(PretrainData(path=root))
    return read_all(source.read, len(source))


def read_all(read: Callable[[int], Any], count: int) -> str:
    unreadable = 0
    for index in range(count):
        try:
            unreadable += getattr(read(index), "pixels", 0) is None
        except UnreadableImage:
            unreadable += 1
    return "skips" if unreadable else "takes"


# ---- images in class folders


def write_folders(root: Path, generator: random.Random) -> None:
    for half in ("train", "val"):
        for name in ("ash", "oak"):
            write_pictures(root / half / name, generator.randrange(2, 4), generator)


def finetune_on(root: Path) -> str:
    outcomes = []
    for half in read_image_folder(root):
        images = TestImages(half, FinetuneData(path=root, image_size=16), (16, 16), PLAIN)
        outcomes.append(read_all(images.__getitem__, len(images)))
    return min(outcomes)  # "skips" before "takes"


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


OF_FOLDERS = {
    **OF_FILES,
    "an image beside the classes": Fault(lambda root, g: shutil.copy(some_image(root, g), root / "train"), "note"),
    "an empty class": Fault(lambda root, g: empty(root / g.choice(["train", "val"]) / "ash"), "refuses"),
    "a class of val alone": Fault(lambda root, g: (root / "val" / "oak").rename(root / "val" / "elm"), "refuses"),
    "one class": Fault(lambda root, g: [shutil.rmtree(root / half / "oak") for half in ("train", "val")], "refuses"),
    "no val": Fault(lambda root, g: shutil.rmtree(root / "val"), "refuses"),
    "no val images": Fault(lambda root, g: [shutil.rmtree(p) for p in (root / "val").iterdir()], "refuses"),
    "a class missing in val": Fault(lambda root, g: shutil.rmtree(root / "val" / "oak"), "note"),
    "a shared image": Fault(lambda root, g: shutil.copy(root / "train/ash/0.png", root / "val/ash/9.png"), "note"),
}


# ---- COCO


def write_coco(root: Path, generator: random.Random) -> None:
    for half in ("train", "val"):
        (root / half).mkdir(parents=True)
        images, annotations = [], []
        for number in range(3):
            pixels = np.random.default_rng(generator.randrange(10**6)).integers(0, 90, (32, 40, 3), dtype=np.uint8)
            for side in (0, 1):
                x, y = 20 * side + generator.randrange(3, 7), generator.randrange(5, 12)
                w, h = generator.randrange(6, 12), generator.randrange(6, 12)
                pixels[y : y + h, x : x + w] = 255
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": number + 1, "category_id": 1 + side},
                        **{"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [corners]},
                    }
                )
            Image.fromarray(pixels).save(root / half / f"{number}.png")
            images.append({"id": number + 1, "file_name": f"{number}.png", "height": 32, "width": 40})
        (root / "annotations").mkdir(exist_ok=True)
        categories = [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        json_of(root, half).write_text(json.dumps(content))


def json_of(root: Path, half: str) -> Path:
    return root / "annotations" / f"instances_{half}.json"


def detect_on(root: Path) -> str:
    data = DetectionData(path=root)
    sets = [read_coco(locate(data, half)) for half in HALVES]
    check_same_categories(sets[0].categories, sets[0].path, sets[1].categories, sets[1].path)
    check_coco_images(data, *sets)
    return min(read_all(lambda i, coco=coco: read_object(coco.images[i]), len(coco.images)) for coco in sets)


def read_object(record: Any) -> None:
    """An image and its masks: each mask lies on what was drawn, or the pair is nonsense."""
    pixels = np.asarray(read_checked(record, 3)).min(-1)
    assert all(pixels[mask].mean() > 200 for mask in decode_masks(record, record.instances) if mask.any())


def edit(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[Path, random.Random], None]:
    """(json, one of its annotations) -> a change of one half's json."""

    def plant(root: Path, generator: random.Random) -> None:
        path = json_of(root, generator.choice(["train", "val"]))
        content = json.loads(path.read_text())
        change(content, generator.choice(content["annotations"]))
        path.write_text(json.dumps(content))

    return plant


def as_corners(content: dict[str, Any], one: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]


def turned_as_stored(root: Path, generator: random.Random) -> None:
    """A tag that nobody looked at: the json has the sides and boxes of the stored pixels."""
    path = some_image(root, generator)
    exif = Image.Exif()
    exif[274] = generator.randrange(5, 9)
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif)


def resized(root: Path, generator: random.Random) -> None:
    path = some_image(root, generator)
    with Image.open(path) as image:
        smaller = image.resize((20, 16))
    smaller.save(path)


OF_COCO = {
    **{name: OF_FILES[name] for name in ("a cut file", "no image", "an empty file", "a turned photo")},
    "a photo stored on its side": Fault(turned_as_stored, "note"),
    "a resized image": Fault(resized, "skips"),
    "a missing file": Fault(lambda root, g: some_image(root, g).unlink(), "refuses"),
    "no usable image": Fault(lambda root, g: [cut(path) for path in (root / "val").iterdir()], "refuses"),
    "no val json": Fault(lambda root, g: json_of(root, "val").unlink(), "refuses"),
    "corners": Fault(edit(as_corners), "nonsense"),
    "the whole image as a box": Fault(edit(lambda c, one: one.update(bbox=[0, 0, 40, 32])), "nonsense"),
    "the whole image as an area": Fault(edit(lambda c, one: one.update(area=40 * 32)), "nonsense"),
    "a box elsewhere": Fault(edit(lambda c, one: one.update(bbox=[30, 25, 5, 5])), "nonsense"),
    "a box outside": Fault(edit(lambda c, one: one.update(bbox=[30, 10, 30, 9])), "nonsense"),
    "an object twice": Fault(edit(lambda c, one: c["annotations"].append({**one, "id": 99})), "nonsense"),
    "an empty mask": Fault(edit(lambda c, one: one.update(segmentation=[[5, 5, 9, 5, 7, 5]])), "nonsense"),
    "a doubled annotation id": Fault(edit(lambda c, one: c["annotations"].append({**one})), "refuses"),
    "a doubled image id": Fault(edit(lambda c, one: c["images"].append({**c["images"][0]})), "refuses"),
    "no mask": Fault(edit(lambda c, one: one.pop("segmentation")), "refuses"),
    "no box": Fault(edit(lambda c, one: one.pop("bbox")), "refuses"),
    "a negative side": Fault(edit(lambda c, one: one.update(bbox=[9, 9, -3, 4])), "refuses"),
    "an unknown class": Fault(edit(lambda c, one: one.update(category_id=7)), "refuses"),
    "an unknown image": Fault(edit(lambda c, one: one.update(image_id=77)), "refuses"),
    "ids of two types": Fault(edit(lambda c, one: c["images"][0].update(id="1")), "refuses"),
    "another class list": Fault(edit(lambda c, one: c["categories"][1].update(name="up")), "refuses"),
    "a class without objects": Fault(
        edit(lambda c, one: [a.update(category_id=1) for a in c["annotations"]]), "note"
    ),
}  # fmt: skip


# ---- images and label maps


def write_labels(root: Path, generator: random.Random) -> None:
    for part in ("training", "validation"):
        write_pictures(root / "images" / part, generator.randrange(3, 5), generator)
        (root / "annotations" / part).mkdir(parents=True)
        for image in (root / "images" / part).iterdir():
            labels = np.zeros((10, 12), np.uint8)
            labels[2:5] = 1
            labels[generator.randrange(5, 9) :, 3:] = 2
            Image.fromarray(labels).save(root / "annotations" / part / image.name)


def folders_with_labels(root: Path) -> list[LabelledFolders]:
    return folders_of_set(root, ["num_classes=3", "reduce_zero_label=False"])


def segment_on(root: Path) -> str:
    """What engine_mmseg does before a run, and what its readers do for a batch."""
    outcomes = []
    for part in folders_with_labels(root):
        pairs = pair_files(part.images, part.label_maps)
        found = check_label_maps(pairs, part.coding, names=part.origin)
        for image, label_map in pairs:
            if str(image) not in {path for path, _ in found.unreadable}:
                labels = part.coding.encode(read_label_map(label_map).values, label_map)
                assert labels.shape == size_of(read_pixels(image, 3))
        outcomes.append("skips" if found.unreadable else "takes")
    return min(outcomes)


def relabel(
    change: Callable[[np.ndarray], np.ndarray], *, every: bool = True, ending: str = ".png"
) -> Callable[..., None]:
    """Write the label maps of a half anew, or one of them."""

    def plant(root: Path, generator: random.Random) -> None:
        maps = sorted((root / "annotations" / generator.choice(["training", "validation"])).iterdir())
        for path in maps if every else [generator.choice(maps)]:
            changed = change(np.asarray(Image.open(path)))
            if ending == ".tif":  # the bytes decide what a file is, not its name
                tifffile.imwrite(path, changed, photometric="minisblack")
            else:
                Image.fromarray(changed).save(path)

    return plant


def strange_palette(root: Path, generator: random.Random) -> None:
    for number, path in enumerate(sorted((root / "annotations" / "training").iterdir())):
        label_map = Image.fromarray(np.asarray(Image.open(path)), mode="P")
        label_map.putpalette([number, 0, 0, 0, 200, 0, 0, 0, 200] + [0] * 759)
        label_map.save(path)


def a_map(root: Path, generator: random.Random) -> Path:
    return generator.choice(sorted((root / "annotations").rglob("*.png")))


def an_image(root: Path, generator: random.Random) -> Path:
    return generator.choice(sorted((root / "images").rglob("*.png")))


def other_suffix(root: Path, generator: random.Random) -> None:
    for path in list((root / "annotations" / "training").iterdir()):
        path.rename(path.with_name(f"{path.stem}_L.png"))


def turned_alone(root: Path, generator: random.Random) -> None:
    """The photo is turned by its tag, its label map was drawn on the stored pixels."""
    exif = Image.Exif()
    exif[274] = generator.randrange(5, 9)
    path = an_image(root, generator)
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif)


OF_LABELS = {
    **{name: OF_FILES[name] for name in ("a cut file", "no image", "an empty file", "a turned photo")},
    "0 and 255": Fault(relabel(lambda m: np.where(m == 1, 255, 0).astype(np.uint8)), "refuses"),
    "300 classes": Fault(relabel(lambda m: m.astype(np.uint16) * 149), "refuses"),
    "a value too many": Fault(relabel(lambda m: m + 1), "refuses"),
    "a stray value": Fault(relabel(lambda m: np.where(m == 1, 77, m).astype(np.uint8), every=False), "refuses"),
    "fractions": Fault(relabel(lambda m: m.astype(np.float32) + 0.5, ending=".tif"), "refuses"),
    "whole numbers as floats": Fault(relabel(lambda m: m.astype(np.float32), ending=".tif"), "sound"),
    "16 bits": Fault(relabel(lambda m: m.astype(np.uint16)), "sound"),
    "colours": Fault(relabel(lambda m: np.stack([m, m, m], -1), every=False), "refuses"),
    "palettes that differ": Fault(strange_palette, "refuses"),
    "all ignored": Fault(relabel(lambda m: np.full_like(m, 255)), "refuses"),
    "a cut map": Fault(lambda root, g: cut(a_map(root, g)), "refuses"),
    "a missing map": Fault(lambda root, g: a_map(root, g).unlink(), "refuses"),
    "no validation": Fault(lambda root, g: shutil.rmtree(root / "images" / "validation"), "refuses"),
    "another suffix": Fault(other_suffix, "refuses"),
    "a map without its image": Fault(lambda root, g: an_image(root, g).unlink(), "nonsense"),
    "a map of another size": Fault(relabel(lambda m: m[:-1], every=False), "refuses"),
    "a photo turned without its map": Fault(turned_alone, "refuses"),
    "five bands": Fault(lambda root, g: five_bands_under_its_name(an_image(root, g)), "refuses"),
}


def five_bands_under_its_name(path: Path) -> None:
    bands = np.zeros((10, 12, 5), np.uint8)
    tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="contig")


class Task(NamedTuple):
    """How a set is written, checked, and read by a training; its faults."""

    write: Callable[[Path, random.Random], None]
    check: Callable[[Path], Any]
    train: Callable[[Path], str]
    faults: dict[str, Fault]


TASKS = {
    "images": Task(write_unlabelled, lambda root: check_images([root]), pretrain_on, OF_FILES),
    "folders": Task(write_folders, check_folders, finetune_on, OF_FOLDERS),
    "labels": Task(write_labels, lambda root: check_labels(folders_with_labels(root)), segment_on, OF_LABELS),
    "coco": Task(write_coco, lambda root: check_parts(parts_of(root, None)), detect_on, OF_COCO),
}
CASES = [(task, fault) for task, row in TASKS.items() for fault in (None, *row.faults)]
SEEDS = (0,)
"""More of them place the same faults elsewhere."""


def checked(task: Task, root: Path) -> tuple[str, list[Report]]:
    """The worst that the check says: refuses, reports, notes or nothing."""
    try:
        reports = list(task.check(root))
    except UserError:
        return "refuses", []
    said = {problem.severity for report in reports for problem in report.problems if problem.kind != "settings"}
    words = {"refused": "refuses", "wrong": "reports", "note": "notes"}
    return next((word for severity, word in words.items() if severity in said), "nothing"), reports


def trained(task: Task, root: Path) -> str:
    try:
        return task.train(root)
    except UserError:
        return "refuses"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, fault", CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_the_check_says_what_training_does(tmp_path, name, fault, seed):
    task, generator = TASKS[name], random.Random(f"{name} {fault} {seed}")
    task.write(tmp_path / "set", generator)
    planted = task.faults[fault].outcome if fault else "sound"
    if fault:
        task.faults[fault].plant(tmp_path / "set", generator)
    said, reports = checked(task, tmp_path / "set")
    expected = {"refuses": "refuses", "skips": "reports", "nonsense": "reports", "note": "notes", "sound": "nothing"}
    assert said == expected[planted], "\n".join(report.describe() for report in reports)
    outcome = trained(task, tmp_path / "set")
    assert outcome == (planted if planted in ("refuses", "skips") else "takes")
