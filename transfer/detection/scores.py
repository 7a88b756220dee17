"""Detections in COCO's results format, and their average precision by pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from torch import Tensor

from mae_core.errors import UserError
from transfer.detection.coco import CocoSet
from transfer.detection.masks import mask_coder

KINDS = {"bbox": "box", "segm": "mask"}
"""pycocotools' name of what is compared -> ours."""

AREAS = {"": "all", "s": "small", "m": "medium", "l": "large"}
"""What is appended to AP and AR -> pycocotools' range of sizes: below 32 x 32 pixels, up to 96 x 96, above."""
FEW = {"AR1": 0, "AR10": 1}
"""Recall with so many detections an image -> its place among the numbers of detections that are counted."""
LARGEST_TABLE = 20
"""A table on the screen has no more classes than this; metrics.json has them all."""


class Detections(NamedTuple):
    """What was found in image ``image_index`` of a set, best first, in pixels of the original image.

    boxes (n, 4) float32 x1 y1 x2 y2; scores (n,); labels (n,) from 1; codes: n run-length codes of pycocotools
    """

    image_index: int
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    codes: list[dict[str, Any]]


def coco_results(coco: CocoSet, found: Sequence[Detections]) -> list[dict[str, Any]]:
    """COCO's results format: one record per detection, category ids as in the json, JSON values only."""
    results = []
    for detections in found:
        image_id = coco.images[detections.image_index].id
        for box, score, label, code in zip(
            detections.boxes.tolist(),
            detections.scores.tolist(),
            detections.labels.tolist(),
            detections.codes,
            strict=True,
        ):
            x1, y1, x2, y2 = box
            counts = code["counts"]
            results.append(
                {
                    "image_id": image_id,
                    "category_id": coco.category_id(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                    "segmentation": {
                        "size": [int(side) for side in code["size"]],
                        "counts": counts.decode() if isinstance(counts, bytes) else counts,
                    },
                }
            )
    return results


def average_precision(coco: CocoSet, results: list[dict[str, Any]], *, detections: int = 100) -> dict[str, Any]:
    """{"bbox" | "segm": {AP, AP50, AP75, APs, APm, APl, AR, AR1, AR10, ARs, ARm, ARl, "per_class": {name: the same}}}.

    COCO's definition, values in 0..1; ``detections`` is how many of an image count but in AR1 and AR10. A value without
    any truth (no large object, a class that does not occur) is None. Raises ``UserError`` where the set has no
    annotation at all.
    """
    mask_coder()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not any(image.instances for image in coco.images):
        raise UserError(f"{coco.path} has no annotations; there is nothing to score against")
    scores: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind in KINDS:
            truth, found = COCO(), COCO()
            truth.dataset = coco.truth()
            truth.createIndex()
            if results:
                found = truth.loadRes([_only(kind, result) for result in copy.deepcopy(results)])
            else:
                found.dataset = {**truth.dataset, "annotations": []}
                found.createIndex()
            evaluation = COCOeval(truth, found, kind)
            evaluation.params.maxDets = [1, 10, max(detections, 11)]
            evaluation.evaluate()
            evaluation.accumulate()
            scores[kind] = _summary(evaluation, coco)
    return scores


def _only(kind: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result without what the other kind compares: pycocotools would take a mask's size from its box."""
    del result["segmentation" if kind == "bbox" else "bbox"]
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


def scores_table(scores: dict[str, Any]) -> Table:
    """For the screen: a row for boxes and one for masks, and where there are several classes the same of each, values
    in percent."""
    columns = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
    names = list(scores["bbox"]["per_class"])
    names = names if 1 < len(names) <= LARGEST_TABLE else []
    table = Table("", *columns, title="average precision, %", title_justify="left")
    rows = [("", kind, scores[kind]) for kind in KINDS]
    rows += [(name, kind, scores[kind]["per_class"][name]) for name in names for kind in KINDS]
    for name, kind, values in rows:
        cells = ("-" if values[column] is None else f"{100 * values[column]:.1f}" for column in columns)
        table.add_row(f"{name} {KINDS[kind]}".strip(), *cells)
    return table
