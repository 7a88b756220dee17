"""``report.html`` of one run: metrics by class, curves, pictures, and what the encoder brought. One file, no script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from mae_core import layout
from mae_core.atomic import write_text
from transfer.report.charts import line_chart
from transfer.report.page import facts_list, figure, loading_text, scrolling, section
from transfer.report.results import Curve, Picture, duration

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
    body = [
        f'<header><p class="kicker">{escape(run.name)}, segmentation</p>',
        f"<h1>{means[0]} {what}</h1>",
        f'<p class="kicker">{means[1]}, {means[2]} · {origin} · took {duration(results["seconds"])}</p></header>',
        section("Classes", "", class_table(results["per_class"])),
        section("Curves", "curves", "".join(line_chart(curve) for curve in curves_of(entries))),
        section("Pictures", "pictures", "".join(figure(Picture(path.stem, caption, path)) for path in pictures[-1:])),
        section("Environment", "", facts_list({name: str(value) for name, value in environment.items()})),
        section("What the hand-over of the encoder loaded", "", loading_text(loading_lines(loading))),
    ]
    page = files("transfer.report").joinpath("page.html").read_text(encoding="utf-8")
    head = Template(page.partition("<main>")[0]).substitute(title=escape(run.name))
    write_text(run / REPORT, f"{head}<main>{''.join(body)}</main></body></html>\n")
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


def class_table(per_class: Mapping[str, Mapping[str, float | None]]) -> str:
    """IoU and accuracy of each class in percent, with a bar of the IoU."""
    if not per_class:
        return ""
    rows = []
    for name, values in per_class.items():
        numbers = "".join(
            f'<td class="number">{"–" if values[key] is None else format(values[key], ".2f")}</td>'
            for key in ("IoU", "Acc")
        )
        share = min(max(values["IoU"] or 0.0, 0.0), 100.0)
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th>{numbers}<td class="share"><span class="track" '
            f'aria-hidden="true"><i class="bar" style="width:{share:.1f}%"></i></span></td></tr>'
        )
    head = "".join(f'<th scope="col">{column}</th>' for column in ("Class", "IoU, %", "Accuracy, %", ""))
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return scrolling("Classes", f'<table class="times">{body}</table>')


def loading_lines(loading: Mapping[str, Any]) -> str:
    """A loading report as text: every tensor under what became of it."""
    lines = [f"{loading['share']:.1%} of the model's parameters come from {loading['path']}"] if loading else []
    for kind in ("loaded", "renamed", "resized", "new", "unused", "refused"):
        found = loading.get(kind) or []
        told = [f"{name}: {how}" for name, how in found.items()] if isinstance(found, Mapping) else list(found)
        if told:
            lines += [f"{kind} ({len(told)})", *(f"  {line}" for line in told)]
    return "\n".join(lines)
