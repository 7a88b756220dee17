"""Training and scoring of a detector with the core's loop: for engines that bring a network and no loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from mae_core.atomic import write_json
from mae_core.conversion.files import read_weights, write_weights
from mae_core.conversion.loading import read_encoder, with_channels_of
from mae_core.data.images import Statistics, Unreadable, relative_names
from mae_core.data.loading import make_loader
from mae_core.errors import UserError
from mae_core.layout import CHECKPOINTS, CLASSIFIER, CONFIG, ENCODER, LOADING, LOG, METRICS
from mae_core.patches import as_pair
from mae_core.training import distributed
from mae_core.training.loop import FitSettings, Hook, fit, seed_everything
from mae_core.training.run import Run, check_output, open_run
from transfer.backbone import DenseViT
from transfer.detection.averaging import Averaged
from transfer.detection.coco import Category, check_same_categories, encode_masks, read_coco
from transfer.detection.config import DETECTOR, DetectionConfig, DetectorConfig, InferenceConfig, SamplingConfig
from transfer.detection.draw import stacked
from transfer.detection.evaluation import PREDICTIONS, spread_indices, truth_and_prediction, write_evaluation
from transfer.detection.parts import (
    build_trunk,
    check_images,
    files_of,
    locate,
    parameter_groups,
    read_data,
    trunk_options,
)
from transfer.detection.rois import paste_mask
from transfer.detection.samples import DetectionBatch, TrainingSamples, WholeImages, collate, collate_readable
from transfer.detection.scores import Detections, scores_table

DETECTOR_FORMAT = "mae_core_detector"
PICTURE_ROWS = 3

Build = Callable[[DenseViT, int, DetectorConfig, SamplingConfig, InferenceConfig], nn.Module]
"""(trunk, number of classes, numbers) -> a network whose trunk is ``backbone.vit``.

``network(pixels, sizes, targets)`` gives losses by name; without targets, boxes, scores, labels and masks per image.
"""


def detection_losses(model: nn.Module, batch: DetectionBatch) -> dict[str, Tensor]:
    """(model, batch) -> the sum of the detector's losses, and each of them."""
    losses = model(batch.pixels, batch.sizes, batch.targets)
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


@torch.inference_mode()
def detect(
    model: nn.Module, images: WholeImages, run: Run, indices: Sequence[int], *, batch_size: int, workers: int
) -> tuple[list[Detections], list[Unreadable]]:
    """What ``model`` finds in the images of ``indices``, in original pixels, and the images that could not be read.

    Under ``torchrun`` each rank takes its share, and every rank gets the whole result.
    """
    model.eval()
    share = BatchSampler(list(indices)[run.rank :: run.world], batch_size, drop_last=False)
    loader = make_loader(images, share, collate_readable, workers=workers, pin=run.device.type == "cuda")
    found: list[Detections] = []
    unreadable: list[Unreadable] = []
    for batch in loader:
        unreadable += batch.unreadable
        if len(batch):
            with torch.autocast(run.device.type, run.precision, enabled=run.precision != torch.float32):
                outputs = model(batch.pixels.to(run.device, non_blocking=True), batch.sizes)
            found += [to_original(output, images, index) for output, index in zip(outputs, batch.indices, strict=True)]
    if run.world > 1:
        parts: list[Any] = [None] * run.world
        torch.distributed.all_gather_object(parts, (found, unreadable))
        found, unreadable = ([entry for part in parts for entry in part[n]] for n in (0, 1))
    return sorted(found, key=lambda detections: detections.image_index), unreadable


def to_original(output: dict[str, Tensor], images: WholeImages, index: int) -> Detections:
    """The model's output for one canvas -> detections in the pixels of the image that lies on it."""
    record, placement = images.coco.images[index], images.placement(index)
    width, height = record.width, record.height
    scale = torch.tensor([width / placement.width, height / placement.height] * 2)
    boxes = (output["boxes"].float().cpu() * scale).minimum(torch.tensor([width, height] * 2))
    masks = [
        paste_mask(mask, box, height, width)
        for mask, box in zip(output["masks"].float().cpu(), boxes.tolist(), strict=True)
    ]
    codes = encode_masks(torch.stack(masks).numpy()) if masks else []
    return Detections(index, boxes, output["scores"].float().cpu(), output["labels"].cpu(), codes)


