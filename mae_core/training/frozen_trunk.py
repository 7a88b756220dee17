"""Frozen trunks and trained classifiers from weights files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mae_core.errors import UserError
from mae_core.layout import ATTENTIVE, ATTENTIVE_FORMAT, CLASSIFIER, stated_format
from mae_core.models.probe import AttentiveClassifier
from mae_core.models.sizes import Pooling
from mae_core.models.timm_trunk import Encoder
from mae_core.weights.encoder_file import EncoderFile, EncoderInfo
from mae_core.weights.files import read_weights
from mae_core.weights.load import fit_state, read_encoder, stated_in
from mae_core.weights.report import LoadReport
from mae_core.weights.timm_file import read_timm

QUERIES = "pool.queries"
"""The tensor that tells the classifier of an attentive probe."""
NORM_AFTER_POOLING = {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"}


def weights_of(config: Any) -> EncoderFile:
    """The file behind the ``weights`` of a configuration. Raises ``UserError`` where none is given."""
    if config.weights is None:
        raise UserError("no weights given; set weights=FILE, such as the encoder.safetensors of a run")
    return read_encoder(config.weights, **stated_in(config))


def classifier_file(config: Any) -> EncoderFile:
    """As ``weights_of``, and of an attentive probe, which is no encoder's file, what ``classifier_of`` takes."""
    path = None if config.weights is None else Path(config.weights)
    if path is not None and path.is_dir() and not (path / CLASSIFIER).is_file():
        path = path / ATTENTIVE
    if path is None or not path.is_file() or stated_format(path) != ATTENTIVE_FORMAT:
        return weights_of(config)
    if trunk := stated_format(path, "timm"):
        return read_timm(path, trunk)
    tensors, metadata = read_weights(path)
    info = EncoderInfo.from_metadata(metadata).with_facts(format="mae_core")
    return EncoderFile(path, info, tensors, {name: [name] for name in tensors}, LoadReport(str(path)))


def trunk_from(
    source: EncoderFile, *, pooling: Pooling | None, image_size: int | Sequence[int] | None = None
) -> tuple[Encoder, LoadReport]:
    """A frozen trunk that maps images (B, C, H, W) to features (B, D), in eval mode, and the report of its weights;
    without ``pooling`` to normalised tokens (B, 1 + N, D), the cls token first.

    ``cls`` is the cls token after the encoder's norm; ``mean`` the mean of the patch tokens, after which the encoder's
    norm follows, as in a classifier, with the norm it was trained with. The official code leaves a random norm there.
    Raises ``UserError`` where the file is a classifier on mean-pooled patches and the cls token is asked for.
    """
    source.check_pooling(pooling)
    model = source.build(image_size, pooling=pooling)
    rename = NORM_AFTER_POOLING if pooling == "mean" and source.has_norm else {}
    report = fit_state(model, source, grid=model.grid[:2], unused={"head.*": "a classifier's head"}, rename=rename)
    return model.requires_grad_(False).eval(), report


def classifier_of(
    source: EncoderFile, *, image_size: int | Sequence[int] | None = None
) -> tuple[nn.Module, LoadReport]:
    """The trained classifier of a file of ours or of the official fine-tuned layout, in eval mode, and the report.

    ``source``: see ``classifier_file``.

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
