"""``mae shrink``: a smaller copy of a set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mae_core.cli.checking import Source, Split, known_source, reading_asked
from mae_core.errors import UserError, user_errors


def shrink(
    places: Annotated[
        list[Path],
        typer.Argument(help="Folders, .txt lists, .tar shards, data sets on disk; then the new folder."),
    ],
    shortest: Annotated[int, typer.Option(min=16, help="Longest that the shorter side may be, in pixels.")] = 256,
    shards: Annotated[bool, typer.Option("--shards", help="Write tar files of the webdataset layout.")] = False,
    channels: Annotated[
        int | None, typer.Option(min=1, max=16, help="Read images as data.channels does; as stored by default.")
    ] = None,
    pages: Annotated[str, typer.Option(help="auto, bands or first, as data.pages.")] = "auto",
    quality: Annotated[int, typer.Option(min=50, max=100, help="Of the JPEGs that are written.")] = 95,
    source: Source = "auto",
    split: Split = None,
) -> None:
    """Copy images, smaller where their shorter side is longer than --shortest; 1 to 16 channels, 8 to 32 bits. The new
    folder appears whole, with checksums, and nothing is written over.

    Example: mae shrink photos photos_256 --shortest 256
    """
    with user_errors():
        from mae_core.data.shrink import shrink as run
        from mae_core.data.sources import open_places
        from mae_core.training.progress import Counter

        if len(places) < 2:
            raise UserError("mae shrink needs a set of images and a new folder: mae shrink FOLDER OUT")
        *given, out = places
        reading = reading_asked(channels, pages, None)
        images = open_places(given, reading, kind=known_source(source), split=split)
        found = run(
            images,
            out,
            reading=reading,
            shortest=shortest,
            shards=shards,
            quality=quality,
            on_progress=Counter("shrinking"),
        )
        for line in found.lines(out):
            typer.echo(line)
