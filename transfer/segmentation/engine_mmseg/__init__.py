"""mmseg: what is registered with it, and trainings on its runner. The only folder that imports mmseg, mmengine, mmcv.

A config names this package under ``custom_imports``; then mmseg's own tools can run it too.
"""

from transfer.segmentation.engine_mmseg.backbone import MAECoreViT
from transfer.segmentation.engine_mmseg.checks import folders_to_check
from transfer.segmentation.engine_mmseg.data import (
    EightBitDistortion,
    LabelledFolder,
    ManyChannelPreProcessor,
    NamedImage,
    NamedLabels,
)
from transfer.segmentation.engine_mmseg.metric import PerClassIoUMetric
from transfer.segmentation.engine_mmseg.optimizer import MAECoreLayerDecay
from transfer.segmentation.engine_mmseg.options import parse_options
from transfer.segmentation.engine_mmseg.record import RunRecord
from transfer.segmentation.engine_mmseg.training import evaluate, train

__all__ = [
    "EightBitDistortion",
    "LabelledFolder",
    "MAECoreLayerDecay",
    "MAECoreViT",
    "ManyChannelPreProcessor",
    "NamedImage",
    "NamedLabels",
    "PerClassIoUMetric",
    "RunRecord",
    "evaluate",
    "folders_to_check",
    "parse_options",
    "train",
]
