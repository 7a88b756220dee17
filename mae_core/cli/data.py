"""``mae shrink``: a smaller copy of a set of images; ``mae bench-data``: how fast they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mae_core.cli.arguments import ConfigAndOverrides, read_arguments, split_arguments
from mae_core.cli.checking import MaxPixels, Source, Split, known_source, reading_asked
from mae_core.cli.configuring import command_of, locate, schema_of
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
    max_pixels: MaxPixels = None,
    quality: Annotated[int, typer.Option(min=50, max=100, help="Of the JPEGs that are written.")] = 95,
    source: Source = "auto",
    split: Split = None,
) -> None:
    """Copy images, smaller where their shorter side is longer than --shortest; 1 to 16 channels, 8 to 32 bits. The new
    folder appears whole, with checksums, and nothing is written over.

    Example: mae shrink photos photos_256 --shortest 256
    """
    with user_errors():
        from mae_core.counting import Counter
        from mae_core.data.shrink import shrink as run
        from mae_core.data.sources import open_places

        if len(places) < 2:
            raise UserError("mae shrink needs a set of images and a new folder: mae shrink FOLDER OUT")
        *given, out = places
        reading = reading_asked(channels, pages, max_pixels)
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


def bench_data(
    arguments: ConfigAndOverrides = None,
    rate: Annotated[float, typer.Option(min=1e-3, help="Images per second that a GPU trains.")] = 1000.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each measured number of processes.")] = 2.0,
    command: Annotated[
        str | None, typer.Option("--for", help="The command that it is for, where its folder does not say that.")
    ] = None,
) -> None:
    """Measure the loader of a recipe, without a model: images per second by stage (read, decode, augment, collate) and
    by number of processes, and how many a GPU of a rate needs. Writes nothing.

    Example: mae bench-data pretrain/tiny_96 data.path=images --rate 2000
    """
    with user_errors():
        given, overrides = split_arguments(arguments)
        path = locate(given, command)
        schema = schema_of(command_of(path, command))
        named = {word.partition("=")[0] for word in overrides}
        needed = [] if "output" in named else ["output=unused"]
        if "from_scratch" in schema.model_fields and not named & {"weights", "from_scratch"}:
            needed.append("weights=unused")
        config = read_arguments(schema, [str(path), *overrides, *needed])
        from mae_core.training.bench_data import bench_data as run

        run(config, rate, seconds=seconds, say=typer.echo)
