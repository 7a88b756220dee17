"""Textured backgrounds for composed scenes: noise, woven regions, shapes and loose curves, from one generator."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in perceived brightness (ITU-R BT.601)."""

_NOISE_DEVIATION = 0.48  # of a field of unit normal control points under the cubic B-spline, in two dimensions
_OVERSAMPLING = 2


@lru_cache(maxsize=64)
def spline_weights(length: int, cells: int) -> np.ndarray:
    """Uniform cubic B-spline basis that spreads `cells + 3` control points over `length` samples.

    Returns (length, cells + 3) float32, every row sums to 1. Control point `j + 1` sits at coordinate `j` of 0..cells.
    """
    position = (np.arange(length) + 0.5) * cells / length
    cell = np.minimum(position.astype(int), cells - 1)
    t = position - cell
    basis = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    weights: np.ndarray = np.zeros((length, cells + 3), dtype=np.float32)
    for offset, value in enumerate(basis):
        weights[np.arange(length), cell + offset] = value / 6
    weights.setflags(write=False)
    return weights


def smooth_noise(generator: np.random.Generator, size: int, cells: int, channels: int = 1) -> np.ndarray:
    """(channels, size, size) float32, mean about 0 and deviation about 1; `cells` bumps along a side."""
    points = generator.standard_normal((channels, cells + 3, cells + 3), dtype=np.float32) / _NOISE_DEVIATION
    weights = spline_weights(size, cells)
    return weights @ points @ weights.T


def draw_palette(generator: np.random.Generator, num_colours: int) -> np.ndarray:
    """Colours of one scene, related in hue and apart in brightness: (num_colours, 3) float32 in 0..255."""
    anchor = generator.uniform(60, 195)
    brightness = anchor + generator.uniform(-55, 55, (num_colours, 1))
    tint = generator.normal(0, 26, (1, 3)) + generator.normal(0, 24, (num_colours, 3))
    return np.clip(brightness + tint - (tint @ LUMA)[:, None], 8, 247).astype(np.float32)


TEXTURES = ("plain", "stripes", "checks", "dots")
"""What a pixel of the background belongs to, by its value in a texture map."""

_REGIONS = 3


def paint_background(generator: np.random.Generator, size: int, clutter: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A background without any digit: (size, size, 3) float32 in 0..255, and its texture map (size, size) uint8.

    `clutter` scales the strength of the texture and the number of distracting shapes; 0 leaves a soft two-colour field.
    """
    palette = draw_palette(generator, 6)
    field = sum(smooth_noise(generator, size, cells)[0] * 0.55**octave for octave, cells in enumerate((2, 4, 8)))
    canvas = _blend(palette[0], palette[1], _step(field, generator.uniform(0.8, 3.0)))
    canvas += clutter * generator.uniform(3, 14) * smooth_noise(generator, size, 4, channels=3).transpose(1, 2, 0)

    textures: np.ndarray = np.zeros((size, size), dtype=np.uint8)
    for _ in range(generator.binomial(_REGIONS, min(1.2 * clutter, 1.0))):
        edge = generator.normal(0, 0.3) + smooth_noise(generator, size, int(generator.integers(1, 3)))[0]
        cover = _step(edge, 40.0) * generator.uniform(0.8, 1.0)
        colours = palette[generator.choice(len(palette), 4, replace=False)]
        first, second = (colours[pick(colours @ LUMA)] for pick in (np.argmin, np.argmax))
        kind = int(generator.integers(1, len(TEXTURES)))
        canvas = _blend(canvas, _blend(first, second, _weave(generator, size, TEXTURES[kind])), cover)
        textures[edge > 0] = kind

    grain_cells = max(2, size // int(generator.integers(2, 6)))
    canvas += clutter * generator.uniform(1, 8) * smooth_noise(generator, size, grain_cells)[0][..., None]
    return _draw_shapes(generator, np.clip(canvas, 0, 255), palette, clutter), textures


def _step(field: np.ndarray, sharpness: float) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * sharpness * field)


def _blend(under: np.ndarray, over: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Colours (3,) or (H, W, 3), cover (H, W) in 0..1 -> (H, W, 3) float32."""
    return (under + (over - under) * cover[..., None]).astype(np.float32)


def _weave(generator: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """Stripes, checks or dots with bent lines: (size, size) float32 in 0..1."""
    angle = generator.uniform(0, np.pi)
    turns = 2 * np.pi * generator.uniform(3, 9) / size
    row, column = np.mgrid[:size, :size].astype(np.float32) * np.float32(turns)
    bend_u, bend_v = smooth_noise(generator, size, 2, channels=2) * generator.uniform(0, 0.8)
    u = np.sin(column * np.cos(angle) + row * np.sin(angle) + bend_u + generator.uniform(0, 6.28))
    sharpness = generator.uniform(3, 10)
    if kind == "stripes":
        return _step(u, sharpness)
    v = np.sin(row * np.cos(angle) - column * np.sin(angle) + bend_v + generator.uniform(0, 6.28))
    return _step(u * v, 2 * sharpness) if kind == "checks" else _step(u + v - 0.9, sharpness)


def _draw_shapes(generator: np.random.Generator, canvas: np.ndarray, palette: np.ndarray, clutter: float) -> np.ndarray:
    """Ellipses, polygons and stroke-like curves over `canvas` (H, W, 3), antialiased."""
    scale = _OVERSAMPLING
    size = canvas.shape[0]
    picture = Image.fromarray(canvas.astype(np.uint8)).resize((size * scale,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for _ in range(generator.binomial(4, min(0.35 * clutter, 1.0))):
        centre = generator.uniform(0, size * scale, 2)
        corners = int(generator.integers(3, 6)) if generator.random() < 0.5 else 20
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + generator.uniform(0, 6.28)
        radii = size * scale * generator.uniform(0.04, 0.16, 2)
        outline = centre + radii * np.stack((np.cos(angles), np.sin(angles)), axis=1)
        draw.polygon(outline.ravel().tolist(), fill=_near(generator, palette, 22))
    t = np.linspace(0, 1, 14)[:, None]
    for _ in range(generator.binomial(6, min(0.4 * clutter, 1.0))):
        a = generator.uniform(0, size, 2)
        b, c, d = a + generator.normal(0, 0.22 * size, (3, 2))
        curve = (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d
        width = max(1, round(size * scale * generator.uniform(0.015, 0.06)))
        draw.line((curve * scale).ravel().tolist(), fill=_near(generator, palette, 30), width=width, joint="curve")
    return np.asarray(picture.reduce(scale), dtype=np.float32)


def _near(generator: np.random.Generator, palette: np.ndarray, spread: float) -> tuple[int, ...]:
    """A colour of the palette, moved a little."""
    colour = palette[generator.integers(len(palette))] + generator.normal(0, spread, 3)
    return tuple(int(value) for value in np.clip(colour, 0, 255))
