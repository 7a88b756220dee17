"""Reconstruction strips: what the encoder saw, what the decoder made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae_core.data.decoding import STRETCH
from mae_core.data.images import Statistics
from mae_core.errors import UserError
from mae_core.masking import Masker, PatchMask, describe_masker
from mae_core.models.mae import MaskedAutoencoder
from mae_core.seeds import MASK, generator_at

PANEL_SIDE = 160
GAP = 6
LINE_HEIGHT = 20
TRUTH_NOTE = "* shown with the mean and std of each true patch, which the target leaves out"
UNTRAINED_NOTE = "predictions of visible patches are never trained: the loss is on hidden ones alone"
INK, PAPER = (30, 30, 30), (255, 255, 255)
PICTURE_LIKE = (0.02, 0.98)
"""Where the means of channels in 0..1 lie that can be looked at as they are."""


@dataclass(frozen=True)
class Display:
    """Which bands of an image are shown, one as grey or three as red, green and blue, and in which range: 0..1 as in a
    picture, or (``stretched``) between two percentiles of the input, which all panels of a row share."""

    bands: tuple[int, ...]
    stretched: bool = False

    @classmethod
    def of(cls, statistics: Statistics, bands: Sequence[int] | None = None) -> Display:
        """The bands asked for, or the first three (of two, the first). Raises ``UserError`` for bands that are not
        there."""
        channels = len(statistics.mean)
        chosen = tuple(bands) if bands else (0, 1, 2) if channels >= 3 else (0,)
        if len(chosen) not in (1, 3) or not all(0 <= band < channels for band in chosen):
            raise UserError(
                f"bands {', '.join(map(str, chosen))} cannot be shown: name one, or three for red, green and blue, "
                f"from 0 to {channels - 1}"
            )
        low, high = PICTURE_LIKE
        picture = channels in (1, 3) and all(low < mean < high for mean in statistics.mean)
        return cls(chosen, stretched=not picture)

    def limits(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(C, H, W) -> what is black and what is white, (bands, 1, 1) each."""
        shown = values[list(self.bands)]
        if not self.stretched:
            return torch.zeros(len(shown), 1, 1), torch.ones(len(shown), 1, 1)
        low, high = np.percentile(shown.numpy(), STRETCH, axis=(1, 2), keepdims=True)
        return torch.from_numpy(low), torch.from_numpy(high)

    def picture(self, values: Tensor, limits: tuple[Tensor, Tensor]) -> Image.Image:
        """(C, H, W) not normalised -> RGB picture; values outside the limits are clipped."""
        low, high = limits
        shown = ((values[list(self.bands)] - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        levels = (shown * 255).round().to(torch.uint8).expand(3, -1, -1).numpy()
        return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))

    def note(self, channels: int) -> str:
        """What a reader has to know of the colours; empty for plain grey and RGB."""
        notes = []
        if channels != len(self.bands) or self.bands != tuple(range(channels)):
            names = "as red, green and blue" if len(self.bands) == 3 else "as grey"
            notes.append(f"band{'s' if len(self.bands) > 1 else ''} {', '.join(map(str, self.bands))} {names}")
        if self.stretched:
            notes.append(f"each row from the {STRETCH[0]}nd to the {STRETCH[1]}th percentile of its input")
        return "; ".join(notes)


class Strip(NamedTuple):
    """One row of panels, and what they are."""

    label: str
    panels: list[Image.Image]


def fixed_mask(model: MaskedAutoencoder, count: int, seed: int, *, number: int = 0) -> PatchMask:
    """The same masks each time, one per picture, so that strips of different steps can be compared; ``number`` counts
    different masks of the same picture."""
    return draw_mask(model, model.masker, count, seed, number)


def draw_mask(model: MaskedAutoencoder, masker: Masker, count: int, seed: int, number: int = 0) -> PatchMask:
    """``fixed_mask`` with any strategy."""
    generators = [generator_at(seed, MASK, 2**31 + number, index) for index in range(count)]
    return masker(count, model.encoder.grid, generators)


