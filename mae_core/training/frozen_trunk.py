"""Frozen trunks from weights files, and the files that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mae_core.errors import UserError
from mae_core.models.sizes import Pooling
from mae_core.models.timm_trunk import Encoder
from mae_core.weights.classifier import read_classifier
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import fit_state, read_encoder, stated_in
from mae_core.weights.report import LoadReport

NORM_AFTER_POOLING = {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"}


def weights_of(config: Any) -> EncoderFile:
    """The file behind the ``weights`` of a configuration. Raises ``UserError`` where none is given."""
    if config.weights is None:
        raise UserError("no weights given; set weights=FILE, such as the encoder.safetensors of a run")
    return read_encoder(config.weights, **stated_in(config))


def classifier_file(config: Any) -> EncoderFile:
    """The classifier behind the ``weights`` of a configuration, see ``read_classifier``; raises as ``weights_of``."""
    return weights_of(config) if config.weights is None else read_classifier(config.weights, **stated_in(config))


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
