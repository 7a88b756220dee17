"""Images with one label each, in ImageFolder layout: ``train/<class>/*`` and ``val/<class>/*``."""

from __future__ import annotations

import csv
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_core.data.augmentation import Size
from mae_core.data.check import Problem, Tell, refuse
from mae_core.data.config import EvaluationData, FinetuneData
from mae_core.data.decoding import Unreadable, UnreadableImage, read_image, usable
from mae_core.data.images import IMAGE_SUFFIXES, Statistics, check_found, files_below, next_readable
from mae_core.data.loading import Place
from mae_core.data.reading import ReadAs
from mae_core.data.views import View, evaluation_view, finetune_view
from mae_core.errors import UserError
from mae_core.seeds import AUGMENT, derive_seed, seeded
from mae_core.texts import find_named, missing_hint, read_text, same_spelling

Label = int | tuple[int, ...]
"""The class of an image, or, with several labels an image, its classes."""


class LabelledPaths(NamedTuple):
    """Files of one split, their labels (class indices), the class names, and the files passed over, by ending."""

    paths: list[Path]
    labels: Sequence[Label]
    classes: list[str]
    passed_over: Mapping[str, int] = MappingProxyType({})

    def target(self, index: int) -> int | Tensor:
        """What a model is trained towards: the class, or (C,) float32 of ones at the classes and zeros elsewhere."""
        label = self.labels[index]
        if isinstance(label, int):
            return label
        return torch.zeros(len(self.classes)).index_fill_(0, torch.tensor(label, dtype=torch.int64), 1.0)


def read_image_folder(root: Path | None, tell: Tell = refuse) -> tuple[LabelledPaths, LabelledPaths]:
    """The train and val splits below ``root``; classes are the folders of ``train``, sorted.

    Raises ``UserError`` for missing splits; ``tell`` gets a class without images, val classes that train does not have,
    and a val split without any.
    """
    if root is None:
        raise UserError("no image folder given; set data.path=FOLDER with train/<class>/* and val/<class>/* in it")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            inside = sorted(root.iterdir())[:5] if root.is_dir() else None
            there = None if inside is None else [p.name if p.exists() else f"{p.name} (a broken link)" for p in inside]
            found = f"it holds {', '.join(there) or 'nothing'}" if there is not None else "the folder does not exist"
            raise UserError(
                f"{root} has no {split}/ folder ({found}); give a folder with train/<class>/* and val/<class>/*"
            )
    classes = class_folders(root / "train")
    if len(classes) < 2:
        sentence = f"{root / 'train'} has {len(classes)} class folders; classification needs two or more"
        tell(Problem("classes", sentence, str(root / "train")))
    strangers = sorted(set(class_folders(root / "val")) - set(classes))
    if strangers:
        alike = [name for name in strangers if any(same_spelling(name, known) for known in classes)]
        form = f" ({alike[0]} is there in another Unicode form: rename one of the folders)" if alike else ""
        sentence = (
            f"{root / 'val'} has classes that train does not have: {', '.join(strangers[:5])}{form}; "
            "the classes of both must agree"
        )
        tell(Problem("classes", sentence, str(root / "val")))
    train = read_class_folders(root / "train", classes, all_there=True, tell=tell)
    val = read_class_folders(root / "val", classes, tell=tell)
    if not val.paths:
        sentence = f"{root / 'val'} holds no images to evaluate on; data.path needs val/<class>/*"
        tell(Problem("classes", sentence, str(root / "val")))
    return train, val


def class_folders(split: Path) -> list[str]:
    """Names of the class folders in a folder, sorted; hidden ones left out."""
    return sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))


def read_class_folders(
    folder: Path, classes: list[str], *, all_there: bool = False, tell: Tell = refuse
) -> LabelledPaths:
    """The images in ``folder/<class>/*``. ``tell`` gets a class folder that has none; a class without a folder is
    passed over unless ``all_there``."""
    paths: list[Path] = []
    labels: list[int] = []
    passed_over: Counter[str] = Counter()
    if beside := sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir() if path.is_file()):
        passed_over["image outside a class folder"] = beside
    for label, name in enumerate(classes):
        if not all_there and not (folder / name).is_dir():
            continue
        found = sorted(files_below(folder / name, passed_over=passed_over))
        if not found:
            sentence = f"class folder {folder / name} holds no images; put some there, or remove the folder"
            tell(Problem("classes", sentence, str(folder / name)))
        paths += found
        labels += [label] * len(found)
    return LabelledPaths(paths, labels, classes, passed_over)


def read_label_lists(root: Path | None) -> tuple[LabelledPaths, LabelledPaths]:
    """Images with any number of classes each: ``root/train.csv`` and ``root/val.csv``, with a header ``file,labels``,
    files relative to ``root`` and labels separated by semicolons. The classes are those of train, sorted.

    Raises ``UserError`` for a missing or malformed list, a file that is not there, fewer than two classes, and val
    labels that train does not have.
    """
    if root is None:
        raise UserError("no folder given; set data.path=FOLDER with train.csv and val.csv (file,labels) in it")
    rows = {split: _read_label_list(root / f"{split}.csv") for split in ("train", "val")}
    classes = sorted({label for _, labels in rows["train"] for label in labels})
    if len(classes) < 2:
        raise UserError(f"{root / 'train.csv'} names {len(classes)} classes; classification needs two or more")
    strangers = sorted({label for _, labels in rows["val"] for label in labels} - set(classes))
    if strangers:
        raise UserError(f"{root / 'val.csv'} has labels that train.csv does not have: {', '.join(strangers[:5])}")
    train, val = (_with_several_labels(found, classes) for found in rows.values())
    return train, val


