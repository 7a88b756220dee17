"""Trained classifiers from weights files: fine-tuned, or probes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mae_core.errors import UserError
from mae_core.layout import ATTENTIVE, ATTENTIVE_FORMAT, CLASSIFIER, stated_format
from mae_core.models.probe import AttentiveClassifier
from mae_core.weights.encoder_file import EncoderFile, EncoderInfo
from mae_core.weights.files import read_weights
from mae_core.weights.load import fit_state, read_encoder
from mae_core.weights.report import LoadReport
from mae_core.weights.timm_file import read_timm

QUERIES = "pool.queries"
"""The tensor that tells the classifier of an attentive probe."""


def read_classifier(path: Path | str, **asked: Any) -> EncoderFile:
    """As ``read_encoder``, and of an attentive probe, which is no encoder's file, what ``classifier_of`` takes."""
    path = Path(path)
    attentive = path / ATTENTIVE if path.is_dir() and not (path / CLASSIFIER).is_file() else path
    if not attentive.is_file() or stated_format(attentive) != ATTENTIVE_FORMAT:
        return read_encoder(path, **asked)
    if trunk := stated_format(attentive, "timm"):
        return read_timm(attentive, trunk)
    tensors, metadata = read_weights(attentive)
    info = EncoderInfo.from_metadata(metadata).with_facts(format="mae_core")
    return EncoderFile(attentive, info, tensors, {name: [name] for name in tensors}, LoadReport(str(attentive)))


def classifier_of(
    source: EncoderFile, *, image_size: int | Sequence[int] | None = None
) -> tuple[nn.Module, LoadReport]:
    """The trained classifier of a file of ours or of the official fine-tuned layout, in eval mode, and the report.

    ``source``: see ``read_classifier``.

    Raises ``UserError`` where the file is an encoder without a head.
    """
    if not source.num_classes:
        raise UserError(
            f"{source.path} is a pre-trained encoder without a head, not a classifier; fine-tune it with mae finetune, "
            "or measure it with mae linprobe or mae knn"
        )
    if QUERIES in source.tensors:
        trunk = source.build(image_size)
        attentive = AttentiveClassifier(trunk, source.num_classes, len(source.tensors[QUERIES]))
        rename = {name: f"trunk.{name}" for name in source.tensors if not name.startswith(("pool.", "head."))}
        return attentive.eval(), fit_state(attentive, source, grid=trunk.grid[:2], trunk=trunk, rename=rename)
    model = source.build(image_size, pooling=source.classifier_pooling, num_classes=source.num_classes)
    return model.eval(), fit_state(model, source, grid=model.grid[:2])
