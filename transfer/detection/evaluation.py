"""What an evaluation leaves in a folder: metrics.json, predictions.json, and pictures of truth and prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mae_core.atomic import atomic_path, write_json, write_text
from mae_core.data.decoding import to_picture
from mae_core.data.images import Unreadable, UnreadableImage
from mae_core.layout import METRICS, PICTURES
from transfer.detection.coco import CocoSet
from transfer.detection.config import InferenceConfig
from transfer.detection.draw import beside, draw_detections, draw_truth
from transfer.detection.samples import read_checked
from transfer.detection.scores import Detections, average_precision, coco_results

PREDICTIONS = "predictions.json"


def spread_indices(total: int, count: int) -> list[int]:
    """At most ``count`` indices spread evenly over ``total``."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def write_evaluation(
    folder: Path,
    coco: CocoSet,
    found: Sequence[Detections],
    unreadable: Sequence[Unreadable],
    *,
    test: InferenceConfig,
    channels: int,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score detections and write all three; returns what metrics.json holds, ``more`` included."""
    results = coco_results(coco, found)
    metrics = {
        **average_precision(coco, results, detections=test.detections),
        "images": len(found),
        "unreadable": [list(entry) for entry in unreadable],
        **(more or {}),
    }
    write_text(folder / PREDICTIONS, json.dumps(results))
    of_index = {entry.image_index: entry for entry in found}
    for index in spread_indices(len(coco.images), test.num_pictures):
        picture = truth_and_prediction(coco, of_index.get(index), channels, test.picture_score)
        if picture is not None:
            with atomic_path(folder / PICTURES / f"val_{coco.images[index].path.stem}.png") as temporary:
                picture.save(temporary)
    write_json(folder / METRICS, metrics)
    return metrics


def truth_and_prediction(
    coco: CocoSet, detections: Detections | None, channels: int, least: float
) -> Image.Image | None:
    """Truth and detections of a score of at least ``least``, side by side; None where the image was not readable."""
    if detections is None:
        return None
    record = coco.images[detections.image_index]
    try:
        pixels = to_picture(read_checked(record, channels))
    except UnreadableImage:
        return None
    prediction = draw_detections(coco, detections, pixels, least)
    title = f"prediction, score from {least:g}"
    return beside([("truth", draw_truth(coco, record, pixels)), (title, prediction)])
