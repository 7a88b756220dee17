"""What may change size on the way from one file to another: positions, the patch embedding, channels, relative tables.

Conventions (see also ``pos_embed``): the official MAE, detectron2, mmseg and mmpretrain resize positions bicubically
without antialiasing, timm with it; FAIR resizes the patch embedding 14 -> 16 as a picture, timm by the pseudo-inverse
of the image resize (FlexiViT, arXiv 2212.08013, 3.4), which keeps the embedding of a resized image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_core.data.images import Statistics
from mae_core.errors import UserError
from mae_core.patches import PatchGrid, as_pair
from mae_core.pos_embed import resize_pos_embed, sincos_2d
from mae_core.weights.encoder_file import EncoderInfo
from mae_core.weights.formats import SHAPES
from mae_core.weights.parts import Parts, sizes_of
from mae_core.weights.rename import is_decoder, split_index
from mae_core.weights.report import LoadReport

ChannelMethod = Literal["sum", "mean_tile", "new"]
PatchMethod = Literal["bicubic", "pseudo_inverse"]
STEM, STEM_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
STEM_WARNING = "an adapted stem is an initialisation to train on from, not a frozen feature"


@dataclass(frozen=True)
class Adaptation:
    """Sizes to change; None keeps the file's.

    image_size  (height, width) in pixels, or one number
    channels    how the stem is adapted to ``in_chans``: ``sum`` (to one channel: equal to feeding the grey image to
                all), ``mean_tile`` (the mean over channels for each, scaled so that the response keeps its size),
                ``new`` (drawn anew from ``seed``); None: sum for one channel, mean_tile otherwise
    antialias   resize positions as timm does when a grid shrinks; not as the official code does
    grid        (rows, cols) of the file, where it does not say and is not square
    reorder     put a row-first sine-cosine table (mmpretrain, MIMDet) into the official column-first layout by
                reordering the channels of the whole trunk: the same function, its features reordered alike
    """

    image_size: int | tuple[int, int] | None = None
    patch_size: int | None = None
    in_chans: int | None = None
    channels: ChannelMethod | None = None
    patch: PatchMethod = "bicubic"
    antialias: bool = False
    grid: tuple[int, int] | None = None
    reorder: bool = False
    seed: int = 0


class UnknownGrid(UserError):
    """Nothing says how the positions lie."""


MOST_PREFIX_TOKENS = 8


def positions_of(
    rows: int,
    patch: int,
    info: EncoderInfo,
    asked: tuple[int, int] | None = None,
    image_size: int | Sequence[int] | None = None,
) -> tuple[int, tuple[int, int]]:
    """How the rows of a position table lie: (1 with a row for the cls token, 0 without one, (rows, cols) of the grid).

    The grid is the one ``asked`` for, or that the file states; else a square; else that of the images (H, W) it is
    wanted for, if they fill the table exactly. Raises ``UserError`` for tables of more prefix tokens and for a grid
    that contradicts the table; ``UnknownGrid`` where nothing tells it.
    """
    grid = asked or info.grid
    if grid is None and info.image_size is not None:
        try:
            grid = list(PatchGrid.of(info.image_size, patch)[:2])
        except (TypeError, ValueError):
            grid = None
    if grid is not None:
        if not (isinstance(grid, list | tuple) and len(grid) == 2 and all(type(cells) is int for cells in grid)):
            raise UserError(f"its metadata names the grid {grid!r}, which is not [rows, columns]; the file is damaged")
        prefix = rows - grid[0] * grid[1]
        if prefix in (0, 1) and rows > prefix:
            return prefix, (grid[0], grid[1])
        if 1 < prefix <= MOST_PREFIX_TOKENS:
            raise UserError(_too_many(rows, prefix, (grid[0], grid[1])))
        raise UserError(
            f"{rows - 1} positions do not fill a {grid[0]}x{grid[1]} grid; the file is damaged, or the grid is wrong"
        )
    for prefix in (1, 0, 2):
        side = math.isqrt(max(rows - prefix, 0))
        if side > (prefix == 0) and side * side == rows - prefix:
            if prefix > 1:
                raise UserError(_too_many(rows, prefix, (side, side)))
            return prefix, (side, side)
        if prefix == 1 and image_size is not None:
            height, width = (length // patch for length in as_pair(image_size))
            if height * width in (rows - 1, rows):
                return rows - height * width, (height, width)
    side = math.isqrt(rows - 1)
    raise UnknownGrid(
        f"{rows - 1} positions do not fill a {side}x{side} grid; the file is damaged, or its grid is not "
        "square and must be given, with mae convert --grid ROWS COLS or by the size of the images"
    )


def grid_of_table(rows: int, asked: tuple[int, int] | None = None) -> tuple[int, int]:
    """(rows, columns) of the grid that a table of BEiT's relative positions is made for: the one ``asked`` for, else a
    square. Raises ``UserError`` where the table is of another one."""
    side = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    grid = (asked[0], asked[1]) if asked else (side, side)
    if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 == rows:
        return grid
    wrong = f"relative_position_bias_table has {rows} rows, which is not that of a {grid[0]}x{grid[1]} grid"
    raise (UserError if asked else UnknownGrid)(f"{wrong}; name its grid with mae convert --grid ROWS COLS")


def _too_many(rows: int, prefix: int, grid: tuple[int, int]) -> str:
    return (
        f"{prefix} prefix tokens: pos_embed has {rows} rows for {grid[0]}x{grid[1]} patches, so that {prefix - 1} more "
        "tokens than the cls token have a position, such as a distillation token; only encoders with one cls token are "
        "supported. (If it was trained on images that are not square, its grid has to be given.)"
    )


def adapt(parts: Parts, wanted: Adaptation) -> None:
    """Resize ``parts`` in place. Raises ``UserError`` for sizes that do not fit."""
    _, channels, patch, _ = parts.tensors[STEM].shape
    old = None if parts.info.grid is None else (parts.info.grid[0], parts.info.grid[1])
    if old is not None:
        _settle_sine_layout(parts, old, wanted.reorder)
    adapt_stem(parts.tensors, parts.sources, wanted, parts.report)
    new_patch = wanted.patch_size or patch
    parts.info = parts.info.with_facts(patch_size=new_patch, in_chans=wanted.in_chans or channels)
    if old is not None:
        size = as_pair(wanted.image_size) if wanted.image_size is not None else (old[0] * patch, old[1] * patch)
        splits = not any(side % new_patch for side in size)  # DINOv2's 518 pixels do not, into patches of 16
        if wanted.image_size is None and not splits:
            size = (old[0] * new_patch, old[1] * new_patch)
            parts.report.notes.append(
                f"the grid of {old[0]}x{old[1]} patches stays, so that it is for images of {size[0]}x{size[1]}"
            )
        new = PatchGrid.of(size, new_patch)
        if new[:2] != old:
            _resize_positions(parts, old, new[:2], wanted.antialias)
        parts.info = parts.info.with_facts(grid=list(new[:2]), image_size=list(new.image_size))


def usual_method(in_chans: int) -> ChannelMethod:
    """How a stem is adapted to ``in_chans`` where the caller does not say."""
    return "sum" if in_chans == 1 else "mean_tile"


def adapt_stem(
    tensors: dict[str, Tensor], sources: Mapping[str, list[str]], wanted: Adaptation, report: LoadReport
) -> None:
    """Give the patch embedding among ``tensors`` the patch size and the channels that are ``wanted``, in place, and
    drop a decoder: it predicts the pixels of one patch, and does not survive another patch or other channels."""
    _, channels, patch, _ = tensors[STEM].shape
    new_patch, new_channels, told = wanted.patch_size or patch, wanted.in_chans or channels, []
    if new_patch != patch:
        tensors[STEM] = resize_patch_embed(tensors[STEM], new_patch, wanted.patch)
        told.append(f"patch {patch} -> {new_patch} ({wanted.patch})")
    if new_channels != channels:
        method: ChannelMethod = wanted.channels or usual_method(new_channels)
        tensors[STEM] = adapt_channels(tensors[STEM], new_channels, method, seed=wanted.seed)
        told.append(f"channels {channels} -> {new_channels} ({method})")
        report.notes.append(f"the patch embedding was adapted to {new_channels} channels: {STEM_WARNING}")
    if not told:
        return
    report.resized[STEM] = ", ".join(told)
    gone = [name for name in tensors if is_decoder(name)]
    for name in gone:
        report.unused.update(dict.fromkeys(sources[name], "the decoder predicts patches of the old size"))
        del tensors[name]
    if gone:
        report.notes.append("the decoder was dropped: it predicts patches of the old size or channels")


def restandardise_stem(tensors: dict[str, Tensor], old: Statistics, new: Statistics) -> None:
    """Let the patch embedding among ``tensors`` answer to pixels standardised with ``new`` as it did to the same ones
    standardised with ``old``, in place: (x * new.std + new.mean - old.mean) / old.std is what it was trained on."""
    weight, bias = (tensors[name] for name in (STEM, STEM_BIAS))
    was, now = (torch.tensor(each, dtype=torch.float64)[:, :, None, None] for each in (old, new))
    filters = weight.double() / was[1]
    tensors[STEM] = (filters * now[1]).float()
    tensors[STEM_BIAS] = (bias.double() + (filters * (now[0] - was[0])).sum((1, 2, 3))).float()


def _resize_positions(parts: Parts, old: tuple[int, int], new: tuple[int, int], antialias: bool) -> None:
    how = f"{old[0]}x{old[1]} -> {new[0]}x{new[1]}"
    area = (2 * old[0] - 1) * (2 * old[1] - 1)
    for name in list(parts.tensors):
        values = parts.tensors[name]
        if name in ("pos_embed", "decoder_pos_embed"):
            parts.tensors[name] = resize_pos_embed(values, old, new, antialias=antialias)
        elif name.endswith("relative_position_bias_table") and values.shape[0] == area + 3:
            parts.tensors[name] = resize_relative_table(values, old, new)
        elif name.endswith(("rel_pos_h", "rel_pos_w")) and values.shape[0] == 2 * old[name.endswith("w")] - 1:
            length = 2 * new[name.endswith("w")] - 1
            table = F.interpolate(values.float().t()[None], size=length, mode="linear", align_corners=False)
            parts.tensors[name] = table[0].t().contiguous().to(values.dtype)
        else:
            continue
        parts.report.resized[name] = how


def resize_relative_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """((2h-1)*(2w-1) + 3, heads) of BEiT's relative positions to another window: bicubic, the cls entries kept."""
    body, cls = table[:-3], table[-3:]
    picture = body.float().t().reshape(1, table.shape[1], 2 * old[0] - 1, 2 * old[1] - 1)
    picture = F.interpolate(picture, size=(2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic", align_corners=False)
    return torch.cat([picture[0].flatten(1).t().to(table.dtype), cls])


def resize_patch_embed(weight: Tensor, patch: int, method: PatchMethod = "bicubic") -> Tensor:
    """(D, C, p, p) -> (D, C, patch, patch). ``bicubic`` resizes the filters as pictures, as FAIR did for ViT-H;
    ``pseudo_inverse`` solves for filters that answer to a resized image as the old ones did to the image."""
    if method == "bicubic":
        size = (patch, patch)
        return F.interpolate(weight.float(), size=size, mode="bicubic", align_corners=False).to(weight.dtype)
    old = weight.shape[-1]
    units = torch.eye(old * old, dtype=torch.float64).reshape(-1, 1, old, old)
    resize = F.interpolate(units, size=(patch, patch), mode="bicubic", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resize.flatten(1))  # (patch*patch, old*old)
    return (weight.double().flatten(2) @ inverse.t()).unflatten(2, (patch, patch)).to(weight.dtype)


def adapt_channels(weight: Tensor, in_chans: int, method: ChannelMethod, *, seed: int = 0) -> Tensor:
    """(D, C, p, p) -> (D, in_chans, p, p); see ``Adaptation.channels``. Raises ``UserError`` where ``sum`` is asked for
    other than one channel."""
    D, C, patch, _ = weight.shape
    if method == "sum":
        if in_chans != 1:
            raise UserError(f"sum makes one channel of several, not {in_chans}; use mean_tile or new")
        return weight.sum(dim=1, keepdim=True)
    if method == "mean_tile":
        return weight.mean(dim=1, keepdim=True).repeat(1, in_chans, 1, 1) * (C / in_chans)
    fresh = torch.empty(D, in_chans * patch * patch)
    torch.nn.init.xavier_uniform_(fresh, generator=torch.Generator().manual_seed(seed))
    return fresh.reshape(D, in_chans, patch, patch).to(weight.dtype)


def is_row_first(table: Tensor, grid: tuple[int, int]) -> bool:
    """Whether a position table (1, 1 + rows*cols, D) is the sine-cosine table with rows before columns, which
    mmpretrain and MIMDet make, and not the official one."""
    width = table.shape[2]
    if width % 4 or table.shape[1] != 1 + grid[0] * grid[1]:
        return False
    values = table[0, 1:].float()
    official = sincos_2d(width, *grid, prefix=0)[0]
    return bool((values - official.roll(width // 2, dims=1)).abs().max() < 1e-2) and not bool(
        (values - official).abs().max() < 1e-2
    )


def _settle_sine_layout(parts: Parts, grid: tuple[int, int], reorder: bool) -> None:
    for table, letter in (("pos_embed", "D"), ("decoder_pos_embed", "E")):
        if table not in parts.tensors or not is_row_first(parts.tensors[table], grid):
            continue
        parts.info = parts.info.with_facts(**{f"{table}_layout": None if reorder else "row_first"})
        if reorder:
            swap_halves(parts.tensors, letter)
            note = (
                f"{table} had the row-first layout of mmpretrain and MIMDet: the two halves of all channels changed "
                "places, so that it has the official one and the features are the same, their halves exchanged"
            )
        else:
            note = (
                f"{table} has the row-first sine-cosine layout of mmpretrain and MIMDet, not the official one; it is "
                "kept, because the blocks learned with it (mae convert --reorder-positions puts table and blocks "
                "into the official order)"
            )
        parts.report.notes.append(note)


def swap_halves(tensors: dict[str, Tensor], letter: str) -> None:
    """Exchange the two halves of the residual stream's channels (``letter`` of ``SHAPES``: D encoder, E decoder) in
    every tensor that reads or writes it: the same function on reordered channels."""
    half = sizes_of(tensors)[letter] // 2
    for name, values in tensors.items():
        letters = SHAPES.get(split_index(name)[0], ())
        axes = [axis for axis, each in enumerate(letters) if each == letter]
        if name.endswith("attn.proj.weight"):
            axes = axes[:1]  # its input is the heads' output, not the stream
        if axes:
            tensors[name] = values.roll([half] * len(axes), axes)