def train(config: DetectionConfig, build: Build, *, resume: bool = False) -> dict[str, Any]:
    """Train, then score; returns what metrics.json holds. Raises ``UserError`` for what a user can get wrong."""
    if config.weights is not None:
        config = with_channels_of(read_encoder(config.weights), config)
    check_output(config, resume=resume)
    if resume and all((config.output / name).is_file() for name in (DETECTOR, METRICS)):
        return leave_finished(config)
    train_set, val_set = read_data(config)
    if not any(image.instances for image in val_set.images):
        raise UserError(f"{val_set.path} has no annotations; there is nothing to score against")
    seed_everything(config.seed)
    vit, report, statistics = build_trunk(config)
    network = config.model
    if network.norm == "sync_bn" and config.device == "cpu":  # SyncBN exists on GPUs only, and there may be some
        network = network.model_copy(update={"norm": "bn"})
    model = build(vit, len(train_set.categories), network, config.sampling, config.test)
    settings = replace(FitSettings.of(config.optim, len(train_set.images)), milestones=config.optim.milestones)

    run = open_run(config, resume=resume, names=relative_names(files_of(config, train_set, val_set), config.data.path))
    if report is not None and run.is_main:
        report.print()
        write_json(run.folder / LOADING, report.as_dict())
    elif report is None:
        run.say("training from scratch: no weights are loaded")
    model.to(run.device)
    trained, scored = model, model
    hooks: list[Hook] = []
    if config.optim.ema is not None:
        trained = Averaged(model, config.optim.ema)
        scored = trained.average.module
        hooks = [(1, trained.follow)]
    groups = parameter_groups(model, len(vit.blocks), config.optim)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=config.optim.betas, fused=True)
    start = run.restore(trained, optimizer) if resume else 0
    sampler = run.sampler(
        len(train_set.images), config.optim.batch_size, total_steps=settings.total_steps, start_step=start
    )
    samples = TrainingSamples(train_set, config.data, statistics, config.seed)
    loader = make_loader(samples, sampler, collate, workers=config.data.workers, pin=run.device.type == "cuda")
    images = WholeImages(val_set, config.data, statistics)
    run.say(
        f"{len(train_set.images)} training and {len(val_set.images)} validation images of "
        f"{len(train_set.categories)} classes; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"{settings.total_steps} steps of {config.optim.batch_size}, peak lr {settings.lr:.3g}; writing to {run.folder}"
    )

    def draw(step: int) -> None:
        shown, _ = detect(scored, images, run, spread_indices(len(images), PICTURE_ROWS), batch_size=1, workers=0)
        least, channels = config.test.picture_score, config.data.channels
        rows = [truth_and_prediction(val_set, detections, channels, least) for detections in shown]
        if run.is_main and any(rows):
            run.picture(f"step_{step:08d}", stacked([row for row in rows if row is not None]), step)

    metadata = {
        "format": DETECTOR_FORMAT,
        "engine": config.engine,
        "detector": {**config.model.model_dump(mode="json"), "size": vit.size, "patch_size": vit.grid.patch},
        "image_size": list(as_pair(config.data.image_size)),
        "position_size": list(vit.grid.image_size),
        "in_chans": vit.in_channels,
        "mean": statistics.mean,
        "std": statistics.std,
        "categories": [list(category) for category in train_set.categories],
        "epochs": config.optim.epochs,
    }
    result = fit(
        trained,
        loader,
        detection_losses,
        optimizer,
        run=run,
        settings=settings,
        start_step=start,
        hooks=[*hooks, (config.log.pictures_every, draw)],
        metadata=metadata,
    )
    if run.is_main:
        write_weights(run.folder / DETECTOR, scored.state_dict(), metadata)
    training = {
        "steps": settings.total_steps,
        "seconds": round(result.seconds, 2) if start < settings.total_steps else None,
        "loss": result.loss if math.isfinite(result.loss) else None,
    }
    metrics = score(scored, images, run, config, more={"training": training})
    run.close()
    distributed.leave()
    return metrics


