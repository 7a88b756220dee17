"""Transfer of a pre-trained encoder to detection and segmentation.

The public names load on first use, so that ``import transfer`` imports no engine and no model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "load_detector": "transfer.detection.detector",
    "Detector": "transfer.detection.detector",
    "Detected": "transfer.detection.detector",
    "load_segmenter": "transfer.segmentation.segmenter",
    "Segmenter": "transfer.segmentation.segmenter",
    "Segmented": "transfer.segmentation.segmenter",
    "load_classifier": "mae_core.training.classify_images",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from mae_core.training.classify_images import load_classifier
    from transfer.detection.detector import Detected, Detector, load_detector
    from transfer.segmentation.segmenter import Segmented, Segmenter, load_segmenter


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'transfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
