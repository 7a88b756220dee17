"""Pictures of boxes and masks, the truth beside the prediction."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from transfer.detection.coco import CocoImage
from transfer.detection.heads import Detections
from transfer.detection.masks import encode_shape, part_of_code

COLOURS = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (0, 160, 160), (240, 50, 230), (128, 128, 0), (170, 110, 40), (70, 70, 220),
)  # fmt: skip
LEAST_SIDE = 320
"""A small image is enlarged to at least this many pixels, so that lines and letters are seen."""
LARGEST_SIDE = 4096
"""To which a small image is enlarged at most: a strip of a few pixels would become gigabytes."""
MASK_OPACITY = 0.45
MOST_NAMES = 12


def draw_truth(classes: Sequence[str], image: CocoImage, pixels: Image.Image, drawn: Collection[str]) -> Image.Image:
    """The image with what ``drawn`` names (boxes, masks) of its objects; the class beside each where there are several;
    crowds are left out."""
    instances = [instance for instance in image.instances if not instance.crowd]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (instance.box for instance in instances)]
    labels = [instance.label for instance in instances]
    one_class = len(classes) == 1
    names = ["" if one_class else classes[label - 1] for label in labels]
    shapes = [instance.shape for instance in instances if instance.shape is not None] if "masks" in drawn else None
    codes = None if shapes is None else [encode_shape(shape, image.height, image.width) for shape in shapes]
    return _draw(pixels, boxes, codes, labels, names, one_class, outlined="boxes" in drawn)


def draw_detections(
    classes: Sequence[str], found: Detections, pixels: Image.Image, drawn: Collection[str], *, scale: float = 1.0
) -> Image.Image:
    """The image with what ``drawn`` names (boxes, masks) of the objects found in it: class and score beside each, or
    the score alone where there is one class. ``scale``: of a picture that was made smaller than the image."""
    if scale < 1:
        return _draw_small(classes, found, pixels, drawn, scale)
    with_masks = "masks" in drawn and found.codes is not None
    codes = found.codes if with_masks else None
    one_class, labels = len(classes) == 1, found.labels.tolist()
    prefixes = ["" if one_class else f"{classes[label - 1]} " for label in labels]
    names = [f"{prefix}{score:.2f}" for prefix, score in zip(prefixes, found.scores.tolist(), strict=True)]
    return _draw(pixels, found.boxes.tolist(), codes, labels, names, one_class, outlined="boxes" in drawn)


def _draw_small(
    classes: Sequence[str], found: Detections, pixels: Image.Image, drawn: Collection[str], scale: float
) -> Image.Image:
    """Masks tinted, or boxes outlined where there are none, on a picture of ``scale``; without names."""
    labels = found.labels.tolist()
    colours = [COLOURS[(n if len(classes) == 1 else label - 1) % len(COLOURS)] for n, label in enumerate(labels)]
    tinted = np.array(pixels.convert("RGB"))
    if "masks" in drawn and found.codes is not None:
        for code, colour in zip(found.codes, colours, strict=True):
            (top, left), mask = part_of_code(code)
            spans = []
            for first, length, most in ((top, mask.shape[0], tinted.shape[0]), (left, mask.shape[1], tinted.shape[1])):
                places = np.arange(int(first * scale), min(int((first + length) * scale) + 1, most))
                source = ((places + 0.5) / scale).astype(int) - first
                inside = (source >= 0) & (source < length)
                spans.append((places[inside], source[inside]))
            (rows, source_rows), (cols, source_cols) = spans
            area = np.ix_(rows, cols)
            shown = mask[np.ix_(source_rows, source_cols)][..., None]
            mixed = (1 - MASK_OPACITY) * tinted[area] + MASK_OPACITY * np.array(colour)
            tinted[area] = np.where(shown, mixed, tinted[area]).astype(np.uint8)
        return Image.fromarray(tinted)
    canvas = Image.fromarray(tinted)
    pen = ImageDraw.Draw(canvas)
    for box, colour in zip((found.boxes * scale).tolist(), colours, strict=True):
        pen.rectangle((box[0], box[1], max(box[0], box[2]), max(box[1], box[3])), outline=colour)
    return canvas


def beside(columns: Sequence[tuple[str, Image.Image]], *, gap: int = 8) -> Image.Image:
    """Images of one height side by side, each under its title."""
    font = ImageFont.load_default(16)
    line = 26
    width = sum(image.width for _, image in columns) + gap * (len(columns) - 1)
    sheet = Image.new("RGB", (width, max(image.height for _, image in columns) + line), "white")
    pen, left = ImageDraw.Draw(sheet), 0
    for title, image in columns:
        pen.text((left + 2, 3), title, fill="black", font=font)
        sheet.paste(image, (left, line))
        left += image.width + gap
    return sheet


def stacked(rows: Sequence[Image.Image], *, gap: int = 8) -> Image.Image:
    """Images one below the other."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height + gap for row in rows) - gap), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + gap
    return sheet


def _draw(
    pixels: Image.Image,
    boxes: Sequence[Any],
    codes: Sequence[dict[str, Any]] | None,
    labels: Sequence[int],
    names: Sequence[str],
    one_class: bool,
    *,
    outlined: bool,
) -> Image.Image:
    """``pixels`` in RGB, enlarged, with the masks of n codes tinted, boxes (x1 y1 x2 y2) outlined if wanted, and named.

    One colour a class; in a set of ``one_class``, one colour an object, and no names where there are many.
    """
    scale = max(1, min(math.ceil(LEAST_SIDE / min(pixels.size)), LARGEST_SIDE // max(pixels.size)))
    colours = [COLOURS[(n if one_class else label - 1) % len(COLOURS)] for n, label in enumerate(labels)]
    tinted = np.asarray(pixels.convert("RGB")).astype(np.float32)
    for code, colour in zip(codes or [], colours, strict=codes is not None):
        (row, col), mask = part_of_code(code)  # one at a time: thousands of whole masks of a large image are gigabytes
        under = tinted[row : row + mask.shape[0], col : col + mask.shape[1]]
        under[mask] = (1 - MASK_OPACITY) * under[mask] + MASK_OPACITY * np.array(colour)
    canvas = Image.fromarray(tinted.astype(np.uint8)).resize(
        (pixels.width * scale, pixels.height * scale), Image.Resampling.NEAREST
    )
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for box, colour in zip(boxes if outlined else [], colours, strict=outlined):
        x1, y1, x2, y2 = (round(value * scale) for value in box)
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2 if scale > 1 else 1)
    if len(labels) <= MOST_NAMES or not one_class:
        for box, colour, name in zip(boxes, colours, names, strict=True):
            if not name:
                continue
            left, _, right, bottom = pen.textbbox((0, 0), name, font=font)
            x = min(max(0, round(box[0] * scale)), max(0, canvas.width - int(right - left) - 4))
            above, below = round(box[1] * scale) - int(bottom) - 3, round(box[3] * scale) + 1
            y = above if above >= 0 else min(below, max(0, canvas.height - int(bottom) - 3))
            pen.rectangle((x, y, x + right - left + 4, y + bottom + 2), fill=colour)
            pen.text((x + 2, y), name, fill="white", font=font)
    return canvas
