"""``mae evaluate``: a classifier measured on class folders, or on the robustness sets of the paper (Table 13)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from mae_core.data.images import ImageFiles, read_some, statistics_of
from mae_core.data.labelled import LabelledPaths, class_folders, read_class_folders, read_label_list
from mae_core.errors import UserError
from mae_core.measures.accuracy import Accuracy, Tally
from mae_core.measures.average_precision import MultiLabelScores, average_precision
from mae_core.measures.robustness import ALEXNET_ERROR, KINDS, Kind, corruption_errors, find_corruptions, severities_of
from mae_core.texts import shortened
from mae_core.training.classification import IMAGES_TRIED, check_all_if_asked, in_words
from mae_core.training.features import Rows, Viewer, rows_of
from mae_core.training.frozen_config import EvaluateConfig
from mae_core.training.frozen_trunk import classifier_file
from mae_core.training.run import Run, check_output, open_run
from mae_core.training.same_data import Data
from mae_core.training.tables import PredictionTable, write_logits, write_per_class
from mae_core.weights.classifier import classifier_of
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import with_file

IMAGENET_CLASSES = 1000


class Part(NamedTuple):
    """Images that are measured together: all of them, or a corruption at a severity."""

    corruption: str | None
    severity: int
    files: LabelledPaths


class ChosenClasses(nn.Module):
    """A classifier that chooses among some of its classes."""

    def __init__(self, model: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("places", torch.tensor(places, dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, chosen classes)."""
        return self.model(images)[:, self.places]


