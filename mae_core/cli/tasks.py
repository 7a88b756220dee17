"""The tasks of the other package as groups of ``mae``: found by name, so that this one knows nothing of them."""

from __future__ import annotations

from importlib.metadata import entry_points
from pkgutil import resolve_name

import typer

GROUP = "mae_core.tasks"
"""Entry points that bring a group of commands: a ``typer.Typer``."""
ELSEWHERE = {
    "detect": "transfer.detection.commands:app",
    "segment": "transfer.segmentation.commands:app",
    "labels": "transfer.detection.labels.commands:app",
}
"""Groups of this distribution outside of this package, by the name of the verb."""

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command that hands its words to a parser of its own."""


def task_groups() -> dict[str, typer.Typer]:
    """The groups that are installed, by the verb."""
    places = {**{point.name: point.value for point in entry_points(group=GROUP)}, **ELSEWHERE}
    groups = {}
    for name, place in places.items():
        try:
            groups[name] = resolve_name(place)
        except ModuleNotFoundError:
            continue
    return groups
