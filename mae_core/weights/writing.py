"""``convert``: an encoder under our names, written under those of a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mae_core.errors import UserError
from mae_core.weights.encoder_file import EncoderInfo
from mae_core.weights.files import unwrapped
from mae_core.weights.formats import BLOCK_EXTRAS, KEPT_APART, OWN_ONLY, Format
from mae_core.weights.opening import describe
from mae_core.weights.parts import Parts, missing_decoder, num_parameters, read_parts
from mae_core.weights.rename import Reading, format_of, is_decoder, split_index
from mae_core.weights.report import LoadReport
from mae_core.weights.resize import Adaptation, adapt

GAMMAS = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}
"""Layer scale -> the layer whose output it scales."""
THIRDS = ("query", "key", "value")


@dataclass
class Converted:
    """Tensors under the names of a format.

    reading  how they are named
    parts    the source under our names, after resizing
    resized  whether anything of it was
    """

    tensors: dict[str, Tensor]
    reading: Reading
    parts: Parts
    resized: bool = False


def convert(
    state: Mapping[str, Tensor],
    source: str | None,
    target: str,
    *,
    adaptation: Adaptation | None = None,
    drop: Sequence[str] = (),
    heads: int | None = None,
    branch: str | None = None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Tensors of one format -> (tensors of another, the account of every tensor on both sides).

    ``source``: name of a format, or None to recognise it. ``state`` may be wrapped as trainers do. Encoder and decoder
    are converted where both formats hold a decoder, the encoder alone otherwise. ``adaptation``: sizes to change on the
    way. ``drop``: patterns of source tensors to leave out. ``heads``: attention heads; names and shapes alone are
    converted without them, but they must divide the width. ``branch``: which encoder, where ``state`` holds several.
    What is only renamed shares its memory with ``state``.

    Raises ``UserError`` where a tensor is missing, left over, of a wrong shape, not finite, or means something that the
    target cannot hold.
    """
    file = unwrapped(Path("the tensors"), state)
    parts = read_parts(file, source, drop=drop, needless=tuple(format_of(target).lacks), branch=branch)
    wanted = adaptation or Adaptation()
    describe(parts, EncoderInfo(), heads=heads, grid=wanted.grid, image_size=wanted.image_size)
    return convert_parts(parts, target, wanted).tensors, parts.report


def convert_parts(parts: Parts, target: str, adaptation: Adaptation) -> Converted:
    """An opened file under the names of another format, resized as asked. Raises ``UserError`` as ``convert`` does."""
    if parts.info.cls_token is False and target != "mae_core" and "cls_token" not in format_of(target).lacks:
        raise UserError(f"this encoder has no cls token, and a file of the format {target} has one; keep it as it is")
    parts.report.path = f"{parts.format} -> {target}"
    if parts.info.grid is None and any("grid" in each for each in parts.undecided):
        if adaptation != Adaptation():
            raise UserError(next(each for each in parts.undecided if "grid" in each))
        parts.report.notes.append("the grid is not known: the positions do not fill a square")
    before = dict(parts.tensors)
    adapt(parts, adaptation)
    resized = any(parts.tensors.get(name) is not values for name, values in before.items())
    return replace(write_parts(parts, format_of(target)), resized=resized)


def write_parts(parts: Parts, target: Format) -> Converted:
    """Name ``parts`` as ``target`` does. Raises ``UserError`` where they mean something that it cannot hold."""
    tensors, report = _without_what_it_lacks(parts, target), parts.report
    decoder = any(is_decoder(name) for name in tensors)
    layout = target.layouts[0] if decoder or target.bare is None else target.bare
    prefix = layout.prefixes[0]
    if not decoder and "head.weight" not in tensors and layout.bare_prefix is not None:
        prefix = layout.bare_prefix
    reading = Reading(target, layout, prefix)
    _fold_extras(tensors, reading, parts)
    _settle_positions(tensors, reading, parts)
    written: dict[str, Tensor] = {}
    for ours, values in tensors.items():
        if split_index(ours)[0] not in reading.written and not ours.startswith(OWN_ONLY):
            raise UserError(
                f"{parts.sources[ours][0]} has no place in the format {target.name}; leave it out with mae convert "
                "--drop"
            )
        names = reading.names(ours)
        places = {1: (), 2: tuple(KEPT_APART.values()), 3: (0, 1, 2)}[len(names)]
        thirds = values.chunk(3) if places else ()
        written.update(zip(names, [thirds[place] for place in places] or [values], strict=True))
        _account(ours, names, places, parts)
    _fill(written, reading, tensors, report)
    report.total_parameters = num_parameters(written)
    filled = {name for name, how in report.changed.items() if how.startswith("filled")}
    report.loaded_parameters = num_parameters({n: v for n, v in written.items() if n not in filled})
    return Converted(written, reading, parts)