def classes_of(source: EncoderFile, folder: Path) -> list[str]:
    """The names of a classifier's classes: those its file states; of a file of 1000 classes that states none,
    ImageNet's where folders are named so; else the folders themselves, sorted, where they are as many.

    Raises ``UserError`` where the folders are not named as the file's classes, or are of another number.
    """
    folders = class_folders(folder) if folder.is_dir() else []
    if not folders:
        found = "holds no class folders" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}; set data.path to a folder of <class>/* folders")
    stated = source.info.classes
    if stated is None and source.num_classes == IMAGENET_CLASSES:
        imagenet = ImageNetInfo("imagenet-1k").label_names()
        named_so = set(folders) & set(imagenet)
        stated = imagenet if named_so and (len(named_so) == len(folders) or len(folders) != IMAGENET_CLASSES) else None
    if stated is not None:
        strangers = sorted(set(folders) - set(stated))
        if strangers:
            raise UserError(
                f"{folder} has labels that are not classes of {source.path}: {', '.join(strangers[:5])}; its classes "
                f"are {shortened(stated)}"
            )
        return list(stated)
    if len(folders) != source.num_classes:
        raise UserError(
            f"{source.path} has {source.num_classes} classes and does not name them, but {folder} has {len(folders)} "
            "class folders; give a folder for each of its classes"
            + (", or name the folders as ImageNet does" if source.num_classes == IMAGENET_CLASSES else "")
        )
    return folders


def parts_of(source: EncoderFile, kind: Kind, root: Path | None) -> list[Part]:
    """What is measured, one part after another. Raises ``UserError`` where the folder is not of that kind."""
    if root is None:
        raise UserError("no image folder given; set data.path=FOLDER with <class>/* in it")
    if source.info.multi_label:
        if not kind.has_splits:
            raise UserError(f"{source.path} is a multi-label classifier; evaluate it with kind=folder")
        if not (root / "val.csv").is_file():
            raise UserError(
                f"{source.path} is a multi-label classifier; list its images in {root / 'val.csv'} (file,labels)"
            )
        return [Part(None, 0, read_label_list(root / "val.csv", source.info.classes))]
    if kind.corrupted:
        return [
            Part(corruption, severity, read_class_folders(place, classes_of(source, place)))
            for corruption, folder in find_corruptions(root).items()
            for severity, place in severities_of(folder)
        ]
    folder = root / "val" if kind.has_splits and (root / "val").is_dir() else root
    return [Part(None, 0, read_class_folders(folder, classes_of(source, folder)))]


def choose(model: nn.Module, files: LabelledPaths) -> tuple[nn.Module, LabelledPaths]:
    """``model`` and ``files`` with the classes that have images alone."""
    labels = torch.tensor(files.labels)
    places, among = labels.unique(return_inverse=True)
    chosen = LabelledPaths(files.paths, among.tolist(), [files.classes[place] for place in places.tolist()])
    return ChosenClasses(model, places.tolist()), chosen


def scores_of(files: LabelledPaths, found: Rows) -> Accuracy | MultiLabelScores:
    """Counts of right and wrong over rows of logits; with several labels an image, average precisions."""
    targets = torch.stack([torch.as_tensor(files.target(index)) for index in found.indices.tolist()])
    if isinstance(files.labels[0], tuple):
        return MultiLabelScores(average_precision(found.values, targets), len(targets))
    tally = Tally(len(files.classes), torch.device("cpu"))
    tally.add(found.values, targets)
    return tally.counts()


def as_kind_says(config: EvaluateConfig) -> EvaluateConfig:
    """``config`` with the test crop of its kind of images, where it sets none."""
    crop = KINDS[config.kind].test_crop
    if config.data.test_crop is not None or crop is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"test_crop": crop})})


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure a classifier; returns what metrics.json holds. Raises ``UserError`` for what a user can get wrong."""
    source = classifier_file(config)
    config = with_file(source, as_kind_says(config), frozen=True)
    check_output(config, resume=False)
    model: nn.Module
    model, _ = classifier_of(source, image_size=config.data.image_size)
    kind = KINDS[config.kind]
    parts = parts_of(source, kind, config.data.path)
    for part in parts:
        read_some(ImageFiles(part.files.paths, config.data.reading), IMAGES_TRIED)
    if kind.own_classes_only:
        model, files = choose(model, parts[0].files)
        parts = [parts[0]._replace(files=files)]
    images = ImageFiles([path for part in parts for path in part.files.paths], config.data.reading, config.data.path)
    check_all_if_asked(images, config.data)

    run = open_run(config, resume=False, data=Data(images.names, images.content))
    announce(run, source, kind, parts, len(images))
    viewer = Viewer(
        model.to(run.device), config.data, statistics_of(config.data, source.metadata), config.evaluation_batch
    )
    metrics = measure_parts(parts, viewer, run, config)
    run.close(metrics)
    return metrics


def announce(run: Run, source: EncoderFile, kind: Kind, parts: list[Part], num_images: int) -> None:
    """Print what will be measured, and where the images differ from the published set."""
    about = "several labels per image" if source.info.multi_label else kind.about
    run.say(f"{source.path}: ViT-{source.size} of {source.num_classes} classes; {about}; {num_images} images")
    here = len({label for part in parts for label in part.files.labels})
    if kind.classes is not None and here != kind.classes:
        run.say(f"a complete copy has {kind.classes} classes, here are {here}: the numbers are not the published ones'")


def mce_in_words(metrics: dict[str, Any]) -> str:
    """The mean corruption error as the end of a line on the screen, or why there is none."""
    if metrics["mCE"] is not None:
        return f"; mCE {metrics['mCE']}"
    lacking = f"; no mCE, {len(metrics['incomplete_corruptions'])} of {len(ALEXNET_ERROR)} corruptions are incomplete"
    mean = metrics["mCE_of_found"]
    return lacking if mean is None else f"{lacking} ({mean} is the mean over the others)"


def measure_parts(parts: list[Part], viewer: Viewer, run: Run, config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of all parts; the tables and pictures are written on the way."""
    rows: list[Rows] = []
    scores: list[Accuracy | MultiLabelScores] = []
    errors: dict[str, dict[int, float]] = {}
    with PredictionTable(run, viewer.data.path) as table:
        for part in parts:
            found = rows_of(part.files.paths, viewer, run)
            table.add(part.files, found)
            scores.append(scores_of(part.files, found))
            if part.corruption is not None:
                top1 = scores[-1].top1  # type: ignore[union-attr]
                errors.setdefault(part.corruption, {})[part.severity] = 1 - top1
                run.say(f"{part.corruption} {part.severity}: top-1 {100 * top1:.2f} % on {len(found.indices)} images")
            if config.save_logits:
                rows.append(found)
    classes = parts[0].files.classes
    whole = Accuracy.sum_of(scores) if isinstance(scores[0], Accuracy) else scores[0]  # type: ignore[arg-type]
    metrics = {**whole.as_dict(classes), **(corruption_errors(errors) if errors else {})}
    run.say(in_words(metrics) + (mce_in_words(metrics) if errors else ""))
    if run.is_main:
        write_per_class(run, whole, classes)
        if config.save_logits:
            write_logits(run, [part.files for part in parts], rows, viewer.data.path)
    return metrics
