"""Many small pictures under their captions on one sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from mae_core.atomic import atomic_path
from mae_core.data.decoding import UnreadableImage
from mae_core.data.images import spread_indices
from mae_core.data.near_copies import Copy
from mae_core.errors import UserError

SIDE = 160
"""Pixels of a thumbnail's longer side."""
GAP, LINE = 8, 16
MOST = 60
"""Pictures on one sheet; a command says how many more there were."""
MOST_COPIES = 20
"""Of them, pictures of near-copies and of what they are copies of."""
MISSING = (200, 60, 60)
"""In place of an image that cannot be read."""


class Cell(NamedTuple):
    """An image of a set that was checked: the files that problems call it by, its caption, and what draws it, which may
    raise ``UnreadableImage``."""

    files: tuple[str, ...]
    caption: str
    draw: Callable[[], Image.Image]


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 6, side: int = SIDE
) -> Image.Image:
    """Pictures scaled to ``side`` pixels in rows, each above its caption, a line for each line of it, cut to the width.

    Raises ``ValueError`` unless there are as many captions as pictures, and at least one.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions; give a caption for each picture")
    font = ImageFont.load_default(12)
    columns = min(columns, len(pictures))
    lines = max(caption.count("\n") + 1 for caption in captions)
    small = [thumbnail(picture, side) for picture in pictures]
    tallest = max(picture.height for picture in small)
    width, height = side + GAP, tallest + GAP + lines * LINE
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(small, captions, strict=True)):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        sheet.paste(picture, (left + (side - picture.width) // 2, top + tallest - picture.height))
        for line, text in enumerate(caption.split("\n")):
            pen.text((left, top + tallest + line * LINE), _cut(text, font, side), fill="black", font=font)
    return sheet


def check_new_picture(path: Path | None) -> None:
    """Raise ``UserError`` for a picture that exists, before the work that it is of."""
    if path is not None and path.exists():
        raise UserError(f"{path} exists; choose another file with --picture")


def draw_checked(
    path: Path,
    cells: Sequence[Cell],
    faulty: AbstractSet[str],
    copies: Sequence[Copy],
    legend: Callable[[int], Image.Image] | None = None,
) -> str:
    """Write up to ``MOST`` images of the sets of a check into the picture ``path``: those that cannot be read or have
    faults, then copies beside what they are copies of, then others spread over the sets -> a sentence about it.
    ``legend``: a picture of a width, to go below.

    Raises ``UserError`` where there is no image.
    """
    if not cells:
        raise UserError(f"there is no image to draw into {path}; leave --picture out")
    place = {file: number for number, cell in enumerate(cells) for file in cell.files}
    odd = [number for number, cell in enumerate(cells) if not faulty.isdisjoint(cell.files)][:MOST]
    marks = dict.fromkeys(odd, "! ")
    pairs = [(place[copy.of], place[copy.name]) for copy in copies if copy.of in place and copy.name in place]
    alike = list(dict.fromkeys(number for pair in pairs for number in pair if number not in marks))
    alike = alike[: min(MOST_COPIES, MOST - len(odd))]
    marks |= dict.fromkeys(alike, "= ")
    rest = [number for number in range(len(cells)) if number not in marks]
    shown = [*odd, *alike, *(rest[one] for one in spread_indices(len(rest), MOST - len(marks)))]
    pictures, captions = zip(*(_drawn(cells[number], marks.get(number, "")) for number in shown), strict=True)
    sheet = contact_sheet(pictures, captions)
    if legend is not None:
        below = legend(sheet.width)
        both = Image.new("RGB", (max(sheet.width, below.width), sheet.height + below.height), "white")
        both.paste(sheet)
        both.paste(below, (0, sheet.height))
        sheet = both
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    then = f", then {len(alike)} that are near-copies" if alike else ""
    return f"drew {len(shown)} of {len(cells)} images into {path}, {len(odd)} with faults first{then}"


def _drawn(cell: Cell, mark: str) -> tuple[Image.Image, str]:
    try:
        return thumbnail(cell.draw()), mark + cell.caption
    except UnreadableImage as error:
        return Image.new("RGB", (SIDE, SIDE), MISSING), f"! {Path(cell.files[0]).name}\n{error.unreadable.reason}"


def thumbnail(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """A picture in RGB whose longer side is ``side`` pixels."""
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return picture.convert("RGB").resize(size, resample)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
