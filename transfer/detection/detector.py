"""A trained detector from Python: images in, objects out. The script predict.py writes what it finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from PIL import Image
from torch import nn

from mae_core.config.load import load_config
from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, size_of, to_picture
from mae_core.data.given import AnyImage, as_list, name_of, pixels_of, refusal
from mae_core.data.images import Statistics
from mae_core.data.windows import WindowedImage, open_windows, overview, tiles_of
from mae_core.errors import UserError
from mae_core.training import distributed
from mae_core.training.run import Run
from mae_core.weights.files import WeightsFile
from transfer.detection.annotations import Category
from transfer.detection.coco import CocoImage, CocoSet
from transfer.detection.config import DetectionConfig, DetectionData
from transfer.detection.detector_file import DETECTOR, engines_note, is_detector, read_detector, trained_detector
from transfer.detection.draw import draw_detections
from transfer.detection.engine import load_engine
from transfer.detection.headers import header_of
from transfer.detection.heads import HEADS, Detections, Head
from transfer.detection.masks import decode_codes
from transfer.detection.samples import WholeImages
from transfer.detection.tiles import Part, TileImages, as_detections, merge, parts_of
from transfer.engines import DETECTION

MOST_AT_ONCE, TILES_AT_ONCE = 64, 128
"""Images, and tiles of one image, that are read ahead of what is done with the results."""
OVERLAP = 0.2
OF_TRAINING = ("optim", "log", "ema")
"""Sections of a recipe that have no effect on a finished detector."""
OF_ITS_FILE = (
    "model",
    "weights",
    *(f"data.{name}" for name in ("channels", "image_size", "mean", "std", "statistics")),
)
"""Sections and options that a detector's file decides."""


@dataclass(frozen=True)
class Detected:
    """The objects of one image, best first.

    classes     the names of all classes
    size        (height, width) of the given image
    detections  the objects as the engines give them; the properties below are their parts
    """

    classes: list[str]
    size: tuple[int, int]
    detections: Detections
    _image: AnyImage | WindowedImage = field(repr=False, compare=False)
    _drawn: tuple[str, ...] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.detections.scores)

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32: x1 y1 x2 y2 in pixels of the given image."""
        return self.detections.boxes.numpy()

    @property
    def scores(self) -> np.ndarray:
        """(N,) float32, 0 to 1."""
        return self.detections.scores.numpy()

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: places in ``classes``, counted from 1."""
        return self.detections.labels.numpy()

    @property
    def names(self) -> list[str]:
        """The class of each object."""
        return [self.classes[label - 1] for label in self.labels.tolist()]

    @property
    def codes(self) -> list[dict[str, Any]] | None:
        """N run-length codes of pycocotools, of the size of the image; None of a detector of boxes."""
        return self.detections.codes

    @property
    def masks(self) -> np.ndarray | None:
        """(N, height, width) bool, decoded anew on every use; None of a detector of boxes."""
        return None if self.codes is None else decode_codes(self.codes, *self.size)

    def above(self, score: float) -> Detected:
        """The objects with a score of ``score`` or more."""
        return replace(self, detections=self.detections.above(score))

    def draw(self, score: float = 0.5) -> Image.Image:
        """The image with the objects of a score of at least ``score``, RGB, enlarged where it is small; one that was
        searched in tiles is made smaller, its longer side 2048 pixels at most."""
        found = self.detections.above(score)
        if isinstance(self._image, WindowedImage):
            picture, scale = overview(self._image)
            return draw_detections(self.classes, found, picture, self._drawn, scale=scale)
        return draw_detections(self.classes, found, to_picture(pixels_of(self._image, None, "given")), self._drawn)


class GivenImages(WholeImages):
    """Images that a caller hands over, files or pixels in memory, as they are evaluated."""

    def __init__(
        self, coco: CocoSet, data: DetectionData, statistics: Statistics, in_memory: Mapping[int, Pixels]
    ) -> None:
        super().__init__(coco, data, statistics)
        self.in_memory = in_memory

    def read(self, index: int) -> Pixels:
        """The pixels in memory, or those of the file."""
        return self.in_memory[index] if index in self.in_memory else super().read(index)


