"""Writes a report's three files; each is built whole before the first is written, and each appears whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mae_core.atomic import write_json, write_text
from transfer.report.page import render_page
from transfer.report.results import (
    COLUMNS,
    SPREAD_MEANING,
    VERDICT_TEXTS,
    Report,
    compare,
    decimals,
    duration,
    headline,
    mean_and_half_range,
    signed,
)


def write_report(report: Report, folder: Path | str) -> Path:
    """Write ``report.html``, ``report.md`` and ``report.json`` into ``folder`` (made when missing).

    Returns the path of the HTML file. Raises ValueError for a picture that is not a PNG file and FileNotFoundError for
    one that is missing; nothing is written then.
    """
    folder = Path(folder)
    page, text, numbers = render_page(report), render_markdown(report, folder), report_numbers(report)
    json.dumps(numbers, allow_nan=False)
    write_json(folder / "report.json", numbers)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def report_numbers(report: Report) -> dict[str, Any]:
    """Return the content of report.json: the values per seed, and beside them what the report derives from them."""
    comparisons = {name: compare(result) for name, result in report.tasks.items()}
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
            name: {"difference": found.difference, "spread": found.spread, "verdict": found.verdict}
            for name, found in comparisons.items()
        },
        "timings": {name: float(seconds) for name, seconds in report.timings.items()},
        "environment": report.environment,
    }


def render_markdown(report: Report, folder: Path) -> str:
    """Return the Markdown twin of the page: pictures as links relative to ``folder``, curves left to the page."""
    lines = [f"# {report.title}", "", f"**{headline(report.tasks)}**", ""]
    lines += [f"The whole chain took {duration(report.seconds)}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---|---|---:|---:|---:|---:|---|"]
    for name, result in report.tasks.items():
        found, digits = compare(result), decimals([*result.scratch, *result.pretrained])
        cells = [
            name,
            result.metric,
            mean_and_half_range(result.scratch, digits),
            mean_and_half_range(result.pretrained, digits),
            signed(found.difference, digits),
            "–" if found.spread is None else f"{found.spread:.{digits}f}",
            VERDICT_TEXTS[found.verdict],
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", SPREAD_MEANING]
    notes = [f"* {name}: {result.note}" for name, result in report.tasks.items() if result.note]
    lines += ["", *notes] if notes else []
    for picture in report.pictures:
        link = Path(os.path.relpath(picture.path, folder)).as_posix().replace(" ", "%20")
        lines += ["", f"## {picture.title}", "", f"![{picture.title}]({link})", "", picture.caption]
    if report.timings:
        lines += ["", "## Times", "", "| stage | time |", "|---|---:|"]
        lines += [f"| {name} | {duration(seconds)} |" for name, seconds in report.timings.items()]
    if report.environment:
        lines += ["", "## Environment", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in report.environment.items()]
    if report.commands:
        lines += ["", "## Commands"]
        for title, shell in report.commands:
            lines += ["", f"{title}:", "", "```sh", shell.rstrip(), "```"]
    if report.loading_reports:
        lines += ["", "## What each hand-over of the encoder loaded", "", "```", report.loading_reports.rstrip(), "```"]
    return "\n".join(lines) + "\n"
