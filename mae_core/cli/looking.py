"""Commands that look at models, and train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mae_core.cli.arguments import Branch, DecoderHeads, Heads
from mae_core.errors import UserError, user_errors


def reconstruct(
    weights: Annotated[
        Path, typer.Argument(help="A pre-training run, a checkpoint of one, or any file with a MAE decoder.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders, lists or shards of them.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("reconstruction.png"),
    ratio: Annotated[
        list[float] | None, typer.Option(help="Share of hidden patches; the run's own by default. May be repeated.")
    ] = None,
    masking: Annotated[
        list[str] | None, typer.Option(help="random, block or grid; the run's own by default. May be repeated.")
    ] = None,
    masks: Annotated[int, typer.Option(min=1, help="Different masks of each kind.")] = 1,
    bands: Annotated[
        str | None,
        typer.Option(
            help="Channels to show, counted from 0: one is drawn in grey, three as red, green and blue, such as 3,2,1."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What the decoder predicts, if the file does not state it.")
    ] = None,
    heads: Heads = None,
    decoder_heads: DecoderHeads = None,
    branch: Branch = None,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    most: Annotated[int, typer.Option(min=1, help="Draw at most this many images.")] = 12,
) -> None:
    """Draw the reconstructions of a masked autoencoder: input, masked, prediction, pasted.

    Example: mae reconstruct runs/mine images --ratio 0.5 --ratio 0.75 --ratio 0.9 --masking random --masking block
    """
    with user_errors():
        from mae_core.training.viewer import reconstruct_files

        try:
            chosen = [int(band) for band in bands.split(",")] if bands else None
        except ValueError:
            raise UserError(f"--bands {bands} is not a list of numbers; give one or three, such as 3,2,1") from None
        reconstruct_files(
            weights,
            images,
            out,
            ratios=ratio or (),
            maskings=masking or (),
            masks=masks,
            bands=chosen,
            target=target,
            heads=heads,
            decoder_heads=decoder_heads,
            branch=branch,
            seed=seed,
            most=most,
        )


def map_features(
    run: Annotated[Path, typer.Argument(help="A run with an encoder, its encoder.safetensors, or any known file.")],
    images: Annotated[list[Path], typer.Argument(help="Folders of images, lists or shards.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("map.html"),
    groups: Annotated[int, typer.Option(min=1, help="Groups of k-means.")] = 8,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest neighbours of each image.")] = 6,
    most: Annotated[int, typer.Option(min=2, help="Draw at most this many images, spread over the set.")] = 1000,
    pooling: Annotated[Literal["cls", "mean"], typer.Option(help="Feature: the cls token, or the patches' mean.")] = (
        "cls"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of k-means.")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")] = "auto",
    branch: Branch = None,
) -> None:
    """Draw the images of a folder as an encoder sees them, on one HTML page: principal components, groups, nearest
    neighbours, the most alike, and those unlike all others.

    Example: mae map runs/mine photos --out map.html
    """
    with user_errors():
        from mae_core.training.feature_map import write_map

        write_map(
            run,
            images,
            out,
            groups=groups,
            neighbours=neighbours,
            most=most,
            pooling=pooling,
            seed=seed,
            device=device,
            branch=branch,
        )
