"""Labels for single images: whole or sliding, at one scale or several, flipped or not; through mmseg's own pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmseg.registry import MODELS

from transfer.segmentation.config import inference_mode, inference_pipeline
from transfer.segmentation.engine_mmseg.segmenter import build_segmenter
from transfer.segmentation.segmenter_file import SegmenterFile


class Predictor:
    """A segmenter that labels image files as its evaluation does.

    mode        ``whole`` or ``slide`` with windows of ``crop_size`` every ``stride`` pixels; the config's when None
    scales      factors on the size that the config resizes test images to; probabilities are averaged over them
    flip        average over the mirrored image too
    """

    def __init__(
        self,
        file: SegmenterFile,
        *,
        mode: str | None = None,
        crop_size: int | None = None,
        stride: int | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        section = inference_mode(file.config, mode=mode, crop_size=crop_size, stride=stride)
        model = build_segmenter(file, device)
        model.test_cfg = ConfigDict(section)
        several = flip or tuple(scales) != (1.0,)
        self.model = MODELS.build({"type": "SegTTAModel", "module": model}).eval() if several else model
        self.pipeline = Compose(inference_pipeline(file.config, scales, flip=flip, always=several))

    def __call__(self, image: Path) -> np.ndarray:
        """The class of each pixel, (H, W) uint16, of the image in its own size. Raises ``UserError`` for a bad file."""
        data: Mapping[str, Any] = pseudo_collate([self.pipeline({"img_path": str(image)})])
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample = self.model.test_step(data)[0]
        return sample.pred_sem_seg.data.reshape(sample.ori_shape).cpu().numpy().astype(np.uint16)
