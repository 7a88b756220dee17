"""Commands that look at images and models, and train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mae_core.errors import UserError, user_errors


def data_stats(
    paths: Annotated[
        list[Path], typer.Argument(help="Folders, .txt lists of files, .tar shards, Hugging Face data sets.")
    ],
    channels: Annotated[
        int | None, typer.Option(min=1, max=16, help="Bring all images to so many; as stored by default.")
    ] = None,
    source: Annotated[str, typer.Option(help="auto, files, list, shards or huggingface.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of a Hugging Face data set.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that was found to this file.")] = None,
) -> None:
    """Read all images: sizes, channels, unreadable files, and mean and standard deviation per channel, of pixels in
    0..1, as a configuration takes them.

    Example: mae data-stats images
    """
    with user_errors():
        from mae_core.atomic import write_json
        from mae_core.config import hint
        from mae_core.data.sources import SOURCES, open_places
        from mae_core.data.survey import describe, survey
        from mae_core.training.progress import Counter

        if source != "auto" and source not in SOURCES:
            raise UserError(f"--source {source} is unknown; {hint(source, ['auto', *SOURCES])}")
        if json_file is not None and json_file.exists():
            raise UserError(f"{json_file} exists; choose another file with --json")
        images = open_places(paths, None, kind=source, split=split)
        found = survey(images, channels=channels, on_progress=Counter("reading images"))
        typer.echo(describe(found, channels))
        if json_file is not None:
            write_json(json_file, found.as_dict())
