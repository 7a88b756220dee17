"""Many small pictures under their captions on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE = 160
"""Pixels of a thumbnail's longer side."""
GAP, LINE = 8, 16
MOST = 60
"""Pictures on one sheet; a command says how many more there were."""


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
    width, height = side + GAP, side + GAP + lines * LINE
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        small = thumbnail(picture, side)
        sheet.paste(small, (left + (side - small.width) // 2, top + side - small.height))
        for line, text in enumerate(caption.split("\n")):
            pen.text((left, top + side + line * LINE), _cut(text, font, side), fill="black", font=font)
    return sheet


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
