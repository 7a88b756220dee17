"""``convert``: an encoder under our names, written under those of a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_core.errors import UserError
from mae_core.weights.encoder_file import EncoderInfo
from mae_core.weights.files import WeightsFile
from mae_core.weights.formats import BLOCK_EXTRAS, KEPT_APART, OWN_ONLY, Format, Layout
from mae_core.weights.opening import Opened, describe_parts
from mae_core.weights.parts import Parts, missing_decoder, num_parameters, read_parts
from mae_core.weights.rename import (
    Reading,
    format_of,
    is_decoder,
    leaves,
    required,
    split_index,
    their_names,
    without_decoder,
)
from mae_core.weights.report import LoadReport
from mae_core.weights.resize import Adaptation, adapt
from mae_core.weights.unwrapping import unwrap

GAMMAS = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}
"""Layer scale -> the layer whose output it scales."""


@dataclass
class Converted:
    """Tensors under the names of a format.

    reading   how they are named
    parts     the source under our names, after resizing
    info      what is known of the model, its sizes after resizing
    raw       the source as it was read, without outer prefixes; None where it was resized
    """

    tensors: dict[str, Tensor]
    reading: Reading
    parts: Parts
    report: LoadReport
    info: EncoderInfo
    raw: dict[str, Tensor] | None = None


def convert(
    state: Mapping[str, Tensor],
    source: str | None,
    target: str,
    *,
    adaptation: Adaptation | None = None,
    drop: Sequence[str] = (),
    heads: int | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Tensors of one format -> (tensors of another, the account of every tensor on both sides).

    ``source``: name of a format, or None to recognise it. ``state`` may be wrapped as trainers do. Encoder and decoder
    are converted where both formats hold a decoder, the encoder alone otherwise. ``adaptation``: sizes to change on the
    way. ``drop``: patterns of source tensors to leave out. ``heads``: attention heads; names and shapes alone are
    converted without them, but they must divide the width. What is only renamed shares its memory with ``state``.

    Raises ``UserError`` where a tensor is missing, left over, of a wrong shape, not finite, or means something that the
    target cannot hold.
    """
    plain, notes, _ = unwrap(state)
    report = LoadReport(f"{source or 'unknown'} -> {target}", notes=list(notes))
    parts = read_parts(plain, report, source, drop=drop, needless=tuple(format_of(target).lacks))
    wanted = adaptation or Adaptation()
    file = WeightsFile(Path("the tensors"), {})
    asked: dict[str, Any] = {"grid": wanted.grid, "image_size": wanted.image_size}
    converted = convert_opened(describe_parts(file, parts, EncoderInfo(), report, heads=heads, **asked), target, wanted)
    return converted.tensors, converted.report


def convert_opened(opened: Opened, target: str, adaptation: Adaptation) -> Converted:
    """An opened file under the names of another format, resized as asked. Raises ``UserError`` as ``convert`` does."""
    parts, report = opened.parts, opened.report
    report.path = f"{parts.format} -> {target}"
    if opened.info.grid is None and "pos_embed" in parts.tensors:
        if adaptation != Adaptation():
            raise UserError(next(each for each in opened.undecided if "grid" in each))
        report.notes.append("the grid is not known: its positions fill no square")
    before = dict(parts.tensors)
    info = adapt(parts, adaptation, opened.info, report)
    resized = any(parts.tensors.get(name) is not values for name, values in before.items())
    converted = write_parts(parts, format_of(target), report, info)
    converted.raw = None if resized else parts.state
    return converted


