"""A run of a detector with any engine: training, or scoring of a trained one; what is before and after the engine's
part."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mae_core.atomic import write_json
from mae_core.data.images import ImageFiles, relative_names
from mae_core.errors import UserError
from mae_core.layout import CHECKPOINTS, CLASSIFIER, CONFIG, ENCODER, LOG, METRICS
from mae_core.models.classifier import learning_line
from mae_core.resuming import Resume
from mae_core.training import distributed
from mae_core.training.classification import tell_of_weights
from mae_core.training.loop import FitSettings
from mae_core.training.run import Run, check_output, open_run
from mae_core.training.same_data import Data
from mae_core.training.statistics import with_statistics
from mae_core.weights.files import SAFETENSORS, WeightsFile, read_file
from mae_core.weights.load import read_encoder, stated_in, with_file
from transfer.detection.coco import CocoSet, check_same_categories
from transfer.detection.config import DetectionConfig
from transfer.detection.data_sets import HALVES, check_images, files_of, read_data, read_halves, shared_files
from transfer.detection.detector_file import (
    DETECTOR,
    describe_detector,
    engines_note,
    head_of,
    read_detector,
    trained_detector,
)
from transfer.detection.engine import DetectorEngine, Job, build_network, builder_of, load_engine
from transfer.detection.samples import WholeImages

SPLIT = "split.json"
FILES_OF_RUNS = (METRICS, DETECTOR, CONFIG, LOG, CHECKPOINTS, ENCODER, CLASSIFIER)


def train_detector(config: DetectionConfig, *, resume: Resume = False) -> dict[str, Any]:
    """Train, write the run directory, score on the validation set; returns what metrics.json holds.

    Raises ``UserError`` for everything a user can get wrong, before any work where that is possible.
    """
    engine = load_engine(config.engine)
    builder_of(config.model.head, config.engine)
    whole = None if config.weights is None else zoo_detector(engine, config.weights)
    source = None if config.weights is None or whole is not None else read_encoder(config.weights, **stated_in(config))
    if source is not None:
        config = with_file(source, config)
    resume = check_output(config, resume=resume)
    if resume and all((config.output / name).is_file() for name in (DETECTOR, METRICS)):
        return leave_finished(config)
    train_set, val_set = read_data(config)
    settings = settings_of(config, len(train_set.images))
    said = {} if whole is not None else None if source is None else source.metadata
    training = ImageFiles([image.path for image in train_set.images], config.data.reading)
    config = with_statistics(config, training, resume=resume, weights=said)
    trunk, model, statistics = build_network(config, engine, len(train_set.categories), source)
    report = trunk.report
    if engine.zoo is not None and whole is not None:
        report = engine.zoo.load(model, whole, other_classes=True)

    names = relative_names(files_of(config, train_set, val_set), config.data.path)
    files = ImageFiles([image.path for coco in (train_set, val_set) for image in coco.images], config.data.reading)
    labels = list(dict.fromkeys((train_set.path, val_set.path)))
    run = open_run(config, resume=resume, data=Data(names, files.content, labels))
    tell_of_weights(run, report)
    tell_of_split(run, train_set, val_set)
    model.to(run.device)
    run.say(
        f"{len(train_set.images)} training and {len(val_set.images)} validation images of "
        f"{len(train_set.categories)} classes; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{settings.total_steps} steps of {config.optim.batch_size}, peak lr {settings.lr:.3g}; writing to {run.folder}"
    )
    if learning := learning_line(model, config.model.trainable_blocks):
        run.say(learning)
    metadata = describe_detector(config, trunk.vit, statistics, train_set.categories)
    images = WholeImages(val_set, config.data, statistics)
    job = Job(config, train_set, images, statistics, settings, run, metadata)
    metrics = fit_and_score(engine, model, job)
    run.close()
    return metrics


def tell_of_split(run: Run, train_set: CocoSet, val_set: CocoSet) -> None:
    """Write split.json where the configuration splits one set, and say where the halves share images."""
    share = run.config.data.val_share
    if share is not None and run.is_main:
        sets = zip(HALVES, (train_set, val_set), strict=True)
        names = {half: [image.path.name for image in coco.images] for half, coco in sets}
        write_json(run.folder / SPLIT, {"val_share": share, "seed": run.config.seed, **names})
    if note := shared_files(train_set, val_set):
        run.say(f"note: {note}")


def zoo_detector(engine: DetectorEngine, path: Path) -> WeightsFile | None:
    """The whole detector of the engine's model zoo that ``path`` holds; None where it holds another thing."""
    if engine.zoo is None or not path.is_file() or path.suffix == SAFETENSORS:
        return None
    file = read_file(path)
    return file if engine.zoo.holds(file) else None


def fit_and_score(engine: DetectorEngine, model: Any, job: Job) -> dict[str, Any]:
    """Train ``model``, write the detector's file, score it; the metrics, on rank 0."""
    fitted = engine.fit(model, job)
    job.run.write_weights(DETECTOR, fitted.model.state_dict(), job.metadata)
    training = {
        "steps": job.settings.total_steps,
        "seconds": None if fitted.seconds is None else round(fitted.seconds, 2),
        "loss": fitted.loss if math.isfinite(fitted.loss) else None,
    }
    return engine.score(fitted.model, job.images, job.run, job.config, {"training": training})


def settings_of(config: DetectionConfig, images: int) -> FitSettings:
    """How long and how fast, for a number of training images."""
    return replace(FitSettings.of(config.optim, images), milestones=config.optim.milestones)


def leave_finished(config: DetectionConfig) -> dict[str, Any]:
    """Say that the run is complete; the metrics it has, on rank 0."""
    run = Run(config, distributed.join(config.device, config.rank_timeout))
    run.say(f"{run.folder} is a finished run, nothing is left to resume; its scores are in {run.folder / METRICS}")
    distributed.leave()
    return json.loads((run.folder / METRICS).read_text(encoding="utf-8")) if run.is_main else {}


def evaluate_detector(config: DetectionConfig) -> dict[str, Any]:
    """Score the trained detector in ``config.weights`` on the validation set; writes to ``config.output``, returns what
    metrics.json holds.

    Network, canvas and pixel statistics are the file's; data are the configuration's, and so are thresholds and
    sampling where it gives them. Raises ``UserError`` where the output folder holds a run or an evaluation, or the
    classes differ.
    """
    engine = load_engine(config.engine)
    held = [name for name in FILES_OF_RUNS if (config.output / name).exists()]
    if held:
        raise UserError(
            f"output folder {config.output} already holds {', '.join(held)}; --eval-only overwrites nothing, "
            "choose another with output=FOLDER"
        )
    check_output(config, resume=False)
    file = read_detector(config.weights)
    (val_set,) = read_halves(config, ("val",), masks=head_of(file, config).learns_masks)
    val_set.check_scorable()
    model, categories, statistics, config = trained_detector(file, config, engine, val_set.categories)
    check_same_categories(categories, config.weights or Path(), val_set.categories, val_set.path)
    check_images(config.data, val_set)
    run = Run(config, distributed.join(config.device, config.rank_timeout))
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to output folder {run.folder}: {error.strerror}") from None
    if note := engines_note(file, config.engine):
        run.say(note)
    model.to(run.device)
    metrics = engine.score(model, WholeImages(val_set, config.data, statistics), run, config, {})
    distributed.leave()
    return metrics
