"""Commands about runs and the machines they run on: doctor, verify-resume, replay, slurm, report,
compare-runs."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated

import typer

from mae_core.cli.arguments import ConfigAndOverrides, read_arguments, split_arguments
from mae_core.cli.configuring import command_of, locate, published, schema_of
from mae_core.errors import UserError, user_errors

TRAINS = {
    **{name: (name,) for name in ("pretrain", "finetune", "linprobe", "train-tokenizer")},
    "detect": ("detect", "train"),
    "segment": ("segment", "train"),
}
"""Commands that can be queued again with ``--resume auto``, by what a recipe is for."""


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


def slurm(
    arguments: ConfigAndOverrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of a node, a process each; 0: a process on its CPUs.")] = 8,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPU cores of a process; by default one more than data.workers.")
    ] = None,
    time: Annotated[str, typer.Option(help="Time limit of the job, after which it is queued again.")] = "24:00:00",
    grace: Annotated[int, typer.Option(min=10, help="Seconds before the limit at which the run saves.")] = 300,
    option: Annotated[
        list[str] | None, typer.Option(help="A further option of sbatch, such as partition=gpu. May be repeated.")
    ] = None,
    command: Annotated[
        str | None, typer.Option("--for", help="The command that it is for, where its folder does not say that.")
    ] = None,
) -> None:
    """Print a batch file for Slurm: a process per GPU, saved and queued again at the time limit, until it is finished.

    Example: mae slurm pretrain/base data.path=images output=runs/base --nodes 4 > base.sh, then sbatch base.sh
    """
    with user_errors():
        from mae_core.config.recipes import name_of
        from mae_core.training.slurm import batch_file, job_of, stops_in_time

        given, overrides = split_arguments(arguments)
        path = locate(given, command)
        kind = command_of(path, command)
        if kind not in TRAINS:
            raise UserError(f"mae {kind} trains nothing that could be queued again; recipes of {', '.join(TRAINS)} do")
        config = None if kind == "segment" else read_arguments(schema_of(kind), [str(path), *overrides])
        job = job_of(path.stem, config, nodes, gpus, cpus, time, grace, option or [])
        recipe = given if given is not None and Path(given).is_file() else name_of(path)
        words = [*overrides, *stops_in_time(kind, job, overrides, config)]
        typer.echo(batch_file(job, ["mae", *TRAINS[kind], recipe, *words, "--resume", "auto"]), nl=False)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of any task, finished or not.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("runs.html"),
) -> None:
    """Write one HTML page about runs, side by side: curves, pictures, events, what differs from the paper's recipe and
    between them, environment.

    Example: mae report runs/mine runs/other --out runs.html
    """
    with user_errors():
        page, paper = (resolve_name(f"transfer.report.runs:{name}") for name in ("write_runs_report", "Published"))
        typer.echo(f"wrote {page(runs, out, lambda options: paper(*published(options)))}")


def compare_runs(
    one: Annotated[Path, typer.Argument(help="A run directory.")],
    other: Annotated[Path, typer.Argument(help="Another.")],
    tolerance: Annotated[float, typer.Option(min=0, help="Relative difference of numbers that counts as none.")] = 0.0,
) -> None:
    """Name the first difference of two runs in configuration, data, logged numbers and weights. Exit code 0 where they
    are equal, 1 where they differ.

    Example: mae compare-runs runs/mine runs/again
    """
    with user_errors():
        from mae_core.training.compare_runs import compare_runs as run

        found = run(one, other, tolerance=tolerance)
        for part, same, text in found:
            typer.echo(f"{'same' if same else 'DIFFERS':>7}  {part}: {text}")
        if not all(difference.same for difference in found):
            raise typer.Exit(1)
