"""Pictures of measurements: embeddings in the plane, and which class is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMES = 40
"""More classes are drawn without their names."""
MOST_IN_LEGEND = 20


def _as_picture(figure: Figure) -> Image.Image:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    return Image.open(file).convert("RGB")


def scatter_picture(points: Tensor, groups: Sequence[str], axes: Sequence[str], *, title: str) -> Image.Image:
    """points (N, 2), a group each -> a scatter plot, coloured by group; a legend for up to ``MOST_IN_LEGEND``."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6))
    plot = figure.add_subplot()
    names = sorted(set(groups))
    colours = colormaps["tab20" if len(names) > 10 else "tab10"] if len(names) <= 20 else colormaps["hsv"]
    for number, name in enumerate(names):
        mine = points[np.array([group == name for group in groups])].numpy()
        colour = colours(number if len(names) <= 20 else number / len(names))
        plot.scatter(mine[:, 0], mine[:, 1], s=12, color=colour, label=name or "(no folder)", alpha=0.8, linewidths=0)
    if 1 < len(names) <= MOST_IN_LEGEND:
        plot.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, markerscale=2, fontsize=9)
    plot.set(xlabel=axes[0], ylabel=axes[1], title=title)
    plot.spines[["top", "right"]].set_visible(False)
    return _as_picture(figure)


def confusion_picture(confusion: Tensor, classes: Sequence[str], *, title: str) -> Image.Image:
    """confusion (C, C) counts [truth, prediction] -> a heat map of the share of each row, numbers in it where there is
    room."""
    from matplotlib.figure import Figure

    counts = confusion.numpy().astype(float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= MOST_NAMES
    side = min(max(5.0, 0.45 * len(classes) + 2), 16.0)
    figure = Figure(figsize=(side, side))
    plot = figure.add_subplot()
    image = plot.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=plot, fraction=0.046, pad=0.03, label="share of the true class")
    if named:
        plot.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        plot.set_yticks(range(len(classes)), classes, fontsize=8)
        for row, col in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, col] > 0.5 else "black"
            plot.text(col, row, f"{counts[row, col]:g}", ha="center", va="center", fontsize=7, color=colour)
    plot.set(xlabel="predicted", ylabel="true", title=title)
    return _as_picture(figure)
