"""Labels for single images: whole or sliding, at one scale or several, flipped or not; through mmseg's own pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmseg.registry import MODELS

from mae_core.data.decoding import Pixels, UnreadableImage
from mae_core.data.given import AnyImage, pixels_of, refusal
from transfer.segmentation.config import channels_of, inference_mode, inference_pipeline
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
        self.section, self.several = section, flip or tuple(scales) != (1.0,)
        several = self.several
        self.model = MODELS.build({"type": "SegTTAModel", "module": model}).eval() if several else model
        self.pipeline = Compose(inference_pipeline(file.config, scales, flip=flip, always=several))
        self.channels = channels_of(file.config)

    def __call__(self, image: AnyImage, name: str = "given") -> np.ndarray:
        """The class of each pixel, (H, W) uint16, of the image in its own size; ``name`` is for the error.

        Raises ``UserError`` for a file that cannot be read, and for other channels than the encoder's.
        """
        sample = self._answer(image, name)
        return sample.pred_sem_seg.data.reshape(sample.ori_shape).cpu().numpy().astype(np.uint16)

    def scores_of_own(self, pixels: Pixels) -> np.ndarray:
        """The class scores (K, H, W) float32, before a softmax, of pixels that are an image of their own."""
        scores = self._answer(pixels, "window").seg_logits.data.float()
        if len(scores) == 1:  # mmseg has taken the sigmoid, which ``decide`` takes
            scores = scores.logit(eps=1e-6)
        return scores.cpu().numpy()

    def scores_in(self, size: tuple[int, int]) -> Callable[[Pixels], np.ndarray]:
        """The same of a window of ``size`` of a large image, passed through the network at once and as it is, as mmseg
        does when it slides; pixels that reach over the edge of the image are zero after the standardisation."""
        preprocessor = copy(self.model.data_preprocessor)
        preprocessor.test_cfg = None  # it would pad each window, and not the image

        def scores(pixels: Pixels) -> np.ndarray:
            packed = self.pipeline({"img_path": "window", "pixels": pixels})
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                inputs = preprocessor(pseudo_collate([packed]), False)["inputs"]
                rows, cols = inputs.shape[-2:]
                inputs = torch.nn.functional.pad(inputs, (0, size[1] - cols, 0, size[0] - rows))
                logits = self.model.encode_decode(inputs, [{"img_shape": inputs.shape[-2:]}])
            return logits[0, :, :rows, :cols].float().cpu().numpy()

        return scores

    def decide(self, scores: np.ndarray) -> np.ndarray:
        """(K, H, W) class scores -> (H, W) uint16 classes, as mmseg decides."""
        if len(scores) > 1:
            return scores.argmax(axis=0).astype(np.uint16)
        chances = torch.from_numpy(scores[0]).sigmoid()
        return (chances > self.model.decode_head.threshold).numpy().astype(np.uint16)

    def _answer(self, image: AnyImage, name: str) -> Any:
        """mmseg's sample with all that it says of an image."""
        given: dict[str, Any] = {"img_path": str(image) if isinstance(image, Path | str) else name}
        if not isinstance(image, Path | str):
            try:
                given["pixels"] = pixels_of(image, self.channels, name)
            except UnreadableImage as error:
                raise refusal(error.unreadable) from None
        data: Mapping[str, Any] = pseudo_collate([self.pipeline(given)])
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.model.test_step(data)[0]
