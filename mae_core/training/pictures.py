"""Reconstruction strips: what the encoder saw, what the decoder made of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae_core.data.images import Statistics
from mae_core.masking import PatchMask
from mae_core.models.mae import MaskedAutoencoder
from mae_core.seeds import MASK, generator_at

PANEL_SIDE = 160
GAP = 6
TITLE_HEIGHT = 20
TRUTH_NOTE = "* shown with the mean and std of each true patch, which the target leaves out"
INK, PAPER = (30, 30, 30), (255, 255, 255)


def fixed_mask(model: MaskedAutoencoder, count: int, seed: int) -> PatchMask:
    """The same masks each time, one per picture, so that strips of different steps can be compared."""
    return model.masker(count, model.encoder.grid, [generator_at(seed, MASK, 2**31, index) for index in range(count)])


@torch.no_grad()
def reconstruction_strip(
    model: MaskedAutoencoder, pixels: Tensor, mask: PatchMask, statistics: Statistics
) -> Image.Image:
    """A row per image: input, masked, prediction, pasted (visible input and predicted hidden patches).

    pixels (B, C, H, W), normalised with ``statistics``. Where the target needs the truth to become pixels, the panels
    say so.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    output = model(pixels.to(device), mask=mask)
    shown = model.reconstruct(pixels.to(device), output)
    model.train(training)
    star = "*" if model.target.shows_truth else ""
    hidden = mask.hidden.float().mean().item()
    titles = ["input", f"{hidden:.0%} hidden", f"prediction{star}", f"pasted{star}"]
    columns = [pixels, *(panel.cpu() for panel in shown)]
    rows = [[to_image(column[index], statistics) for column in columns] for index in range(len(pixels))]
    for index, row in enumerate(rows):
        row[1] = _grey_out(row[1], mask.hidden[index].cpu().numpy(), model.encoder.grid.rows)
    return tile(rows, titles, TRUTH_NOTE if star else "")


def to_image(pixels: Tensor, statistics: Statistics) -> Image.Image:
    """(C, H, W) normalised -> RGB picture; values outside 0..1 are clipped."""
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    values = ((pixels.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    values = values if len(values) == 3 else values[:1].repeat(3, axis=0)
    return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))


def tile(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], note: str = "", *, side: int = PANEL_SIDE
) -> Image.Image:
    """Panels of one size in rows under column titles, above a note; small images are enlarged without smoothing to
    about
    ``side`` pixels."""
    width, height = rows[0][0].size
    scale = max(1, round(side / max(width, height)))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(size=12)
    bottom = TITLE_HEIGHT + len(rows) * (height + GAP)
    sheet = Image.new("RGB", (len(titles) * (width + GAP) + GAP, bottom + (TITLE_HEIGHT if note else 0)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, bottom), note, fill=INK, font=font)
    for column, title in enumerate(titles):
        pen.text((GAP + column * (width + GAP), 2), title, fill=INK, font=font)
    for line, row in enumerate(rows):
        for column, panel in enumerate(row):
            place = (GAP + column * (width + GAP), TITLE_HEIGHT + line * (height + GAP))
            sheet.paste(panel.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def _grey_out(image: Image.Image, hidden: np.ndarray, rows: int) -> Image.Image:
    """Paint hidden patches in one grey."""
    values = np.array(image)
    grid = hidden.reshape(rows, -1)
    patch = values.shape[0] // rows
    values[np.kron(grid, np.ones((patch, patch))).astype(bool)] = 128
    return Image.fromarray(values)
