"""The metric that is registered with mmseg: mIoU, mAcc, aAcc, and the values of each class."""

from __future__ import annotations

import math

from mmseg.evaluation.metrics import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class PerClassIoUMetric(IoUMetric):
    """mmseg's IoU metric that also keeps the values of each class, in percent, None where a class never occurs."""

    per_class: dict[str, dict[str, float | None]] = {}
    """Set on the rank that computes."""

    def compute_metrics(self, results: list) -> dict[str, float]:
        """mIoU, mAcc and aAcc in percent; sets ``per_class``: name -> IoU, Acc."""
        areas = [sum(column) for column in zip(*results, strict=True)]
        values = self.total_area_to_metrics(*areas, self.metrics, self.nan_to_num, self.beta)
        self.per_class = {
            name: {key: _percent(values[key][index]) for key in ("IoU", "Acc")}
            for index, name in enumerate(self.dataset_meta["classes"])
        }
        return super().compute_metrics(results)


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else round(100 * float(value), 2)
