"""``mae inspect``: what a weights file holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mae_core.weights.catalogue import CATALOGUE
from mae_core.weights.opening import open_weights
from mae_core.weights.parts import missing_decoder, num_parameters, sizes_of
from mae_core.weights.rename import is_decoder
from mae_core.weights.resize import is_row_first

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
SHOWN = (
    "size", "width", "depth", "heads", "mlp_ratio", "norm_eps", "activation", "patch_size", "in_chans", "grid",
    "image_size",
)  # fmt: skip
TRAINING = ("target", "mask_ratio", "epochs", "step")


def inspect_file(path: Path | str, **asked: Any) -> dict[str, Any]:
    """What a weights file, run, checkpoint or exported folder holds, as JSON values. ``asked``: heads, branch and
    asked_as, see ``open_weights``.

    Raises ``UserError`` where loading it would: broken, of no known format (then the nearest is named), more prefix
    tokens than a cls token, NaN or infinite numbers.
    """
    parts = open_weights(path, mapped=True, **asked)
    path, info, report, file, tensors = parts.path, parts.info, parts.report, parts.file, parts.tensors
    report.notes += parts.undecided
    sizes = sizes_of(tensors)
    grid = None if info.grid is None else (info.grid[0], info.grid[1])
    if grid is not None and "pos_embed" in tensors and is_row_first(tensors["pos_embed"], grid):
        report.notes.append("pos_embed has the row-first sine-cosine layout of mmpretrain and MIMDet")
    lost = missing_decoder(tensors) if parts.has_decoder else []
    uses = {use: [name for name in names if name not in tensors] for use, names in USES.items()}
    uses["reconstruct"] += [name for name in lost if name not in uses["reconstruct"]]
    for lacking in uses.values():
        lacking += [word for word in ("heads", "grid") if getattr(info, word) is None and "pos_embed" not in lacking]
    published = next((row for row in CATALOGUE.values() if row.filename == path.name), None)
    return {
        "file": str(path),
        "format": info.format,
        "kind": kind_of(tensors, file.beside),
        "published": published.name if published else None,
        "layout": parts.fit.reading.layout.about,
        "same_names": sorted({parts.format, *parts.others} - {info.format}),
        **{name: getattr(info, name) for name in SHOWN},
        "decoder": {"width": sizes["E"], "heads": info.decoder_heads, "missing": lost} if parts.has_decoder else None,
        "classes": sizes.get("K", 0),
        "target": info.target or (published.target if published else None),
        "dtype": sorted({str(values.dtype).removeprefix("torch.") for values in tensors.values()}),
        "tensors": len(parts.state),
        "parameters": num_parameters(tensors),
        "metadata": dict(file.metadata),
        "dropped": report.unused,
        "notes": report.notes,
        "missing_for": {use: lacking for use, lacking in uses.items() if lacking},
        "use_for": [use for use, lacking in uses.items() if not lacking],
        "mean": info.mean,
        "std": info.std,
        "training": {name: value for name in TRAINING if (value := getattr(info, name)) is not None},
    }


def kind_of(tensors: Mapping[str, Any], beside: Collection[str]) -> str:
    """Which kind of file holds ``tensors`` (our names), by what they are and what lay beside them."""
    kind = "encoder"
    if any(is_decoder(name) for name in tensors):
        kind = "encoder and decoder of a pre-training"
    elif "head.weight" in tensors:
        kind = f"classifier on {'mean-pooled patches' if 'fc_norm.weight' in tensors else 'the cls token'}"
    trainer = f", a trainer's checkpoint ({', '.join(sorted(beside))} beside the weights)"
    return kind + (trainer if "optimizer" in beside else "")


def describe_file(path: Path | str, **asked: Any) -> str:
    """``inspect_file`` in lines to read. Raises ``UserError`` as it does."""
    found = inspect_file(path, **asked)
    training = ", ".join(f"{name} {value}" for name, value in found["training"].items())
    alike = f" ({', '.join(found['same_names'])} has the same names)" if found["same_names"] else ""
    size = f"ViT-{found['size']}" if found["size"] else "a ViT of no named size"
    grid, image = found["grid"], found["image_size"]
    place = f"grid {grid[0]}x{grid[1]} (images {image[0]}x{image[1]})" if grid else "grid not stated and not square"
    row = CATALOGUE.get(found["published"])
    named = f"; named as the published {row.name}: {row.content}" if row else ""
    target = found["target"] or "not stated"
    if row and row.target and "target" not in found["training"]:
        target += " (by the file's name)"
    decoder = "no"
    if part := found["decoder"]:
        lost = f", {len(part['missing'])} tensors missing" if part["missing"] else ""
        decoder = f"width {part['width']}, heads {part['heads'] or 'not stated'}{lost}"
    lines = [
        f"file       {found['file']}",
        f"format     {found['format']}: {found['layout']}{alike}",
        f"kind       {found['kind']}{named}",
        f"encoder    {size}: width {found['width']}, depth {found['depth']}, heads {found['heads'] or 'not stated'}, "
        f"MLP x {found['mlp_ratio']:g}, {found['activation']}, LayerNorm epsilon {found['norm_eps']:g}",
        f"patches    {found['patch_size']}x{found['patch_size']}, {place}, {found['in_chans']} channels",
        f"decoder    {decoder}",
        f"classes    {found['classes'] or 'none'}",
        f"target     {target}",
        f"pixels     mean {found['mean'] or 'not stated'}, std {found['std'] or 'not stated'}",
        f"training   {training or 'not stated'}",
        f"tensors    {found['tensors']}, {found['parameters']:,} numbers, {', '.join(found['dtype'])}",
    ]
    if found["dropped"]:
        lines.append(f"besides    {len(found['dropped'])} tensors: {', '.join(sorted(set(found['dropped'].values())))}")
    lines += [f"note       {note}" for note in found["notes"]]
    lines.append(f"use it for {', '.join(found['use_for']) or 'nothing as it is'}")
    lines += [f"not for    {use}: lacks {', '.join(lacking[:3])}" for use, lacking in found["missing_for"].items()]
    return "\n".join(lines)
