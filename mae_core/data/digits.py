"""The embedded data set: scenes of real handwritten digits, as unlabelled images and as three labelled data sets.

scikit-learn ships 1,797 digits of 8x8 pixels (from UCI's "Optical Recognition of Handwritten Digits"). A scene enlarges
a few of them, bends and colours them and lays them on a textured background, so its class, boxes, instance masks and
label map are known exactly. Validation scenes use digits that no training or unlabelled scene shows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_core.data.glyphs import NUM_CLASSES, DigitIndices, digit_indices
from mae_core.data.scenes import LABEL_NAMES, Scene, compose_scene
from mae_core.errors import UserError

__all__ = [
    "CLASS_NAMES",
    "NUM_CLASSES",
    "TASKS",
    "DigitIndices",
    "DigitsLayout",
    "Scene",
    "compose_scene",
    "digit_indices",
    "run_lengths",
    "write_digits",
]

CLASS_NAMES = tuple(str(digit) for digit in range(NUM_CLASSES))

TASKS = ("classification", "detection", "segmentation")
"""The labelled data sets, in the order that numbers their ranges of scenes: append only."""

_HALVES = {"train": "train", "val": "test"}  # part of a labelled data set -> split of its scenes
_ADE_PARTS = {"train": "training", "val": "validation"}
_SCENES_PER_TASK = 10_000_000  # room for each task's scenes within a split
_SCENES_PER_JOB = 50

_Records = list[tuple[dict[str, Any], list[dict[str, Any]]]]
"""COCO's record of each image, with the records of its instances."""


@dataclass(frozen=True)
class DigitsLayout:
    """Where `write_digits` puts things under `root`; also the way to address a data set written earlier."""

    root: Path

    @property
    def unlabelled(self) -> Path:
        """Folder of images without labels."""
        return self.root / "unlabelled"

    @property
    def classification(self) -> Path:
        """Folder with `train` and `val`, each an ImageFolder of classes 0..9."""
        return self.root / "classification"

    @property
    def detection(self) -> Path:
        """Folder with images in `train` and `val`, and COCO annotations."""
        return self.root / "detection"

    @property
    def segmentation(self) -> Path:
        """Folder with `images` and `annotations`, each with `training` and `validation`."""
        return self.root / "segmentation"

    @property
    def segmentation_classes(self) -> Path:
        """Text file of the label values, one `id<TAB>name` a line."""
        return self.segmentation / "classes.txt"

    def detection_json(self, part: str) -> Path:
        """COCO annotations of part "train" or "val"."""
        return self.detection / "annotations" / f"instances_{part}.json"


@dataclass(frozen=True)
class _Job:
    """Scenes first..last-1 of one part of one data set, for one worker."""

    dataset: str
    part: str
    first: int
    last: int


