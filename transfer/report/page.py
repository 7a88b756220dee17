"""The report as one HTML file: style, pictures and charts inside, no script, nothing fetched."""

from __future__ import annotations

import base64
import struct
from html import escape
from importlib.resources import files
from string import Template

from transfer.report.charts import line_chart
from transfer.report.results import (
    AHEAD,
    COLUMNS,
    SPREAD_MEANING,
    VERDICT_TEXTS,
    Picture,
    Report,
    TaskResult,
    compare,
    decimals,
    duration,
    headline,
    mean_and_half_range,
    signed,
)

CONTENT_WIDTH = 1120
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def render_page(report: Report) -> str:
    """Return the whole page; raises ValueError for a picture that is not PNG, FileNotFoundError for a missing one."""
    template = Template(files("transfer.report").joinpath("page.html").read_text(encoding="utf-8"))
    answer, _, rest = headline(report.tasks).partition(": ")
    seeds = max((len(result.pretrained) for result in report.tasks.values()), default=0)
    return template.substitute(
        title=escape(report.title),
        answer=escape(f"{answer}:" if rest else answer),
        headline=escape(rest),
        tally="good" if answer == "Yes" else "mixed",
        seeds=f"{seeds} {'seed' if seeds == 1 else 'seeds'}",
        duration=duration(report.seconds),
        tiles="".join(tile(name, result) for name, result in report.tasks.items()),
        table=result_table(report.tasks),
        spread_meaning=escape(SPREAD_MEANING),
        pictures=section("Pictures", "pictures", "".join(figure(picture) for picture in report.pictures)),
        curves=section(
            "Curves",
            "curves pairs" if len(report.curves) in (2, 4) else "curves",
            "".join(line_chart(curve) for curve in report.curves),
        ),
        timings=section("Times", "", timing_table(report.timings, report.seconds) if report.timings else ""),
        environment=section("Environment", "", facts_list(report.environment)),
        commands=section("Commands", "", "".join(command(*entry) for entry in report.commands)),
        loading=section("What each hand-over of the encoder loaded", "", loading_text(report.loading_reports)),
    )


def section(title: str, style: str, content: str) -> str:
    """Return a titled section, or nothing where there is no content."""
    if not content:
        return ""
    return f'<section><h2>{escape(title)}</h2><div class="{style}">{content}</div></section>'


def tile(name: str, result: TaskResult) -> str:
    """Return one task at a glance: for both arms a bar to the mean and a dot per seed, from zero."""
    values = [*result.scratch, *result.pretrained]
    found, digits = compare(result), decimals(values)
    top = max(*values, 1e-9) * 1.06
    rows = "".join(
        f'<div class="row {arm}"><span class="arm">{label}</span>{track(arm_values, mean, top)}'
        f'<span class="value">{mean:.{digits}f}</span></div>'
        for arm, label, arm_values, mean in (
            ("pretrained", "pre-trained", result.pretrained, found.pretrained_mean),
            ("scratch", "scratch", result.scratch, found.scratch_mean),
        )
    )
    note = f'<p class="note">{escape(result.note)}</p>' if result.note else ""
    better = "" if result.higher_is_better else ", lower is better"
    return (
        f'<article class="tile"><h2>{escape(name)}</h2><p class="gain {"good" if found.verdict == AHEAD else "plain"}">'
        f"{signed(found.difference, digits)}</p>"
        f'<p class="metric">{escape(result.metric)}{better}</p>{rows}{note}</article>'
    )


def track(values: list[float], mean: float, top: float) -> str:
    """Return a bar from zero to ``mean`` and a dot per seed, on an axis from zero to ``top`` that clips."""

    def percent(value: float) -> str:
        return f"{min(max(value / top, 0.0), 1.0) * 100:.2f}%"

    dots = "".join(f'<i class="dot" style="left:{percent(value)}"></i>' for value in values)
    return f'<span class="track" aria-hidden="true"><i class="bar" style="width:{percent(mean)}"></i>{dots}</span>'


def result_table(tasks: dict[str, TaskResult]) -> str:
    """Return the table of all tasks, the single seeds in small print under each mean."""
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    rows = []
    for name, result in tasks.items():
        found, digits = compare(result), decimals([*result.scratch, *result.pretrained])
        arms = "".join(
            f'<td class="number">{mean_and_half_range(values, digits)}'
            f"<small>{' · '.join(f'{value:.{digits}f}' for value in values)}</small></td>"
            for values in (result.scratch, result.pretrained)
        )
        spread = "–" if found.spread is None else f"{found.spread:.{digits}f}"
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(result.metric)}</td>{arms}'
            f'<td class="number">{signed(found.difference, digits)}</td><td class="number">{spread}</td>'
            f'<td><span class="verdict {"good" if found.verdict == AHEAD else "plain"}">{VERDICT_TEXTS[found.verdict]}'
            "</span></td></tr>"
        )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return scrolling("Results", f'<table class="results">{body}</table>')


def figure(picture: Picture) -> str:
    """Return a picture embedded as base64, small ones enlarged by a whole factor with hard pixels."""
    content = picture.path.read_bytes()
    if content[:8] != PNG_SIGNATURE or len(content) < 24:
        raise ValueError(f"picture {picture.path} is not a PNG file; save it as PNG")
    width, height = struct.unpack(">II", content[16:24])
    limit = CONTENT_WIDTH if width > 2 * height else CONTENT_WIDTH // 2 - 16
    factor = max(1, limit // width)
    style = "wide" if width * factor > CONTENT_WIDTH // 2 else "half"
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<figure class="{style}"><img src="data:image/png;base64,{data}" alt="{escape(picture.title, quote=True)}" '
        f'width="{width * factor}" height="{height * factor}" class="{"pixelated" if factor > 1 else "smooth"}">'
        f"<figcaption><strong>{escape(picture.title)}</strong> {escape(picture.caption)}</figcaption></figure>"
    )


def timing_table(timings: dict[str, float], total: float) -> str:
    """Return the stages with their time and a bar of their share of the whole."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{duration(seconds)}</td>'
        f'<td class="share"><span class="track" aria-hidden="true"><i class="bar" '
        f'style="width:{min(seconds / max(total, 1e-9), 1.0) * 100:.1f}%"></i></span></td></tr>'
        for name, seconds in timings.items()
    )
    head = "".join(f'<th scope="col">{column}</th>' for column in ("Stage", "Time", "Share of the whole"))
    whole = f'<tr><th scope="row">whole chain</th><td class="number">{duration(total)}</td><td></td></tr>'
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody><tfoot>{whole}</tfoot>"
    return scrolling("Times", f'<table class="times">{body}</table>')


def facts_list(facts: dict[str, str]) -> str:
    """Return names and values as a definition list."""
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{entries}</dl>" if entries else ""


def command(title: str, shell: str) -> str:
    """Return one titled shell snippet."""
    return f"<h3>{escape(title)}</h3>{scrolling(title, f'<pre><code>{escape(shell.rstrip())}</code></pre>')}"


def loading_text(text: str) -> str:
    """Return the loading reports, folded away: a reader looks for them only when a number surprises."""
    if not text:
        return ""
    body = scrolling("Loading reports", f"<pre>{escape(text.rstrip())}</pre>")
    return f"<details><summary>Show the loading reports</summary>{body}</details>"


def scrolling(label: str, content: str) -> str:
    """Return a container in which wide content scrolls, reachable by keyboard, so that the page itself never does."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label, quote=True)}">{content}</div>'
