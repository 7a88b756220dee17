"""Line charts as inline SVG, coloured by the page's style sheet so that they follow its light and dark scheme."""

from __future__ import annotations

import math
from html import escape

from transfer.report.results import Curve

WIDTH, HEIGHT = 400, 232
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 38
MAX_POINTS = 400
DASHES = ("", "5 3", "1.5 3", "8 3 1.5 3")
Points = list[tuple[float, float]]


def line_chart(curve: Curve) -> str:
    """Return a ``<figure>`` with the chart and its legend; points that are not finite are left out."""
    series = {name: thinned(finite(points)) for name, points in curve.series.items()}
    styles = series_styles(list(series))
    body = plot(series, styles, curve) if any(series.values()) else '<p class="empty">no points were recorded</p>'
    legend = "".join(
        f'<li><svg class="key {colour}" viewBox="0 0 24 8" aria-hidden="true">'
        f'<line x1="1" y1="4" x2="23" y2="4" stroke-dasharray="{dash}"/></svg>{escape(name)}</li>'
        for name, (colour, dash) in styles.items()
    )
    return (
        f'<figure class="chart"><figcaption><strong>{escape(curve.title)}</strong>'
        f'<span class="unit">{escape(curve.y_label)}</span></figcaption>{body}<ul class="legend">{legend}</ul></figure>'
    )


def plot(series: dict[str, Points], styles: dict[str, tuple[str, str]], curve: Curve) -> str:
    """Return the ``<svg>`` of at least one non-empty series: grid, axis labels, one polyline each."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs), 5), ticks(min(ys), max(ys), 5)
    x_low, x_high = min(0.0, *xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {place_y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place_y(y) + 4:.1f}" text-anchor="end">{tick_text(y, y_ticks)}</text>')
    for x in x_ticks:
        if x_low <= x <= x_high:
            anchor = "end" if place_x(x) > WIDTH - RIGHT - 12 else "middle"
            position = f'x="{place_x(x):.1f}" y="{HEIGHT - 20}"'
            parts.append(f'<text {position} text-anchor="{anchor}">{tick_text(x, x_ticks)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(curve.x_label)}</text>')
    for name, points in series.items():
        colour, dash = styles[name]
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle class="{colour}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3"/>')
        elif points:
            path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
            parts.append(f'<polyline class="{colour}" points="{path}" stroke-dasharray="{dash}"/>')
    ends = "; ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in series.items() if points)
    label = escape(f"{curve.title}, {curve.y_label} over {curve.x_label}: {ends}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def series_styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """Return name -> (colour class, dash pattern): a colour per arm, the further seeds of an arm dashed."""
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


def finite(points: Points) -> Points:
    """Return the points whose two numbers are finite."""
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Points) -> Points:
    """Return at most about MAX_POINTS of the points, evenly picked, the last one among them."""
    step = math.ceil(len(points) / MAX_POINTS) or 1
    kept = points[::step]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers; the first is at or below ``low`` and the last at or above ``high``."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(count - 1, 1)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float, all_ticks: list[float]) -> str:
    """Return a tick's label with just the decimals its axis needs; thousands as "2k"."""
    step = all_ticks[1] - all_ticks[0]
    if step >= 1000 and step % 100 == 0:
        return f"{value / 1000:g}k"
    places = next((places for places in range(7) if abs(round(step, places) - step) < step * 1e-6), 7)
    return f"{value:.{places}f}".replace("-", "−")
