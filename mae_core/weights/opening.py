"""A weights file opened once: its tensors under our names, and every fact of its encoder decided or refused.

Loading, converting and inspecting start here, so that they cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_core.errors import UserError, naming
from mae_core.layout import EXPORTED, resolve_weights
from mae_core.models.sizes import SIZES, ViTSize, heads_of_width
from mae_core.weights.encoder_file import TRAINER_WORDS, EncoderInfo, info_beside
from mae_core.weights.files import read_file
from mae_core.weights.formats import FORMATS, MOCO_V3, MOCO_V3_HEADS
from mae_core.weights.parts import Parts, read_parts, sizes_of
from mae_core.weights.resize import UnknownGrid, grid_of_table, positions_of
from mae_core.weights.wrappers import ASKED_IN_CONFIG

SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
HEADS_OPTION = "model.heads=N in a run's configuration, --heads N of mae convert, inspect and export, heads=N in Python"


def open_weights(
    path: Path | str,
    *,
    decoder: bool = False,
    source: str | None = None,
    drop: Sequence[str] = (),
    needless: Sequence[str] = (),
    mapped: bool = False,
    branch: str | None = None,
    asked_as: str = ASKED_IN_CONFIG,
    **asked: Any,
) -> Parts:
    """Open a weights file of any known format, a run, a checkpoint or a folder of timm or transformers.

    ``decoder``: which file of a run is meant, see ``resolve_weights``. ``source``: the format, where it is known;
    otherwise the one that the file states, or that its names show. ``drop``, ``needless``: see ``read_parts``.
    ``branch``: which encoder of a file that holds several; ``asked_as``: how the caller's user writes it.
    ``asked``: heads, grid, image_size, see ``describe``.

    Raises ``UserError`` where the file is broken, of no known format, holds NaN or infinite numbers, or contradicts
    what is asked.
    """
    path = resolve_weights(path, decoder=decoder)
    shard = SHARD.search(path.name)
    if shard:
        raise UserError(f"{path} is one of {int(shard[1])} shards; give their folder, {path.parent}")
    file = read_file(path, mapped=mapped)
    arguments = {name: value for name, value in file.arguments.items() if isinstance(value, int | float)}
    stated = EncoderInfo.from_metadata(file.metadata).completed(EncoderInfo.from_foreign(arguments, TRAINER_WORDS))
    if stated.timm is not None:
        name = stated.timm.removeprefix("timm:")
        raise UserError(
            f"{path} holds {stated.timm} under timm's own names, which no other format has; "
            f"timm.create_model({name!r}, num_classes=N) and load_state_dict take its tensors as they are"
        )
    if source is None and stated.format in FORMATS:
        source = stated.format
    with naming(path):
        parts = read_parts(file, source, drop=drop, needless=needless, branch=branch, asked_as=asked_as)
        stated = stated.completed(_of_its_writer(parts))
        return describe(parts, stated.completed(_of_this_file(info_beside(path), parts)), **asked)


def _of_its_writer(parts: Parts) -> EncoderInfo:
    """What the names tell of who trained it: MoCo v3's ViT-S has twice the heads of other ViT-S."""
    heads = MOCO_V3_HEADS.get(sizes_of(parts.tensors)["D"]) if {*MOCO_V3} & {*parts.words} else None
    if heads is not None:
        parts.report.notes.append(f"{heads} attention heads, as MoCo v3's models of this width have")
    return EncoderInfo(heads=heads)


def _of_this_file(beside: EncoderInfo, parts: Parts) -> EncoderInfo:
    """``beside``, where the config.json is of these tensors; a file under another name than an exported one may lie
    beside the configuration of something else."""
    width, depth = sizes_of(parts.tensors)["D"], parts.depth
    if beside.width in (None, width) and beside.depth in (None, depth):
        return beside
    found = f"{beside.width} x {beside.depth} blocks, the tensors {width} x {depth}"
    if parts.path.name in EXPORTED:
        raise UserError(f"its config.json says width x depth {found}; give the two that belong together")
    parts.report.notes.append(f"the config.json beside it is of another model ({found}) and was not used")
    return EncoderInfo()


