"""Commands that measure an encoder or a classifier on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mae_core.cli.arguments import ConfigAndOverrides, Configured, DryRun, Resume, read_arguments
from mae_core.cli.checking import check_folders
from mae_core.cli.weights import export
from mae_core.errors import user_errors
from mae_core.resuming import meaning

Device = Literal["auto", "cpu", "cuda"]
OnError = Literal["skip", "raise"]


def finetune(arguments: ConfigAndOverrides = None, resume: Resume = "no", dry_run: DryRun = False) -> None:
    """Fine-tune an encoder on train/<class>/* and evaluate on val/<class>/*. Writes classifier.safetensors,
    metrics.json.

    Example: mae finetune configs/finetune/tiny_96.yaml weights=runs/mine data.path=labelled output=runs/classes
    """
    with user_errors():
        from mae_core.training.finetune_config import FinetuneConfig

        config = read_arguments(FinetuneConfig, arguments)
        if dry_run:
            from mae_core.training.classification_plan import print_finetune_plan

            print_finetune_plan(config, resume=meaning(resume))
            return
        from mae_core.training.finetune import finetune as run

        run(config, resume=meaning(resume))


def linprobe(arguments: ConfigAndOverrides = None, resume: Resume = "no", dry_run: DryRun = False) -> None:
    """Train one linear layer on a frozen encoder, on train/<class>/*, and measure it on val/<class>/*. Writes
    classifier.safetensors, metrics.json.

    Example: mae linprobe configs/linprobe/base.yaml weights=runs/mine data.path=labelled output=runs/probe
    """
    with user_errors():
        from mae_core.training.frozen_config import LinprobeConfig

        config = read_arguments(LinprobeConfig, arguments)
        if dry_run:
            from mae_core.training.classification_plan import print_probe_plan

            print_probe_plan(config, resume=meaning(resume))
            return
        from mae_core.training.linprobe import linprobe as run

        run(config, resume=meaning(resume))


def knn(arguments: ConfigAndOverrides = None) -> None:
    """Classify val/<class>/* by the nearest images of train/<class>/* in a frozen encoder's features: cosine
    similarity, temperature 0.07, k = 10 and 20. Writes metrics.json.

    Example: mae knn weights=runs/mine data.path=labelled output=runs/knn
    """
    with user_errors():
        from mae_core.training.frozen_config import KnnConfig

        config = read_arguments(KnnConfig, arguments)
        from mae_core.training.embedding import knn as run

        run(config)


def features(arguments: ConfigAndOverrides = None) -> None:
    """Embed all images of data.path (a folder, a list of files, or one image) with a frozen encoder. Writes
    features.npz (features, files, folders) and a picture of them in the plane (picture=pca, tsne or none).

    Example: mae features weights=runs/mine data.path=images output=runs/features
    """
    with user_errors():
        from mae_core.training.frozen_config import FeaturesConfig

        config = read_arguments(FeaturesConfig, arguments)
        from mae_core.training.embedding import write_features

        write_features(config)


def evaluate(arguments: ConfigAndOverrides = None) -> None:
    """Measure a classifier on <class>/* folders below data.path, or on ImageNet-A, -R, -Sketch or -C (kind=...): top-1
    and top-5, each class, the confusions, every prediction. Writes metrics.json, per_class.csv, predictions.csv.

    Example: mae evaluate weights=runs/classes data.path=labelled/val output=runs/evaluation
    """
    with user_errors():
        from mae_core.training.frozen_config import EvaluateConfig

        config = read_arguments(EvaluateConfig, arguments)
        from mae_core.training.evaluate import evaluate as run

        run(config)


def predict(
    run: Annotated[Path, typer.Argument(help="A run of a classifier, or its classifier.safetensors.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="New folder for predictions.csv and contact_sheet.png.")],
    top: Annotated[int, typer.Option(help="Number of likeliest classes to list.")] = 3,
    device: Annotated[Device, typer.Option(help="auto: a GPU where there is one.")] = "auto",
    on_error: Annotated[OnError, typer.Option(help="What to do about an image that cannot be read.")] = "skip",
) -> None:
    """Classify images without labels: a table of names and probabilities, and a picture of the least certain ones.

    Example: mae classify predict runs/classes photos --out named
    """
    with user_errors():
        from mae_core.training.classify_images import predict_folder

        typer.echo(f"wrote {predict_folder(run, images, out, top=top, device=device, on_error=on_error)}")


classify = typer.Typer(no_args_is_help=True, help="Classification on an encoder, from a folder per class.")
classify.command("train", cls=Configured)(finetune)
classify.command("evaluate", cls=Configured)(evaluate)
classify.command("predict")(predict)
classify.command("check")(check_folders)
classify.command("export")(export)
