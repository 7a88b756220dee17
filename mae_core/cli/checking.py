"""``mae check`` and ``mae data-stats``: what is in a set of data, and what training would refuse or misread."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from mae_core.cli.arguments import BRANCH_OPTION, Branch
from mae_core.cli.tasks import pass_on
from mae_core.errors import UserError, user_errors

if TYPE_CHECKING:
    from mae_core.data.images import Statistics
    from mae_core.data.reading import Reading

GROUP = "mae_core.checks"
"""Entry points that bring checks of their own: a function of the arguments and ``prog``, the name in its help."""
ELSEWHERE = {
    "coco": ("transfer.detection.check_data:main", "a COCO json and its images"),
    "labels": ("transfer.segmentation.check_data:main", "images and their label maps"),
}
"""Checks of this distribution outside of this package, by the name of the verb: where they are, and of what."""

check = typer.Typer(no_args_is_help=True, help="Find faults in data before training meets them; writes nothing.")

Places = Annotated[list[Path], typer.Argument(help="Folders, .txt lists, .tar shards, Hugging Face data sets.")]
Source = Annotated[str, typer.Option(help="auto, files, list, shards or huggingface.")]
Split = Annotated[str | None, typer.Option(help="Split of a Hugging Face data set.")]
Weights = Annotated[Path | None, typer.Option(help="Compare mean and std with those that this encoder's file states.")]
PagesOption = Annotated[str, typer.Option("--pages", help="data.pages of the training: auto, bands or first.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="data.max_pixels of the training.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all findings to this file, as JSON.")]
PictureFile = Annotated[
    Path | None, typer.Option("--picture", help="Draw images of the set: unreadable and odd ones, then near-copies.")
]


def known_source(source: str) -> str:
    """``--source``, a row of ``SOURCES`` or auto. Raises ``UserError`` for another word."""
    from mae_core.config.schema import hint
    from mae_core.data.sources import SOURCES

    if source != "auto" and source not in SOURCES:
        raise UserError(f"--source {source} is unknown; {hint(source, ['auto', *SOURCES])}")
    return source


def reading_asked(channels: int | None, pages: str, max_pixels: int | None) -> Reading:
    """How a command's options say that images are read. Raises ``UserError`` for a ``--pages`` that does not exist."""
    from mae_core.config.schema import hint
    from mae_core.data.reading import MAX_PIXELS, Pages, Reading

    if pages not in get_args(Pages):
        raise UserError(f"--pages {pages} is unknown; {hint(pages, get_args(Pages))}")
    return Reading(channels, max_pixels or MAX_PIXELS, cast("Pages", pages))


def _expected(weights: Path | None, branch: str | None) -> Statistics | None:
    if weights is None:
        return None
    from mae_core.data.images import Statistics
    from mae_core.weights.load import read_encoder

    info = read_encoder(weights, branch=branch, asked_as=BRANCH_OPTION).info
    return Statistics(info.mean, info.std) if info.mean and info.std else None


def data_stats(
    paths: Places,
    channels: Annotated[
        int | None,
        typer.Option(min=1, max=16, help="Convert all images to this number of channels; as stored by default."),
    ] = None,
    source: Source = "auto",
    split: Split = None,
    json_file: JsonFile = None,
) -> None:
    """Read all images: sizes, channels, unreadable files, and mean and standard deviation per channel, of pixels in
    0..1, as a configuration takes them. ``mae check images`` says more.

    Example: mae data-stats images
    """
    with user_errors():
        from mae_core.atomic import write_json
        from mae_core.counting import Counter
        from mae_core.data.sources import open_places
        from mae_core.data.survey import describe, describe_unreadable, survey

        images = open_places(paths, None, kind=known_source(source), split=split)
        if json_file is not None and json_file.exists():
            raise UserError(f"{json_file} exists; choose another file with --json")
        found = survey(images, channels=channels, on_progress=Counter("reading images"))
        typer.echo("\n".join([*describe_unreadable(found), describe(found, channels)]))
        if json_file is not None:
            write_json(json_file, found.as_dict())


@check.command("images")
def check_images(
    paths: Places,
    channels: Annotated[
        int | None, typer.Option(min=1, max=16, help="data.channels of the training; 3 for pictures by default.")
    ] = None,
    source: Source = "auto",
    split: Split = None,
    pages: PagesOption = "auto",
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    branch: Branch = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
) -> None:
    """Images without labels, as mae pretrain takes them. Exit code 2 where training would leave images out.

    Example: mae check images photos
    """
    with user_errors():
        from mae_core.counting import Counter
        from mae_core.data.check import conclude
        from mae_core.data.survey import check_images as run

        asked: dict[str, Any] = {"source": known_source(source), "split": split, "expected": _expected(weights, branch)}
        conclude(
            run(paths, reading_asked(channels, pages, max_pixels), **asked, on_progress=Counter("reading images")),
            json_file,
            picture=picture,
        )


@check.command("folders")
def check_folders(
    path: Annotated[Path, typer.Argument(help="A folder with train/<class>/* and val/<class>/*, or two .csv.")],
    channels: Annotated[int, typer.Option(min=1, max=16, help="data.channels of the training.")] = 3,
    pages: PagesOption = "auto",
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    branch: Branch = None,
    json_file: JsonFile = None,
    picture: PictureFile = None,
) -> None:
    """Images with classes, as mae finetune takes them. Exit code 2 where training would refuse or leave images out.

    Example: mae check folders labelled
    """
    with user_errors():
        from mae_core.counting import Counter
        from mae_core.data.check import conclude
        from mae_core.data.survey import check_folders as run

        progress = Counter("reading images")
        reading = reading_asked(channels, pages, max_pixels)
        reports = run(path, reading, expected=_expected(weights, branch), on_progress=progress)
        conclude(reports, json_file, picture=picture)


def _checks_elsewhere() -> dict[str, tuple[str, str]]:
    """``ELSEWHERE``, and what other distributions bring."""
    found = {point.name: (point.value, f"see {point.value}") for point in entry_points(group=GROUP)}
    return {**found, **ELSEWHERE}


for _name, (_place, _of_what) in _checks_elsewhere().items():
    pass_on(check, _name, _place, prog=f"mae check {_name}", about=f"{_of_what[0].upper()}{_of_what[1:]}")