def write_parts(parts: Parts, target: Format, report: LoadReport, info: EncoderInfo) -> Converted:
    """Name ``parts`` as ``target`` does. Raises ``UserError`` where they mean something that it cannot hold."""
    tensors = _without_what_it_lacks(parts, target, report)
    decoder = any(is_decoder(name) for name in tensors)
    layout = target.layouts[0] if decoder or target.bare is None else target.bare
    prefix = layout.prefixes[0]
    if not decoder and "head.weight" not in tensors and layout.bare_prefix is not None:
        prefix = layout.bare_prefix
    reading = Reading(target, layout, prefix)
    _fold_extras(tensors, layout, target, report, parts)
    _no_positions(tensors, layout, target, report, parts)
    written: dict[str, Tensor] = {}
    names = _names_of(reading)
    for ours, values in tensors.items():
        pattern, index = split_index(ours)
        theirs = (ours.removeprefix(OWN_ONLY),) if ours.startswith(OWN_ONLY) else names.get(pattern)
        if theirs is None:
            theirs_before = parts.sources[ours][0]
            raise UserError(f"{theirs_before} has no place in the format {target.name}; leave it out with --drop")
        full = list(theirs) if ours.startswith(OWN_ONLY) or index is None else [name.format(index) for name in theirs]
        if target.separate_bias and pattern == "blocks.{}.attn.qkv.bias":
            full = [full[0].replace("qkv.bias", name) for name in KEPT_APART]
        written.update(zip(full, _split(values, full, target), strict=True))
        _account(ours, full, values, parts, report)
    _fill(written, reading, tensors, report)
    report.total_parameters = num_parameters(written)
    filled = {name for name, how in report.changed.items() if how.startswith("filled")}
    report.loaded_parameters = num_parameters({n: v for n, v in written.items() if n not in filled})
    return Converted(written, reading, parts, report, info)


def _without_what_it_lacks(parts: Parts, target: Format, report: LoadReport) -> dict[str, Tensor]:
    lacks = dict(target.lacks)
    if "fc_norm" in lacks and "fc_norm.weight" in parts.tensors:
        lacks["head"] = lacks["fc_norm"]
    if parts.has_decoder:
        if "decoder" in lacks:
            report.notes.append(f"the decoder was dropped: {lacks['decoder']}")
        elif missing := missing_decoder(parts.tensors):
            told = [theirs for ours in missing for theirs in their_names(parts.fit.reading, ours)]
            lacking = "1 tensor is" if len(told) == 1 else f"{len(told)} tensors are"
            raise UserError(
                f"its decoder is not complete, {lacking} missing from the file ({', '.join(told[:3])}); "
                f"leave the decoder out with {without_decoder(parts.fit.reading)}"
            )
    kept: dict[str, Tensor] = {}
    for ours, values in parts.tensors.items():
        group = "decoder" if is_decoder(ours) else ours.split(".")[0]
        why = lacks.get(group)
        if ours.startswith(OWN_ONLY) and (target.name != "mae_core" or not parts.has_decoder):
            why = "pre-training's own, which only our files carry"
        if why is None:
            kept[ours] = values
        else:
            report.unused.update(dict.fromkeys(parts.sources[ours], why))
    return kept


def _fold_extras(tensors: dict[str, Tensor], layout: Layout, target: Format, report: LoadReport, parts: Parts) -> None:
    """Layer scale and relative positions that ``layout`` does not have: folded into the layer before, or left out
    where they do nothing."""
    for ours in [name for name in tensors if name.endswith(BLOCK_EXTRAS)]:
        block, extra = ".".join(ours.split(".", 2)[:2]), ours.split(".", 2)[2]
        if extra in target.fills or (extra in layout.extras and extra not in GAMMAS):
            continue
        values = tensors.pop(ours)
        if extra in layout.extras and not bool((values == 1).all()):
            tensors[ours] = values
            continue
        theirs = parts.sources[ours][0]
        if extra not in GAMMAS:
            if values.count_nonzero():
                raise UserError(
                    f"{theirs} holds learned relative positions, which {target.name} cannot hold and without which "
                    f"the features would change; convert to a format that holds them, or leave them out with "
                    f"--drop '*{extra.removeprefix('attn.')}'"
                )
            report.unused[theirs] = "relative positions that are all zero do nothing"
        elif bool((values == 1).all()):
            report.unused[theirs] = "a layer scale of ones does nothing"
        else:
            report.unused[theirs] = f"folded into {GAMMAS[extra]}, which gives the same function"
            for leaf in (".weight", ".bias"):
                name = f"{block}.{GAMMAS[extra]}{leaf}"
                layer = tensors[name]
                tensors[name] = layer * values.to(layer.dtype).view(-1, *[1] * (layer.ndim - 1))