def reconstruction_strip(
    model: MaskedAutoencoder, pixels: Tensor, mask: PatchMask, statistics: Statistics, display: Display | None = None
) -> Image.Image:
    """A row per image: input, masked, prediction, pasted (visible input and predicted hidden patches).

    pixels (B, C, H, W), normalised with ``statistics``. Where the target needs the truth to become pixels, the panels
    say so.
    """
    display = display or Display.of(statistics)
    rows = reconstruction_rows(model, pixels, mask, statistics, display)
    titles = panel_titles(model, f"{mask.hidden.float().mean().item():.0%} hidden")
    return tile(rows, titles, notes_of(model, display))


@torch.no_grad()
def reconstruction_rows(
    model: MaskedAutoencoder,
    pixels: Tensor,
    mask: PatchMask,
    statistics: Statistics,
    display: Display,
    label: str = "",
) -> list[Strip]:
    """The four panels of each image (B, C, H, W), normalised with ``statistics``, in the order of ``panel_titles``."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    output = model(pixels.to(device), mask=mask)
    shown = model.reconstruct(pixels.to(device), output)
    model.train(training)
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    columns = [(column.float().cpu() * std + mean) for column in (pixels, *shown)]
    rows = []
    for index in range(len(pixels)):
        limits = display.limits(columns[0][index])
        panels = [display.picture(column[index], limits) for column in columns]
        panels[1] = _grey_out(panels[1], mask.hidden[index].cpu().numpy(), model.encoder.grid.rows)
        rows.append(Strip(label, panels))
    return rows


def panel_titles(model: MaskedAutoencoder, masked: str = "masked") -> list[str]:
    """Above the columns; a star where the truth was needed to draw a prediction."""
    star = "*" if model.target.shows_truth else ""
    return ["input", masked, f"prediction{star}", f"pasted{star}"]


def notes_of(model: MaskedAutoencoder, display: Display) -> list[str]:
    """Below the panels: what is predicted, and what a reader could otherwise believe."""
    notes = [TRUTH_NOTE] if model.target.shows_truth else []
    if not model.loss_on_all_patches:
        notes.append(UNTRAINED_NOTE)
    bands = display.note(model.encoder.in_channels)
    return [f"the target is {model.target_name.replace('_', ' ')}", *notes, *([bands] if bands else [])]


def describe_mask(masker: Masker, mask: PatchMask) -> str:
    """Two lines: the strategy, and how much of the image it hid."""
    hidden, total = mask.hidden_ids.shape[1], mask.hidden.shape[1]
    return f"{describe_masker(masker)['masking']}\n{hidden} of {total} hidden\n({hidden / total:.0%})"


def tile(
    rows: Sequence[Strip], titles: Sequence[str], notes: Sequence[str] = (), *, side: int = PANEL_SIDE
) -> Image.Image:
    """Panels of one size in rows under column titles, beside their labels, above notes; small images are enlarged
    without smoothing to about ``side`` pixels."""
    width, height = rows[0].panels[0].size
    scale = max(1, round(side / max(width, height)))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(size=12)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = round(max(pen.multiline_textbbox((0, 0), row.label, font=font)[2] for row in rows))
    left = GAP + (margin + GAP if margin else 0)
    columns = left + len(titles) * (width + GAP)
    sheet_width = max([columns, *(round(pen.textlength(note, font=font)) + 2 * GAP for note in notes)])
    bottom = LINE_HEIGHT + len(rows) * (height + GAP)
    sheet = Image.new("RGB", (sheet_width, bottom + LINE_HEIGHT * len(notes)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, note in enumerate(notes):
        pen.text((GAP, bottom + number * LINE_HEIGHT), note, fill=INK, font=font)
    for column, title in enumerate(titles):
        pen.text((left + column * (width + GAP), 2), title, fill=INK, font=font)
    for line, row in enumerate(rows):
        top = LINE_HEIGHT + line * (height + GAP)
        pen.multiline_text((GAP, top), row.label, fill=INK, font=font)
        for column, panel in enumerate(row.panels):
            place = (left + column * (width + GAP), top)
            sheet.paste(panel.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def _grey_out(image: Image.Image, hidden: np.ndarray, rows: int) -> Image.Image:
    """Paint hidden patches in one grey."""
    values = np.array(image)
    grid = hidden.reshape(rows, -1)
    patch = values.shape[0] // rows
    values[np.kron(grid, np.ones((patch, patch))).astype(bool)] = 128
    return Image.fromarray(values)
