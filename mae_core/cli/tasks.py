"""The tasks of the other package as groups of ``mae``: found by name, so that this one knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any

import typer

from mae_core.errors import UserError, user_errors

GROUP = "mae_core.tasks"
"""Entry points that bring a group of commands: a ``typer.Typer``."""
ELSEWHERE = {
    "detect": "transfer.detection.commands:app",
    "segment": "transfer.segmentation.commands:app",
    "labels": "transfer.detection.labels.commands:app",
}
"""Groups of this distribution outside of this package, by the name of the verb."""
COMMANDS = {"compare": "transfer.compare.command:compare"}
"""Commands of this distribution outside of this package."""


def pass_on(app: typer.Typer, name: str, place: str, *, prog: str, about: str) -> None:
    """Add the command ``name`` to ``app``: it hands its words to the function at ``place``, which has a parser of its
    own, takes ``prog`` for its help, and is imported when the command runs."""

    def run(context: typer.Context) -> None:
        with user_errors():
            try:
                command: Callable[..., None] = resolve_name(place)
            except ModuleNotFoundError as error:
                raise UserError(f"{prog} needs {error.name}, which is not installed") from None
            command(context.args, prog=prog)

    passed = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, context_settings=passed, help=f"{about}; --help says more.")(run)


def task_groups() -> dict[str, typer.Typer]:
    """The groups that are installed, by the verb."""
    places = {**{point.name: point.value for point in entry_points(group=GROUP)}, **ELSEWHERE}
    return _installed(places)


def task_commands() -> dict[str, Callable[..., None]]:
    """Commands that stand beside the groups, by the verb."""
    return _installed(COMMANDS)


def _installed(places: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, place in places.items():
        try:
            found[name] = resolve_name(place)
        except ModuleNotFoundError:
            continue
    return found
