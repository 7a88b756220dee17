"""Detectors of one engine in another: the same layers under other names, and where the background class stands.

No engine is imported here, so that a detector of detectron2 is read where detectron2 is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mae_core.errors import UserError
from transfer.detection.config import DetectorConfig
from transfer.engines import DETECTION

RPN_THEIRS = "proposal_generator.rpn_head"
CLASSES = re.compile(r"roi_heads\.box_predictor\.cls_score\.")
BOXES = re.compile(r"roi_heads\.box_predictor\.bbox_pred\.")
MASKS = re.compile(r"roi_heads\.mask_predictor\.mask_fcn_logits\.")
ANCHORS = re.compile(r"rpn\.head\.(cls_logits|bbox_pred)\.")
"""Layers, by torchvision's names, whose rows stand in another order or number."""
DELTAS = 4


def names_of(config: DetectorConfig) -> dict[str, str]:
    """Start of a name of the torchvision engine -> of the detectron2 engine; all other names are equal."""
    several = config.rpn_convs > 1
    rows = {
        f"rpn.head.conv.{n}.0.": f"{RPN_THEIRS}.conv.conv{n}." if several else f"{RPN_THEIRS}.conv."
        for n in range(config.rpn_convs)
    }
    rows["rpn.head.cls_logits."] = f"{RPN_THEIRS}.objectness_logits."
    rows["rpn.head.bbox_pred."] = f"{RPN_THEIRS}.anchor_deltas."
    for n in range(config.box_convs):
        rows[f"roi_heads.box_head.{n}.0."] = f"roi_heads.box_head.conv{n + 1}."
        rows[f"roi_heads.box_head.{n}.1."] = f"roi_heads.box_head.conv{n + 1}.norm."
    rows[f"roi_heads.box_head.{config.box_convs + 1}."] = "roi_heads.box_head.fc1."
    for n in range(config.mask_convs):
        rows[f"roi_heads.mask_head.{n}.0."] = f"roi_heads.mask_head.mask_fcn{n + 1}."
        rows[f"roi_heads.mask_head.{n}.1."] = f"roi_heads.mask_head.mask_fcn{n + 1}.norm."
    rows["roi_heads.mask_predictor.conv5_mask."] = "roi_heads.mask_head.deconv."
    rows["roi_heads.mask_predictor.mask_fcn_logits."] = "roi_heads.mask_head.predictor."
    return rows


def renamed(name: str, rows: Mapping[str, str]) -> str:
    """``name`` by the longest start that fits."""
    start = max((start for start in rows if name.startswith(start)), key=len, default="")
    return rows.get(start, "") + name.removeprefix(start)


def to_detectron2(state: Mapping[str, Tensor], config: DetectorConfig) -> dict[str, Tensor]:
    """Tensors of the torchvision engine's network -> of detectron2's, where the background is the last class, and has
    neither boxes nor masks."""
    names = names_of(config)
    return {renamed(name, names): _with_rows(tensor, name, config, back=False) for name, tensor in state.items()}


def to_torchvision(state: Mapping[str, Tensor], config: DetectorConfig) -> dict[str, Tensor]:
    """The inverse of ``to_detectron2``; boxes and masks of the background are zeros, they are never read."""
    names = {theirs: ours for ours, theirs in names_of(config).items()}
    ours = {renamed(theirs, names): tensor for theirs, tensor in state.items()}
    return {name: _with_rows(tensor, name, config, back=True) for name, tensor in ours.items()}


def _with_rows(tensor: Tensor, name: str, config: DetectorConfig, *, back: bool) -> Tensor:
    """A layer, by torchvision's name, with its rows as detectron2 has them, or ``back``."""
    if CLASSES.match(name):
        return tensor.roll(1 if back else -1, 0)
    if BOXES.match(name) or MASKS.match(name):
        background = DELTAS if BOXES.match(name) else 1
        return torch.cat([torch.zeros_like(tensor[:background]), tensor]) if back else tensor[background:]
    if ANCHORS.match(name):  # torchvision has the sizes of a ratio together, detectron2 the ratios of a size
        per_anchor, ratios = DELTAS if "bbox_pred" in name else 1, len(config.anchor_ratios)
        sizes = len(tensor) // per_anchor // ratios
        shape = (sizes, ratios) if back else (ratios, sizes)
        return tensor.unflatten(0, (*shape, per_anchor)).transpose(0, 1).flatten(0, 2)
    return tensor


TRANSLATIONS = {("torchvision", "detectron2"): to_detectron2, ("detectron2", "torchvision"): to_torchvision}
"""(engine of a file, engine of a network) -> tensors of the one as the other's."""


def translated(
    state: Mapping[str, Tensor], config: DetectorConfig, *, source: str, engine: str, path: object
) -> dict[str, Tensor]:
    """The tensors of a detector of engine ``source`` for the network of ``engine``. Raises ``UserError``, naming the
    file ``path``, where one engine cannot have the other's network."""
    translate = TRANSLATIONS.get((source, engine))
    cascade = config.cascade and "model.cascade" not in DETECTION[engine].can
    if translate is None or cascade:
        network = f"cascade of engine {source}" if cascade else f"detector of engine {source}"
        raise UserError(f"{path} is a {network}, which engine {engine} cannot run; use engine={source}")
    return translate(state, config)
