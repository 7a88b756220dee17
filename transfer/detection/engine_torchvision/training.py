"""A detector in the core's loop: for engines that bring a network and no loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mae_core.data.config import Workers
from mae_core.data.images import Unreadable, spread_indices
from mae_core.training import distributed
from mae_core.training.averaging import attach_average
from mae_core.training.loop import Hook, fit
from mae_core.training.run import Run
from transfer.detection.config import DetectionConfig
from transfer.detection.draw import stacked
from transfer.detection.engine import Fitted, Job
from transfer.detection.engine_torchvision.regions import paste_mask
from transfer.detection.heads import Detections
from transfer.detection.masks import encode_masks
from transfer.detection.results import truth_and_prediction, write_results
from transfer.detection.samples import DetectionBatch, WholeImages, collate_readable

PICTURE_ROWS = 3


def detection_losses(model: nn.Module, batch: DetectionBatch) -> dict[str, Tensor]:
    """(model, batch) -> the sum of the detector's losses, and each of them."""
    losses = model(batch.pixels, batch.sizes, batch.targets)
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


@torch.inference_mode()
def detect(
    model: nn.Module, images: WholeImages, run: Run, indices: Sequence[int], *, batch_size: int, workers: Workers
) -> tuple[list[Detections], list[Unreadable]]:
    """What ``model`` finds in the images of ``indices``, in original pixels, and the images that could not be read.

    Under ``torchrun`` each rank takes its share, and every rank gets the whole result.
    """
    model.eval()
    found: list[Detections] = []
    unreadable: list[Unreadable] = []
    for batch in run.loader(images, collate_readable, batch_size, workers=workers, indices=indices):
        unreadable += batch.unreadable
        if len(batch):
            with run.autocast():
                outputs = model(batch.pixels.to(run.device, non_blocking=True), batch.sizes)
            found += [to_original(output, images, index) for output, index in zip(outputs, batch.indices, strict=True)]
    parts = distributed.gather((found, unreadable))
    found = sorted((entry for part in parts for entry in part[0]), key=lambda detections: detections.image_index)
    return found, [entry for part in parts for entry in part[1]]


def to_original(output: dict[str, Tensor], images: WholeImages, index: int) -> Detections:
    """The model's output for one canvas -> detections in the pixels of the image that lies on it."""
    record, placement = images.coco.images[index], images.placement(index)
    width, height = record.width, record.height
    scale = torch.tensor([width / placement.width, height / placement.height] * 2)
    boxes = (output["boxes"].float().cpu() * scale).minimum(torch.tensor([width, height] * 2))
    codes = None
    if "masks" in output:
        pairs = zip(output["masks"].float().cpu(), boxes.tolist(), strict=True)
        masks = [paste_mask(mask, box, height, width) for mask, box in pairs]
        codes = encode_masks(torch.stack(masks).numpy()) if masks else []
    return Detections(index, boxes, output["scores"].float().cpu(), output["labels"].cpu(), codes)


def fit_in_core_loop(model: nn.Module, job: Job) -> Fitted:
    """Train ``model`` as the job says; the network to score, which is the averaged one where ``ema`` is set."""
    config, run, settings = job.config, job.run, job.settings
    optimizer = torch.optim.AdamW(job.parameter_groups(model), lr=settings.lr, betas=config.optim.betas, fused=True)
    scored = model if config.ema is None else attach_average(optimizer, model, config.ema)
    start = run.restore(model, optimizer)
    coco = job.images.coco

    def draw(step: int) -> None:
        indices = spread_indices(len(job.images), PICTURE_ROWS)
        shown, _ = detect(scored, job.images, run, indices, batch_size=1, workers=0)
        rows = [truth_and_prediction(coco, detections, config) for detections in shown]
        if run.is_main and any(rows):
            run.picture(f"step_{step:08d}", stacked([row for row in rows if row is not None]), step)

    # An image is scored in about the time that it trains in: more regions, and masks are pasted and encoded
    # (nuclei, ViT-Tiny, CPU: 0.8 to 1.0 of it).
    result = fit(
        model,
        job.batches(start, job.statistics),
        detection_losses,
        optimizer,
        run=run,
        settings=settings,
        start_step=start,
        hooks=[Hook(config.log.pictures_every, draw, min(PICTURE_ROWS, len(job.images)))],
        metadata=job.metadata,
        after=len(job.images),
    )
    return Fitted(scored, result.seconds if start < settings.total_steps else None, result.loss)


def score_by_detecting(
    model: nn.Module, images: WholeImages, run: Run, config: DetectionConfig, more: dict[str, Any]
) -> dict[str, Any]:
    """Detect in all images and write the evaluation, with ``more``, to the run directory; the metrics, on rank 0."""
    run.say(f"evaluating on {len(images)} images")
    found, unreadable = detect(
        model, images, run, range(len(images)), batch_size=config.test.test_batch, workers=config.data.workers
    )
    return write_results(images, found, unreadable, run, config, more)
