"""``mae``: one subcommand per task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import mae_core
from mae_core.cli.arguments import ConfigAndOverrides, Configured, DryRun, Resume, read_arguments
from mae_core.cli.checking import check, data_stats
from mae_core.cli.classification import classify, evaluate, features, finetune, knn, linprobe
from mae_core.cli.configuring import config
from mae_core.cli.data import bench_data, shrink
from mae_core.cli.looking import map_features, reconstruct
from mae_core.cli.running import compare_runs, doctor, replay, report, slurm, verify_resume
from mae_core.cli.tasks import task_commands, task_groups
from mae_core.cli.weights import catalogue, convert, export, inspect
from mae_core.errors import user_errors
from mae_core.resuming import meaning

app = typer.Typer(
    name="mae",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Pre-train a ViT on your own images with a masked autoencoder, look at it, and turn it into a classifier, a "
    "detector or a segmenter.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mae-transfer {mae_core.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of ``mae`` itself."""


@app.command(cls=Configured)
def pretrain(
    arguments: ConfigAndOverrides = None,
    resume: Resume = "no",
    dry_run: DryRun = False,
) -> None:
    """Pre-train on a folder of images without labels. Writes encoder.safetensors.

    Example: mae pretrain configs/pretrain/tiny_96.yaml data.path=images output=runs/mine
    """
    with user_errors():
        from mae_core.training.pretrain_config import PretrainConfig

        config = read_arguments(PretrainConfig, arguments)
        from mae_core.training.pretrain import pretrain as run

        if not dry_run:
            run(config, resume=meaning(resume))
            return
        from mae_core.training.plan import print_plan

        print_plan(config, resume=meaning(resume))


@app.command("fit-pca")
def fit_pca(
    arguments: ConfigAndOverrides = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; target.pca by default.")] = None,
    components: Annotated[int, typer.Option(help="Number of components; the paper keeps 96.")] = 96,
    images: Annotated[int, typer.Option(min=1, help="Fit on the patches of this many images.")] = 2000,
) -> None:
    """Fit the principal components that target.kind=pca predicts, on patches as a pre-training sees them.

    Example: mae fit-pca configs/pretrain/tiny_96.yaml data.path=images --out pca.safetensors, then
    mae pretrain configs/pretrain/tiny_96.yaml data.path=images target.kind=pca target.pca=pca.safetensors
    """
    with user_errors():
        from mae_core.training.pretrain_config import PretrainConfig

        config = read_arguments(PretrainConfig, arguments)
        from mae_core.training.pca import fit_pca as run

        run(config, out, components=components, images=images)


@app.command("train-tokenizer", cls=Configured)
def train_tokenizer(arguments: ConfigAndOverrides = None, resume: Resume = "no") -> None:
    """Train a small discrete VAE, whose tokens target.kind=tokens predicts. Writes tokenizer.safetensors.

    Example: mae train-tokenizer data.path=images model.patch_size=16 output=runs/tokens, then
    mae pretrain data.path=images target.kind=tokens target.tokenizer=runs/tokens
    """
    with user_errors():
        from mae_core.training.tokenizer_config import TokenizerConfig

        config = read_arguments(TokenizerConfig, arguments)
        from mae_core.training.tokenizer import train_tokenizer as run

        run(config, resume=meaning(resume))


@app.command()
def digits(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    image_size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 64,
    unlabelled: Annotated[int, typer.Option(help="Images without labels.")] = 4000,
    train: Annotated[int, typer.Option(help="Training images of each task.")] = 400,
    test: Annotated[int, typer.Option(help="Validation images of each task.")] = 200,
    clutter: Annotated[float, typer.Option(help="Strength of the background clutter; 0 is none, 1 a lot.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Write the embedded data set (scenes of real handwritten digits) as ImageFolder, COCO and label maps."""
    with user_errors():
        from mae_core.counting import Counter
        from mae_core.data.digits import write_digits

        write_digits(
            out,
            seed=seed,
            image_size=image_size,
            num_unlabelled=unlabelled,
            num_train=train,
            num_test=test,
            clutter=clutter,
            workers=workers,
            on_progress=Counter("composing scenes"),
        )


app.command()(reconstruct)
app.command("map")(map_features)
app.command("data-stats")(data_stats)
app.command()(doctor)
app.command()(replay)
app.command("verify-resume", cls=Configured)(verify_resume)
app.command(cls=Configured)(slurm)
app.command()(report)
app.command("compare-runs")(compare_runs)
app.command()(shrink)
app.command("bench-data", cls=Configured)(bench_data)
for configured in (finetune, linprobe, knn, features, evaluate):
    app.command(cls=Configured)(configured)
app.command()(inspect)
app.command()(convert)
app.command()(export)
for name, group in {"check": check, "classify": classify, "config": config, "weights": catalogue}.items():
    app.add_typer(group, name=name)
for name, group in task_groups().items():
    app.add_typer(group, name=name)
for name, command in task_commands().items():
    app.command(name, cls=Configured)(command)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
