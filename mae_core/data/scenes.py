"""Scenes composed from real handwritten digits on textured clutter, each from a seed and with exact labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mae_core.data.clutter import TEXTURES, paint_background
from mae_core.data.glyphs import (
    NUM_CLASSES,
    bend_glyph,
    digit_indices,
    load_glyphs,
    load_source,
    paint_fragment,
    paint_stroke,
)
from mae_core.errors import UserError

LABEL_NAMES = (*TEXTURES, "digit")
"""Class names of `Scene.label_map`, by value."""

SPLITS = {"unlabelled": "train", "train": "train", "test": "test"}
"""Scene split -> the half of the digit images it draws from. The order numbers the random streams: append only."""

MIN_IMAGE_SIZE = 32
MIN_VISIBLE_RATIO = 0.75
"""Share of its pixels that an occluded digit keeps: a digit that would hide more moves away, or is left out."""

DARKNESS = 0.55
"""The background is dimmed to this share, so that digits are light on dark, like chalk."""

_OCCLUDING_RATIO = 0.4  # share of the digits that may cover older ones
_PLACEMENT_TRIES = 12


@dataclass(frozen=True)
class Scene:
    """One composed picture of H x W pixels with its n digits, in painting order (later ones lie on top).

    image   (H, W, 3) uint8 RGB
    labels  (n,) int64, 0..9
    boxes   (n, 4) float32, x1 y1 x2 y2 in pixels, tight around the visible mask, x2 and y2 exclusive
    masks   (n, H, W) bool, the visible part of each digit: no two overlap
    textures  (H, W) uint8, what the background is made of, a row of `TEXTURES`; defined under the digits too
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    textures: np.ndarray

    @property
    def label_map(self) -> np.ndarray:
        """(H, W) uint8: the background's texture, and `len(TEXTURES)` where a digit is; see `LABEL_NAMES`."""
        return np.where(self.masks.any(axis=0), len(TEXTURES), self.textures).astype(np.uint8)


def compose_scene(
    split: str,
    index: int,
    *,
    seed: int = 0,
    image_size: int = 64,
    digits: tuple[int, int] = (1, 4),
    clutter: float = 1.0,
) -> Scene:
    """Scene number `index` of a split; with equal options it depends on (seed, split, index) alone.

    split       "unlabelled" and "train" draw from the training digits, "test" from the test digits; separate streams
    image_size  side in pixels, at least 32
    digits      fewest and most digits to place; one that finds no place without hiding another is left out, except
                the first. The class of the first is `index % 10`, so any ten scenes in a row hold every class.
                A digit alone is about 0.7 to 0.95 of the image high, one of several about 1/4 to 1/2.
    clutter     strength of the texture and number of distracting shapes: 0 is a plain background, 1 the default

    Raises UserError for an unknown split, a negative number, an image too small or an empty range of digits.
    """
    fewest, most = digits
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    if index < 0 or seed < 0 or clutter < 0:
        raise UserError(f"index, seed and clutter must not be negative, found {index}, {seed} and {clutter}")
    if image_size < MIN_IMAGE_SIZE:
        raise UserError(
            f"digits are not readable in {image_size} pixels; use an image size of {MIN_IMAGE_SIZE} or more"
        )
    if not 1 <= fewest <= most:
        raise UserError(f"digits={digits} is not a range of one digit or more; use for example (1, 4)")

    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(list(SPLITS).index(split), index)))
    pool = getattr(digit_indices(seed), SPLITS[split])
    pool_labels = load_source()[1][pool]
    glyphs = load_glyphs()

    background, textures = paint_background(generator, image_size, clutter)
    canvas = DARKNESS * background
    for _ in range(generator.binomial(3, min(0.35 * clutter, 1.0))):
        height = generator.uniform(0.25, 0.5) * image_size
        paint_fragment(generator, canvas, bend_glyph(generator, glyphs[generator.choice(pool)], height, image_size))

    num_digits = int(generator.integers(fewest, most + 1))
    labels: list[int] = []
    areas: list[int] = []
    masks: np.ndarray = np.zeros((0, image_size, image_size), dtype=bool)
    for position in range(num_digits):
        label = index % NUM_CLASSES if position == 0 else int(generator.integers(NUM_CLASSES))
        glyph = glyphs[generator.choice(pool[pool_labels == label])]
        height = image_size * (generator.uniform(0.7, 0.95) if num_digits == 1 else generator.uniform(0.28, 0.5))
        stroke = bend_glyph(generator, glyph, height, image_size)
        place = _find_place(generator, stroke.mask, masks, areas)
        if place is None:
            continue
        top, left, masks = place
        paint_stroke(generator, canvas, stroke, top, left)
        labels.append(label)
        areas.append(int(stroke.mask.sum()))

    noise = generator.standard_normal(canvas.shape, dtype=np.float32) * generator.uniform(0.5, 3.0)
    image = np.clip(canvas * _light(generator, image_size) + noise, 0, 255).astype(np.uint8)
    return Scene(
        image=image, labels=np.array(labels, dtype=np.int64), boxes=_boxes(masks), masks=masks, textures=textures
    )


def _find_place(
    generator: np.random.Generator, stroke: np.ndarray, masks: np.ndarray, areas: list[int]
) -> tuple[int, int, np.ndarray] | None:
    """A random place for `stroke` (h, w) bool over `masks` (n, H, W) where every older digit stays visible enough.

    `areas` counts the pixels that each older digit had before any other covered it. Most digits may cover none at all.
    Returns (top, left, masks of all n + 1 digits), or None where no place was found.
    """
    height, width = stroke.shape
    num_digits, image_height, image_width = masks.shape
    before = masks.sum(axis=(1, 2))
    needed = MIN_VISIBLE_RATIO * np.array(areas) if generator.random() < _OCCLUDING_RATIO else before
    for _ in range(_PLACEMENT_TRIES):
        top = int(generator.integers(0, image_height - height + 1))
        left = int(generator.integers(0, image_width - width + 1))
        covered = np.zeros((image_height, image_width), dtype=bool)
        covered[top : top + height, left : left + width] = stroke
        remaining = masks & ~covered
        if num_digits == 0 or (remaining.sum(axis=(1, 2)) >= needed).all():
            return top, left, np.concatenate((remaining, covered[None]))
    return None


def _boxes(masks: np.ndarray) -> np.ndarray:
    """Tight boxes of non-empty masks: (n, H, W) bool -> (n, 4) float32 x1 y1 x2 y2, x2 and y2 exclusive."""
    edges = []
    for axis in (1, 2):
        occupied: np.ndarray = np.asarray(masks.any(axis=axis))
        length = occupied.shape[1]
        edges.append((occupied.argmax(axis=1), length - occupied[:, ::-1].argmax(axis=1)))
    (left, right), (top, bottom) = edges
    return np.stack((left, top, right, bottom), axis=1).astype(np.float32)


def _light(generator: np.random.Generator, size: int) -> np.ndarray:
    """Brightness that falls off in one direction: (size, size, 1) float32 about 1."""
    row, column = np.ogrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    angle = generator.uniform(0, 2 * np.pi)
    slope = 0.12 * generator.random() * (row * np.sin(angle) + column * np.cos(angle))
    return (1 + slope).astype(np.float32)[..., None]
