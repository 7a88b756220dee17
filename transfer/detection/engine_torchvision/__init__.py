"""The torchvision engine: heads of torchvision's parts, trained in the core's loop.

The only folder that imports ``torchvision.models.detection``.
"""

from transfer.detection.engine import DetectorEngine
from transfer.detection.engine_torchvision.network import adapt_to_images, build_backbone
from transfer.detection.engine_torchvision.training import detect, fit_in_core_loop, score_by_detecting

ENGINE = DetectorEngine(build_backbone, adapt_to_images, fit_in_core_loop, detect, score_by_detecting)
