"""Detections in the formats that other tools read: COCO's results format, average precision by pycocotools, and the
files of an evaluation: metrics.json, predictions.json, pictures of truth and prediction."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from mae_core.atomic import atomic_path, write_json, write_text
from mae_core.data.decoding import to_picture
from mae_core.data.images import Unreadable, UnreadableImage, spread_indices
from mae_core.layout import METRICS, PICTURES
from mae_core.training.run import Run
from transfer.detection.coco import CocoSet
from transfer.detection.config import DetectionConfig
from transfer.detection.draw import beside, draw_detections, draw_truth
from transfer.detection.heads import HEADS, Detections, Head
from transfer.detection.masks import mask_coder
from transfer.detection.samples import WholeImages, read_checked

PREDICTIONS = "predictions.json"
AREAS = {"": "all", "s": "small", "m": "medium", "l": "large"}
"""What is appended to AP and AR -> pycocotools' range of sizes: below 32 x 32 pixels, up to 96 x 96, above."""
FEW = {"AR1": 0, "AR10": 1}
"""Recall with so many detections an image -> its place among the numbers of detections that are counted."""
LARGEST_TABLE = 20
"""A table on the screen has no more classes than this; metrics.json has them all."""


def coco_results(coco: CocoSet, found: Sequence[Detections]) -> list[dict[str, Any]]:
    """COCO's results format: one record per detection, category ids as in the json, JSON values only."""
    results = []
    for detections in found:
        image_id = coco.images[detections.image_index].id
        boxes, scores, labels = (x.tolist() for x in (detections.boxes, detections.scores, detections.labels))
        for number, ((x1, y1, x2, y2), score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
            result = {
                "image_id": image_id,
                "category_id": coco.category_id(label),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            if detections.codes is not None:
                result["segmentation"] = _as_json(detections.codes[number])
            results.append(result)
    return results


def _as_json(code: dict[str, Any]) -> dict[str, Any]:
    counts = code["counts"]
    return {
        "size": [int(side) for side in code["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def average_precision(
    coco: CocoSet, results: list[dict[str, Any]], *, detections: int = 100, kinds: Iterable[str] = ("bbox", "segm")
) -> dict[str, Any]:
    """{kind: {AP, AP50, AP75, APs, APm, APl, AR, AR1, AR10, ARs, ARm, ARl, "per_class": {name: the same}}}.

    ``kinds``: bbox, segm. COCO's definition, values in 0..1; ``detections`` is how many of an image count, of which AR1
    and AR10 count 1 and 10 at most. A value without any truth (no large object, a class that does not occur) is None.
    Raises ``UserError`` where there is nothing to score against.
    """
    mask_coder()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco.check_scorable()
    scores: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind in kinds:
            truth, found = COCO(), COCO()
            truth.dataset = coco.truth()
            truth.createIndex()
            if results:
                found = truth.loadRes([_only(kind, result) for result in copy.deepcopy(results)])
            else:
                found.dataset = {**truth.dataset, "annotations": []}
                found.createIndex()
            evaluation = COCOeval(truth, found, kind)
            evaluation.params.maxDets = [1, min(10, detections), detections]  # of one image, ascending
            evaluation.evaluate()
            evaluation.accumulate()
            scores[kind] = _summary(evaluation, coco)
    return scores


def _only(kind: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result without what the other kind compares: pycocotools would take a mask's size from its box."""
    result.pop("segmentation" if kind == "bbox" else "bbox", None)
    return result


def _summary(evaluation: Any, coco: CocoSet) -> dict[str, Any]:
    """All values of all classes together, and of each."""
    every = list(range(len(coco.categories)))
    per_class = {name: _values(evaluation, [k]) for k, name in enumerate(_distinct(coco))}
    return {**_values(evaluation, every), "per_class": per_class}


def _values(evaluation: Any, classes: list[int]) -> dict[str, float | None]:
    """Means over pycocotools' precision (thresholds, recalls, classes, areas, counts) and recall, which lacks the
    second axis; -1 in them means no truth."""
    params = evaluation.params
    precision, recall = evaluation.eval["precision"][:, :, classes], evaluation.eval["recall"][:, classes]
    area = {name: params.areaRngLbl.index(label) for name, label in AREAS.items()}
    at = {name: np.isclose(params.iouThrs, threshold) for name, threshold in (("AP50", 0.5), ("AP75", 0.75))}
    return {
        "AP": _mean(precision[..., area[""], -1]),
        **{name: _mean(precision[chosen][..., area[""], -1]) for name, chosen in at.items()},
        **{f"AP{name}": _mean(precision[..., index, -1]) for name, index in area.items() if name},
        "AR": _mean(recall[..., area[""], -1]),
        **{name: _mean(recall[..., area[""], place]) for name, place in FEW.items()},
        **{f"AR{name}": _mean(recall[..., index, -1]) for name, index in area.items() if name},
    }


def _mean(values: np.ndarray) -> float | None:
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _distinct(coco: CocoSet) -> list[str]:
    """Class names; where two classes share one, with their id."""
    names = coco.names
    return [f"{c.name} ({c.id})" if names.count(c.name) > 1 else c.name for c in coco.categories]


def scores_table(scores: dict[str, Any], head: Head) -> Table:
    """For the screen: a row for each of the head's metrics, and where there are several classes the same of each,
    values in percent."""
    columns = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
    kinds = head.metrics
    names = list(scores[next(iter(kinds))]["per_class"])
    names = names if 1 < len(names) <= LARGEST_TABLE else []
    table = Table("", *columns, title="average precision, %", title_justify="left")
    rows = [("", kind, scores[kind]) for kind in kinds]
    rows += [(name, kind, scores[kind]["per_class"][name]) for name in names for kind in kinds]
    for name, kind, values in rows:
        cells = ("-" if values[column] is None else f"{100 * values[column]:.1f}" for column in columns)
        table.add_row(f"{name} {kinds[kind]}".strip(), *cells)
    return table


def write_results(
    images: WholeImages,
    found: Sequence[Detections],
    unreadable: list[Unreadable],
    run: Run,
    config: DetectionConfig,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Score ``found``, write metrics.json (``more`` included), predictions.json and pictures to the run directory and
    print the table; the metrics, on rank 0."""
    run.note_unreadable(unreadable)
    if not run.is_main:
        return {}
    head, test, coco = HEADS[config.model.head], config.test, images.coco
    results = coco_results(coco, found)
    metrics = {
        **average_precision(coco, results, detections=test.detections, kinds=head.metrics),
        "images": len(found),
        "unreadable": [list(entry) for entry in unreadable],
        **more,
    }
    write_text(run.folder / PREDICTIONS, json.dumps(results))
    of_index = {entry.image_index: entry for entry in found}
    for index in spread_indices(len(coco.images), test.num_pictures):
        picture = truth_and_prediction(coco, of_index.get(index), config)
        if picture is not None:
            with atomic_path(run.folder / PICTURES / f"val_{coco.images[index].path.stem}.png") as temporary:
                picture.save(temporary)
    write_json(run.folder / METRICS, metrics)
    Console().print(scores_table(metrics, head))
    run.say(f"wrote {run.folder / METRICS} and {run.folder / PREDICTIONS}")
    return metrics


def truth_and_prediction(
    coco: CocoSet,
    detections: Detections | None,
    config: DetectionConfig,
    *,
    least: float | None = None,
    title: str = "truth",
) -> Image.Image | None:
    """The annotated image under ``title`` beside the detections of a score of at least ``least``, the configuration's
    where None; None where the image was not readable."""
    if detections is None:
        return None
    record, least = coco.images[detections.image_index], config.test.picture_score if least is None else least
    try:
        pixels = to_picture(read_checked(record, config.data.channels))
    except UnreadableImage:
        return None
    drawn = HEADS[config.model.head].drawn
    truth = draw_truth(coco.names, record, pixels, drawn)
    prediction = draw_detections(coco.names, detections.above(least), pixels, drawn)
    return beside([(title, truth), (f"prediction, score from {least:g}", prediction)])