def _without_what_it_lacks(parts: Parts, target: Format) -> dict[str, Tensor]:
    lacks, report, reading = dict(target.lacks), parts.report, parts.fit.reading
    if "fc_norm" in lacks and "fc_norm.weight" in parts.tensors:
        lacks["head"] = lacks["fc_norm"]
    if parts.has_decoder and "decoder" in lacks:
        report.notes.append(f"the decoder was dropped: {lacks['decoder']}")
    elif parts.has_decoder and (missing := missing_decoder(parts.tensors)):
        told = [theirs for ours in missing for theirs in reading.names(ours)]
        lacking = "1 tensor is" if len(told) == 1 else f"{len(told)} tensors are"
        raise UserError(
            f"its decoder is not complete, {lacking} missing from the file ({', '.join(told[:3])}); "
            f"leave the decoder out with {reading.without_decoder()}"
        )
    kept: dict[str, Tensor] = {}
    for ours, values in parts.tensors.items():
        why = lacks.get("decoder" if is_decoder(ours) else ours.split(".")[0])
        if ours.startswith(OWN_ONLY) and (target.name != "mae_core" or not parts.has_decoder):
            why = "pre-training's own, which only our files carry"
        if why is None:
            kept[ours] = values
        else:
            report.unused.update(dict.fromkeys(parts.sources[ours], why))
    return kept


def _fold_extras(tensors: dict[str, Tensor], reading: Reading, parts: Parts) -> None:
    """Layer scale and relative positions that the target does not have: folded into the layer before, or left out
    where they do nothing."""
    target, held, unused = reading.format, reading.layout.extras, parts.report.unused
    for ours in [name for name in tensors if name.endswith(BLOCK_EXTRAS)]:
        _, number, extra = ours.split(".", 2)
        ones = extra in GAMMAS and bool((tensors[ours] == 1).all())
        if extra in target.fills or (extra in held and not ones):
            continue
        values, theirs = tensors.pop(ours), parts.sources[ours][0]
        if ones:
            unused[theirs] = "a layer scale of ones does nothing"
        elif extra in GAMMAS:
            unused[theirs] = f"folded into {GAMMAS[extra]}, which gives the same function"
            for leaf in ("weight", "bias"):
                name = f"blocks.{number}.{GAMMAS[extra]}.{leaf}"
                layer = tensors[name]
                tensors[name] = layer * values.to(layer.dtype).view(-1, *[1] * (layer.ndim - 1))
        elif values.count_nonzero():
            raise UserError(
                f"{theirs} holds learned relative positions, which {target.name} cannot hold and without which "
                f"the features would change; convert to a format that holds them, or leave them out with "
                f"mae convert --drop '*{extra.removeprefix('attn.')}'"
            )
        else:
            unused[theirs] = "relative positions that are all zero do nothing"


def _settle_positions(tensors: dict[str, Tensor], reading: Reading, parts: Parts) -> None:
    """Absolute positions that one of the two ends does not have."""
    if "pos_embed" in tensors and "pos_embed" not in reading.layout.top:
        if tensors.pop("pos_embed").count_nonzero():
            raise UserError(
                f"the format {reading.format.name} has no absolute positions and the features would change without "
                "them; for mmseg use mae convert --to mmseg, its MAE backbone"
            )
        parts.report.unused[parts.sources["pos_embed"][0]] = "positions that are all zero do nothing"
    elif "pos_embed" not in tensors and "pos_embed" in reading.layout.top:
        if parts.info.grid is not None:
            bias = tensors["patch_embed.proj.bias"]
            tensors["pos_embed"] = bias.new_zeros(1, 1 + parts.info.grid[0] * parts.info.grid[1], len(bias))
            parts.sources["pos_embed"] = []


def _account(ours: str, names: Sequence[str], places: Sequence[int], parts: Parts) -> None:
    sources, report = parts.sources[ours], parts.report
    if not sources:
        report.changed[names[0]] = "filled with zeros: the source has no absolute positions"
    elif ours in report.resized:
        report.resized[names[0]] = report.resized.pop(ours)
    elif names[0] in report.resized or not places:
        report.place(names[0], sources)
    elif len(sources) > 1:
        report.renamed.update(zip(sources, names, strict=False))
    else:
        report.changed.update({n: f"the {THIRDS[p]} of {sources[0]}" for n, p in zip(names, places, strict=True)})


def _fill(written: dict[str, Tensor], reading: Reading, tensors: Mapping[str, Tensor], report: LoadReport) -> None:
    """What the target has and the source has not: filled where one value is right, named as new elsewhere."""
    target, layout = reading.format, reading.layout
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    for extra in {**target.fills, **target.starts}:
        for index in range(depth):
            name = f"{reading.prefix}{layout.blocks}.{index}.{layout.extras[extra]}"
            if name in written:
                continue
            if extra in target.starts:
                report.new.append(f"{name} ({target.starts[extra]})")
            else:
                written[name] = torch.full_like(tensors["patch_embed.proj.bias"], target.fills[extra])
                report.changed[name] = f"filled with {target.fills[extra]:g}: MAE has no layer scale"
    lacking = reading.required(depth) - tensors.keys()
    if not tensors.keys() & {"norm.weight", "fc_norm.weight"} and "norm" in layout.top and "norm" not in target.lacks:
        lacking |= {"norm.weight", "norm.bias"}
    report.new = sorted([*report.new, *(name for ours in lacking for name in reading.names(ours))])
    if lacking:
        report.notes.append(
            f"the source has no {', '.join(sorted({name.split('.')[0] for name in lacking}))}; "
            "the file lacks it, and a model that needs it initialises it"
        )
