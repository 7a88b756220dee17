"""The training of a detector with any engine: what comes before and after the engine's own part."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from mae_core.data.images import relative_names
from mae_core.errors import UserError
from mae_core.layout import DETECTOR, METRICS
from mae_core.training import distributed
from mae_core.training.classification import tell_of_weights
from mae_core.training.loop import FitSettings
from mae_core.training.run import Run, check_output, open_run
from mae_core.weights.files import write_weights
from mae_core.weights.load import read_encoder, with_channels_of
from transfer.detection.config import DetectionConfig
from transfer.detection.job import DetectorEngine, Job, build_network
from transfer.detection.parts import files_of, read_data
from transfer.detection.samples import WholeImages
from transfer.detection.trained import describe_detector


def train(config: DetectionConfig, engine: DetectorEngine, *, resume: bool = False) -> dict[str, Any]:
    """Train, then score; returns what metrics.json holds. Raises ``UserError`` for what a user can get wrong."""
    zoo = engine.zoo if engine.zoo is not None and engine.zoo.holds(config.weights) else None
    if config.weights is not None and zoo is None:
        config = with_channels_of(read_encoder(config.weights), config)
    config = follow_devices(config, distributed.world_size())
    check_output(config, resume=resume)
    if resume and all((config.output / name).is_file() for name in (DETECTOR, METRICS)):
        return leave_finished(config)
    train_set, val_set = read_data(config)
    if not any(image.instances for image in val_set.images):
        raise UserError(f"{val_set.path} has no annotations; there is nothing to score against")
    start = config if zoo is None else config.model_copy(update={"weights": None})
    trunk, model = build_network(start, engine, len(train_set.categories))
    report = trunk.report
    if zoo is not None and config.weights is not None:
        report = zoo.load(model, config.weights, other_classes=True)
    settings = settings_of(config, len(train_set.images))

    run = open_run(config, resume=resume, names=relative_names(files_of(config, train_set, val_set), config.data.path))
    tell_of_weights(run, report)
    model.to(run.device)
    run.say(
        f"{len(train_set.images)} training and {len(val_set.images)} validation images of "
        f"{len(train_set.categories)} classes; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{settings.total_steps} steps of {config.optim.batch_size}, peak lr {settings.lr:.3g}; writing to {run.folder}"
    )
    vit, statistics = trunk.vit, trunk.statistics
    metadata = describe_detector(config, vit, statistics, train_set.categories)
    images = WholeImages(val_set, config.data, statistics)
    fitted = engine.fit(model, Job(config, train_set, images, statistics, settings, run, resume, metadata))
    if run.is_main:
        write_weights(run.folder / DETECTOR, fitted.model.state_dict(), metadata)
    training = {
        "steps": settings.total_steps,
        "seconds": None if fitted.seconds is None else round(fitted.seconds, 2),
        "loss": fitted.loss if math.isfinite(fitted.loss) else None,
    }
    metrics = engine.score(fitted.model, images, run, config, {"training": training})
    run.close()
    distributed.leave()
    return metrics


def follow_devices(config: DetectionConfig, devices: int) -> DetectionConfig:
    """``config`` with the batch of ``devices`` devices, where ``optim.images_per_device`` is set; the learning rate
    follows the batch."""
    per_device = config.optim.images_per_device
    if per_device is None:
        return config
    optim = config.optim.model_copy(update={"batch_size": per_device * devices})
    return config.model_copy(update={"optim": optim})


def settings_of(config: DetectionConfig, images: int) -> FitSettings:
    """How long and how fast, for a number of training images."""
    return replace(FitSettings.of(config.optim, images), milestones=config.optim.milestones)


def leave_finished(config: DetectionConfig) -> dict[str, Any]:
    """Say that the run is complete; the metrics it has, on rank 0."""
    run = Run(config, distributed.join(config.device))
    run.say(f"{run.folder} is a finished run, nothing is left to resume; its scores are in {run.folder / METRICS}")
    distributed.leave()
    return json.loads((run.folder / METRICS).read_text(encoding="utf-8")) if run.is_main else {}
