"""scikit-learn's handwritten digits: the two disjoint halves, their enlargement, and their painting into a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from mae_core.data.clutter import LUMA, spline_weights
from mae_core.errors import UserError

NUM_CLASSES = 10

_TEST_RATIO = 1 / 3
_HALVES_STREAM = 1000  # spawn key of the split into halves, away from the keys of the scenes
_SOURCE_SIDE = 11  # source pixels across an enlarged digit: 8 of the digit, the rest empty margin
_ZOOM = 4
_THRESHOLDS = (0.34, 0.48)
# of the ink at a stroke's edge: above, faint arcs of a 0 fall out and leave a C; below, the holes of 6, 8 and 9 close
_MIN_CONTRAST = 50  # of 255, between a stroke and the brightness around it


@dataclass(frozen=True)
class DigitIndices:
    """Positions in scikit-learn's digits of the images each half may use, sorted int64; the halves are disjoint."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Stroke:
    """One digit ready to paint: ink (h, w) float32, and the level above which a pixel belongs to the stroke."""

    ink: np.ndarray
    threshold: float

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool."""
        return self.ink > self.threshold


@lru_cache(maxsize=1)
def load_source() -> tuple[np.ndarray, np.ndarray]:
    """Digit images (1797, 8, 8) float32 in 0..1 and their labels (1797,) int64.

    Raises UserError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the embedded digits come with scikit-learn, which is not installed; "
            'install it with: pip install "mae-transfer[demo]"'
        ) from error
    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


@lru_cache(maxsize=16)
def digit_indices(seed: int = 0) -> DigitIndices:
    """Which digit images train and unlabelled scenes use, and which test scenes use: a third of each class.

    Raises UserError where scikit-learn is not installed.
    """
    labels = load_source()[1]
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_HALVES_STREAM,)))
    train, test = [], []
    for digit in range(NUM_CLASSES):
        members = generator.permutation(np.flatnonzero(labels == digit))
        num_test = round(len(members) * _TEST_RATIO)
        test.append(members[:num_test])
        train.append(members[num_test:])
    return DigitIndices(train=np.sort(np.concatenate(train)), test=np.sort(np.concatenate(test)))


@lru_cache(maxsize=1)
def load_glyphs() -> np.ndarray:
    """All digits enlarged by a cubic B-spline, with an empty margin: (1797, 44, 44) float32, about 0..1."""
    images = load_source()[0]
    num_points = _SOURCE_SIDE + 3
    margin = (num_points - images.shape[-1]) // 2
    points = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    # The B-spline blurs by (1, 4, 1) / 6; its inverse to first order keeps the holes of 0, 4, 6, 8 and 9 open.
    neighbours = np.eye(num_points, k=1) + np.eye(num_points, k=-1)
    sharpen = ((8 * np.eye(num_points) - neighbours) / 6).astype(np.float32)
    weights = spline_weights(_SOURCE_SIDE * _ZOOM, _SOURCE_SIDE) @ sharpen
    return weights @ points @ weights.T


def bend_glyph(generator: np.random.Generator, glyph: np.ndarray, height: float, limit: int) -> Stroke:
    """Scale an enlarged digit to about `height` pixels, rotate and shear it a little.

    The stroke is cropped to what is visible and one pixel around it, at most `limit` pixels a side.
    """
    threshold = min(generator.uniform(*_THRESHOLDS), 0.7 * float(glyph.max()))
    angle, shear = np.deg2rad(generator.uniform(-10, 10)), generator.uniform(-0.12, 0.12)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag((generator.uniform(0.85, 1.2), 1.0))
    reach = 8.5 * _ZOOM * np.abs(forward).sum(axis=1).max()
    zoom = min(height / (8 * _ZOOM), (limit - 2) / reach)
    inverse = np.linalg.inv(zoom * forward)
    side = int(np.ceil(zoom * reach)) + 4
    offset = np.full(2, glyph.shape[0] / 2) - inverse @ np.full(2, side / 2)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    picture = Image.fromarray(glyph).transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    ink = np.asarray(picture)
    rows, columns = (np.flatnonzero((ink > threshold).any(axis=axis)) for axis in (1, 0))
    ink = ink[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]
    return Stroke(ink=ink[:limit, :limit], threshold=threshold)


def paint_stroke(generator: np.random.Generator, canvas: np.ndarray, stroke: Stroke, top: int, left: int) -> None:
    """Paint a readable digit into `canvas` (H, W, 3) float32 0..255, in place, its corner at (top, left)."""
    height, width = stroke.ink.shape
    region = canvas[top : top + height, left : left + width]
    around = region[stroke.ink > 0.3 * stroke.threshold] @ LUMA
    inks = _pick_colours(generator, float(np.quantile(around, 0.9)))
    if generator.random() < 0.4:
        inks[1] = inks[0]
    glow = generator.uniform(0.35, 0.9)
    rim = max(around.mean() - 70, 0.0)
    halo = np.clip(stroke.ink / stroke.threshold, 0, 1) ** 1.5 * glow
    region += (rim - region) * halo[..., None]

    angle = generator.uniform(0, 2 * np.pi)
    row, column = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    mix = np.clip(0.5 + 0.5 * (row * np.sin(angle) + column * np.cos(angle)), 0, 1)[..., None]
    colour = inks[0] + (inks[1] - inks[0]) * mix
    region += (colour - region) * _cover(stroke)[..., None]


def paint_fragment(generator: np.random.Generator, canvas: np.ndarray, stroke: Stroke) -> None:
    """Paint less than half of a digit somewhere into `canvas` (H, W, 3) float32, in place: an unlabelled distractor."""
    height, width = stroke.ink.shape
    top = int(generator.integers(0, canvas.shape[0] - height + 1))
    left = int(generator.integers(0, canvas.shape[1] - width + 1))
    region = canvas[top : top + height, left : left + width]
    angle = generator.uniform(0, 2 * np.pi)
    row, column = np.mgrid[:height, :width]
    along = row * np.sin(angle) + column * np.cos(angle)
    cut = np.quantile(along[stroke.mask], generator.uniform(0.55, 0.75))
    colour = np.clip(region.mean(axis=(0, 1)) + generator.normal(0, 55, 3), 0, 255)
    cover = _cover(stroke) * np.clip(along - cut, 0, 1) * generator.uniform(0.5, 0.9)
    region += (colour - region) * cover[..., None]


def _cover(stroke: Stroke) -> np.ndarray:
    """Antialiased opacity, 1/2 on the edge of the mask: (h, w) in 0..1."""
    steepness = max(stroke.ink.shape) / 12
    return np.clip(0.5 + (stroke.ink - stroke.threshold) * steepness, 0, 1)


def _pick_colours(generator: np.random.Generator, high: float) -> np.ndarray:
    """Two random colours (2, 3), both clearly brighter than `high`."""
    brightness = 255 - max(255 - high - _MIN_CONTRAST, 1.0) * generator.random((2, 1))
    tint = generator.normal(0, 70, (1, 3)) + generator.normal(0, 30, (2, 3))
    return _with_brightness(tint, brightness)


def _with_brightness(tint: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    """Colours of exactly this brightness: tint (n, 3) any numbers, brightness (n, 1) 0..255 -> (n, 3) within 0..255."""
    chroma = tint - (tint @ LUMA)[:, None]
    room = np.where(chroma > 0, 255 - brightness, brightness) / np.maximum(np.abs(chroma), 1e-6)
    return brightness + chroma * np.minimum(room.min(axis=1, keepdims=True), 1.0)
