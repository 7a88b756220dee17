"""What the commands with a configuration take."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mae_core.dialects import other_word
from mae_core.errors import UserError
from mae_core.resuming import HELP, one_word

ConfigAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe by name or a configuration file, and options that override it, such as data.path=images "
        "optim.epochs=100; mae config keys lists them.",
        show_default=False,
    ),
]
Heads = Annotated[int | None, typer.Option(min=1, help="Attention heads, if the file does not state them.")]
DecoderHeads = Annotated[
    int | None, typer.Option(min=1, help="Attention heads of the decoder, if the file does not state them.")
]
Branch = Annotated[
    str | None,
    typer.Option(help="Which encoder of a file that holds several: teacher, student, momentum_encoder, model_ema."),
]
BRANCH_OPTION = "--branch {}"
Resume = Annotated[str, typer.Option("--resume", metavar="[auto]", help=HELP, show_default=False)]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan of the run, its memory and its time, and write nothing.")
]


class Configured(TyperCommand):
    """A command with a recipe and ``key=value``: takes ``--resume`` and ``--resume auto``, and answers the words of
    other command lines."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        try:
            return super().parse_args(ctx, one_word(args))
        except Exception as error:  # typer brings its own click, whose errors have no public name
            told = other_word(getattr(error, "option_name", ""), "mae")
            if told is not None:
                raise typer.BadParameter(told, ctx=ctx, param_hint="the command line") from None
            raise


def split_arguments(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The recipe of a command line, if there is one, and its overrides. Raises ``UserError`` for two recipes."""
    files = [argument for argument in arguments or [] if "=" not in argument]
    if len(files) > 1:
        raise UserError(f"one configuration file at a time, got {', '.join(files)}; options are written key=value")
    return files[0] if files else None, [argument for argument in arguments or [] if "=" in argument]


def read_arguments(schema: Any, arguments: list[str] | None) -> Any:
    """A configuration from a command line: at most one recipe, anywhere, and overrides.

    Commands read it before they import what they run: a typo need not wait for timm to load.
    """
    from mae_core.config.load import load_config

    return load_config(schema, *split_arguments(arguments))
