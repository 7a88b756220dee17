"""Trained detectors: what their files say of them, how they are read, and how they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mae_core.data.images import Statistics
from mae_core.errors import UserError
from mae_core.layout import CHECKPOINTS, CLASSIFIER, CONFIG, DETECTOR, ENCODER, LOG, METRICS
from mae_core.patches import as_pair
from mae_core.training import distributed
from mae_core.training.run import Run, check_output
from mae_core.weights.files import read_weights
from transfer.backbone import DenseViT
from transfer.detection.annotations import Category
from transfer.detection.coco import check_same_categories, read_coco
from transfer.detection.config import DetectionConfig, DetectorConfig
from transfer.detection.job import DetectorEngine, build_network
from transfer.detection.parts import check_images, locate, trunk_options
from transfer.detection.samples import WholeImages

DETECTOR_FORMAT = "mae_core_detector"


def describe_detector(
    config: DetectionConfig, vit: DenseViT, statistics: Statistics, categories: Sequence[Category]
) -> dict[str, Any]:
    """What the file of a detector says of it: all that is needed to build it again and to read its answers."""
    return {
        "format": DETECTOR_FORMAT,
        "engine": config.engine,
        "detector": {**config.model.model_dump(mode="json"), "size": vit.size, "patch_size": vit.grid.patch},
        "sampling": config.sampling.model_dump(mode="json"),
        "test": config.test.model_dump(mode="json"),
        "image_size": list(as_pair(config.data.image_size)),
        "position_size": list(vit.grid.image_size),
        "in_chans": vit.in_channels,
        "mean": statistics.mean,
        "std": statistics.std,
        "categories": [list(category) for category in categories],
        "epochs": config.optim.epochs,
    }


class Trained(NamedTuple):
    """A trained detector, its classes and pixel statistics, and the configuration to ask it with: channels, canvas, and
    what was given of sampling and test are that configuration's, all else of these two is that of its training."""

    model: nn.Module
    categories: tuple[Category, ...]
    statistics: Statistics
    config: DetectionConfig


def load_detector(config: DetectionConfig, engine: DetectorEngine, categories: Sequence[Category] = ()) -> Trained:
    """The trained detector in ``config.weights``, detector.safetensors or its run directory.

    A file of the engine's zoo says nothing of itself: it is read into the network of the configuration, for
    ``categories``. Raises ``UserError`` where the file is broken, or holds something else.
    """
    path = config.weights
    if path is None:
        raise UserError("--eval-only needs a trained detector; set weights=detector.safetensors or its run")
    file = path / DETECTOR if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path} holds no {DETECTOR}; give the folder of a finished detector run")
    if engine.zoo is not None and engine.zoo.holds(file):
        trunk, model = build_network(config.model_copy(update={"weights": None}), engine, len(categories))
        engine.zoo.load(model, file).print()
        return Trained(model, tuple(categories), trunk.statistics, config)
    state, metadata = read_weights(file)
    if metadata.get("format") != DETECTOR_FORMAT or metadata.get("engine") != config.engine:
        raise UserError(f"{file} is not a detector of engine {config.engine}; give the {DETECTOR} of such a run")
    detector = DetectorConfig.model_validate(metadata["detector"])
    size, canvas = detector.size or "base", metadata["image_size"]
    config = asked_as_trained(config, metadata)
    options = trunk_options(detector, size, canvas, metadata["position_size"])
    vit = DenseViT(size, patch_size=detector.patch_size, in_chans=metadata["in_chans"], **options)
    model = engine.build(vit, len(metadata["categories"]), detector, config.sampling, config.test)
    statistics = Statistics(tuple(metadata["mean"]), tuple(metadata["std"]))
    engine.adapt(model, statistics, as_pair(canvas))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
        raise UserError(f"{file} does not fit the network its metadata describe ({problem}); export it again") from None
    return Trained(model, tuple(Category(*entry) for entry in metadata["categories"]), statistics, config)


def asked_as_trained(config: DetectionConfig, metadata: dict[str, Any]) -> DetectionConfig:
    """``config`` with the channels and the canvas of a detector's file, and, in sampling and test, with what the file
    says wherever ``config`` was not given a value of its own."""
    images = {"image_size": tuple(metadata["image_size"]), "channels": metadata["in_chans"]}
    update: dict[str, Any] = {"data": config.data.model_copy(update=images)}
    for name in ("sampling", "test"):
        section = getattr(config, name)
        given = section.model_dump(include=section.model_fields_set)
        update[name] = type(section).model_validate({**metadata.get(name, {}), **given})
    return config.model_copy(update=update)


def evaluate(config: DetectionConfig, engine: DetectorEngine) -> dict[str, Any]:
    """Score the detector in ``config.weights`` on the validation set; writes to ``config.output``.

    Network, canvas and pixel statistics are the file's; data are the configuration's, and so are thresholds and
    sampling where it gives them. Raises ``UserError`` where the output folder holds a run or an evaluation, or the
    classes differ.
    """
    marks = (METRICS, DETECTOR, CONFIG, LOG, CHECKPOINTS, ENCODER, CLASSIFIER)
    held = [name for name in marks if (config.output / name).exists()]
    if held:
        raise UserError(
            f"output folder {config.output} already holds {', '.join(held)}; --eval-only overwrites nothing, "
            "choose another with output=FOLDER"
        )
    check_output(config, resume=False)
    val_set = read_coco(locate(config.data, "val"))
    model, categories, statistics, config = load_detector(config, engine, val_set.categories)
    check_same_categories(categories, config.weights or Path(), val_set.categories, val_set.path)
    check_images(config.data, val_set)
    run = Run(config, distributed.join(config.device))
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to output folder {run.folder}: {error.strerror}") from None
    model.to(run.device)
    metrics = engine.score(model, WholeImages(val_set, config.data, statistics), run, config, {})
    distributed.leave()
    return metrics
