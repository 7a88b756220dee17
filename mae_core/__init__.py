"""Masked autoencoder pre-training for vision transformers, and everything that needs no detector and no segmenter.

The public names load on first use, so that ``import mae_core`` stays instant and pulls in no model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "build_mae": "mae_core.models.mae",
    "MaskedAutoencoder": "mae_core.models.mae",
    "MAEOutput": "mae_core.models.mae",
    "load_mae": "mae_core.weights.load",
    "load_encoder": "mae_core.weights.load",
    "build_classifier": "mae_core.weights.load",
    "load_classifier": "mae_core.training.classify_images",
    "embed": "mae_core.training.embedding",
    "load_pca": "mae_core.training.target_files",
    "load_tokenizer": "mae_core.training.target_files",
    "TokenTarget": "mae_core.targets",
    "convert": "mae_core.weights.writing",
    "ViTEncoder": "mae_core.models.encoder",
    "SIZES": "mae_core.models.sizes",
    "PatchMask": "mae_core.masking",
    "PatchGrid": "mae_core.patches",
    "patchify": "mae_core.patches",
    "unpatchify": "mae_core.patches",
    "UserError": "mae_core.errors",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from mae_core.errors import UserError
    from mae_core.masking import PatchMask
    from mae_core.models.encoder import ViTEncoder
    from mae_core.models.mae import MAEOutput, MaskedAutoencoder, build_mae
    from mae_core.models.sizes import SIZES
    from mae_core.patches import PatchGrid, patchify, unpatchify
    from mae_core.targets import TokenTarget
    from mae_core.training.classify_images import load_classifier
    from mae_core.training.embedding import embed
    from mae_core.training.target_files import load_pca, load_tokenizer
    from mae_core.weights.load import build_classifier, load_encoder, load_mae
    from mae_core.weights.writing import convert


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mae_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