def leave_finished(config: DetectionConfig) -> dict[str, Any]:
    """Say that the run is complete; the metrics it has, on rank 0."""
    run = Run(config, distributed.join(config.device))
    run.say(f"{run.folder} is a finished run, nothing is left to resume; its scores are in {run.folder / METRICS}")
    distributed.leave()
    return json.loads((run.folder / METRICS).read_text(encoding="utf-8")) if run.is_main else {}


def score(
    model: nn.Module, images: WholeImages, run: Run, config: DetectionConfig, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Detect in all images, write the evaluation to the run directory, print the table; the metrics, on rank 0."""
    run.say(f"evaluating on {len(images)} images")
    found, unreadable = detect(
        model, images, run, range(len(images)), batch_size=config.test.test_batch, workers=config.data.workers
    )
    run.note_unreadable(unreadable)
    if not run.is_main:
        return {}
    metrics = write_evaluation(
        run.folder,
        images.coco,
        found,
        unreadable,
        test=config.test,
        channels=config.data.channels,
        more=more,
    )
    Console().print(scores_table(metrics))
    run.say(f"wrote {run.folder / METRICS} and {run.folder / PREDICTIONS}")
    return metrics


def load_detector(
    path: Path, engine: str, build: Build, sampling: SamplingConfig, test: InferenceConfig
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained detector and its metadata, from detector.safetensors or its run directory.

    Raises ``UserError`` where the file is broken, or holds something else.
    """
    file = path / DETECTOR if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path} holds no {DETECTOR}; give the folder of a finished detector run")
    state, metadata = read_weights(file)
    if metadata.get("format") != DETECTOR_FORMAT or metadata.get("engine") != engine:
        raise UserError(f"{file} is not a detector of engine {engine}; --eval-only takes the {DETECTOR} of a run")
    detector = DetectorConfig.model_validate(metadata["detector"])
    size, canvas = detector.size or "base", metadata["image_size"]
    options = trunk_options(detector, size, canvas, metadata["position_size"])
    vit = DenseViT(size, patch_size=detector.patch_size, in_chans=metadata["in_chans"], **options)
    model = build(vit, len(metadata["categories"]), detector, sampling, test)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
        raise UserError(f"{file} does not fit the network its metadata describe ({problem}); export it again") from None
    return model, metadata


def evaluate(config: DetectionConfig, build: Build) -> dict[str, Any]:
    """Score the detector in ``config.weights`` on the validation set; writes to ``config.output``.

    Network, canvas and pixel statistics are the file's; data, thresholds and batch are the configuration's. Raises
    ``UserError`` where the output folder holds a run or an evaluation, or the classes differ.
    """
    if config.weights is None:
        raise UserError("--eval-only needs a trained detector; set weights=detector.safetensors or its run")
    marks = (METRICS, DETECTOR, CONFIG, LOG, CHECKPOINTS, ENCODER, CLASSIFIER)
    held = [name for name in marks if (config.output / name).exists()]
    if held:
        raise UserError(
            f"output folder {config.output} already holds {', '.join(held)}; --eval-only overwrites nothing, "
            "choose another with output=FOLDER"
        )
    check_output(config, resume=False)
    val_set = read_coco(locate(config.data, "val"))
    model, metadata = load_detector(config.weights, config.engine, build, config.sampling, config.test)
    categories = [Category(*entry) for entry in metadata["categories"]]
    check_same_categories(categories, config.weights, val_set.categories, val_set.path)
    data = config.data.model_copy(
        update={"image_size": tuple(metadata["image_size"]), "channels": metadata["in_chans"]}
    )
    config = config.model_copy(update={"data": data})
    check_images(data, val_set)
    run = Run(config, distributed.join(config.device))
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to output folder {run.folder}: {error.strerror}") from None
    model.to(run.device)
    images = WholeImages(val_set, data, Statistics(tuple(metadata["mean"]), tuple(metadata["std"])))
    metrics = score(model, images, run, config)
    distributed.leave()
    return metrics
