"""Labelled sets of three layouts: their training images in a random order of which every prefix is a subset, and the
data set that trains on some of them and is scored on others.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from mae_core.atomic import atomic_folder, write_json
from mae_core.data.labelled import read_image_folder
from mae_core.errors import UserError
from transfer.segmentation.label_maps import pair_files


class LabelledSet:
    """A folder with labels. A subset of it is a folder of links to its images, or of json files beside them."""

    def __init__(self, data: Path) -> None:
        self.data = data.resolve()

    def groups(self) -> list[list[Any]]:
        """The labelled training images: of every class a list, or one list of all. Raises ``UserError`` where the
        folder has another layout."""
        raise NotImplementedError

    def order(self, seed: int) -> list[Any]:
        """All training images in an order drawn from ``seed``, classes in turn: its prefixes are nested subsets."""
        groups = self.groups()
        generator = random.Random(seed)
        for group in groups:
            generator.shuffle(group)
        rounds: list[list[Any]] = []
        for row in zip_longest(*groups):
            members = [item for item in row if item is not None]
            generator.shuffle(members)
            rounds.append(members)
        return list(chain.from_iterable(rounds))

    def write(self, folder: Path, train: Sequence[Any], scored: Sequence[Any] | None) -> None:
        """A data set in ``folder`` with ``train`` to learn and, to be scored on, ``scored`` of the training images, or
        where that is None the validation set."""
        raise NotImplementedError

    def words(self, folder: Path | None) -> list[str]:
        """The options of a ``mae`` command that trains on what ``write`` wrote, or without ``folder`` on the set."""
        return [f"data.path={folder or self.data}"]


class ClassFolders(LabelledSet):
    """``train/<class>/*`` and ``val/<class>/*``."""

    def groups(self) -> list[list[Any]]:
        """Files by class."""
        train, _ = read_image_folder(self.data)
        found: dict[Any, list[Any]] = {}
        for path, label in zip(train.paths, train.labels, strict=True):
            found.setdefault(label, []).append(path)
        return list(found.values())

    def write(self, folder: Path, train: Sequence[Any], scored: Sequence[Any] | None) -> None:
        """Links to the files."""
        with atomic_folder(folder) as new:
            for split, paths in (("train", train), ("val", scored or ())):
                for path in paths:
                    _link(path, new / split / path.relative_to(self.data / "train"))
            if scored is None:
                _link(self.data / "val", new / "val")


class Coco(LabelledSet):
    """COCO: ``train/``, ``val/`` and ``annotations/instances_{train,val}.json``."""

    def _json(self, split: str) -> dict[str, Any]:
        path = self.data / "annotations" / f"instances_{split}.json"
        if not path.is_file():
            raise UserError(f"{path} does not exist; a COCO set has train/, val/ and annotations/instances_*.json")
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def groups(self) -> list[list[Any]]:
        """Ids of the images that have an object."""
        content = self._json("train")
        with_object = {entry["image_id"] for entry in content["annotations"] if not entry.get("iscrowd")}
        return [sorted(with_object & {image["id"] for image in content["images"]})]

    def write(self, folder: Path, train: Sequence[Any], scored: Sequence[Any] | None) -> None:
        """Two json files; the images stay where they are."""
        content = self._json("train")
        with atomic_folder(folder) as new:
            write_json(new / "train.json", _only(content, set(train)))
            write_json(new / "val.json", self._json("val") if scored is None else _only(content, set(scored)))
            _link(self.data / "train", new / "train")
            _link(self.data / ("val" if scored is None else "train"), new / "scored")

    def words(self, folder: Path | None) -> list[str]:
        """The four places of a subset."""
        if folder is None:
            return super().words(None)
        return [
            *(f"data.train_images={folder / 'train'}", f"data.train_annotations={folder / 'train.json'}"),
            *(f"data.val_images={folder / 'scored'}", f"data.val_annotations={folder / 'val.json'}"),
        ]


def _only(content: dict[str, Any], ids: set[Any]) -> dict[str, Any]:
    """The COCO json of some of its images."""
    images = [image for image in content["images"] if image["id"] in ids]
    annotations = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}


class LabelMaps(LabelledSet):
    """``images/{training,validation}`` and ``annotations/{training,validation}``."""

    def groups(self) -> list[list[Any]]:
        """Pairs of image and label map."""
        return [list(pair_files(self.data / "images/training", self.data / "annotations/training"))]

    def write(self, folder: Path, train: Sequence[Any], scored: Sequence[Any] | None) -> None:
        """Links to the files."""
        with atomic_folder(folder) as new:
            for split, pairs in (("training", train), ("validation", scored or ())):
                for image, label_map in pairs:
                    _link(image, new / "images" / split / image.relative_to(self.data / "images/training"))
                    below = label_map.relative_to(self.data / "annotations/training")
                    _link(label_map, new / "annotations" / split / below)
            if scored is None:
                for kind in ("images", "annotations"):
                    _link(self.data / kind / "validation", new / kind / "validation")
            if (self.data / "classes.txt").is_file():
                _link(self.data / "classes.txt", new / "classes.txt")


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target.resolve(), link)
