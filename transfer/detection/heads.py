"""The heads on the pyramid: one row per head, with what the rest of the toolkit needs to know of it.

To add one: a row here, and for each engine that has it a function that builds the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

BuildNetwork = Callable[..., nn.Module]
"""(backbone, num_classes, DetectorConfig, SamplingConfig, InferenceConfig) -> the engine's whole network. The backbone
is the ``PyramidBackbone`` of the engine; the network keeps it as ``backbone``."""

BOX_CELLS, MASK_CELLS = 7, 14
"""Side of the features that a box and a mask are read from."""
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Factors of the box deltas (x, y, width, height) in the loss."""


class Head(NamedTuple):
    """A kind of detector.

    targets   what it learns from, of an annotation: boxes, labels, masks
    outputs   what it gives for an object; masks are written to predictions.json where they are among them
    metrics   pycocotools' name of what is scored -> ours
    drawn     what its pictures show of an object, in this order
    builders  engine -> what builds the network, as "module:function" or itself; an engine without a row lacks the head
    """

    targets: tuple[str, ...]
    outputs: tuple[str, ...]
    metrics: Mapping[str, str]
    drawn: tuple[str, ...]
    builders: Mapping[str, str | BuildNetwork]

    @property
    def learns_masks(self) -> bool:
        """Whether it learns masks, so that every annotation needs a segmentation."""
        return "masks" in self.targets


_TORCHVISION = "transfer.detection.engine_torchvision.network"
_DETECTRON2 = "transfer.detection.engine_detectron2.network"
HEADS = {
    "mask_rcnn": Head(
        targets=("boxes", "labels", "masks"),
        outputs=("boxes", "scores", "labels", "masks"),
        metrics={"bbox": "box", "segm": "mask"},
        drawn=("masks", "boxes"),
        builders={"torchvision": f"{_TORCHVISION}:mask_rcnn", "detectron2": f"{_DETECTRON2}:mask_rcnn"},
    ),
    "faster_rcnn": Head(
        targets=("boxes", "labels"),
        outputs=("boxes", "scores", "labels"),
        metrics={"bbox": "box"},
        drawn=("boxes",),
        builders={"torchvision": f"{_TORCHVISION}:faster_rcnn", "detectron2": f"{_DETECTRON2}:faster_rcnn"},
    ),
}
"""Name in a configuration (``model.head``) -> head."""


class Detections(NamedTuple):
    """What was found in image ``image_index`` of a set, best first, in pixels of the original image.

    boxes (n, 4) float32 x1 y1 x2 y2; scores (n,); labels (n,) from 1; codes: n run-length codes of pycocotools, None
    of a head without masks
    """

    image_index: int
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    codes: list[dict[str, Any]] | None

    def above(self, score: float) -> Detections:
        """Those with a score of ``score`` or more."""
        kept = self.scores >= score
        codes = self.codes
        if codes is not None:
            codes = [code for code, keep in zip(codes, kept.tolist(), strict=True) if keep]
        return self._replace(boxes=self.boxes[kept], scores=self.scores[kept], labels=self.labels[kept], codes=codes)
