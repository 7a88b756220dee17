"""The pre-trained encoder into a backbone: the same loader and the same report for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mae_core.weights.load import LoadReport, fit_state, read_encoder
from transfer.backbone import DenseViT

NEW = ("*relative_position_bias_table", "*.rel_pos_h", "*.rel_pos_w", "*.ls1.gamma", "*.ls2.gamma")
"""Tensors of a dense backbone that a pre-trained encoder does not have."""


def load_pretrained(backbone: DenseViT, path: Path | str, *, allow_missing: Sequence[str] = ()) -> LoadReport:
    """Load the encoder of a weights file, run directory or checkpoint into ``backbone``; returns the report.

    Positions are resized to the backbone's stored grid. ``allow_missing``: patterns of tensors that the file may lack
    and that start anew. Raises ``UserError`` where the file is broken or of another
    architecture: a backbone never starts half loaded.
    """
    source = read_encoder(path)
    unused = {
        "norm.*": "dense maps take no final norm",
        "fc_norm.*": "a classifier's norm",
        "head.*": "a classifier's head",
    }
    if backbone.cls_token is None:
        unused["cls_token"] = "this backbone has no cls token"
    return fit_state(backbone, source, grid=backbone.grid[:2], new=NEW, unused=unused, allow_missing=allow_missing)
