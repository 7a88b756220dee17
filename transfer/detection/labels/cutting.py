"""``mae labels tile``: large annotated images become tiles with their clipped annotations, once, before a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mae_core.atomic import atomic_folder, check_new_folder
from mae_core.data.decoding import Pixels, UnreadableImage, decode_bytes
from mae_core.data.reading import Reading
from mae_core.data.windows import Window, WindowedImage, open_windows, tiles_of
from mae_core.errors import UserError
from transfer.detection.coco import CocoImage
from transfer.detection.labels.convert import name_apart, read_labels, with_split, write_splits
from transfer.detection.labels.records import LabelledImage, LabelledObject, Mask, mask_of
from transfer.detection.masks import cut_part, part_of_code
from transfer.detection.samples import cut_polygon, read_checked

LEAST_SHARE = 0.25


def cut_into_tiles(
    source: Path | str,
    out: Path | str,
    *,
    tile: int,
    overlap: float = 0.0,
    least_share: float = LEAST_SHARE,
    val_share: float = 0.15,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Cut the images of a set of any format of ``mae labels convert`` into the new folder ``out``, a COCO set.

    An object becomes a part in every tile that shows at least ``least_share`` of its area. TIFF and .npy are read by
    windows. Tiles of an image stay in its split. Raises ``UserError`` for what cannot be read or cut.
    """
    source, out = Path(source), Path(out)
    check_new_folder(out)
    if not 0 <= least_share <= 1:
        raise UserError(f"--least-share is {least_share}; give a share from 0 to 1")
    tiles_of(1, 1, tile, overlap)
    labels = read_labels(source)
    splits, how = with_split(labels.images, val_share, seed)
    for images in splits.values():
        name_apart(images, labels, by_stem=True)
    cut: dict[str, list[LabelledImage]] = {}
    small, lost, whole = 0, 0, 0
    with atomic_folder(out) as folder:
        for split, images in splits.items():
            cut[split] = []
            for image in images:
                counts: np.ndarray = np.zeros(len(image.objects), dtype=int)
                for part, window, pixels in _tiles(image, tile, overlap):
                    small += _clip(image, window, part, least_share, counts)
                    _save(pixels, folder / split / part.name)
                    cut[split].append(part)
                lost += int((counts == 0).sum())
                whole += len(counts)
        record = {
            "source": str(source),
            "format": labels.format,
            "split": how,
            "tile": tile,
            "overlap": overlap,
            "least_share": least_share,
            "parts_left_out": small,
            "objects_in_no_tile": lost,
        }
        write_splits(folder, cut, labels.classes, record)
    for line in (*labels.described(), *(f"note: {note}" for note in labels.notes)):
        say(line)
    numbers = [f"{split} {len(parts)} tiles of {len(splits[split])} images" for split, parts in cut.items()]
    say(f"{'; '.join(numbers)}; split: {how}")
    left_out = f"{small} parts with less than {least_share:g} of their object were left out"
    say(f"{left_out}; {lost} of {whole} objects are in no tile")
    say(f"wrote {out}; check it with: mae check coco {out}")
    return out


def _tiles(image: LabelledImage, tile: int, overlap: float) -> Iterator[tuple[LabelledImage, Window, Pixels]]:
    """Every tile: its record without objects, where it lies, its pixels."""
    try:
        source = _opened(image)
        for window in tiles_of(source.height, source.width, tile, overlap):
            pixels = source.read(window)
            suffix = ".tif" if isinstance(pixels, Tensor) else ".png"
            stem = image.name.rpartition(".")[0] or image.name
            name = f"{stem}_{window.top}_{window.left}{suffix}"
            yield LabelledImage(image.path, name, window.height, window.width), window, pixels
    except UnreadableImage as error:
        path, reason = error.unreadable
        raise UserError(f"image {path} cannot be read ({reason}); repair or remove it") from None