class Detector:
    """A trained detector that finds objects as its evaluation does: same canvas, thresholds and precision."""

    def __init__(self, file: WeightsFile, config: DetectionConfig, categories: Sequence[Category] = ()) -> None:
        engine = load_engine(config.engine)
        model, self.categories, self.statistics, self.config = trained_detector(file, config, engine, categories)
        self.note = engines_note(file, config.engine)
        self.run = Run(self.config, distributed.join(self.config.device, self.config.rank_timeout))
        self.model = model.to(self.run.device)
        self._detect = engine.detect

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of labels 1..K."""
        return [category.name for category in self.categories]

    @property
    def head(self) -> Head:
        """What it was trained to find."""
        return HEADS[self.config.model.head]

    def set_of(self, records: Sequence[CocoImage]) -> CocoSet:
        """Images without annotations, under the classes of the detector."""
        return CocoSet(Path("images"), tuple(records), self.categories)

    def detect(
        self, images: WholeImages, at_once: int = MOST_AT_ONCE
    ) -> Iterator[tuple[list[Detections], list[Unreadable]]]:
        """What is found in ``images``, ``at_once`` at a time, and those that could not be decoded."""
        for first in range(0, len(images), at_once):
            indices = range(first, min(first + at_once, len(images)))
            workers = self.config.data.workers if len(indices) == at_once else 0  # they take seconds to start
            yield self._detect(
                self.model, images, self.run, indices, batch_size=self.config.test.test_batch, workers=workers
            )

    @overload
    def predict(
        self, images: AnyImage, *, score: float = 0.0, tile: int | None = None, overlap: float = OVERLAP
    ) -> Detected: ...

    @overload
    def predict(
        self, images: Sequence[AnyImage], *, score: float = 0.0, tile: int | None = None, overlap: float = OVERLAP
    ) -> list[Detected]: ...

    def predict(
        self,
        images: AnyImage | Sequence[AnyImage],
        *,
        score: float = 0.0,
        tile: int | None = None,
        overlap: float = OVERLAP,
    ) -> Detected | list[Detected]:
        """The objects in an image, or in each of a list, of any sizes; see ``AnyImage``.

        score          only objects with this score or more; by default all that predictions.json would have
        tile, overlap  search large images in tiles, see ``detect_in_tiles``

        Raises ``UserError`` for an image that cannot be read or has other channels.
        """
        given, several = as_list(images)
        if tile is not None:
            tiled = [self._in_tiles(x, name_of(x, n), tile, overlap).above(score) for n, x in enumerate(given)]
            return tiled if several else tiled[0]
        in_memory: dict[int, Pixels] = {}
        try:
            coco = self.set_of(self.records(given, in_memory))
        except UnreadableImage as error:
            raise refusal(error.unreadable) from None
        whole = GivenImages(coco, self.config.data, self.statistics, in_memory)
        found: list[Detected] = []
        for part, unreadable in self.detect(whole):
            for entry in unreadable:
                raise refusal(entry)
            found += [self.result(d, coco, given[d.image_index]).above(score) for d in part]
        return found if several else found[0]

    def detect_in_tiles(
        self,
        source: WindowedImage,
        tile: int,
        overlap: float,
        image_index: int = 0,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Detections:
        """What is found in an image of any size, in square tiles of ``tile`` pixels, of which neighbours share
        ``overlap``; objects on seams are one. Memory does not grow with the image, but for the objects found.

        A tile is resized to the canvas: objects have the size they were trained at where a tile is as large as the
        training's images. Raises ``UnreadableImage``.
        """
        size = (source.height, source.width)
        tiles = tiles_of(*size, tile, overlap)
        records = [CocoImage(number, Path("tile"), t.height, t.width, ()) for number, t in enumerate(tiles, start=1)]
        images = TileImages(self.set_of(records), self.config.data, self.statistics, source, tiles)
        parts: list[Part] = []
        with self._batches_told(len(tiles), on_progress):
            for found, unreadable in self.detect(images, TILES_AT_ONCE):
                for entry in unreadable:
                    raise UnreadableImage(*entry)
                for detections in found:
                    parts += parts_of(detections, tiles[detections.image_index], size)
        objects = merge(parts, tiles, self.config.test.nms_threshold)
        return as_detections(objects, size, image_index, masks="masks" in self.head.outputs)

    @contextmanager
    def _batches_told(self, total: int, on_progress: Callable[[int, int], None] | None) -> Iterator[None]:
        """Inside, ``on_progress`` gets after each batch how many images of ``total`` the network has seen."""
        done = 0

        def note(network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal done
            done += len(inputs[0])
            if on_progress is not None:
                on_progress(done, total)

        handle = self.model.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def _in_tiles(self, image: AnyImage, name: str, tile: int, overlap: float) -> Detected:
        try:
            source = open_windows(image, self.config.data.reading, name)
            found = self.detect_in_tiles(source, tile, overlap)
        except UnreadableImage as error:
            raise refusal(error.unreadable) from None
        return Detected(self.classes, (source.height, source.width), found, source, self.head.drawn)

    def result(self, detections: Detections, coco: CocoSet, image: AnyImage | WindowedImage) -> Detected:
        """Detections in an image of ``coco`` in the form of the Python API; ``image`` is what a picture is drawn on."""
        record = coco.images[detections.image_index]
        return Detected(self.classes, (record.height, record.width), detections, image, self.head.drawn)

    def records(self, images: Sequence[AnyImage], in_memory: dict[int, Pixels] | None = None) -> list[CocoImage]:
        """The images numbered from 1, with their sizes; ``in_memory`` takes the pixels of those that are no files.

        Raises ``UnreadableImage``.
        """
        reading = self.config.data.reading
        records = []
        for number, image in enumerate(images):
            name = name_of(image, number)
            if isinstance(image, Path | str):
                header = header_of(Path(image), reading.channels)
                height, width = header.height, header.width
            else:
                pixels = pixels_of(image, reading, name)
                height, width = size_of(pixels)
                if in_memory is not None:
                    in_memory[number] = pixels
            records.append(CocoImage(number + 1, Path(name), height, width, ()))
        return records


def load_detector(
    weights: Path | str,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overrides: Sequence[str] = (),
    config_file: Path | str | None = None,
    categories: Sequence[Category] = (),
) -> Detector:
    """The detector of a run, or its detector.safetensors, of either engine.

    overrides    options as for training, such as ``test.detections=500``
    config_file  the recipe of a file that does not say how its network is built, a detector of detectron2's model zoo;
                 ``categories`` are its classes then

    Raises ``UserError`` where the file holds no detector, or its engine is not installed.
    """
    file = read_detector(Path(weights))
    recipe = None if config_file is None else Path(config_file)
    chosen = [] if device == "auto" else [f"device={device}"]
    return Detector(file, inference_configuration(file, recipe, [*chosen, *overrides]), categories)


def inference_configuration(file: WeightsFile, recipe: Path | None, overrides: Sequence[str]) -> DetectionConfig:
    """The configuration of inference: the engine of a file that train_net.py wrote is the file's. Raises ``UserError``
    for a file that is no detector."""
    without_effect = {*OF_TRAINING, *(OF_ITS_FILE if is_detector(file) else ())}
    unread = [word for word in overrides if {re.split("[.=]", word)[0], word.partition("=")[0]} & without_effect]
    if unread:
        raise UserError(f"{unread[0]} has no effect on the predictions of {file.path}; leave it out")
    options = [f"weights={file.path}"]
    if is_detector(file):
        options.append(f"engine={file.metadata['engine']}")
    elif recipe is None:
        raise UserError(
            f"{file.path} is not a detector that train_net.py wrote; give a {DETECTOR}, or its run (for a detector of "
            "detectron2's model zoo, add --config-file RECIPE.yaml and --truth JSON)"
        )
    else:
        options += [f"engine={name}" for name, engine in DETECTION.items() if engine.zoo][:1]
    return load_config(DetectionConfig, recipe, [*options, *overrides])