def write_digits(
    out: Path | str,
    *,
    seed: int = 0,
    image_size: int = 64,
    num_unlabelled: int = 4000,
    num_train: int | Mapping[str, int] = 400,
    num_test: int | Mapping[str, int] = 200,
    clutter: float = 1.0,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> DigitsLayout:
    """Compose the data sets and write them to `out`, all or nothing; the files are the same for any number of workers.

    num_train and num_test hold for each of classification, detection and segmentation; a mapping with these three keys
    sets them apart. A smaller number gives the first scenes of a larger one. Classification shows one digit, the others
    one to four. `on_progress(done, total)` is called after every few scenes. With `workers`
    above 1 the calling script needs the usual `if __name__ == "__main__":`.

    Raises UserError where `out` holds something already, a number is out of range, or scikit-learn is not installed.
    """
    out = Path(out)
    train_sizes, test_sizes = _sizes("num_train", num_train), _sizes("num_test", num_test)
    if num_unlabelled < 0:
        raise UserError(f"num_unlabelled={num_unlabelled} is not a number of images; use 0 or more")
    if workers < 1:
        raise UserError(f"workers={workers} is too few; use 1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another folder, or remove it first")
    compose_scene("train", 0, seed=seed, image_size=image_size, clutter=clutter)  # refuses bad numbers before any work

    sizes = {("unlabelled", ""): num_unlabelled}
    sizes |= {
        (task, part): given[task] for task in TASKS for part, given in (("train", train_sizes), ("val", test_sizes))
    }
    jobs = [
        _Job(dataset, part, first, min(first + _SCENES_PER_JOB, size))
        for (dataset, part), size in sizes.items()
        for first in range(0, size, _SCENES_PER_JOB)
    ]
    total = sum(job.last - job.first for job in jobs)

    with _folder_at_once(out) as folder:
        layout = DigitsLayout(folder)
        _make_folders(layout)
        annotations: dict[str, _Records] = {"train": [], "val": []}
        write = partial(_write_job, layout, seed=seed, image_size=image_size, clutter=clutter)
        done = 0
        with _mapper(workers) as run:
            for job, records in zip(jobs, run(write, jobs), strict=True):
                if job.dataset == "detection":
                    annotations[job.part] += records
                done += job.last - job.first
                if on_progress is not None:
                    on_progress(done, total)
        for part, records in annotations.items():
            layout.detection_json(part).write_text(json.dumps(_coco(records)), encoding="utf-8")
        layout.segmentation_classes.write_text("".join(f"{value}\t{name}\n" for value, name in enumerate(LABEL_NAMES)))
        readme = _readme(seed, image_size, clutter, num_unlabelled, train_sizes, test_sizes)
        (folder / "README.txt").write_text(readme, encoding="utf-8")
    return DigitsLayout(out)


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run-length encoding of a mask (H, W) bool: by columns, the first run is of background."""
    flat = mask.ravel(order="F")
    changes: np.ndarray = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate(([0], changes, [flat.size]))
    counts = np.diff(ends).tolist()
    return {"counts": [0, *counts] if flat[0] else counts, "size": list(mask.shape)}


def _sizes(name: str, given: int | Mapping[str, int]) -> dict[str, int]:
    sizes = dict(given) if isinstance(given, Mapping) else dict.fromkeys(TASKS, given)
    if set(sizes) != set(TASKS):
        found = ", ".join(sizes) or "nothing"
        raise UserError(f"{name} has sizes for {found}; give one number, or one for each of {', '.join(TASKS)}")
    for task, size in sizes.items():
        if not 0 <= size <= _SCENES_PER_TASK:
            raise UserError(f"{name}={size} for {task} is not a number of images; use 0 to {_SCENES_PER_TASK}")
    return sizes


@contextmanager
def _folder_at_once(final: Path) -> Iterator[Path]:
    """Yield a new sibling folder that takes the name `final` when the body succeeds and is removed when it does not.

    Raises UserError where it cannot be written.
    """
    folder = final.absolute().parent / f".{final.name}-{os.getpid()}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
        if final.exists():
            final.rmdir()
        folder.rename(final)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror or error}; choose another place") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Any]]:
    """The built-in map, or one over processes. They are spawned: a fork of a program with torch's threads may hang."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _make_folders(layout: DigitsLayout) -> None:
    folders = [layout.unlabelled, layout.detection / "annotations"]
    for part, ade_part in _ADE_PARTS.items():
        folders += [layout.classification / part / name for name in CLASS_NAMES]
        folders += [layout.detection / part]
        folders += [layout.segmentation / kind / ade_part for kind in ("images", "annotations")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def _write_job(layout: DigitsLayout, job: _Job, *, seed: int, image_size: int, clutter: float) -> _Records:
    """Compose and write the scenes of a job; for detection returns (image record, instance records) of each."""
    digits = (1, 1) if job.dataset == "classification" else (1, 4)
    split = _HALVES.get(job.part, job.dataset)
    offset = TASKS.index(job.dataset) * _SCENES_PER_TASK if job.dataset in TASKS else 0
    records = []
    for index in range(job.first, job.last):
        scene = compose_scene(split, offset + index, seed=seed, image_size=image_size, digits=digits, clutter=clutter)
        name = f"{index:06d}.png"
        if job.dataset == "unlabelled":
            path = layout.unlabelled / name
        elif job.dataset == "classification":
            path = layout.classification / job.part / CLASS_NAMES[scene.labels[0]] / name
        elif job.dataset == "detection":
            path = layout.detection / job.part / name
            records.append(_coco_records(scene, index + 1, name))
        else:
            part = _ADE_PARTS[job.part]
            path = layout.segmentation / "images" / part / name
            _save(scene.label_map, layout.segmentation / "annotations" / part / name)
        _save(scene.image, path)
    return records


def _save(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=3)


def _coco_records(scene: Scene, image_id: int, file_name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    height, width = scene.image.shape[:2]
    instances = []
    for label, (x1, y1, x2, y2), mask in zip(scene.labels.tolist(), scene.boxes.tolist(), scene.masks, strict=True):
        instances.append(
            {
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(mask.sum()),
                "segmentation": run_lengths(mask),
                "iscrowd": 0,
            }
        )
    return {"id": image_id, "file_name": file_name, "height": height, "width": width}, instances


def _coco(records: _Records) -> dict[str, Any]:
    instances = [instance for _, of_image in records for instance in of_image]
    return {
        "info": {"description": "Handwritten digits in composed scenes"},
        "images": [image for image, _ in records],
        "annotations": [{"id": number, **instance} for number, instance in enumerate(instances, start=1)],
        "categories": [{"id": digit + 1, "name": name} for digit, name in enumerate(CLASS_NAMES)],
    }


def _readme(
    seed: int, image_size: int, clutter: float, num_unlabelled: int, train: Mapping[str, int], test: Mapping[str, int]
) -> str:
    halves = digit_indices(seed)
    lines = [
        "Handwritten digits in composed scenes, written by mae_core.data.digits.write_digits.",
        "",
        f"seed {seed}, image size {image_size} x {image_size}, clutter {clutter:g}",
        f"unlabelled      {num_unlabelled} images of one to four digits",
        *(f"{task:<15} {train[task]} training and {test[task]} validation images" for task in TASKS),
        "",
        f"The digits are the {len(halves.train) + len(halves.test)} that scikit-learn ships.",
        f"{len(halves.train)} of them appear in unlabelled and training images,",
        f"the other {len(halves.test)} in validation images alone. No scene appears twice.",
        "",
        "classification/{train,val}/{0..9}       one folder a class (ImageFolder)",
        "detection/annotations/instances_*.json  COCO; category ids 1..10 are the digits 0..9",
        "segmentation/annotations                label maps; values in segmentation/classes.txt",
        "",
        "Source of the digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,",
        "UCI Machine Learning Repository, 1998, CC BY 4.0.",
    ]
    return "\n".join(lines) + "\n"
