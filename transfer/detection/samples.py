"""From annotated images to batches: where an image lies on the canvas, large-scale jitter, what the network gets."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from mae_core.data.decoding import (
    Pixels,
    Unreadable,
    UnreadableImage,
    fill_no_data,
    read_image,
    size_of,
    to_tensor,
    usable,
)
from mae_core.data.images import Statistics, check_found, next_readable
from mae_core.data.loading import Place
from mae_core.data.orientation import as_stored, orientation_of
from mae_core.data.reading import ReadAs
from mae_core.patches import as_pair
from mae_core.seeds import AUGMENT, generator_at
from transfer.detection.annotations import Instance
from transfer.detection.coco import CocoImage, CocoSet, decode_masks
from transfer.detection.config import DetectionData
from transfer.detection.headers import Header

if TYPE_CHECKING:
    from typing_extensions import Self

Target = dict[str, Tensor]
"""boxes (n, 4) float32 x1 y1 x2 y2 in canvas pixels; labels (n,) int64 from 1; masks (n, H, W) bool of the canvas,
where the head learns them."""


class Placement(NamedTuple):
    """How an image lies on the canvas: resized to (height, width), cropped from (top, left), flipped, then padded.

    The padding is at the right and the bottom; ``visible`` is the (height, width) that is not padding.
    """

    height: int
    width: int
    top: int
    left: int
    canvas: tuple[int, int]
    hflip: bool = False
    vflip: bool = False

    @property
    def visible(self) -> tuple[int, int]:
        """(height, width) of the part of the canvas that shows the image."""
        return min(self.height - self.top, self.canvas[0]), min(self.width - self.left, self.canvas[1])

    def image(self, image: Pixels, statistics: Statistics) -> Tensor:
        """The canvas (C, H, W) float32, standardised; padding is zero, which is the mean colour."""
        rows, cols = self.visible
        pixels = F.resize(to_tensor(fill_no_data(image, statistics.mean)), [self.height, self.width], antialias=True)
        pixels = pixels[:, self.top : self.top + rows, self.left : self.left + cols]
        pixels = pixels.flip(self._flipped) if self._flipped else pixels
        pixels = F.normalize(F.to_dtype(pixels, torch.float32, scale=True), list(statistics.mean), list(statistics.std))
        return F.pad(pixels, [0, 0, self.canvas[1] - cols, self.canvas[0] - rows])

    def boxes(self, rectangles: np.ndarray, size: tuple[int, int]) -> Tensor:
        """(n, 4) x1 y1 x2 y2 in an image of ``size`` (height, width) -> (n, 4) float32 on the canvas, cut to what is
        visible; nothing is left of one that is out of sight."""
        rows, cols = self.visible
        moved = rectangles * self._scale(size) - np.tile([self.left, self.top], 2)
        x1, y1, x2, y2 = np.clip(moved, 0, [cols, rows, cols, rows]).T
        x1, x2 = (cols - x2, cols - x1) if self.hflip else (x1, x2)
        y1, y2 = (rows - y2, rows - y1) if self.vflip else (y1, y2)
        return torch.from_numpy(np.stack([x1, y1, x2, y2], axis=1)).float()

    def window(self, size: tuple[int, int]) -> np.ndarray:
        """x1 y1 x2 y2 of the visible part, in pixels of an image of ``size`` (height, width)."""
        rows, cols = self.visible
        corners = np.array([self.left, self.top, self.left + cols, self.top + rows], dtype=np.float64)
        return corners / self._scale(size)

    def _scale(self, size: tuple[int, int]) -> np.ndarray:
        return np.tile([self.width / size[1], self.height / size[0]], 2)

    def masks(self, masks: np.ndarray) -> Tensor:
        """(n, h, w) bool of the original image -> (n, canvas height, canvas width) bool, by nearest neighbour."""
        rows, cols = self.visible
        y = ((np.arange(rows) + self.top + 0.5) * masks.shape[1] / self.height).astype(int)
        x = ((np.arange(cols) + self.left + 0.5) * masks.shape[2] / self.width).astype(int)
        moved = torch.from_numpy(np.ascontiguousarray(masks[:, y[:, None], x]))
        moved = moved.flip(self._flipped) if self._flipped else moved
        canvas = torch.zeros(len(masks), *self.canvas, dtype=torch.bool)
        canvas[:, :rows, :cols] = moved
        return canvas

    @property
    def _flipped(self) -> list[int]:
        return [axis for axis, flip in ((-2, self.vflip), (-1, self.hflip)) if flip]


def place_whole(height: int, width: int, canvas: tuple[int, int]) -> Placement:
    """The whole image as large as it fits, at the top left: what evaluation uses."""
    scale = min(canvas[0] / height, canvas[1] / width)
    return Placement(max(1, round(height * scale)), max(1, round(width * scale)), 0, 0, canvas)


def place_jittered(
    height: int, width: int, canvas: tuple[int, int], data: DetectionData, generator: torch.Generator
) -> Placement:
    """Large-scale jitter: ``place_whole`` times a random scale; a random part where that is larger than the canvas."""
    scale, down, right, hflip, vflip = torch.rand(5, generator=generator).tolist()
    low, high = data.resize_scale
    fit = min(canvas[0] / height, canvas[1] / width) * (low + scale * (high - low))
    new_height, new_width = max(1, round(height * fit)), max(1, round(width * fit))
    top, left = int(down * (max(0, new_height - canvas[0]) + 1)), int(right * (max(0, new_width - canvas[1]) + 1))
    return Placement(new_height, new_width, top, left, canvas, hflip < data.hflip, vflip < data.vflip)


Masks = np.ndarray[Any, np.dtype[np.bool_]]
"""(n, H, W)."""


def boxes_of(masks: Masks) -> np.ndarray:
    """Tight boxes of masks: (n, H, W) bool -> (n, 4) float64 x1 y1 x2 y2, x2 and y2 exclusive, zero where a mask is
    empty."""
    edges = []
    for axis in (1, 2):
        occupied = np.asarray(masks.any(axis=axis))
        last = occupied.shape[1] - occupied[:, ::-1].argmax(axis=1)
        edges.append((occupied.argmax(axis=1), np.where(occupied.any(axis=1), last, 0)))
    (left, right), (top, bottom) = edges
    return np.stack([left, top, right, bottom], axis=1).astype(np.float64)


def visible_bounds(instances: Sequence[Instance], masks: Masks, window: np.ndarray) -> np.ndarray:
    """Bounds of the visible part of each object, (n, 4) x1 y1 x2 y2 in pixels of the original image.

    Polygons keep their fractions of a pixel, as in detectron2; run-length codes have whole pixels. ``masks`` (n, h, w)
    are the pixels of ``instances``, ``window`` x1 y1 x2 y2 what is visible of the image.
    """
    first, last = np.floor(window[:2]).astype(int), np.ceil(window[2:]).astype(int)
    bounds = boxes_of(masks[:, first[1] : last[1], first[0] : last[0]]) + np.tile(first, 2)
    for number, instance in enumerate(instances):
        if isinstance(instance.shape, tuple):
            points = np.concatenate([cut_polygon(polygon.reshape(-1, 2), window) for polygon in instance.shape])
            if len(points):
                bounds[number] = np.concatenate([points.min(axis=0), points.max(axis=0)])
    return bounds


def cut_polygon(points: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Corners (n, 2) of a polygon -> those of its part in ``window`` x1 y1 x2 y2 (Sutherland and Hodgman, 1974)."""
    for side in range(4):
        axis, sign = side % 2, 1 if side < 2 else -1
        depth = sign * (points[:, axis] - window[side])
        inside, following = depth >= 0, np.roll(depth, -1)
        crossing = inside != (following >= 0)
        share = np.divide(depth, depth - following, out=np.zeros_like(depth), where=crossing)
        crossed = points + share[:, None] * (np.roll(points, -1, axis=0) - points)
        points = np.stack([points, crossed], axis=1)[np.stack([inside, crossing], axis=1)]
    return points


