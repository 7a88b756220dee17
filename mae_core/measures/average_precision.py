"""Mean average precision: how well a classifier with several labels per image ranks the images of each class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class MultiLabelScores(NamedTuple):
    """average_precision (classes,), NaN for a class that no image has; the number of images."""

    average_precision: Tensor
    images: int

    @property
    def mean(self) -> float:
        """mAP over the classes that occur, 0..1."""
        return float(self.average_precision.nanmean())

    def as_dict(self, classes: list[str]) -> dict[str, Any]:
        """For metrics.json, in per cent."""
        each = dict(zip(classes, self.average_precision.tolist(), strict=True))
        return {
            "mAP": round(100 * self.mean, 3),
            "images": self.images,
            "per_class": {name: None if value != value else round(100 * value, 3) for name, value in each.items()},
        }


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """scores (N, C), targets (N, C) of zeros and ones -> (C,) float64: the mean of the precision at each positive,
    images of equal score taken together; NaN for a class without positives."""
    results = []
    for score, positive in zip(scores.double().T, targets.double().T, strict=True):
        order = score.argsort(descending=True)
        hits = positive[order].cumsum(0)
        precision = hits / torch.arange(1, len(hits) + 1, device=hits.device)
        last_of_equals = torch.searchsorted(-score[order], -score[order], right=True) - 1
        results.append((precision[last_of_equals] * positive[order]).sum() / hits[-1])
    return torch.stack(results)
