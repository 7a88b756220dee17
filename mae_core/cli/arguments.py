"""What the commands with a configuration take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from mae_core.errors import UserError
from mae_core.resuming import HELP, meaning, one_word

ConfigAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="A configuration file, and options that override it, such as data.path=images optim.epochs=100.",
        show_default=False,
    ),
]
Resume = Annotated[str, typer.Option("--resume", metavar="[auto]", help=HELP, show_default=False)]


class Resumable(TyperCommand):
    """A command that takes ``--resume`` and ``--resume auto``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        return super().parse_args(ctx, one_word(args))


def read_resume(value: str) -> bool | Literal["auto"]:
    """What ``--resume`` asks for."""
    try:
        return meaning(value)
    except ValueError as error:
        raise UserError(str(error)) from None


def read_arguments(schema: Any, arguments: list[str] | None) -> Any:
    """A configuration from a command line: at most one file, anywhere, and overrides."""
    from mae_core.config.load import load_config

    files = [argument for argument in arguments or [] if "=" not in argument]
    if len(files) > 1:
        raise UserError(f"one configuration file at a time, got {', '.join(files)}; options are written key=value")
    return load_config(schema, files[0] if files else None, [a for a in arguments or [] if "=" in a])
