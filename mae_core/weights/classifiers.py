"""Frozen trunks and trained classifiers from weights files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from mae_core.config.sections import JobConfig
from mae_core.errors import UserError
from mae_core.models.encoder import Pooling, ViTEncoder
from mae_core.weights.load import EncoderFile, LoadReport, fit_state, read_encoder, with_channels_of

NORM_AFTER_POOLING = {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"}
Frozen = TypeVar("Frozen", bound=JobConfig)


def weights_of(config: Any) -> EncoderFile:
    """The file behind the ``weights`` of a configuration. Raises ``UserError`` where none is given."""
    if config.weights is None:
        raise UserError("no weights given; set weights=FILE, such as the encoder.safetensors of a run")
    return read_encoder(config.weights)


def as_file_says(source: EncoderFile, config: Frozen) -> Frozen:
    """``config`` with the channels, the image size and, of a classifier, the test crop of the weights where the user
    set none: what is frozen is measured as it was when it was trained. Raises ``UserError`` where other channels are
    asked for."""
    config = with_channels_of(source, config)
    data = config.data  # type: ignore[attr-defined]
    source.check_asked(in_chans=data.channels)
    stated = {"image_size": source.image_size, "test_crop": source.metadata.get("test_crop")}
    wanted = {name: value for name, value in stated.items() if value is not None and name not in data.model_fields_set}
    return config.model_copy(update={"data": data.model_copy(update=wanted)}) if wanted else config


def trunk_from(
    source: EncoderFile, *, pooling: Pooling, image_size: int | Sequence[int] | None = None
) -> tuple[ViTEncoder, LoadReport]:
    """A frozen trunk that maps images (B, C, H, W) to features (B, D), in eval mode, and the report of its weights.

    ``cls`` is the cls token after the encoder's norm; ``mean`` the mean of the patch tokens, after which the encoder's
    norm follows, as in a classifier, with the norm it was trained with. The official code leaves a random norm there.
    Raises ``UserError`` where the file is a classifier on mean-pooled patches and the cls token is asked for.
    """
    if pooling == "cls" and not source.has_norm:
        raise UserError(
            f"{source.path} has no norm of its cls token, as classifiers on mean-pooled patches have none; "
            "set model.pooling=mean, or give the encoder it was fine-tuned from"
        )
    model = vit_of(source, image_size, pooling)
    rename = NORM_AFTER_POOLING if pooling == "mean" and source.has_norm else {}
    report = fit_state(model, source, grid=model.grid[:2], unused={"head.*": "a classifier's head"}, rename=rename)
    return model.requires_grad_(False).eval(), report


def classifier_of(
    source: EncoderFile, *, image_size: int | Sequence[int] | None = None
) -> tuple[ViTEncoder, LoadReport]:
    """The trained classifier of a file of ours or of the official fine-tuned layout, in eval mode, and the report.

    Raises ``UserError`` where the file is an encoder without a head.
    """
    if not source.num_classes:
        raise UserError(
            f"{source.path} is a pre-trained encoder without a head, not a classifier; fine-tune it with mae finetune, "
            "or measure it with mae linprobe or mae knn"
        )
    model = vit_of(source, image_size, "cls" if source.has_norm else "mean", num_classes=source.num_classes)
    return model.eval(), fit_state(model, source, grid=model.grid[:2])


def vit_of(
    source: EncoderFile, image_size: int | Sequence[int] | None, pooling: Pooling, *, num_classes: int = 0
) -> ViTEncoder:
    """An untrained model of a file's architecture, by default at its image size."""
    return ViTEncoder(
        source.size,
        image_size=source.image_size if image_size is None else image_size,
        patch_size=source.patch_size,
        in_chans=source.in_chans,
        pooling=pooling,
        num_classes=num_classes,
    )
