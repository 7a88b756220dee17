"""``report.html`` of one run: metrics by class, curves, pictures, and what the encoder brought. One file, no script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_core import layout
from mae_core.atomic import write_text
from transfer.report import Curve, Picture, render
from transfer.report.results import duration

REPORT = "report.html"
CURVES = (
    ("loss", ("loss", "decode.loss_ce", "aux.loss_ce"), "Training loss", "cross-entropy"),
    ("mIoU", ("mIoU", "mAcc", "aAcc"), "Validation", "percent"),
)
"""What has to be in the log, what is drawn then, title and unit."""


def write_run_report(run: Path, results: Mapping[str, Any]) -> Path:
    """Write the report of a run directory that holds log.jsonl and metrics.json; returns its path."""
    log = run / layout.LOG
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    pictures = sorted((run / layout.PICTURES).glob("step_*.png"))
    loading, environment = (_read(run / name) for name in (layout.LOADING, layout.ENVIRONMENT))
    means = [f"{name} {results.get(name, float('nan')):.2f} %" for name in ("mIoU", "mAcc", "aAcc")]
    origin = "pre-trained weights" if loading else "no pre-trained weights"
    what = f"after {results['steps']} steps" if results["steps"] else "of a trained segmenter"
    caption = "Validation images, the truth beside the prediction; black is ignored."
    page = render(
        "run.html",
        title=run.name,
        task="segmentation",
        headline=f"{means[0]} {what}",
        summary=f"{means[1]}, {means[2]} · {origin} · took {duration(results['seconds'])}",
        columns=("Class", "IoU, %", "Accuracy, %"),
        classes=class_rows(results["per_class"]),
        charts=curves_of(entries),
        pictures=[Picture(path.stem, caption, path) for path in pictures[-1:]],
        environment=environment,
        loading=loading_lines(loading),
    )
    write_text(run / REPORT, page)
    return run / REPORT


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def curves_of(entries: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The charts of a run's log; those of which it holds nothing are left out."""
    curves = []
    for needed, names, title, unit in CURVES:
        if any(needed in entry for entry in entries):
            series = {n: [(entry["step"], entry[n]) for entry in entries if n in entry] for n in names}
            curves.append(Curve(title, unit, {name: points for name, points in series.items() if points}))
    return curves


def class_rows(per_class: Mapping[str, Mapping[str, float | None]]) -> list[tuple[str, list[str], float]]:
    """(name, IoU and accuracy in percent as text, length of the IoU's bar) of each class."""
    rows = []
    for name, values in per_class.items():
        numbers = ["–" if values[key] is None else format(values[key], ".2f") for key in ("IoU", "Acc")]
        rows.append((name, numbers, min(max(values["IoU"] or 0.0, 0.0), 100.0)))
    return rows


def loading_lines(loading: Mapping[str, Any]) -> str:
    """A loading report as text: every tensor under what became of it."""
    lines = [f"{loading['share']:.1%} of the model's parameters come from {loading['path']}"] if loading else []
    for kind in ("loaded", "renamed", "resized", "new", "unused", "refused"):
        found = loading.get(kind) or []
        told = [f"{name}: {how}" for name, how in found.items()] if isinstance(found, Mapping) else list(found)
        if told:
            lines += [f"{kind} ({len(told)})", *(f"  {line}" for line in told)]
    return "\n".join(lines)