def _no_positions(tensors: dict[str, Tensor], layout: Layout, target: Format, report: LoadReport, parts: Parts) -> None:
    """Absolute positions that one of the two ends does not have."""
    if "pos_embed" in tensors and "pos_embed" not in layout.top:
        values = tensors.pop("pos_embed")
        if values.count_nonzero():
            raise UserError(
                f"the format {target.name} has no absolute positions and the features would change without them; "
                "for mmseg use --to mmseg, its MAE backbone"
            )
        report.unused[parts.sources["pos_embed"][0]] = "positions that are all zero do nothing"
    elif "pos_embed" not in tensors and "pos_embed" in layout.top:
        width = tensors["patch_embed.proj.bias"].shape[0]
        table = next((v for n, v in parts.tensors.items() if n.endswith("relative_position_bias_table")), None)
        if table is None:
            return
        side = round(((table.shape[0] - 3) ** 0.5 + 1) / 2)
        tensors["pos_embed"] = torch.zeros(1, 1 + side * side, width, dtype=tensors["patch_embed.proj.bias"].dtype)
        parts.sources["pos_embed"] = []


def _names_of(reading: Reading) -> dict[str, tuple[str, ...]]:
    """Our pattern -> what the reading calls it: three names where it keeps query, key and value apart."""
    names: dict[str, list[tuple[int, str]]] = {}
    aliases = {reading.prefix + part + leaf for part in reading.layout.aliases.values() for leaf in leaves(part)}
    for theirs, slot in reading.rows.items():
        if theirs in aliases or theirs.rsplit(".", 1)[-1] in KEPT_APART:
            continue
        names.setdefault(slot.ours, []).append((slot.place or 0, theirs))
    return {ours: tuple(name for _, name in sorted(found)) for ours, found in names.items()}


def _split(values: Tensor, names: Sequence[str], target: Format) -> list[Tensor]:
    """Values for each of ``names``: all of them, or query, key and value apart."""
    if len(names) == 1:
        return [values]
    thirds = values.chunk(3)
    return [thirds[place] for place in KEPT_APART.values()] if target.separate_bias else list(thirds)


def _account(ours: str, names: Sequence[str], values: Tensor, parts: Parts, report: LoadReport) -> None:
    sources = parts.sources[ours]
    if not sources:
        report.changed[names[0]] = "filled with zeros: the source has no absolute positions"
    elif names[0] in report.resized:
        pass
    elif ours in report.resized:
        report.resized[names[0]] = report.resized.pop(ours)
    elif len(names) > 1 and len(sources) > 1:
        report.renamed.update(zip(sources, names, strict=False))
    elif len(names) > 1:
        which = ("query", "value") if len(names) == 2 else ("query", "key", "value")
        report.changed.update({name: f"the {part} of {sources[0]}" for name, part in zip(names, which, strict=True)})
    elif len(sources) > 1:
        report.changed[names[0]] = f"joined from {', '.join(sources)}"
    elif sources[0] == names[0]:
        report.loaded.append(names[0])
    else:
        report.renamed[sources[0]] = names[0]


def _fill(written: dict[str, Tensor], reading: Reading, tensors: Mapping[str, Tensor], report: LoadReport) -> None:
    """What the target has and the source has not: filled where one value is right, named as new elsewhere."""
    target, layout = reading.format, reading.layout
    trunk = f"{reading.prefix}{layout.blocks}.{{}}"
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    like = tensors["patch_embed.proj.bias"]
    for extra, value in target.fills.items():
        for index in range(depth):
            name = f"{trunk.format(index)}.{layout.extras[extra]}"
            if name not in written:
                written[name] = torch.full_like(like, value)
                report.changed[name] = f"filled with {value:g}: MAE has no layer scale"
    names = _names_of(reading)
    lacking = required(reading, depth) - tensors.keys()
    if not tensors.keys() & {"norm.weight", "fc_norm.weight"} and "norm" in layout.top and "norm" not in target.lacks:
        lacking |= {"norm.weight", "norm.bias"}
    for ours in lacking:
        pattern, number = split_index(ours)
        report.new += [name.format(number) for name in names[pattern]]
    report.new += [
        f"{trunk.format(index)}.{layout.extras[extra]} ({why})"
        for extra, why in target.starts.items()
        for index in range(depth)
        if f"{trunk.format(index)}.{layout.extras[extra]}" not in written
    ]
    report.new.sort()
    if lacking:
        report.notes.append(
            f"the source has no {', '.join(sorted({name.split('.')[0] for name in lacking}))}; "
            "the file lacks it, and a model that needs it starts it anew"
        )