def _opened(image: LabelledImage) -> WindowedImage:
    """The pixels as the annotations were drawn on them: of the file inside of the annotations, and as stored where
    only those sides are the record's. Raises ``UnreadableImage``, also for a file of another size."""
    if image.content is not None:
        return WindowedImage(decode_bytes(image.content, str(image.path), Reading()))
    source = open_windows(image.path, Reading(), str(image.path))
    if (source.height, source.width) == (image.height, image.width):
        return source
    return WindowedImage(read_checked(CocoImage(0, image.path, image.height, image.width, ()), Reading()))


def _save(pixels: Pixels, path: Path) -> None:
    """A tile with the numbers of its image: PNG of grey and RGB of 8 bits, TIFF of everything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, Image.Image):
        pixels.save(path)
        return
    import tifffile

    array = pixels.permute(1, 2, 0).numpy()
    array = array[..., 0] if array.shape[2] == 1 else array
    tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig" if array.ndim == 3 else None)


def _clip(image: LabelledImage, window: Window, tile: LabelledImage, least_share: float, counts: np.ndarray) -> int:
    """Put the parts of the objects into a tile and count them; how many were too small."""
    small = 0
    for number, found in enumerate(image.objects):
        assert found.box is not None
        x, y, width, height = found.box
        if x >= window.right or y >= window.bottom or x + width <= window.left or y + height <= window.top:
            continue
        part, share = _part(found, window)
        if part is None or share < least_share or share <= 0:
            small += share > 0
            continue
        tile.objects.append(part)
        counts[number] += 1
    return small


def _part(found: LabelledObject, window: Window) -> tuple[LabelledObject | None, float]:
    """What a window shows of an object, in its own pixels, and the share of the object's area."""
    assert found.box is not None
    polygons, mask = found.polygons, found.mask
    if found.coco is not None:
        segmentation = found.coco[0]
        if isinstance(segmentation, list):
            polygons = [np.asarray(polygon, dtype=float).reshape(-1, 2) for polygon in segmentation]
        else:
            mask = Mask(*part_of_code(segmentation))
    corner = np.array([window.left, window.top], dtype=float)
    if polygons:
        edges = np.array([window.left, window.top, window.right, window.bottom], dtype=float)
        cut = [c - corner for c in (cut_polygon(polygon, edges) for polygon in polygons) if len(c) >= 3]
        cut = [polygon for polygon in cut if _area(polygon) > 0]
        share = sum(map(_area, cut)) / max(sum(map(_area, polygons)), 1e-9)
        return (_boxed(found, polygons=cut), share) if cut else (None, 0.0)
    if mask is not None:
        (top, left), inside = cut_part(*mask, window)
        part = mask_of(inside)
        if part is None:
            return None, 0.0
        place = (top - window.top + part.corner[0], left - window.left + part.corner[1])
        return _boxed(found, mask=part._replace(corner=place)), float(inside.sum() / mask.pixels.sum())
    x, y, width, height = found.box
    x1, y1 = max(x, window.left), max(y, window.top)
    x2, y2 = min(x + width, window.right), min(y + height, window.bottom)
    share = (x2 - x1) * (y2 - y1) / (width * height)
    box = (x1 - window.left, y1 - window.top, x2 - x1, y2 - y1)
    return LabelledObject(found.name, box, crowd=found.crowd), share


def _boxed(found: LabelledObject, **shape: Any) -> LabelledObject:
    """An object of a shape, with the box around it."""
    if polygons := shape.get("polygons"):
        corners = np.concatenate(polygons)
        (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        return LabelledObject(found.name, (x1, y1, x2 - x1, y2 - y1), crowd=found.crowd, **shape)
    (top, left), pixels = shape["mask"]
    box = (float(left), float(top), float(pixels.shape[1]), float(pixels.shape[0]))
    return LabelledObject(found.name, box, crowd=found.crowd, **shape)


def _area(polygon: np.ndarray) -> float:
    """Of a polygon (points, 2), by the shoelace formula."""
    x, y = polygon.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
