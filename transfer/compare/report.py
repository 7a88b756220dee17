"""The report of a comparison: every encoder on every task, what each costs, curves and pictures side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from mae_core.atomic import write_json, write_text
from transfer.report import Curve, Picture, render
from transfer.report.results import count_word, decimals, join_words, mean_and_half_range

NAME = "compare"
SPREAD_MEANING = (
    "Means over seeds; ± is half the distance between the best and the worst seed. The best encoder of a task is ahead "
    "of another where their means differ by more than the larger of the two distances between best and worst seed; "
    "those it is not ahead of are marked ≈. With one seed there is no spread."
)


@dataclass(frozen=True)
class EncoderRow:
    """An encoder and its cost."""

    name: str
    source: str
    licence: str
    parameters: int
    flops: int
    images_per_second: float
    image_size: Sequence[int]


@dataclass(frozen=True)
class Cell:
    """An encoder on a task with a share of the labels: a score a seed, the rate that was chosen, and what to show."""

    task: str
    metric: str
    encoder: str
    share: float
    labels: int
    scores: list[float]
    choice: dict[str, float] = field(default_factory=dict)
    grid: list[dict[str, Any]] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)
    picture: Picture | None = None
    loading: str = ""
    command: str = ""

    @property
    def column(self) -> str:
        """The task, and the share where it is not all."""
        return self.task if self.share == 1 else f"{self.task}, {self.share:.0%} of the labels"

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.scores)

    @property
    def range(self) -> float:
        """Between the best and the worst seed."""
        return max(self.scores) - min(self.scores)


@dataclass(frozen=True)
class Results:
    """Everything that the report shows."""

    title: str
    encoders: list[EncoderRow]
    cells: list[Cell]
    seconds: float
    trainings: int
    seeds: int
    holdout: float
    environment: dict[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def columns(self) -> dict[str, list[Cell]]:
        """Column -> its cells, the best first."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.column, []).append(cell)
        return {name: sorted(cells, key=lambda cell: -cell.mean) for name, cells in found.items()}


def rivals(cells: Sequence[Cell]) -> list[str]:
    """Of cells with the best first, the encoders that the best is not ahead of."""
    best, *others = cells
    return [cell.encoder for cell in others if best.mean - cell.mean <= max(best.range, cell.range)]


def headline(results: Results) -> str:
    """Which encoder is best, from the numbers alone."""
    columns = results.columns
    if not columns:
        return "Nothing has been measured yet."
    ahead: dict[str, list[str]] = {}
    open_ones = []
    for name, cells in columns.items():
        if len(cells) > 1 and len(cells[0].scores) > 1 and not rivals(cells):
            ahead.setdefault(cells[0].encoder, []).append(name)
        else:
            tied = [cells[0].encoder, *rivals(cells)] if len(cells) > 1 else [cells[0].encoder]
            open_ones.append(f"{name} ({join_words(tied)})")
    total = len(columns)
    sentences = [
        f"{encoder} is ahead of every other in {count_word(len(names))} of {count_word(total)}: {join_words(names)}."
        for encoder, names in sorted(ahead.items(), key=lambda entry: -len(entry[1]))
    ]
    if open_ones:
        sentences.append(f"No encoder is ahead by more than the spread in {join_words(open_ones)}.")
    return " ".join(sentences)


def budget_meaning(results: Results) -> str:
    """What all encoders had alike."""
    if not any(cell.grid for cell in results.cells):
        return "Every encoder has the same steps, rate and layer decay: nothing was searched."
    return (
        "Every encoder has the same steps and the same grid of rates and decays, of which the best was chosen on "
        f"{100 * results.holdout:.0f} % of the training labels, which were held out; the validation set was read by "
        "the final trainings alone."
    )