class Sample(NamedTuple):
    """pixels (C, H, W), None where the image could not be read; size is the part of the canvas that is not padding."""

    pixels: Tensor | None
    size: tuple[int, int]
    target: Target
    image_index: int
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class DetectionBatch:
    """pixels (B, C, H, W) float32, standardised; per sample the visible size, the target, and the index in its set."""

    pixels: Tensor
    sizes: list[tuple[int, int]]
    targets: list[Target]
    indices: list[int]
    unreadable: list[Unreadable]

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device) -> DetectionBatch:
        """Tensors on ``device``."""
        targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()} for target in self.targets]
        pixels = self.pixels.to(device, non_blocking=True)
        return DetectionBatch(pixels, self.sizes, targets, self.indices, self.unreadable)

    def split(self, size: int) -> list[DetectionBatch]:
        """Consecutive parts of at most ``size`` samples."""
        parts = [slice(start, start + size) for start in range(0, len(self), size)]
        return [DetectionBatch(self.pixels[p], self.sizes[p], self.targets[p], self.indices[p], []) for p in parts]


class TrainingSamples(Dataset[Sample]):
    """Jittered samples by (epoch, index); equal seed and place, equal sample, whoever computes it.

    Targets are those of ``target_on``. An unreadable image is replaced by the next readable one and reported.
    """

    def __init__(
        self, coco: CocoSet, data: DetectionData, statistics: Statistics, seed: int, *, masks: bool = True
    ) -> None:
        self.coco, self.data, self.statistics, self.seed, self.masks = coco, data, statistics, seed, masks
        self.canvas = as_pair(data.image_size)

    def __len__(self) -> int:
        return len(self.coco.images)

    def name_of(self, index: int) -> str:
        """What identifies an image."""
        return str(self.coco.images[index].path)

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place

        def look(place: int) -> tuple[CocoImage, Placement, Tensor]:
            record = self.coco.images[place]
            generator = generator_at(self.seed, AUGMENT, epoch, index)
            placement = place_jittered(record.height, record.width, self.canvas, self.data, generator)
            image = read_checked(record, self.data.reading)
            return record, placement, usable(placement.image(image, self.statistics), record.path)

        _, found, unreadable = next_readable(index, len(self), look)
        if found is None:
            return Sample(None, self.canvas, {}, index, unreadable)
        record, placement, pixels = found
        return Sample(pixels, placement.visible, target_on(record, placement, masks=self.masks), index, unreadable)


