"""What the commands with a configuration take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mae_core.errors import UserError

ConfigAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="A configuration file, and options that override it, such as data.path=images optim.epochs=100.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the output folder from its last checkpoint.")
]


def read_arguments(schema: Any, arguments: list[str] | None) -> Any:
    """A configuration from a command line: at most one file, anywhere, and overrides."""
    from mae_core.config.load import load_config

    files = [argument for argument in arguments or [] if "=" not in argument]
    if len(files) > 1:
        raise UserError(f"one configuration file at a time, got {', '.join(files)}; options are written key=value")
    return load_config(schema, files[0] if files else None, [a for a in arguments or [] if "=" in a])
