"""Pictures of boxes and masks, the truth beside the prediction."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from transfer.detection.coco import CocoImage, CocoSet, decode_masks
from transfer.detection.heads import Detections
from transfer.detection.masks import decode_codes

COLOURS = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (0, 160, 160), (240, 50, 230), (128, 128, 0), (170, 110, 40), (70, 70, 220),
)  # fmt: skip
LEAST_SIDE = 320
"""A small image is enlarged to at least this many pixels, so that lines and letters are seen."""
MASK_OPACITY = 0.45
MOST_NAMES = 12


def draw_truth(coco: CocoSet, image: CocoImage, pixels: Image.Image, drawn: Collection[str]) -> Image.Image:
    """The image with what ``drawn`` names (boxes, masks) of its objects; the class beside each where there are several;
    crowds are left out."""
    instances = [instance for instance in image.instances if not instance.crowd]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (instance.box for instance in instances)]
    labels = [instance.label for instance in instances]
    one_class = len(coco.categories) == 1
    names = ["" if one_class else coco.names[label - 1] for label in labels]
    masks = decode_masks(image, instances) if "masks" in drawn else None
    return _draw(pixels, boxes, masks, labels, names, one_class, outlined="boxes" in drawn)


def draw_detections(
    coco: CocoSet, detections: Detections, pixels: Image.Image, least: float, drawn: Collection[str]
) -> Image.Image:
    """The image with what ``drawn`` names (boxes, masks) of the detections of a score of at least ``least``: class and
    score beside each, or the score alone where there is one class."""
    kept = [n for n, score in enumerate(detections.scores.tolist()) if score >= least]
    masks = None
    if "masks" in drawn and detections.codes is not None:
        masks = decode_codes([detections.codes[n] for n in kept], *pixels.size[::-1])
    labels = [int(detections.labels[n]) for n in kept]
    scores = [float(detections.scores[n]) for n in kept]
    one_class = len(coco.categories) == 1
    classes = ["" if one_class else f"{coco.names[label - 1]} " for label in labels]
    names = [f"{name}{score:.2f}" for name, score in zip(classes, scores, strict=True)]
    boxes = [tuple(detections.boxes[n].tolist()) for n in kept]
    return _draw(pixels, boxes, masks, labels, names, one_class, outlined="boxes" in drawn)


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
    masks: np.ndarray | None,
    labels: Sequence[int],
    names: Sequence[str],
    one_class: bool,
    *,
    outlined: bool,
) -> Image.Image:
    """``pixels`` in RGB, enlarged, with masks (n, h, w) tinted, boxes (x1 y1 x2 y2) outlined if wanted, and named.

    One colour a class; in a set of ``one_class``, one colour an object, and no names where there are many.
    """
    scale = max(1, math.ceil(LEAST_SIDE / min(pixels.size)))
    colours = [COLOURS[(n if one_class else label - 1) % len(COLOURS)] for n, label in enumerate(labels)]
    tinted = np.asarray(pixels.convert("RGB")).astype(np.float32)
    for mask, colour in zip([] if masks is None else masks, colours, strict=masks is not None):
        tinted[mask] = (1 - MASK_OPACITY) * tinted[mask] + MASK_OPACITY * np.array(colour)
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
