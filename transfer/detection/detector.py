"""Train or score a detector with whichever engine the configuration names."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from transfer.detection.config import DetectionConfig
from transfer.engines import require


def train_detector(config: DetectionConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train, write the run directory, score on the validation set; returns what metrics.json holds.

    Raises ``UserError`` for everything a user can get wrong, before any work where that is possible.
    """
    return _engine(config).train(config, resume=resume)


def evaluate_detector(config: DetectionConfig) -> dict[str, Any]:
    """Score the trained detector in ``config.weights`` on the validation set; returns what metrics.json holds."""
    return _engine(config).evaluate(config)


def _engine(config: DetectionConfig) -> ModuleType:
    """The file that alone imports the engine; it has ``train(config, resume)`` and ``evaluate(config)``."""
    require(config.engine)
    return importlib.import_module(f"transfer.detection.engine_{config.engine}")