class WholeImages(Dataset[Sample]):
    """Whole images by index, for evaluation; no target. An unreadable one has no pixels."""

    def __init__(self, coco: CocoSet, data: DetectionData, statistics: Statistics) -> None:
        self.coco, self.data, self.statistics = coco, data, statistics
        self.canvas = as_pair(data.image_size)

    def __len__(self) -> int:
        return len(self.coco.images)

    def placement(self, index: int) -> Placement:
        """Where image ``index`` lies on the canvas."""
        record = self.coco.images[index]
        return place_whole(record.height, record.width, self.canvas)

    def read(self, index: int) -> Pixels:
        """The pixels of image ``index``. Raises ``UnreadableImage``."""
        return read_checked(self.coco.images[index], self.data.reading)

    def with_statistics(self, statistics: Statistics) -> Self:
        """The same images, standardised by other statistics."""
        other = copy(self)
        other.statistics = statistics
        return other

    def __getitem__(self, index: int) -> Sample:
        try:
            placement, path = self.placement(index), self.coco.images[index].path
            pixels = usable(placement.image(self.read(index), self.statistics), path)
        except UnreadableImage as error:
            return Sample(None, self.canvas, {}, index, [error.unreadable])
        return Sample(pixels, placement.visible, {}, index, [])


def target_on(record: CocoImage, placement: Placement, *, masks: bool = True) -> Target:
    """What is to be found on the canvas: the instances of an image, without crowds and those out of sight.

    With ``masks`` their boxes are those of the visible parts of the masks, else the json's, cut to what is visible.
    """
    instances = [instance for instance in record.instances if not instance.crowd]
    size = (record.height, record.width)
    labels = torch.tensor([instance.label for instance in instances], dtype=torch.int64)
    if not masks:
        given = np.array([instance.box for instance in instances], dtype=np.float64).reshape(-1, 4)
        boxes = placement.boxes(np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1), size)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return {"boxes": boxes[kept], "labels": labels[kept]}
    decoded, window = decode_masks(record, instances), placement.window(size)
    bounds, moved = visible_bounds(instances, decoded, window), placement.masks(decoded)
    boxes = placement.boxes(bounds, size)
    # what the canvas cuts may show less than a pixel of a part, which its mask has not: the box keeps to the mask
    at_edge = np.concatenate([bounds[:, :2] <= window[:2], bounds[:, 2:] >= window[2:]], axis=1)
    cut = torch.from_numpy(at_edge.any(axis=1))
    tight = torch.from_numpy(boxes_of(moved[cut].numpy())).float()
    boxes[cut] = boxes[cut].minimum(tight + 1).maximum(tight - 1)
    kept = moved.any(dim=2).any(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return {"boxes": boxes[kept], "labels": labels[kept], "masks": moved[kept]}


def read_checked(record: CocoImage, read_as: ReadAs) -> Pixels:
    """The image of a record: upright, as its boxes were drawn, or as stored where only those sides are the json's.

    Raises ``UnreadableImage`` where it cannot be read or does not have the size in the json.
    """
    image = read_image(record.path, read_as)
    if size_of(image) == (record.height, record.width):
        return image
    header = Header(*size_of(image), len(to_tensor(image)), orientation_of(record.path))
    check_size(record, header)
    return as_stored(image, header.orientation)


def check_size(record: CocoImage, header: Header) -> None:
    """Raise ``UnreadableImage`` where a file does not have the size in the json, neither upright nor as stored."""
    height, width = record.height, record.width
    if (header.height, header.width) != (height, width) and not header.annotated_as_stored(height, width):
        raise UnreadableImage(
            record.path, f"it is {header.width}x{header.height}, but its annotations are for {width}x{height}"
        )


def collate(samples: list[Sample]) -> DetectionBatch:
    """A batch of training samples. Raises ``UserError`` where a place had no readable image near it."""
    check_found(samples, "them and their json")
    return collate_readable(samples)


def collate_readable(samples: list[Sample]) -> DetectionBatch:
    """A batch of the samples that could be read; it may be empty."""
    good = [sample for sample in samples if sample.pixels is not None]
    pixels = torch.stack([sample.pixels for sample in good]) if good else torch.zeros(0)
    unreadable = [entry for sample in samples for entry in sample.unreadable]
    return DetectionBatch(
        pixels,
        [s.size for s in good],
        [s.target for s in good],
        [s.image_index for s in good],
        unreadable,
    )
