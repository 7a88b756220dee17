"""``mae labels``: annotations of other tools converted to COCO, and large annotated images cut into tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mae_core.errors import user_errors

app = typer.Typer(no_args_is_help=True, help="Convert annotations of other tools to COCO; cut large annotated images.")

Source = Annotated[Path, typer.Argument(help="A folder of annotations and images, or a COCO json, or a data.yaml.")]
Out = Annotated[Path, typer.Argument(help="New folder: train/, val/, annotations/instances_{train,val}.json.")]
ValShare = Annotated[float, typer.Option(help="Share of the images for validation, where the source has no split.")]
Seed = Annotated[int, typer.Option(help="Seed of that split.")]


@app.command()
def convert(
    source: Source,
    out: Out,
    kind: Annotated[str, typer.Option("--format", help="auto, coco, yolo, voc, labelme or maps.")] = "auto",
    val_share: ValShare = 0.15,
    seed: Seed = 0,
    image_folder: Annotated[
        Path | None, typer.Option(help="The images of a COCO json, where they are not found beside it.")
    ] = None,
    class_name: Annotated[
        str | None, typer.Option(help="The class of the objects in label maps; object by default.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the images, in place of hard links.")] = False,
) -> None:
    """Convert COCO exports, YOLO, Pascal VOC, labelme or instance label maps to what mae detect trains on, and say what
    was left out.

    Example: mae labels convert exported/ data/own --val-share 0.2
    """
    with user_errors():
        from transfer.detection.labels.convert import convert as run

        run(
            source,
            out,
            kind=kind,
            val_share=val_share,
            seed=seed,
            image_folder=image_folder,
            class_name=class_name,
            copy=copy,
        )


@app.command()
def tile(
    source: Source,
    out: Out,
    side: Annotated[int, typer.Option("--tile", help="Side of the tiles, in pixels.")] = 1024,
    overlap: Annotated[float, typer.Option(help="Share of a tile that its neighbours show too.")] = 0.0,
    least_share: Annotated[
        float, typer.Option(help="Parts of an object with a smaller share of its area are left out.")
    ] = 0.25,
    val_share: ValShare = 0.15,
    seed: Seed = 0,
) -> None:
    """Cut large annotated images into tiles with their clipped annotations, as mae detect trains on them.

    Example: mae labels tile slides/ data/tiles --tile 1024 --overlap 0.2
    """
    with user_errors():
        from transfer.detection.labels.cutting import cut_into_tiles

        cut_into_tiles(source, out, tile=side, overlap=overlap, least_share=least_share, val_share=val_share, seed=seed)
