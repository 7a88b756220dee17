"""The report of a chain: scratch against pre-trained for every task, as a page, as Markdown and as numbers."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mae_core.atomic import write_json, write_text
from transfer.report.page import Curve, Picture, render
from transfer.report.results import (
    AHEAD,
    COLUMNS,
    SPREAD_MEANING,
    VERDICT_TEXTS,
    TaskResult,
    compare,
    decimals,
    headline,
    mean_and_half_range,
    signed,
)


@dataclass
class Report:
    """Everything a chain's report shows.

    seconds           wall-clock time of the whole chain
    tasks             task name -> its result
    timings           name of a stage -> seconds of its runs together, of which several run at once
    commands          (title, shell text): what ran, and the same chain on own data
    loading_reports   preformatted text: what was loaded wherever the encoder was used
    """

    title: str
    seconds: float
    tasks: dict[str, TaskResult]
    curves: list[Curve] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    commands: list[tuple[str, str]] = field(default_factory=list)
    loading_reports: str = ""


def write_report(report: Report, folder: Path | str) -> Path:
    """Write ``report.html``, ``report.md`` and ``report.json`` into ``folder`` (made when missing).

    Returns the path of the HTML file. Raises ValueError for a picture that is not a PNG file and FileNotFoundError for
    one that is missing; nothing is written then.
    """
    folder = Path(folder)
    links = [Path(os.path.relpath(picture.path, folder)).as_posix().replace(" ", "%20") for picture in report.pictures]
    answer, _, rest = headline(report.tasks).partition(": ")
    values = {
        "report": report,
        "rows": [row(name, result) for name, result in report.tasks.items()],
        "columns": COLUMNS,
        "answer": f"{answer}:" if rest else answer,
        "headline": rest,
        "good": answer == "Yes",
        "seeds": max((len(result.pretrained) for result in report.tasks.values()), default=0),
        "spread_meaning": SPREAD_MEANING,
        "links": links,
    }
    page, text, numbers = render("comparison.html", **values), render("comparison.md", **values), numbers_of(report)
    json.dumps(numbers, allow_nan=False)
    write_json(folder / "report.json", numbers)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def row(name: str, result: TaskResult) -> dict[str, Any]:
    """One task as page and Markdown show it: texts with the metric's decimals, positions of its bars in percent."""
    found, values = compare(result), [*result.scratch, *result.pretrained]
    digits, top = decimals(values), max(*values, 1e-9) * 1.06

    def percent(value: float) -> str:
        return f"{min(max(value / top, 0.0), 1.0) * 100:.2f}%"

    def arm(label: str, values: list[float], mean: float) -> dict[str, Any]:
        return {
            "label": label,
            "mean": f"{mean:.{digits}f}",
            "text": mean_and_half_range(values, digits),
            "seeds": " · ".join(f"{value:.{digits}f}" for value in values),
            "bar": percent(mean),
            "dots": [percent(value) for value in values],
        }

    return {
        "name": name,
        "metric": result.metric,
        "note": result.note,
        "lower_is_better": not result.higher_is_better,
        "scratch": arm("scratch", result.scratch, found.scratch_mean),
        "pretrained": arm("pre-trained", result.pretrained, found.pretrained_mean),
        "difference": signed(found.difference, digits),
        "spread": "–" if found.spread is None else f"{found.spread:.{digits}f}",
        "verdict": VERDICT_TEXTS[found.verdict],
        "ahead": found.verdict == AHEAD,
    }


def numbers_of(report: Report) -> dict[str, Any]:
    """The content of report.json: the values per seed, and beside them what the report derives from them."""
    comparisons = {name: asdict(compare(result)) for name, result in report.tasks.items()}
    return {
        "seconds": float(report.seconds),
        "tasks": {
            name: {
                "metric": result.metric,
                "scratch": [float(value) for value in result.scratch],
                "pretrained": [float(value) for value in result.pretrained],
            }
            for name, result in report.tasks.items()
        },
        "headline": headline(report.tasks),
        "comparisons": {
            name: {key: found[key] for key in ("difference", "spread", "verdict")}
            for name, found in comparisons.items()
        },
        "timings": {name: float(seconds) for name, seconds in report.timings.items()},
        "environment": report.environment,
    }
