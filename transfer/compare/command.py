"""``mae compare``."""

from __future__ import annotations

from mae_core.cli.arguments import ConfigAndOverrides, DryRun, split_arguments
from mae_core.errors import UserError, user_errors


def compare(arguments: ConfigAndOverrides = None, dry_run: DryRun = False) -> None:
    """Compare encoders on your own tasks with equal budgets: one report. The same command continues what was stopped.

    Example: mae compare spec.yaml output=runs/compare
    """
    with user_errors():
        from mae_core.config.load import load_config
        from transfer.compare.config import CompareConfig

        given, overrides = split_arguments(arguments)
        if given is None:
            raise UserError("name a file that lists encoders and tasks; configs/compare/small_data.yaml is one to copy")
        config = load_config(CompareConfig, given, overrides)
        from transfer.compare.run import compare as run

        run(config, dry_run=dry_run, command=" ".join(["mae compare", *(arguments or [])]))
