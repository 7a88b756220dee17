"""What can be done with an encoder: the ``mae`` command, its data, and where its number is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NEIGHBOURS = 20
"""Of k-NN, as the literature reports it; fewer where there are fewer training images."""


@dataclass(frozen=True)
class Kind:
    """A command that trains on an encoder, or reads it frozen.

    command   the words of ``mae``
    layout    the class of ``transfer.compare.labelled_sets`` that reads its data
    metric    name of its number, of which more is better
    score     the number in metrics.json
    schema    "module:class" of its configuration; empty where its recipes are mmseg's
    recipe    name of the recipe for small data; None where it needs none
    more      options that make the command this kind
    frozen    whether the encoder stays as it is
    trains    whether anything is trained, so that rate, steps and seed mean something
    """

    command: tuple[str, ...]
    layout: str
    metric: str
    score: Callable[[Mapping[str, Any]], float]
    schema: str = ""
    recipe: str | None = None
    more: tuple[str, ...] = ()
    frozen: bool = False
    trains: bool = True


TOP1 = "top-1 accuracy (%)"


def _neighbours_score(metrics: Mapping[str, Any]) -> float:
    """Of the one k that was asked for."""
    (top1,) = metrics["top1"].values()
    return float(top1)


def _detection_score(metrics: Mapping[str, Any]) -> float:
    """Mask AP in per cent; of a detector without masks box AP."""
    return 100 * float((metrics.get("segm") or metrics["bbox"])["AP"])


_PROBE = {
    "command": ("mae", "linprobe"),
    "layout": "ClassFolders",
    "score": lambda metrics: float(metrics["top1"]),
    "schema": "mae_core.training.frozen_config:LinprobeConfig",
    "recipe": "small_data",
    "frozen": True,
}
KINDS: dict[str, Kind] = {
    "knn": Kind(
        ("mae", "knn"),
        "ClassFolders",
        f"k-NN {TOP1}",
        _neighbours_score,
        "mae_core.training.frozen_config:KnnConfig",
        frozen=True,
        trains=False,
    ),
    "linprobe": Kind(metric=f"linear probe, {TOP1}", **_PROBE),  # type: ignore[arg-type]
    "attentive": Kind(metric=f"attentive probe, {TOP1}", more=("probe.kind=attentive",), **_PROBE),  # type: ignore[arg-type]
    "finetune": Kind(
        ("mae", "finetune"),
        "ClassFolders",
        TOP1,
        lambda metrics: float(metrics["top1"]),
        "mae_core.training.finetune_config:FinetuneConfig",
        "tiny_96",
    ),
    "detection": Kind(
        ("mae", "detect", "train"),
        "Coco",
        "COCO AP (%)",
        _detection_score,
        "transfer.detection.config:DetectionConfig",
        "small_data",
    ),
    "segmentation": Kind(
        ("mae", "segment", "train"), "LabelMaps", "mIoU (%)", lambda metrics: float(metrics["mIoU"]), "", "small_data"
    ),
}
"""A row of a comparison's tasks. To add one: a row."""
