"""The detectron2 engine: its heads, its trainer, its evaluator, on the same backbone, data and weights.

The only folder that imports detectron2. Importing it registers ``build_mae_core_backbone`` in ``BACKBONE_REGISTRY``.
"""

from transfer.detection.engine import DetectorEngine, Zoo
from transfer.detection.engine_detectron2.backbone import (
    MAECoreBackbone,
    add_mae_core_config,
    build_mae_core_backbone,
    mae_core_backbone,
)
from transfer.detection.engine_detectron2.launching import launch_processes
from transfer.detection.engine_detectron2.lazy import run_lazy_config
from transfer.detection.engine_detectron2.network import adapt_to_images, build_backbone
from transfer.detection.engine_detectron2.scoring import detect, score
from transfer.detection.engine_detectron2.training import fit
from transfer.detection.engine_detectron2.zoo import is_zoo_file, load_zoo_detector

ENGINE = DetectorEngine(build_backbone, adapt_to_images, fit, detect, score, Zoo(is_zoo_file, load_zoo_detector))

__all__ = [
    "ENGINE",
    "MAECoreBackbone",
    "add_mae_core_config",
    "build_mae_core_backbone",
    "launch_processes",
    "mae_core_backbone",
    "run_lazy_config",
]