def read_label_list(file: Path, classes: list[str]) -> LabelledPaths:
    """Images with any number of ``classes`` each from one list, see ``read_label_lists``. Raises ``UserError`` for
    labels that are none of them."""
    rows = _read_label_list(file)
    strangers = sorted({label for _, labels in rows for label in labels} - set(classes))
    if strangers:
        raise UserError(f"{file} has labels that are not the model's: {', '.join(strangers[:5])}")
    return _with_several_labels(rows, classes)


def _with_several_labels(rows: list[tuple[Path, list[str]]], classes: list[str]) -> LabelledPaths:
    place = {name: index for index, name in enumerate(classes)}
    labels = [tuple(sorted(place[name] for name in set(names))) for _, names in rows]
    return LabelledPaths([path for path, _ in rows], labels, classes)


def _read_label_list(file: Path) -> list[tuple[Path, list[str]]]:
    if not file.is_file():
        raise UserError(f"{file} does not exist; data.multi_label=true needs it, with a header file,labels")
    try:
        rows = list(csv.DictReader(StringIO(read_text(file), newline="")))
    except csv.Error as error:
        raise UserError(f"{file} is not a table ({error}); write it as file,labels") from None
    if not rows or not {"file", "labels"} <= rows[0].keys():
        found = f"its header is {','.join(map(str, rows[0]))}" if rows else "it has no rows"
        raise UserError(f"{file} needs a header file,labels and a row for each image ({found})")
    found_rows: list[tuple[Path, list[str]]] = []
    for row in rows:
        path = find_named(file.parent, row["file"] or "")
        if path is None or not path.is_file():
            hint = missing_hint(file.parent, row["file"] or "")
            raise UserError(
                f"{file} names {file.parent / (row['file'] or '')}, which does not exist{hint}; "
                "files are relative to the folder of the list"
            )
        names = [unicodedata.normalize("NFC", name.strip()) for name in (row["labels"] or "").split(";")]
        found_rows.append((path, [name for name in names if name]))
    return found_rows


class LabelledSample(NamedTuple):
    """An image (C, H, W), its target (see ``LabelledPaths.target``), and the unreadable files met; no pixels where the
    file itself is unreadable."""

    pixels: Tensor | None
    label: int | Tensor
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class LabelledBatch:
    """pixels (B, C, H, W) float32, normalised, or features (B, D); labels (B,) int64, or (B, classes) float32 with
    several labels an image."""

    pixels: Tensor
    labels: Tensor
    unreadable: list[Unreadable]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> LabelledBatch:
        """Tensors on ``device``."""
        pixels, labels = (t.to(device, non_blocking=True) for t in (self.pixels, self.labels))
        return LabelledBatch(pixels, labels, self.unreadable)

    def split(self, size: int) -> list[LabelledBatch]:
        """Consecutive parts of at most ``size`` samples."""
        parts = zip(self.pixels.split(size), self.labels.split(size), strict=True)
        return [LabelledBatch(pixels, labels, []) for pixels, labels in parts]


class AugmentedImages(Dataset[LabelledSample]):
    """Training images by (epoch, index), through a random view; an unreadable file is replaced by the next readable
    one."""

    def __init__(self, files: LabelledPaths, view: View, read_as: ReadAs, seed: int) -> None:
        self.files, self.view, self.read_as, self.seed = files, view, read_as, seed

    def __len__(self) -> int:
        return len(self.files.paths)

    def name_of(self, index: int) -> str:
        """What identifies an image."""
        return str(self.files.paths[index])

    def __getitem__(self, place: Place) -> LabelledSample:
        epoch, index = place
        chosen, image, unreadable = next_readable(
            index, len(self), lambda place: read_image(self.files.paths[place], self.read_as)
        )
        if image is None:
            return LabelledSample(None, -1, unreadable)
        with seeded(derive_seed(self.seed, AUGMENT, epoch, index)):
            return LabelledSample(self.view(image), self.files.target(chosen), unreadable)


class TrainImages(AugmentedImages):
    """Images augmented for fine-tuning; see ``finetune_view`` for what is refused."""

    def __init__(self, files: LabelledPaths, data: FinetuneData, size: Size, statistics: Statistics, seed: int) -> None:
        super().__init__(files, finetune_view(data, size, statistics), data.reading, seed)


class TestImages(Dataset[LabelledSample]):
    """Images as they are evaluated, see ``evaluation_view``. Unreadable files have no pixels."""

    __test__ = False

    def __init__(self, files: LabelledPaths, data: EvaluationData, size: Size, statistics: Statistics) -> None:
        self.files, self.read_as = files, data.reading
        self.view = evaluation_view(data.test_crop, size, statistics)

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, index: int) -> LabelledSample:
        try:
            path = self.files.paths[index]
            pixels = usable(self.view(read_image(path, self.read_as)), path)
        except UnreadableImage as error:
            return LabelledSample(None, self.files.target(index), [error.unreadable])
        return LabelledSample(pixels, self.files.target(index), [])


def collate(samples: Sequence[LabelledSample]) -> LabelledBatch:
    """A batch of training samples. Raises ``UserError`` where a place had no readable image near it."""
    check_found(samples)
    return collate_readable(samples)


def collate_readable(samples: Sequence[LabelledSample]) -> LabelledBatch:
    """A batch of the samples that could be read; it may be empty."""
    there = [sample for sample in samples if sample.pixels is not None]
    pixels = torch.stack([sample.pixels for sample in there]) if there else torch.empty(0)
    labels = [torch.as_tensor(sample.label) for sample in there]
    targets = torch.stack(labels) if labels else torch.empty(0, dtype=torch.int64)
    return LabelledBatch(pixels, targets, [entry for sample in samples for entry in sample.unreadable])
