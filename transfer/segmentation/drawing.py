"""Predictions beside the truth, as a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IGNORED_COLOUR = (0, 0, 0)
CELL = 256
GAP = 8
TEXT = 15
TITLES = ("input", "truth", "prediction")


class Example(NamedTuple):
    """An image, its true labels (what is no class is ignored) and the predicted ones, each (H, W)."""

    image: Image.Image
    truth: np.ndarray
    prediction: np.ndarray


def palette(num_classes: int) -> list[tuple[int, int, int]]:
    """A colour per class: hues a golden angle apart, in three alternating tones, none close to black."""
    tones = ((0.75, 0.95), (0.45, 1.0), (0.9, 0.6))
    colours = []
    for index in range(num_classes):
        saturation, value = tones[index % len(tones)]
        red, green, blue = colorsys.hsv_to_rgb((0.08 + index * 0.618034) % 1, saturation, value)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def colour_labels(labels: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """(H, W) labels -> an RGB picture; what is no class, ignored pixels, is black."""
    table = np.array([*colours, IGNORED_COLOUR], dtype=np.uint8)
    return Image.fromarray(table[np.minimum(labels, len(colours))])


def draw_examples(
    examples: Sequence[Example], classes: Sequence[str], colours: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """One row an example: input, truth, prediction; below, the colours of the classes that occur in them."""
    sizes = [_fit(example.image.size) for example in examples]
    left = [GAP + column * (CELL + GAP) for column in range(len(TITLES))]
    width = left[-1] + CELL + GAP
    occurring = sorted({int(v) for e in examples for labels in (e.truth, e.prediction) for v in np.unique(labels)})
    legend = draw_legend(occurring, classes, colours, width)
    top_of_legend = TEXT + 2 * GAP + sum(height + GAP for _, height in sizes)
    sheet = Image.new("RGB", (width, top_of_legend + legend.height), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in zip(left, TITLES, strict=True):
        draw.text((x, GAP), title, fill="black", font=ImageFont.load_default(TEXT))
    y = TEXT + 2 * GAP
    for example, size in zip(examples, sizes, strict=True):
        cells = [example.image.convert("RGB").resize(size, Image.Resampling.BICUBIC)]
        cells += [
            colour_labels(labels, colours).resize(size, Image.Resampling.NEAREST)
            for labels in (example.truth, example.prediction)
        ]
        for x, cell in zip(left, cells, strict=True):
            sheet.paste(cell, (x, y))
        y += size[1] + GAP
    sheet.paste(legend, (0, top_of_legend))
    return sheet


def draw_legend(
    values: Sequence[int], classes: Sequence[str], colours: Sequence[tuple[int, int, int]], width: int
) -> Image.Image:
    """The names and colours of label values, in as many columns as fit; at least wide enough for one."""
    font = ImageFont.load_default(TEXT)
    entries = [(classes[v], colours[v]) if v < len(classes) else ("ignored", IGNORED_COLOUR) for v in values]
    longest = 2 * TEXT + GAP + max(round(font.getlength(name)) for name, _ in entries)
    width = max(width, longest + GAP)
    columns = max(1, min(4, width // longest))
    legend = Image.new("RGB", (width, -(-len(entries) // columns) * (TEXT + GAP) + GAP), "white")
    draw = ImageDraw.Draw(legend)
    for index, (name, colour) in enumerate(entries):
        x = GAP + index % columns * ((width - GAP) // columns)
        y = index // columns * (TEXT + GAP)
        draw.rectangle((x, y + 2, x + TEXT, y + TEXT), fill=colour, outline="grey")
        draw.text((x + TEXT + GAP, y), name, fill="black", font=font)
    return legend


def draw_overlay(
    image: Image.Image,
    labels: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    *,
    opacity: float,
) -> Image.Image:
    """An image under the colours of its (H, W) labels; below, the classes that occur in it."""
    mixed = Image.blend(image.convert("RGB"), colour_labels(labels, colours), opacity)
    legend = draw_legend([int(value) for value in np.unique(labels)], classes, colours, mixed.width)
    sheet = Image.new("RGB", (max(mixed.width, legend.width), mixed.height + GAP + legend.height), "white")
    sheet.paste(mixed, (0, 0))
    sheet.paste(legend, (0, mixed.height + GAP))
    return sheet


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) scaled to the width of a cell, and to at most its height times one and a half."""
    scale = min(CELL / size[0], 1.5 * CELL / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