def describe(
    parts: Parts,
    stated: EncoderInfo,
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    image_size: int | Sequence[int] | None = None,
) -> Parts:
    """``parts`` with its facts: from its shapes, from what is ``stated``, from what is asked.

    ``heads`` and ``grid``: what the file may not say. ``image_size``: of the images it is wanted for, which tells the
    grid of a file that is not square and does not say. A position table without a row for the cls token gets one of
    zeros, which adds nothing. Raises ``UserError`` where stated and found, or stated and asked, contradict each other.
    """
    undecided: list[str] = []
    assumptions: list[str] = []
    tensors = parts.tensors
    sizes = sizes_of(tensors)
    number, note = decide_heads(sizes["D"], parts.depth, stated.heads, heads, tensors)
    if note:
        (undecided if number is None else assumptions).append(note)
    info = stated.with_facts(
        format=stated.format if stated.format in FORMATS else parts.format,
        width=sizes["D"],
        depth=parts.depth,
        heads=number,
        mlp_ratio=sizes["HD"] / sizes["D"],
        norm_eps=stated.norm_eps or ViTSize.norm_eps,
        activation=stated.activation or ViTSize.activation,
        patch_size=sizes["P"],
        in_chans=sizes["C"],
    )
    info = info.with_facts(size=info.trunk.name if number is not None and info.trunk.name in SIZES else None)
    relative = next((each for name, each in tensors.items() if name.endswith("relative_position_bias_table")), None)
    if relative is not None and "pos_embed" not in tensors:
        try:
            cells = grid_of_table(len(relative), grid or info.grid)
            info = info.with_facts(grid=list(cells), image_size=[side * sizes["P"] for side in cells])
        except UnknownGrid as error:
            undecided.append(str(error))
    if "pos_embed" in tensors:
        table = tensors["pos_embed"]
        sized = info if stated.patch_size in (None, sizes["P"]) else info.with_facts(image_size=None)
        try:
            prefix, cells = positions_of(table.shape[1], sizes["P"], sized, grid, image_size)
        except UnknownGrid as error:
            undecided.append(str(error))
            info = info.with_facts(grid=None, image_size=None)
        else:
            info = info.with_facts(grid=list(cells), image_size=[side * sizes["P"] for side in cells])
            if prefix == 0:
                tensors["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
                parts.report.notes.append(
                    f"pos_embed has {table.shape[1]} rows for {cells[0]}x{cells[1]} patches and none for the cls token "
                    "(as DeiT III's); a row of zeros was put before them, which gives the same features. (A grid "
                    "that is not square, with a row for the cls token, has to be stated.)"
                )
    parts.report.notes += assumptions
    parts.info, parts.assumptions, parts.undecided = info, tuple(assumptions), tuple(undecided)
    return parts


def decide_heads(
    width: int, depth: int, stated: Any, asked: int | None, tensors: Mapping[str, Tensor]
) -> tuple[int | None, str]:
    """(attention heads, what to say): stated by the file or by the shape of a table of relative positions; else asked
    for; else of the named size of that width, said where the depth is another; else None and a refusal.

    Raises ``UserError`` where they contradict each other or do not divide the width.
    """
    for name, tensor in tensors.items():
        if name.endswith("relative_position_bias_table"):
            stated = stated or tensor.shape[1]
        elif name.endswith("rel_pos_h"):
            stated = stated or width // tensor.shape[1]
    if stated is not None and asked is not None and stated != asked:
        raise UserError(f"heads={asked} was given, but the file has {stated}; leave heads out, or use another file")
    number = stated if stated is not None else asked
    if number is not None:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1 or width % number:
            raise UserError(f"{number!r} attention heads do not divide a width of {width}; give a number that does")
        return number, ""
    number = heads_of_width(width)
    if number is None:
        return None, (
            f"the file does not say how many attention heads it has, and no named size is {width} wide; give "
            f"{HEADS_OPTION}"
        )
    known = {name: size.depth for name, size in SIZES.items() if size.width == width}
    if depth in known.values():
        return number, ""
    told = ", ".join(f"{name} has {blocks}" for name, blocks in known.items())
    return number, (
        f"{depth} blocks of width {width} match no named ViT size ({told}); are some missing? The file does "
        "not say "
        f"how many attention heads it has: {number}, as {next(iter(known))} has, are assumed (another number: "
        f"{HEADS_OPTION})"
    )
