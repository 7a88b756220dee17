"""``mae report``: runs of any task side by side on one page that opens offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.atomic import write_text
from mae_core.errors import UserError
from mae_core.training.recorded import Recorded, changed, is_number, read_recorded
from transfer.report.page import PNG_SIGNATURE, Curve, Picture, Points, render
from transfer.report.results import duration

MOST_POINTS = 400
"""Of a curve; longer logs are thinned out."""
MOST_PICTURES = 4
MOST_EVENTS = 100
TITLES = {
    "loss": ("Training loss", ""),
    "lr": ("Learning rate", ""),
    "gradient_norm": ("Norm of the gradient", ""),
    "clipped": ("Steps that were clipped", "share"),
    "images_per_second": ("Speed", "images/s"),
    "data_wait": ("Waiting for data", "share of the time"),
}
"""Number of a log -> title and unit of its curve; others are titled by their names."""
NOT_A_RECIPE = ("output", "device", "log.", "data.path", "data.workers", "data.on_error", "weights", "cache", "seed")
"""Options that are not compared with the paper's."""


class Published(NamedTuple):
    """What a run's command is, and the values of the paper's recipe for it; empty where the paper has none."""

    command: str
    values: Mapping[str, Any]


PublishedFor = Callable[[Mapping[str, Any]], Published]


def write_runs_report(folders: Sequence[Path], out: Path, published_for: PublishedFor) -> Path:
    """Write one HTML file about the runs in ``folders``, finished or not: curves, pictures, events, what differs from
    the paper's recipe and between them, environment.

    Raises ``UserError`` for a folder that holds no run, and a file that exists.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another file with --out")
    runs = [read_recorded(folder) for folder in folders]
    names = short_names([run.folder for run in runs])
    published = [published_for(run.config) for run in runs]
    columns = list(zip(names, runs, published, strict=True))
    by_command = {command: [each for each in columns if each[2].command == command] for _, _, (command, _) in columns}
    page = render(
        "runs.html",
        title=" · ".join(names),
        headline=", ".join(names),
        runs=[summary_row(*each) for each in columns],
        charts=curves_of(dict(zip(names, runs, strict=True))),
        pictures=[picture for name, run in zip(names, runs, strict=True) for picture in pictures_of(name, run)],
        options=[option_table(command, columns) for command, columns in by_command.items()],
        events=[(name, event_rows(run)) for name, run in zip(names, runs, strict=True) if run.events],
        names=names,
        environment=side_by_side([run.environment for run in runs]),
        loading=[(name, run.loading) for name, run in zip(names, runs, strict=True) if run.loading],
    )
    write_text(out, page)
    return out


def short_names(folders: Sequence[Path]) -> list[str]:
    """The names of folders, with as many of their parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return [Path(*part[-depth:]).as_posix() for part in parts]


def summary_row(name: str, run: Recorded, published: Published) -> list[str]:
    """A run in a line: command, steps, last loss, images per second, time, best measurements, state."""
    loss, rate = run.series("loss"), run.series("images_per_second")
    times = [line["time"] for line in run.steps if is_number(line.get("time")) and line["time"] > 1e9]
    return [
        name,
        published.command,
        str(run.last_step),
        f"{loss[-1][1]:.4g}" if loss else "–",
        f"{rate[-1][1]:.0f}" if rate else "–",
        duration(times[-1] - times[0]) if len(times) > 1 else "–",
        ", ".join(f"{key} {value:.4g}" for key, value in main_numbers(run.metrics)) or "–",
        "finished" if run.results or run.metrics else "not finished",
        str(len(run.events)),
    ]


def main_numbers(metrics: Mapping[str, Any], most: int = 3) -> list[tuple[str, float]]:
    """The first numbers of a metrics.json, those in its sections as ``section.name``; counts and times are left out."""
    found: list[tuple[str, float]] = []
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found += [(f"{key}.{name}", number) for name, number in main_numbers(value, 1)]
        elif isinstance(value, float) and is_number(value) and key not in ("seconds", "loss"):
            found.append((key, value))
    return found[:most]


def curves_of(runs: Mapping[str, Recorded]) -> list[Curve]:
    """A chart for every number of the logs, with a line for each run that has it."""
    order = list(TITLES)
    numbers = list(dict.fromkeys(name for run in runs.values() for name in run.numbers if name not in ("time", "step")))
    numbers.sort(key=lambda name: order.index(name) if name in order else 0.5)
    curves = []
    for number in numbers:
        title, unit = TITLES.get(number, (number, ""))
        series = {name: thinned(points) for name, run in runs.items() if (points := run.series(number))}
        curves.append(Curve(title, unit, series))
    return curves


def thinned(points: Points) -> Points:
    """At most ``MOST_POINTS`` and one of a curve's points, the last among them."""
    step = -(-len(points) // MOST_POINTS)
    return points if step < 2 else [*points[:-1:step], points[-1]]


def pictures_of(name: str, run: Recorded) -> list[Picture]:
    """The first picture of a run, so that one sees where it came from, and its last ones."""
    whole = [path for path in run.pictures if is_png(path)]
    shown = whole if len(whole) <= MOST_PICTURES else [whole[0], *whole[1 - MOST_PICTURES :]]
    return [Picture(f"{name}: {path.stem}", "", path) for path in shown]


def is_png(path: Path) -> bool:
    """Whether a file begins as PNG; a run that writes it meanwhile, or was killed, may have left another."""
    try:
        with path.open("rb") as file:
            return file.read(24)[:8] == PNG_SIGNATURE
    except OSError:
        return False


def event_rows(run: Recorded) -> list[tuple[str, str, str]]:
    """(step, event, what else it says) of the first events of a run."""
    rows = []
    for event in run.events[:MOST_EVENTS]:
        rest = {key: value for key, value in event.items() if key not in ("event", "step", "time")}
        rows.append((str(event.get("step", "")), str(event["event"]), "; ".join(f"{k}: {v}" for k, v in rest.items())))
    if len(run.events) > MOST_EVENTS:
        rows.append(("", f"and {len(run.events) - MOST_EVENTS} more", "log.jsonl has them"))
    return rows


def option_table(command: str, runs: Sequence[tuple[str, Recorded, Published]]) -> dict[str, Any]:
    """The options in which runs of one command differ from the paper's recipe, or from each other."""
    paper = runs[0][2].values
    first = runs[0][1].config
    keys: dict[str, None] = {}
    for _, run, _ in runs:
        apart = [key for key in changed(paper, run.config) if not key.startswith(NOT_A_RECIPE)] if paper else []
        keys |= dict.fromkeys([*apart, *changed(first, run.config)])
    rows = [(key, cell(paper, key), [cell(run.config, key) for _, run, _ in runs]) for key in keys]
    return {"command": command, "names": [name for name, *_ in runs], "paper": bool(paper), "rows": rows}


def cell(values: Mapping[str, Any], key: str) -> str:
    """A value as a table shows it."""
    return "–" if key not in values else "" if values[key] is None else str(values[key])


def side_by_side(facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(name, its value in each run) of all facts that any run has."""
    names = dict.fromkeys(name for found in facts for name in found)
    return [(name, [cell(found, name) for found in facts]) for name in names]
