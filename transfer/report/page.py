"""Pages from templates: style, pictures and charts are inside the one file, no script runs and nothing is fetched."""

from __future__ import annotations

import base64
import io
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mae_core.templates import fill
from transfer.report.results import duration

CONTENT_WIDTH = 1120
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOURS = {
    "scratch": "#b06a1f",
    "pretrained": "#0b6e78",
    "other0": "#0b6e79",
    "other1": "#6b4fa0",
    "other2": "#a23b55",
    "other3": "#4a6a2a",
    "soft": "#5d6570",
    "line": "#dfe1e0",
}
"""CSS variable of the page -> the colour that stands for it while matplotlib draws; no two are the same."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1.5, 3)), (0, (8, 3, 1.5, 3)))
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line chart; ``series`` maps a name to (x, y) points.

    A series with "scratch" or "pre-trained" in its name takes that arm's colour; its seeds differ in their dashes.
    """

    title: str
    y_label: str
    series: dict[str, Points]
    x_label: str = "step"


@dataclass(frozen=True)
class Picture:
    """A PNG file with a title and a caption; the caption says what the panels are."""

    title: str
    caption: str
    path: Path


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; texts are escaped in ``.html``.

    Raises ``ValueError`` for a picture that is not PNG and ``FileNotFoundError`` for a missing one.
    """
    filters: dict[str, Callable[..., Any]] = {"duration": duration, "embed": embed, "chart": chart}
    return fill(Path(__file__).parent / template, filters, **values)


def embed(picture: Picture) -> dict[str, Any]:
    """A picture for the page: its bytes as text, small ones enlarged by a whole factor with hard pixels.

    Raises ``ValueError`` where the file is not PNG.
    """
    content = picture.path.read_bytes()
    if content[:8] != PNG_SIGNATURE or len(content) < 24:
        raise ValueError(f"picture {picture.path} is not a PNG file; save it as PNG")
    width, height = struct.unpack(">II", content[16:24])
    factor = max(1, (CONTENT_WIDTH if width > 2 * height else CONTENT_WIDTH // 2 - 16) // width)
    return {
        "data": base64.b64encode(content).decode("ascii"),
        "width": width * factor,
        "height": height * factor,
        "column": "wide" if width * factor > CONTENT_WIDTH // 2 else "half",
        "scaling": "pixelated" if factor > 1 else "smooth",
    }


def chart(curve: Curve) -> Markup:
    """A curve as inline SVG in the page's colours, with its ends as the alternative text; empty where no point is
    finite."""
    series = {name: points for name, given in curve.series.items() if (points := list(finite(given)))}
    if not series:
        return Markup("")
    ends = "; ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in series.items())
    label = escape(f"{curve.title}, {curve.y_label} over {curve.x_label}: {ends}", quote=True)
    return Markup(draw(series, curve.x_label).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def draw(series: dict[str, Points], x_label: str) -> str:
    """The ``<svg>`` element of a chart, drawn by matplotlib.

    It refers to nothing, inside or outside of it: no markers, no clip paths, no ids, so that a page can hold many.
    """
    import matplotlib  # takes a second, and a page without curves needs none
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9, "text.color": COLOURS["soft"]}):
        figure = Figure(figsize=(5, 2.9))  # margins by hand: a layout engine draws all of it once more to find them
        below = (0.55 + 0.2 * math.ceil(len(series) / 2)) / 2.9  # axis and legend, in inches of its height
        axes = figure.add_axes((0.14, below, 0.82, 0.97 - below))
        for number, (name, (colour, dash)) in enumerate(series_styles(list(series)).items()):
            alone = len(series[name]) == 1
            (line,) = axes.plot(*zip(*series[name] * (1 + alone), strict=True), color=COLOURS[colour], label=name)
            line.set(linewidth=5 if alone else 1.6, linestyle=dash, clip_on=False, gid=f"series{number}")
            line.set(solid_capstyle="round")
        axes.set_xlabel(x_label, color=COLOURS["soft"], loc="right")
        axes.grid(axis="y", color=COLOURS["line"], clip_on=False)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(bottom=False, left=False, labelcolor=COLOURS["soft"])
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 0), bbox_transform=figure.transFigure, ncols=2, frameon=False
        )
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"<defs>.*?</defs>", "", file.getvalue().partition("<svg ")[2], flags=re.DOTALL)
    svg = re.sub(r' id="(?!series)[^"]*"', "", re.sub(r' clip-path="[^"]*"', "", svg))
    svg = re.sub(r' id="series\d+"', ' class="series"', svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return f"<svg {svg}"


def series_styles(names: list[str]) -> dict[str, tuple[str, Any]]:
    """Return name -> (colour, dash pattern): a colour per arm, the further seeds of an arm dashed."""
    used: dict[str, int] = {}
    styles = {}
    others = iter(range(len(names)))
    for name in names:
        lowered = name.lower().replace("-", "")
        arm = next((arm for word, arm in (("scratch", "scratch"), ("pretrain", "pretrained")) if word in lowered), None)
        colour = arm or f"other{next(others) % 4}"
        styles[name] = (colour, DASHES[used.get(colour, 0) % len(DASHES)])
        used[colour] = used.get(colour, 0) + 1
    return styles


def finite(points: Points) -> Iterator[tuple[float, float]]:
    """The points whose two numbers are finite."""
    return ((float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y))