def write_results(results: Results, folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and ``report.json`` into ``folder`` -> the path of the first."""
    values = {
        "results": results,
        "headline": headline(results),
        "columns": {name: column_of(cells) for name, cells in results.columns.items()},
        "rows": [row_of(encoder, results) for encoder in results.encoders],
        "curves_found": curves_of(results),
        "pictures_found": [cell.picture for cell in results.cells if cell.picture is not None],
        "commands": {cell.column: cell.command for cell in results.cells if cell.scores},
        "loading_text": "\n".join(f"{cell.encoder}: {cell.loading}" for cell in results.cells if cell.loading),
        "spread_meaning": SPREAD_MEANING,
        "budget_meaning": budget_meaning(results),
    }
    page, text, numbers = render(f"{NAME}.html", **values), render(f"{NAME}.md", **values), numbers_of(results)
    json.dumps(numbers, allow_nan=False)
    write_json(folder / "report.json", numbers)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def column_of(cells: Sequence[Cell]) -> dict[str, Any]:
    """A task as the page shows it: a bar an encoder, the best first, and what each cell of the table says."""
    values = [score for cell in cells for score in cell.scores]
    digits, top = decimals(values), max(*values, 1e-9) * 1.06
    close = rivals(cells)

    def percent(value: float) -> str:
        return f"{min(max(value / top, 0.0), 1.0) * 100:.2f}%"

    return {
        "metric": cells[0].metric,
        "labels": cells[0].labels,
        "arms": [
            {
                "name": cell.encoder,
                "mean": f"{cell.mean:.{digits}f}",
                "text": mean_and_half_range(cell.scores, digits),
                "seeds": " · ".join(f"{value:.{digits}f}" for value in cell.scores),
                "bar": percent(cell.mean),
                "dots": [percent(value) for value in cell.scores],
                "best": number == 0,
                "close": cell.encoder in close,
                "choice": ", ".join(f"{name} {value:g}" for name, value in cell.choice.items()),
            }
            for number, cell in enumerate(cells)
        ],
    }


def row_of(encoder: EncoderRow, results: Results) -> dict[str, Any]:
    """An encoder with its cost in words and its place in every column."""
    columns = {name: column_of(cells) for name, cells in results.columns.items()}
    return {
        "name": encoder.name,
        "source": encoder.source,
        "licence": encoder.licence,
        "parameters": f"{encoder.parameters / 1e6:.1f} M",
        "flops": f"{encoder.flops / 1e9:.2f} G",
        "speed": f"{encoder.images_per_second:.0f}",
        "image_size": " x ".join(map(str, encoder.image_size)),
        "cells": [
            next((arm for arm in column["arms"] if arm["name"] == encoder.name), None) for column in columns.values()
        ],
    }


def curves_of(results: Results) -> list[Curve]:
    """Training losses of the first seed, the scores of the grid, and scores over the number of labels."""
    curves = []
    for name in results.columns:
        ordered = [cell for cell in results.cells if cell.column == name]
        if losses := {cell.encoder: cell.curve for cell in ordered if cell.curve}:
            curves.append(Curve(name, "training loss, first seed", losses))
        rates = {name: points for cell in ordered for name, points in rate_series(cell) if len(points) > 1}
        if rates:
            curves.append(Curve(name, "score on the labels held out", rates, x_label="times the recipe's rate"))
    for task in dict.fromkeys(cell.task for cell in results.cells):
        mine = [cell for cell in results.cells if cell.task == task]
        if len({cell.share for cell in mine}) > 1:
            series = {
                encoder: sorted((float(cell.labels), cell.mean) for cell in mine if cell.encoder == encoder)
                for encoder in dict.fromkeys(cell.encoder for cell in mine)
            }
            curves.append(Curve(task, mine[0].metric, series, x_label="labelled training images"))
    return curves


def rate_series(cell: Cell) -> list[tuple[str, list[tuple[float, float]]]]:
    """(name, scores over the rate) for every decay of a cell's grid."""
    ended = [entry for entry in cell.grid if entry["score"] is not None]
    decays = dict.fromkeys(entry["decay"] for entry in ended)
    return [
        (
            f"{cell.encoder}, decay {decay:g}" if len(decays) > 1 else cell.encoder,
            sorted((entry["rate"], entry["score"]) for entry in ended if entry["decay"] == decay),
        )
        for decay in decays
    ]


def numbers_of(results: Results) -> dict[str, Any]:
    """The content of report.json: scores a seed, the grid, the costs, and what the report derives from them."""
    return {
        "title": results.title,
        "headline": headline(results),
        "command": results.command,
        "seconds": results.seconds,
        "trainings": results.trainings,
        "seeds": results.seeds,
        "encoders": [asdict(encoder) for encoder in results.encoders],
        "results": [
            {
                **{key: getattr(cell, key) for key in ("task", "metric", "encoder", "share", "labels", "scores")},
                **{"mean": cell.mean, "range": cell.range, "choice": cell.choice, "grid": cell.grid},
                "command": cell.command,
            }
            for cell in results.cells
        ],
        "environment": results.environment,
    }
