"""``mae convert``: one weights file into another, on disk, proven where asked."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mae_core.errors import UserError, naming
from mae_core.layout import EXPORT_CONFIG, EXPORTED
from mae_core.texts import shortened
from mae_core.weights.catalogue import published_target
from mae_core.weights.encoder_file import EncoderInfo, read_json_beside
from mae_core.weights.features import Geometry
from mae_core.weights.files import SAFETENSORS, TORCH_SUFFIXES, write_torch, write_weights
from mae_core.weights.formats import FORMATS
from mae_core.weights.load import DECODER_HEADS_ASSUMED
from mae_core.weights.opening import open_weights
from mae_core.weights.parts import LEFT_OUT, Parts
from mae_core.weights.rename import format_of, is_decoder
from mae_core.weights.report import LoadReport
from mae_core.weights.resize import Adaptation
from mae_core.weights.tools.check import TOLERANCE, Comparison, compare_features
from mae_core.weights.tools.export import config_of, write_folder
from mae_core.weights.wrappers import ASKED_IN_CONFIG
from mae_core.weights.writing import Converted, convert_parts, write_parts

FOLDERS = ("huggingface", "huggingface_5", "timm")
"""Formats that are written as a folder where --out has no file ending."""


def convert_file(
    source: Path,
    target: str,
    out: Path,
    *,
    from_format: str | None = None,
    adaptation: Adaptation | None = None,
    drop: Sequence[str] = (),
    heads: int | None = None,
    decoder_heads: int | None = None,
    check: bool = False,
    branch: str | None = None,
    asked_as: str = ASKED_IN_CONFIG,
) -> tuple[LoadReport, Comparison | None]:
    """Convert the weights file ``source`` (or a run, checkpoint or exported folder) and write ``out``.

    A ``.pth`` or ``.bin`` ending writes a torch file, ``.safetensors`` a safetensors file with metadata, no ending the
    folder that timm or transformers opens. ``heads``, ``decoder_heads``: of a file that does not say. ``branch``: which
    of several encoders; ``asked_as``: how the caller's user writes it. With ``check`` both ends run on the same images
    first. Raises ``UserError`` for what does not fit, an ``out`` that exists, heads
    that nothing tells, and a difference above 1e-4; then nothing is written.
    """
    format_of(target)
    torch_file = out.suffix in TORCH_SUFFIXES
    if not torch_file and out.suffix != SAFETENSORS and (target not in FOLDERS or out.suffix):
        raise UserError(f"--out {out} has to end in {SAFETENSORS} or {TORCH_SUFFIXES[0]} for the format {target}")
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    wanted = adaptation or Adaptation()
    parts = open_weights(
        source,
        decoder=True,
        source=from_format,
        drop=drop,
        needless=tuple(format_of(target).lacks),
        mapped=True,
        branch=branch,
        asked_as=asked_as,
        heads=heads,
        grid=wanted.grid,
        image_size=wanted.image_size,
    )
    if parts.info.heads is None:
        parts.check_decided()
    _decide_pre_training(parts, decoder_heads)
    with naming(parts.path):
        converted = convert_parts(parts, target, wanted)
    report, info = parts.report, stated_by(converted)
    report.path = f"{parts.path} ({report.path})"
    folder = not torch_file and out.suffix != SAFETENSORS
    comparison = prove(converted, as_folder=folder) if check else None
    if torch_file:
        write_torch(out, converted.tensors, info.to_metadata(), FORMATS[target].wrapper)
    elif folder:
        write_folder(converted, out)
    else:
        write_weights(out, converted.tensors, info.to_metadata())
    return report, comparison


def _decide_pre_training(parts: Parts, decoder_heads: int | None) -> None:
    """What the file does not say of its decoder: by the catalogue, by the caller, or assumed and noted."""
    named, stated, notes = published_target(parts.path.name), parts.info.decoder_heads, parts.report.notes
    if named is not None and not parts.info.target:
        parts.info = parts.info.with_facts(target=named)
        notes.append(f"the published file of that name predicts {named}; this one does not say")
    if decoder_heads is not None and stated not in (None, decoder_heads):
        raise UserError(f"--decoder-heads {decoder_heads} was given, but {parts.path} has {stated}")
    if parts.has_decoder and stated is None and decoder_heads is None:
        notes.append(DECODER_HEADS_ASSUMED)
    parts.info = parts.info.with_facts(decoder_heads=decoder_heads or stated)


def stated_by(converted: Converted) -> EncoderInfo:
    """What the file to write says of itself."""
    parts = converted.parts
    return parts.info.with_facts(format=converted.reading.format.name, converted_from=parts.format, other={})


def prove(converted: Converted, *, as_folder: bool) -> Comparison:
    """Run source and target on the same images, each as its own configuration says; after a resize the source is
    compared as it was resized. Raises ``UserError`` where their features differ by more than 1e-4."""
    parts = converted.parts
    if parts.info.image_size is None:
        raise UserError("--check needs the grid of the positions, which is not square; name it with --grid ROWS COLS")
    source, reading = parts.state, parts.fit.reading
    if converted.resized:
        rewritten = write_parts(replace(parts, report=LoadReport("check")), reading.format)
        source, reading = rewritten.tensors, rewritten.reading
    own = read_json_beside(parts.path, EXPORT_CONFIG) if parts.path.name in EXPORTED else None
    comparison = compare_features(
        (source, reading, Geometry.of(parts.info, own)),
        (converted.tensors, converted.reading, Geometry.of(parts.info, config_of(converted) if as_folder else None)),
        without=[name for name, why in parts.report.unused.items() if why == LEFT_OUT and _is_of_encoder(name)],
    )
    if not comparison.difference <= TOLERANCE:  # not a number is no proof either
        raise UserError(
            f"the features of source and target differ by {comparison.difference:.2e} ({comparison.what}; "
            f"{comparison.source} against {comparison.target}), more than {TOLERANCE:g}; nothing was written"
        )
    return comparison


NOT_ENCODER = ("*decoder*", "*mask_token", "*head.*", "*head", "*predictor*", "*momentum*", "*optimizer*", "*queue*")
"""Names of what features never pass, among those that ``--drop`` may leave out."""


def _is_of_encoder(name: str) -> bool:
    return not is_decoder(name) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_ENCODER)


def summary(report: LoadReport, comparison: Comparison | None, out: Path) -> str:
    """What a conversion did, in a few lines."""
    lines = [f"wrote {out}: {report.total_parameters:,} parameters"]
    if comparison is not None:
        lines.append(
            f"checked: largest feature difference {comparison.difference:.1e} "
            f"({comparison.what}; {comparison.source} against {comparison.target})"
        )
        if comparison.without:
            lines.append(
                f"the comparison leaves out {len(comparison.without)} tensors removed by --drop "
                f"({shortened(comparison.without, 4)}); with them the source model has other features"
            )
    return "\n".join(lines)


def check_as_json(comparison: Comparison | None) -> Mapping[str, Any] | None:
    """A comparison for a JSON file."""
    return None if comparison is None else {**comparison._asdict(), "without": list(comparison.without)}
