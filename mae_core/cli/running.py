"""Commands about runs and the machine they run on: doctor, verify-resume, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mae_core.cli.arguments import ConfigAndOverrides, read_arguments
from mae_core.errors import user_errors


def verify_resume(
    arguments: ConfigAndOverrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each of the two trainings.")] = 24,
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs at random moments.")] = 5,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Deterministic algorithms alone: bitwise on a GPU too, slower.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Work in this folder and leave it; else a temporary one.")] = None,
) -> None:
    """Prove on this machine that a pre-training which is killed and resumed ends in the same weights.

    Example: mae verify-resume tiny_96 data.path=images --kills 5
    """
    with user_errors():
        from mae_core.training.pretrain_config import PretrainConfig
        from mae_core.training.resuming_proof import verify_resume as run

        config = read_arguments(PretrainConfig, arguments)
        run(config, steps=steps, kills=kills, deterministic=deterministic, seed=seed, keep=keep)


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where runs are to be written.")] = Path("."),
) -> None:
    """Say what this machine has and try what a training needs: devices, engines, disk, processes, five training steps.
    Exit code 1 where something is broken.

    Example: mae doctor
    """
    with user_errors():
        from mae_core.training.doctor import report

        if not report(folder):
            raise typer.Exit(1)


def replay(dump: Annotated[Path, typer.Argument(help="An events/nonfinite_*.pt of a run.")]) -> None:
    """Do a step again whose loss or gradient was not finite, and name the first module with such numbers. Exit code 1
    where it comes out otherwise than in the run.

    Example: mae replay runs/mine/events/nonfinite_00000018.pt
    """
    with user_errors():
        from mae_core.training.replay import replay as run

        if not run(dump):
            raise typer.Exit(1)
