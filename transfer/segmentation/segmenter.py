"""A trained segmenter from Python: images in, label maps out. The script predict.py writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from PIL import Image

from mae_core.data.decoding import UnreadableImage
from mae_core.data.given import AnyImage, as_list, name_of, refusal
from mae_core.data.windows import WindowedImage, open_windows, overview, tiles_of
from mae_core.errors import UserError
from mae_core.training.distributed import device_of
from transfer.engines import require
from transfer.segmentation.config import channels_of
from transfer.segmentation.drawing import draw_overlay
from transfer.segmentation.label_coding import as_values, written_values
from transfer.segmentation.pixels import picture_of
from transfer.segmentation.quiet import quietly
from transfer.segmentation.segmenter_file import SegmenterFile, read_segmenter
from transfer.segmentation.tiles import layout_of, seamless

OVERLAP = 0.2


@dataclass(frozen=True)
class Segmented:
    """The label map of one image.

    indices  (H, W) uint16: the place of each pixel's class in ``classes``, counted from 0
    classes  the names of all classes
    values   the value of each class in a label map, as in those of the training
    palette  an RGB colour for each class
    """

    indices: np.ndarray
    classes: list[str]
    values: list[int]
    palette: list[tuple[int, int, int]]
    _image: AnyImage | WindowedImage = field(repr=False, compare=False)

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8, or uint16 where a value needs it: the label map in the values of the training's maps."""
        return as_values(self.indices, self.values)

    def draw(self, opacity: float = 0.5) -> Image.Image:
        """The image under the colours of its classes, which are named below. ``opacity`` of the colours, 0 to 1. One
        that was labelled in tiles is made smaller, its longer side 2048 pixels at most."""
        indices = self.indices
        if isinstance(self._image, WindowedImage):
            picture, _ = overview(self._image)
            places = zip(indices.shape, picture.size[::-1], strict=True)
            rows, cols = (((np.arange(small) + 0.5) * side / small).astype(int) for side, small in places)
            indices = np.array(indices[rows[:, None], cols])
        else:
            picture = picture_of(self._image)
        return draw_overlay(picture, indices, self.classes, self.palette, opacity=opacity)


class Segmenter:
    """A trained segmenter that labels images as its evaluation does."""

    def __init__(self, file: SegmenterFile, predictor: Any) -> None:
        self.file, self._predictor = file, predictor
        self.classes, self.palette, self.values = file.classes, file.palette, written_values(file.values)

    @overload
    def predict(self, images: AnyImage, *, tile: int | None = None, overlap: float = OVERLAP) -> Segmented: ...

    @overload
    def predict(
        self, images: Sequence[AnyImage], *, tile: int | None = None, overlap: float = OVERLAP
    ) -> list[Segmented]: ...

    def predict(
        self, images: AnyImage | Sequence[AnyImage], *, tile: int | None = None, overlap: float = OVERLAP
    ) -> Segmented | list[Segmented]:
        """The label map of an image, or of each of a list, of any sizes; see ``AnyImage``.

        ``tile``, ``overlap``: label large images in windows, see ``predict_in_tiles``. Raises ``UserError`` for an
        image that cannot be read or has other channels.
        """
        given, several = as_list(images)
        names = [name_of(image, number) for number, image in enumerate(given)]
        if tile is not None:
            found = [self.predict_in_tiles(x, name, tile, overlap) for x, name in zip(given, names, strict=True)]
        else:
            found = [self._result(self._predictor(x, name), x) for x, name in zip(given, names, strict=True)]
        return found if several else found[0]

    def _result(self, indices: np.ndarray, image: AnyImage | WindowedImage) -> Segmented:
        return Segmented(indices, self.classes, self.values, self.palette, image)

    def predict_in_tiles(
        self,
        image: AnyImage,
        name: str,
        tile: int,
        overlap: float = OVERLAP,
        *,
        mapped: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Segmented:
        """The label map of an image of any size, at its own size: that of mmseg's sliding inference on the whole image.

        A segmenter that slides (``mode``, or its config) over images of their own size does so with its own windows;
        one that sees images whole slides a window of ``tile`` pixels, of which neighbours share ``overlap``. One that
        sees images resized sees such tiles as images of their own, and their scores are averaged.

        ``mapped``: a new file for the label map, which is in memory otherwise; ``on_progress`` gets the windows done
        and all of them. Raises ``UserError`` for an image that cannot be read, and for several views.
        """
        tiles_of(1, 1, tile, overlap)
        if self._predictor.several:
            raise UserError("large images are labelled at one scale and unmirrored; leave scales and flip out, or tile")
        layout = layout_of(self.file.config, self._predictor.section, tile, overlap)
        try:
            source = open_windows(image, channels_of(self.file.config), name)
            size = (source.height, source.width)
            indices: np.ndarray = np.zeros(size if mapped is None else 0, np.uint16)
            if mapped is not None:
                np.lib.format.open_memmap(mapped, mode="w+", dtype=np.uint16, shape=size).flush()
            one = self._predictor
            scores_of = one.scores_of_own if layout.own else one.scores_in(layout.window_in(source))
            classes = one.model.decode_head.out_channels
            for window, scores in seamless(source, scores_of, layout, classes, on_progress=on_progress):
                if mapped is not None:  # mapped anew, so that no page of it stays in memory
                    indices = np.load(mapped, mmap_mode="r+")
                indices[window.top : window.bottom, window.left : window.right] = one.decide(scores)
        except UnreadableImage as error:
            raise refusal(error.unreadable) from None
        return self._result(indices if mapped is None else np.load(mapped, mmap_mode="r"), source)


def load_segmenter(
    weights: Path | str,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    mode: str | None = None,
    crop_size: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Segmenter:
    """The segmenter of a run, or its segmenter.safetensors.

    mode           ``whole`` or ``slide`` with windows of ``crop_size`` every ``stride`` pixels; as trained when None
    scales, flip   probabilities are averaged over these scales of the image, and over its mirror image

    Raises ``UserError`` where the file holds no segmenter, or mmseg is not installed.
    """
    require("mmseg")
    chosen = device_of(device).type
    file = read_segmenter(weights)
    with quietly():
        from transfer.segmentation.engine_mmseg.prediction import Predictor

        predictor = Predictor(
            file, mode=mode, crop_size=crop_size, stride=stride, scales=scales, flip=flip, device=chosen
        )
    return Segmenter(file, predictor)
