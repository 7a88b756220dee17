"""Nested subsets of labelled sets, and the training of each task on one of them: what label_efficiency.py varies.

A task orders the labelled training images by a seed, so that a smaller subset is a prefix of a larger one; writes the
data set that trains on some of them and is scored on others; and calls the product's own training.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from mae_core.atomic import atomic_folder, write_json
from mae_core.config.load import load_config
from mae_core.data.labelled import read_image_folder
from mae_core.errors import UserError
from mae_core.measures.knn import NEIGHBOURS
from mae_core.training.embedding import knn
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import KnnConfig, LinprobeConfig
from mae_core.training.linprobe import linprobe
from transfer.detection.config import DetectionConfig
from transfer.detection.run import train_detector
from transfer.segmentation.label_maps import pair_files
from transfer.segmentation.train_net import train_segmenter

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WARMUP_SHARE = 0.1
NEVER = 10**9


class Choice(NamedTuple):
    """One point of the grid: a multiple of the recipe's learning rate, and the layer decay."""

    rate: float
    decay: float


class Start(NamedTuple):
    """Where a training starts: from an encoder, or from nothing; whether the trunk stays as it is, and what then reads
    it in classification."""

    weights: Path | None
    frozen: bool = False
    reader: Literal["attentive", "linear", "knn"] = "attentive"

    def grid(self, points: Sequence[Choice]) -> tuple[Choice, ...]:
        """The points that differ for this start: layers that do not learn have no decay, and k-NN no rate."""
        if self.reader == "knn":
            return (Choice(1.0, 1.0),)
        return tuple(dict.fromkeys(Choice(p.rate, 1.0) for p in points)) if self.frozen else tuple(points)


@dataclass(frozen=True)
class Budget:
    """What all arms have in common: optimizer steps, the recipe, and changes of it as ``key=value``."""

    steps: int
    recipe: Path
    options: tuple[str, ...] = ()


class Task:
    """A kind of labelled data and its training. ``metric`` names the number that ``train`` returns."""

    metric: ClassVar[str]
    recipe: ClassVar[Path]

    def __init__(self, data: Path) -> None:
        self.data = data

    def groups(self) -> list[list[Any]]:
        """The labelled training images: of every class a list, or one list of all."""
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

    def train(
        self, folder: Path, images: int, run: Path, start: Start, choice: Choice, budget: Budget, seed: int
    ) -> float:
        """Train on the data set in ``folder``, which has ``images`` training images, and return its score."""
        raise NotImplementedError


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target.resolve(), link)


def _start_words(start: Start) -> list[str]:
    return ["from_scratch=true"] if start.weights is None else [f"weights={start.weights}"]


def _schedule(steps: int, images: int, batch: int) -> list[str]:
    epochs = steps * batch / images
    return [f"optim.epochs={epochs!r}", f"optim.warmup_epochs={WARMUP_SHARE * epochs!r}"]


