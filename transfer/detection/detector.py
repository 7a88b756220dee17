"""Train or score a detector with whichever engine the configuration names."""

from __future__ import annotations

import importlib
from typing import Any

from transfer.detection import trained, trainer
from transfer.detection.config import DetectionConfig
from transfer.detection.job import DetectorEngine
from transfer.engines import require


def train_detector(config: DetectionConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train, write the run directory, score on the validation set; returns what metrics.json holds.

    Raises ``UserError`` for everything a user can get wrong, before any work where that is possible.
    """
    return trainer.train(config, load_engine(config), resume=resume)


def evaluate_detector(config: DetectionConfig) -> dict[str, Any]:
    """Score the trained detector in ``config.weights`` on the validation set; returns what metrics.json holds."""
    return trained.evaluate(config, load_engine(config))


def load_engine(config: DetectionConfig) -> DetectorEngine:
    """``ENGINE`` of the file, or folder, that alone imports the engine. Raises ``UserError`` where it is missing."""
    require(config.engine)
    return importlib.import_module(f"transfer.detection.engine_{config.engine}").ENGINE
