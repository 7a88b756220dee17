"""``mae``: one subcommand per task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mae_core.cli.arguments import ConfigAndOverrides, Resumable, Resume, read_arguments, read_resume
from mae_core.cli.checking import check, data_stats
from mae_core.cli.classification import evaluate, features, knn, linprobe
from mae_core.cli.looking import reconstruct
from mae_core.cli.weights import catalogue, convert, export, inspect
from mae_core.errors import user_errors

app = typer.Typer(
    name="mae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pre-train a ViT on your own images with a masked autoencoder, look at it, and fine-tune it. "
    "Detection: python transfer/detection/train_net.py. Segmentation: python transfer/segmentation/train_net.py.",
)


@app.command(cls=Resumable)
def pretrain(
    arguments: ConfigAndOverrides = None,
    resume: Resume = "no",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan of the run, its memory and its time, and write nothing.")
    ] = False,
) -> None:
    """Pre-train on a folder of images without labels. Writes encoder.safetensors.

    Example: mae pretrain configs/pretrain/tiny_96.yaml data.path=images output=runs/mine
    """
    with user_errors():
        from mae_core.training.pretrain import pretrain as run
        from mae_core.training.pretrain_config import PretrainConfig

        config = read_arguments(PretrainConfig, arguments)
        if not dry_run:
            run(config, resume=read_resume(resume))
            return
        from mae_core.training.plan import print_plan

        print_plan(config)


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
        from mae_core.training.pca import fit_pca as run
        from mae_core.training.pretrain_config import PretrainConfig

        run(read_arguments(PretrainConfig, arguments), out, components=components, images=images)


@app.command("train-tokenizer", cls=Resumable)
def train_tokenizer(arguments: ConfigAndOverrides = None, resume: Resume = "no") -> None:
    """Train a small discrete VAE, whose tokens target.kind=tokens predicts. Writes tokenizer.safetensors.

    Example: mae train-tokenizer data.path=images model.patch_size=16 output=runs/tokens, then
    mae pretrain data.path=images target.kind=tokens target.tokenizer=runs/tokens
    """
    with user_errors():
        from mae_core.training.tokenizer import train_tokenizer as run
        from mae_core.training.tokenizer_config import TokenizerConfig

        run(read_arguments(TokenizerConfig, arguments), resume=read_resume(resume))


@app.command(cls=Resumable)
def finetune(arguments: ConfigAndOverrides = None, resume: Resume = "no") -> None:
    """Fine-tune an encoder on train/<class>/* and evaluate on val/<class>/*. Writes classifier.safetensors,
    metrics.json.

    Example: mae finetune configs/finetune/tiny_96.yaml weights=runs/mine data.path=labelled output=runs/classes
    """
    with user_errors():
        from mae_core.training.finetune import finetune as run
        from mae_core.training.finetune_config import FinetuneConfig

        run(read_arguments(FinetuneConfig, arguments), resume=read_resume(resume))


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
        from mae_core.data.digits import write_digits
        from mae_core.training.progress import Counter

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
app.command("data-stats")(data_stats)
app.command(cls=Resumable)(linprobe)
for command in (knn, features, evaluate, inspect, convert, export):
    app.command()(command)
app.add_typer(check, name="check")
app.add_typer(catalogue, name="weights")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