class Classification(Task):
    """``train/<class>/*`` and ``val/<class>/*``; a frozen trunk is read by a probe or by its nearest neighbours."""

    metric = "top-1 accuracy (%)"
    recipe = CONFIGS / "finetune" / "tiny_96.yaml"
    frozen_rate = 1.0
    """Base rate of LARS for the frozen arm: ten times the paper's for 16 times its batch."""

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

    def train(
        self, folder: Path, images: int, run: Path, start: Start, choice: Choice, budget: Budget, seed: int
    ) -> float:
        """Top-1 of fine-tuning, or of what reads the frozen trunk."""
        base = load_config(FinetuneConfig, budget.recipe, ["from_scratch=true", *budget.options])
        words = [f"data.path={folder}", f"output={run}", *_start_words(start)]
        if start.frozen:
            words += [f"data.{name}={getattr(base.data, name)}" for name in ("image_size", "workers")]
            words.append(f"device={base.device}")
        if start.reader == "knn":
            k = min(NEIGHBOURS[0], images)
            shutil.rmtree(run, ignore_errors=True)  # of one that was interrupted: k-NN has nothing to resume
            return float(knn(load_config(KnnConfig, None, [*words, f"k=[{k}]"]))["top1"][str(k)])
        words += [f"seed={seed}", f"evaluate_every={NEVER}", *_schedule(budget.steps, images, base.optim.batch_size)]
        if start.frozen:
            words += [f"optim.batch_size={base.optim.batch_size}", f"probe.kind={start.reader}"]
            words.append(f"optim.base_lr={self.frozen_rate * choice.rate!r}")
            crop = f"data.crop_scale=[{','.join(map(str, base.data.crop_scale))}]"
            return float(linprobe(load_config(LinprobeConfig, None, [*words, crop]), resume="auto")["top1"])
        words += [*budget.options, f"optim.layer_decay={choice.decay!r}"]
        words.append(f"optim.base_lr={base.optim.base_lr * choice.rate!r}")
        return float(finetune(load_config(FinetuneConfig, budget.recipe, words), resume="auto")["top1"])


class Detection(Task):
    """COCO; images without an object are no labels, as training leaves them out."""

    metric = "COCO mask AP (%)"
    recipe = CONFIGS / "detection" / "small_data.yaml"

    def _json(self, split: str) -> dict[str, Any]:
        path = self.data / "annotations" / f"instances_{split}.json"
        if not path.is_file():
            raise UserError(f"{path} does not exist; --data must hold train/, val/ and annotations/instances_*.json")
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
            _link(self.data / ("val" if scored is None else "train"), new / "scored")

    def train(
        self, folder: Path, images: int, run: Path, start: Start, choice: Choice, budget: Budget, seed: int
    ) -> float:
        """Mask AP, in per cent."""
        base = load_config(DetectionConfig, budget.recipe, ["from_scratch=true", *budget.options])
        words = [f"data.train_images={self.data / 'train'}", f"data.train_annotations={folder / 'train.json'}"]
        words += [f"data.val_images={folder / 'scored'}", f"data.val_annotations={folder / 'val.json'}"]
        words += [f"output={run}", f"seed={seed}", *_schedule(budget.steps, images, base.optim.batch_size)]
        words += [*budget.options, *_start_words(start), f"optim.layer_decay={choice.decay!r}"]
        words.append(f"optim.base_lr={base.optim.base_lr * choice.rate!r}")
        if start.frozen:
            words.append("model.trainable_blocks=0")
        found = train_detector(load_config(DetectionConfig, budget.recipe, words), resume="auto")
        return 100 * float(found["segm"]["AP"])


def _only(content: dict[str, Any], ids: set[Any]) -> dict[str, Any]:
    """The COCO json of some of its images."""
    images = [image for image in content["images"] if image["id"] in ids]
    annotations = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}


class Segmentation(Task):
    """Label maps: images/{training,validation} and annotations/{training,validation}."""

    metric = "mIoU (%)"
    recipe = CONFIGS / "segmentation" / "small_data.py"

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

    def train(
        self, folder: Path, images: int, run: Path, start: Start, choice: Choice, budget: Budget, seed: int
    ) -> float:
        """mIoU."""
        from transfer.segmentation.engine_mmseg.options import parse_options, read_config

        options = parse_options(budget.options)
        base = read_config(budget.recipe, options)
        options |= {
            "data_root": str(folder),
            "iterations": budget.steps,
            "randomness.seed": seed,
            "optim_wrapper.paramwise_cfg.layer_decay_rate": choice.decay,
            "optim_wrapper.optimizer.lr": base.optim_wrapper["optimizer"]["lr"] * choice.rate,
        }
        if start.frozen:
            options["model.backbone.trainable_blocks"] = 0
        found = train_segmenter(budget.recipe, weights=start.weights, work_dir=run, cfg_options=options, resume="auto")
        return float(found["mIoU"])


TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
}
