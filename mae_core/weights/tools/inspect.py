"""``mae inspect``: what a weights file holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mae_core.errors import UserError
from mae_core.layout import resolve_weights
from mae_core.models.sizes import SIZES
from mae_core.weights.catalogue import CATALOGUE
from mae_core.weights.encoder_file import heads_of, read_described
from mae_core.weights.formats import FORMATS
from mae_core.weights.parts import missing_decoder, num_parameters, read_parts, sizes_of
from mae_core.weights.rename import is_decoder
from mae_core.weights.report import LoadReport
from mae_core.weights.resize import grid_of, is_row_first

USES: dict[str, tuple[str, ...]] = {
    "encode": ("norm.weight", "cls_token", "pos_embed"),
    "finetune": ("cls_token", "pos_embed"),
    "linprobe": ("norm.weight", "cls_token", "pos_embed"),
    "detection": ("pos_embed",),
    "segmentation": ("cls_token", "pos_embed"),
    "reconstruct": ("decoder_pred.weight", "norm.weight", "cls_token", "pos_embed"),
    "evaluate": ("head.weight",),
}
"""What a file can be used for -> our names that it takes."""


def inspect_file(path: Path | str) -> dict[str, Any]:
    """What a weights file, run, checkpoint or exported folder holds, as JSON values.

    Raises ``UserError`` where it is broken or of no known format; then the nearest format is named.
    """
    path = resolve_weights(path)
    file = read_described(path, mapped=True)
    report = LoadReport(str(path), notes=list(file.notes))
    try:
        parts = read_parts(file.state, report)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tensors, known = parts.tensors, file.metadata
    sizes = sizes_of(tensors)
    width, patch = sizes["D"], sizes["P"]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    grid: tuple[int, int] | None = None
    if "pos_embed" in tensors:
        try:
            grid = grid_of(tensors["pos_embed"].shape[1] - 1, patch, known)
        except UserError as error:
            report.notes.append(str(error))
    if grid is not None and is_row_first(tensors["pos_embed"], grid):
        report.notes.append("pos_embed has the row-first sine-cosine layout of mmpretrain and MIMDet")
    lost = missing_decoder(tensors) if parts.has_decoder else []
    uses = {use: [name for name in names if name not in tensors] for use, names in USES.items()}
    uses["reconstruct"] += [name for name in lost if name not in uses["reconstruct"]]
    if "head.weight" in tensors:  # a classifier's trunk is no pre-trained encoder
        for use in ("finetune", "linprobe"):
            uses[use].append("a trunk that was not fine-tuned")
    published = next((row for row in CATALOGUE.values() if row.filename == path.name), None)
    stated = known.get("format") if known.get("format") in FORMATS else None
    return {
        "file": str(path),
        "format": stated or parts.format,
        "kind": kind_of(tensors, file.beside),
        "published": published.name if published else None,
        "layout": parts.fit.reading.layout.about,
        "same_names": sorted({parts.format, *parts.others} - {stated or parts.format}),
        "size": next((name for name, row in SIZES.items() if (row.width, row.depth) == (width, depth)), None),
        "width": width,
        "depth": depth,
        "heads": heads_of(width, known),
        "patch_size": patch,
        "in_chans": sizes["C"],
        "grid": list(grid) if grid else None,
        "image_size": [side * patch for side in grid] if grid else None,
        "decoder": {"width": sizes["E"], "missing": lost} if parts.has_decoder else None,
        "classes": sizes.get("K", 0),
        "target": known.get("target") or (published.target if published else None),
        "dtype": sorted({str(values.dtype).removeprefix("torch.") for values in tensors.values()}),
        "tensors": len(file.state),
        "parameters": num_parameters(tensors),
        "metadata": dict(known),
        "dropped": report.unused,
        "notes": report.notes,
        "missing_for": {use: lacking for use, lacking in uses.items() if lacking},
        "use_for": [use for use, lacking in uses.items() if not lacking],
    }


def kind_of(tensors: Mapping[str, Any], beside: Collection[str]) -> str:
    """Which kind of file holds ``tensors`` (our names), by what they are and what lay beside them."""
    if any(is_decoder(name) for name in tensors):
        kind = "encoder and decoder of a pre-training"
    elif "head.weight" in tensors:
        pooled = "mean-pooled patches" if "fc_norm.weight" in tensors else "the cls token"
        kind = f"classifier on {pooled}"
    else:
        kind = "encoder"
    if "optimizer" in beside:
        kind += f", a trainer's checkpoint ({', '.join(sorted(beside))} beside the weights)"
    return kind


def describe_file(path: Path | str) -> str:
    """``inspect_file`` in lines to read. Raises ``UserError`` as it does."""
    found = inspect_file(path)
    known: Mapping[str, Any] = found["metadata"]
    training = ", ".join(
        f"{k} {known[k]}" for k in ("target", "mask_ratio", "epochs", "step") if known.get(k) is not None
    )
    alike = f" ({', '.join(found['same_names'])} has the same names)" if found["same_names"] else ""
    size = f"ViT-{found['size']}" if found["size"] else "a ViT of no named size"
    grid, image = found["grid"], found["image_size"]
    place = f"grid {grid[0]}x{grid[1]} (images {image[0]}x{image[1]})" if grid else "grid not stated and not square"
    row = CATALOGUE.get(found["published"])
    named = f"; named as the published {row.name}: {row.content}" if row else ""
    target = found["target"] or "not stated"
    if row and row.target and not known.get("target"):
        target += " (by the file's name)"
    decoder = "no"
    if found["decoder"]:
        lost = found["decoder"]["missing"]
        decoder = f"width {found['decoder']['width']}" + (f", {len(lost)} tensors missing" if lost else "")
    lines = [
        f"file       {found['file']}",
        f"format     {found['format']}: {found['layout']}{alike}",
        f"kind       {found['kind']}{named}",
        f"encoder    {size}: width {found['width']}, depth {found['depth']}, heads {found['heads']}",
        f"patches    {found['patch_size']}x{found['patch_size']}, {place}, {found['in_chans']} channels",
        f"decoder    {decoder}",
        f"classes    {found['classes'] or 'none'}",
        f"target     {target}",
        f"pixels     mean {known.get('mean', 'not stated')}, std {known.get('std', 'not stated')}",
        f"training   {training or 'not stated'}",
        f"tensors    {found['tensors']}, {found['parameters']:,} numbers, {', '.join(found['dtype'])}",
    ]
    if found["dropped"]:
        lines.append(f"besides    {len(found['dropped'])} tensors: {', '.join(sorted(set(found['dropped'].values())))}")
    lines += [f"note       {note}" for note in found["notes"]]
    lines.append(f"use it for {', '.join(found['use_for']) or 'nothing as it is'}")
    lines += [f"not for    {use}: lacks {', '.join(lacking[:3])}" for use, lacking in found["missing_for"].items()]
    return "\n".join(lines)
