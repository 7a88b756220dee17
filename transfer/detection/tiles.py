"""A detector on an image that is larger than its canvas: tiles, each searched as an image, and their results merged.

An object in the overlap of two tiles is found twice, and one on a seam is found in parts. Two results of one class are
the same object if they agree inside the overlap of their tiles. Of the same object that result is kept that no seam
cuts; where all are cut, their masks and boxes are joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mae_core.data.decoding import Pixels
from mae_core.data.images import Statistics
from mae_core.data.windows import Window, WindowedImage
from transfer.detection.coco import CocoSet
from transfer.detection.config import DetectionData
from transfer.detection.heads import Detections
from transfer.detection.masks import code_of_part, cut_part, part_of_code
from transfer.detection.samples import WholeImages

SAME = 0.5
"""Intersection over union, inside the overlap of their tiles, from which on two results are one object."""
INSIDE = 0.7
"""Share of a result, inside the overlap, that a better one has to cover to make it a part of the same object."""
AT_SEAM, FAR = 0.02, 0.1
"""Shares of a tile's side: a box that ends so close to an inner edge is cut by it; beyond the second, the distance says
nothing more about which of two results is the better one."""


class TileImages(WholeImages):
    """The tiles of one image as images of their own."""

    def __init__(
        self,
        coco: CocoSet,
        data: DetectionData,
        statistics: Statistics,
        source: WindowedImage,
        tiles: Sequence[Window],
    ) -> None:
        super().__init__(coco, data, statistics)
        self.source, self.tiles = source, tiles

    def read(self, index: int) -> Pixels:
        """The pixels of a tile. Raises ``UnreadableImage``."""
        return self.source.read(self.tiles[index])


class Part(NamedTuple):
    """What was found in a tile, in pixels of the whole image.

    box     x1 y1 x2 y2
    corner  (row, column) of the upper left pixel of ``mask``
    mask    (h, w) bool, None of a detector of boxes
    margin  distance of the box from the nearest inner edge of its tile, as a share of the tile's side, at most ``FAR``
    """

    tile: int
    score: float
    label: int
    box: np.ndarray
    corner: tuple[int, int]
    mask: np.ndarray | None
    margin: float

    @property
    def cut(self) -> bool:
        """Whether an inner edge of its tile may cut it."""
        return self.margin <= AT_SEAM


def parts_of(found: Detections, tile: Window, size: tuple[int, int]) -> list[Part]:
    """Detections of one tile of an image of ``size`` (height, width)."""
    boxes = found.boxes.numpy() + np.tile([tile.left, tile.top], 2)
    inner = np.array([tile.left > 0, tile.top > 0, tile.right < size[1], tile.bottom < size[0]])
    edges = np.array([tile.left, tile.top, tile.right, tile.bottom])
    distances = np.where(inner, np.abs(boxes - edges) / max(tile.height, tile.width), FAR)
    margins = distances.min(axis=1, initial=FAR)
    parts = []
    for number, (score, label) in enumerate(zip(found.scores.tolist(), found.labels.tolist(), strict=True)):
        corner, mask = (0, 0), None
        if found.codes is not None:
            (top, left), mask = part_of_code(found.codes[number])
            corner = (top + tile.top, left + tile.left)
        parts.append(Part(found.image_index, score, label, boxes[number], corner, mask, float(margins[number])))
    return parts


def merge(parts: Sequence[Part], tiles: Sequence[Window], nms_threshold: float) -> list[Part]:
    """The objects of an image from the parts found in its tiles, best first.

    ``nms_threshold``: two results of different tiles whose boxes overlap by more are one object too, as in a tile.
    """
    order = sorted(range(len(parts)), key=lambda number: -parts[number].score)
    rank = {number: place for place, number in enumerate(order)}
    same, inside = _relations(parts, tiles, nms_threshold, rank)
    taken: set[int] = set()
    objects: list[Part] = []
    for number in order:
        if number in taken:
            continue
        group, whole = _group(number, parts, same, taken)
        members = group if whole is None else [*group, whole]
        taken.update(members)
        for member in members:
            taken.update(other for other, _ in same.get(member, ()) if whole is not None)
            taken.update(inside.get(member, ()))
        best = max(parts[member].score for member in members)
        joined = _joined([parts[member] for member in group]) if whole is None else parts[whole]
        objects.append(joined._replace(score=best))
    return sorted(objects, key=lambda part: -part.score)


def _group(
    first: int, parts: Sequence[Part], same: dict[int, list[tuple[int, float]]], taken: set[int]
) -> tuple[list[int], int | None]:
    """The cut parts that make one object with ``first``, at most one of a tile, and the part that is the whole of it,
    None where every one is cut."""
    if not parts[first].cut:
        others = [other for other, _ in same.get(first, ()) if other not in taken and not parts[other].cut]
        return [first], max([first, *others], key=lambda number: (parts[number].margin, parts[number].score))
    group, tiles, queue = [first], {parts[first].tile}, [first]
    whole: int | None = None
    while queue:
        member = queue.pop(0)
        for other, _ in sorted(same.get(member, ()), key=lambda pair: -pair[1]):
            if other in taken or parts[other].tile in tiles:
                continue
            tiles.add(parts[other].tile)
            if parts[other].cut:
                group.append(other)
                queue.append(other)
            elif whole is None or parts[other].score > parts[whole].score:
                whole = other
    return group, whole


def _joined(parts: Sequence[Part]) -> Part:
    """One part from several: the union of boxes and masks."""
    boxes = np.stack([part.box for part in parts])
    box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    first = parts[0]._replace(box=box)
    if len(parts) == 1 or parts[0].mask is None:
        return first
    ends = [(p.corner[0] + p.mask.shape[0], p.corner[1] + p.mask.shape[1]) for p in parts if p.mask is not None]
    top, left = (min(part.corner[axis] for part in parts) for axis in (0, 1))
    mask = np.zeros((max(end[0] for end in ends) - top, max(end[1] for end in ends) - left), dtype=bool)
    for part in parts:
        if part.mask is not None:
            row, col = part.corner[0] - top, part.corner[1] - left
            mask[row : row + part.mask.shape[0], col : col + part.mask.shape[1]] |= part.mask
    return first._replace(corner=(top, left), mask=mask)


def _relations(
    parts: Sequence[Part], tiles: Sequence[Window], nms_threshold: float, rank: dict[int, int]
) -> tuple[dict[int, list[tuple[int, float]]], dict[int, list[int]]]:
    """Of each part the parts that are the same object, with how much they agree, and the worse ones it covers."""
    of_tile: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        of_tile.setdefault(part.tile, []).append(number)
    same: dict[int, list[tuple[int, float]]] = {}
    inside: dict[int, list[int]] = {}
    for one, other in _neighbours(sorted(of_tile), tiles):
        shared = _overlap(tiles[one], tiles[other])
        for a, b in _candidates(of_tile[one], of_tile[other], parts):
            first, second, both = _areas(parts[a], parts[b], shared)
            iou = both / max(first + second - both, 1e-9)
            slivers = _is_sliver(parts[a], first, both, parts[b]) or _is_sliver(parts[b], second, both, parts[a])
            if iou >= SAME or slivers or _box_iou(parts[a].box, parts[b].box) > nms_threshold:
                same.setdefault(a, []).append((b, iou))
                same.setdefault(b, []).append((a, iou))
            better, worse = (a, b) if rank[a] < rank[b] else (b, a)
            if parts[worse].cut and both >= INSIDE * (second if worse == b else first) > 0:
                inside.setdefault(better, []).append(worse)
    return same, inside


def _is_sliver(part: Part, shared: float, both: float, other: Part) -> bool:
    """Whether a cut part is the little that its tile sees of an ``other`` one that no seam cuts: most of it lies in the
    overlap, ``shared`` pixels, and there inside the other, ``both``."""
    if not part.cut or other.cut:
        return False
    whole = _area(part.box) if part.mask is None else float(part.mask.sum())
    return shared >= INSIDE * whole and both >= INSIDE * shared > 0


def _neighbours(used: Sequence[int], tiles: Sequence[Window]) -> Iterable[tuple[int, int]]:
    """Pairs of the tiles ``used`` that share pixels, the lower number first."""
    corners = np.array([(tiles[n].top, tiles[n].left, tiles[n].bottom, tiles[n].right) for n in used]).reshape(-1, 4)
    for place, one in enumerate(used):
        top, left, bottom, right = corners[place]
        later = corners[place + 1 :]
        sharing = (later[:, 0] < bottom) & (later[:, 2] > top) & (later[:, 1] < right) & (later[:, 3] > left)
        for index in np.flatnonzero(sharing):
            yield one, used[place + 1 + int(index)]


def _overlap(one: Window, other: Window) -> Window:
    top, left = max(one.top, other.top), max(one.left, other.left)
    return Window(top, left, min(one.bottom, other.bottom) - top, min(one.right, other.right) - left)


def _candidates(ones: Sequence[int], others: Sequence[int], parts: Sequence[Part]) -> Iterable[tuple[int, int]]:
    """Pairs of one class whose boxes touch."""
    first, second = (np.stack([parts[number].box for number in numbers]) for numbers in (ones, others))
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    far = np.minimum(first[:, None, 2:], second[None, :, 2:])
    for i, j in np.argwhere((far > corner).all(axis=2)):
        if parts[ones[i]].label == parts[others[j]].label:
            yield ones[i], others[j]


def _areas(one: Part, other: Part, shared: Window) -> tuple[float, float, float]:
    """Pixels of each inside ``shared``, and of both; of masks, or of boxes where there are none."""
    if one.mask is None or other.mask is None:
        first, second = (_clipped(part.box, shared) for part in (one, other))
        both = np.concatenate([np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])])
        return _area(first), _area(second), _area(both)
    region = Window(*shared)
    sides = [cut_part(part.corner, part.mask, region) for part in (one, other) if part.mask is not None]
    top, left = (max(side[0][axis] for side in sides) for axis in (0, 1))
    bottom, right = (min(side[0][axis] + side[1].shape[axis] for side in sides) for axis in (0, 1))
    both = 0.0
    if bottom > top and right > left:
        views = [m[top - row : bottom - row, left - col : right - col] for (row, col), m in sides]
        both = float((views[0] & views[1]).sum())
    return float(sides[0][1].sum()), float(sides[1][1].sum()), both


def _clipped(box: np.ndarray, region: Window) -> np.ndarray:
    edges = np.array([region.left, region.top, region.right, region.bottom])
    return np.concatenate([np.maximum(box[:2], edges[:2]), np.minimum(box[2:], edges[2:])])


def _area(box: np.ndarray) -> float:
    return float(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]))


def _box_iou(one: np.ndarray, other: np.ndarray) -> float:
    both = _area(np.concatenate([np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])]))
    return both / max(_area(one) + _area(other) - both, 1e-9)


def as_detections(objects: Sequence[Part], size: tuple[int, int], image_index: int, *, masks: bool) -> Detections:
    """Merged objects as the detections of an image of ``size`` (height, width)."""
    codes: list[dict[str, Any]] | None = None
    if masks:
        codes = [code_of_part(part.mask, part.corner, size) for part in objects if part.mask is not None]
    boxes = np.stack([part.box for part in objects]) if objects else np.zeros((0, 4))
    return Detections(
        image_index,
        torch.from_numpy(boxes.astype(np.float32)),
        torch.tensor([part.score for part in objects], dtype=torch.float32),
        torch.tensor([part.label for part in objects], dtype=torch.int64),
        codes,
    )
