"""``mae convert``: one weights file into another, on disk, proven where asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_core.errors import UserError
from mae_core.layout import resolve_weights
from mae_core.models.sizes import SIZES
from mae_core.weights.catalogue import published_target
from mae_core.weights.encoder_file import heads_of, read_described
from mae_core.weights.files import SAFETENSORS, TORCH_SUFFIXES, write_torch, write_weights
from mae_core.weights.formats import FORMATS
from mae_core.weights.parts import Joined, as_tensor
from mae_core.weights.rename import format_of
from mae_core.weights.report import LoadReport
from mae_core.weights.resize import Adaptation
from mae_core.weights.tools.check import TOLERANCE, Comparison, compare_features
from mae_core.weights.tools.export import write_folder
from mae_core.weights.tools.reference import Geometry
from mae_core.weights.writing import Converted, convert_lazily, write_parts

FOLDERS = ("huggingface", "huggingface_5", "timm")
"""Formats that are written as a folder where --out has no file ending."""
CARRIED = (
    "target", "target_options", "masking", "mask_ratio", "masking_options", "mask_tokens_in_encoder",
    "loss_on_all_patches", "decoder_heads", "mean", "std", "epochs", "step", "classes", "multi_label", "pooling",
    "test_crop", "licence", "pos_embed_layout", "decoder_pos_embed_layout",
)  # fmt: skip
"""Metadata that stays true when a file is converted."""


def convert_file(
    source: Path,
    target: str,
    out: Path,
    *,
    from_format: str | None = None,
    adaptation: Adaptation | None = None,
    drop: Sequence[str] = (),
    check: bool = False,
) -> tuple[LoadReport, Comparison | None]:
    """Convert the weights file ``source`` (or a run, checkpoint or exported folder) and write ``out``.

    A ``.pth`` or ``.bin`` ending writes a torch file, ``.safetensors`` a safetensors file with metadata, no ending the
    folder that timm or transformers opens. With ``check`` both ends run on the same images first. Raises ``UserError``
    for what does not fit, an ``out`` that exists, and a difference above 1e-4; then nothing is written.
    """
    format_of(target)
    torch_file = out.suffix in TORCH_SUFFIXES
    if not torch_file and out.suffix != SAFETENSORS and (target not in FOLDERS or out.suffix):
        raise UserError(f"--out {out} has to end in {SAFETENSORS} or {TORCH_SUFFIXES[0]} for the format {target}")
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    path = resolve_weights(source, decoder=True)
    options = {"adaptation": adaptation, "drop": drop}
    converted = _read_converted(path, from_format, target, options, mapped=True)
    if torch_file and any(isinstance(values, Joined) for values in converted.tensors.values()):
        # torch.save takes all tensors at once: what is joined may not lie in memory beside the map of its parts
        converted = _read_converted(path, from_format, target, options, mapped=False)
    converted.report.path = f"{path} ({converted.report.path})"
    comparison = prove(converted) if check else None
    if torch_file:
        metadata = describe(converted)
        converted.parts.tensors.clear()
        converted.parts.state.clear()
        write_torch(out, converted.tensors, metadata, FORMATS[target].wrapper)
    elif out.suffix == SAFETENSORS:
        write_weights(out, converted.tensors, describe(converted), unchanged=True)
    else:
        write_folder(converted, out)
    return converted.report, comparison


def _read_converted(
    path: Path, source: str | None, target: str, options: Mapping[str, Any], *, mapped: bool
) -> Converted:
    file = read_described(path, mapped=mapped)
    named = published_target(path.name)
    if named is not None and not file.metadata.get("target"):
        file.metadata["target"] = named
        file.notes.append(f"the published file of that name predicts {named}; this one does not say")
    try:
        return convert_lazily(file.state, source, target, notes=file.notes, metadata=file.metadata, **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def describe(converted: Converted) -> dict[str, Any]:
    """Metadata of the file to write."""
    parts, known = converted.parts.tensors, converted.metadata
    width = parts["patch_embed.proj.weight"].shape[0]
    depth = len({name.split(".")[1] for name in parts if name.startswith("blocks.")})
    size = next((name for name, row in SIZES.items() if (row.width, row.depth) == (width, depth)), None)
    shape = {name: known[name] for name in ("patch_size", "in_chans", "image_size", "grid") if known.get(name)}
    return {
        "format": converted.reading.format.name,
        "converted_from": converted.parts.format,
        **({"size": size} if size else {}),
        "width": width,
        "depth": depth,
        "heads": heads_of(width, known),
        **shape,
        **{name: known[name] for name in CARRIED if known.get(name) is not None},
    }


def prove(converted: Converted) -> Comparison:
    """Run source and target on the same images. Raises ``UserError`` where their features differ by more than 1e-4.

    After a resize the source is compared as it was resized: a ViT of other sizes has other features.
    """
    known, parts = converted.metadata, converted.parts
    if known.get("image_size") is None:
        raise UserError("--check needs the grid of the positions, which is not square; name it with --grid ROWS COLS")
    height, width = known["image_size"]
    geometry = Geometry(
        (height, width),
        known["patch_size"],
        known["in_chans"],
        heads_of(parts.tensors["patch_embed.proj.weight"].shape[0], known),
    )
    if converted.raw is not None:
        source, reading = converted.raw, parts.fit.reading
    else:
        rewritten = write_parts(parts, parts.fit.reading.format, LoadReport("check"), dict(known))
        source = {name: as_tensor(values) for name, values in rewritten.tensors.items()}
        reading = rewritten.reading
    target = {name: as_tensor(values) for name, values in converted.tensors.items()}
    comparison = compare_features(source, reading, target, converted.reading, geometry)
    if not comparison.difference <= TOLERANCE:  # not a number is no proof either
        raise UserError(
            f"the features of source and target differ by {comparison.difference:.2e} ({comparison.what}; "
            f"{comparison.source} against {comparison.target}), more than {TOLERANCE:g}; nothing was written"
        )
    return comparison


def summary(report: LoadReport, comparison: Comparison | None, out: Path) -> str:
    """What a conversion did, in a few lines."""
    lines = [f"wrote {out}: {report.total_parameters:,} parameters"]
    if comparison is not None:
        lines.append(
            f"checked: largest feature difference {comparison.difference:.1e} "
            f"({comparison.what}; {comparison.source} against {comparison.target})"
        )
    return "\n".join(lines)
