"""From a weights file to a model, with an account of every tensor. The one loader behind every ``weights`` option."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mae_core.config.sections import JobConfig
from mae_core.data.images import DEFAULT_STATISTICS, Statistics
from mae_core.data.views import FileView
from mae_core.errors import UserError
from mae_core.layout import resolve_weights
from mae_core.models.encoder import Pooling, ViTEncoder
from mae_core.models.mae import MaskedAutoencoder, build_mae
from mae_core.models.sizes import SIZES, ViTSize
from mae_core.patches import PatchGrid
from mae_core.pos_embed import resize_pos_embed
from mae_core.targets import rebuild_target
from mae_core.weights.catalogue import published_target
from mae_core.weights.encoder_file import read_described
from mae_core.weights.formats import FORMATS, MAE_CORE_FULL, OWN_ONLY
from mae_core.weights.parts import LACKING, UNKNOWN, as_tensor, describe_refused, read_parts, sizes_of
from mae_core.weights.rename import is_decoder
from mae_core.weights.report import LoadReport
from mae_core.weights.resize import STEM, STEM_WARNING, ChannelMethod, adapt_channels, grid_of
from mae_core.weights.writing import convert_lazily, write_parts

ENCODER_BLOCK = "encoder.blocks."
OPTIONS = {"in_chans": "data.channels"}
"""Attribute of an ``EncoderFile`` -> the option that asks for it, where they differ."""
AnyRun = TypeVar("AnyRun", bound=JobConfig)
DECODER_REASON = "the decoder is for pre-training only"
UNUSED = {
    "decoder_*": DECODER_REASON,
    "mask_token": DECODER_REASON,
    f"{OWN_ONLY}*": "for pre-training only",
}
"""Patterns of official names -> why no encoder takes them."""
OFFICIAL_DECODER_HEADS = 16
"""Of every released model, whatever its size; the tensors do not tell."""
MAE_OPTIONS = ("masking", "mask_ratio", "masking_options", "mask_tokens_in_encoder")
"""Options of ``build_mae`` that our metadata names as they are."""


@dataclass(frozen=True)
class EncoderFile:
    """An encoder's tensors under the official names, and what is known of them.

    format  name of the format the file is in
    names   official name -> the names its values have in the file
    notes   what the reader took off or put right
    unused  names in the file that no encoder takes -> why
    """

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, Any]
    size: str
    patch_size: int
    in_chans: int
    grid: tuple[int, int]
    format: str
    names: dict[str, list[str]]
    notes: list[str]
    unused: dict[str, str]

    @property
    def shape(self) -> ViTSize:
        """Row of the size table."""
        return SIZES[self.size]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) it was trained at."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def has_norm(self) -> bool:
        """Whether it has the norm that follows the last block; classifiers on mean-pooled patches and the backbones of
        detectors and segmenters have none."""
        return "norm.weight" in self.state

    @property
    def num_classes(self) -> int:
        """Classes of its head; 0 where it has none."""
        return len(self.state["head.weight"]) if "head.weight" in self.state else 0

    def check_pretrained(self) -> None:
        """Raise ``UserError`` where the file is a classifier: what trains a new head starts from an encoder."""
        if self.num_classes:
            raise UserError(
                f"{self.path} is a fine-tuned classifier of {self.num_classes} classes, not a pre-trained encoder; "
                "give the encoder it was fine-tuned from, or evaluate it with mae evaluate"
            )

    def check_asked(self, **asked: Any) -> None:
        """Raise ``UserError`` where something asked for (size, patch_size, in_chans; None: not asked) is not the
        file's."""
        wrong = [
            (name, want, getattr(self, name)) for name, want in asked.items() if want not in (None, getattr(self, name))
        ]
        if wrong:
            told = "; ".join(
                f"{OPTIONS.get(name, name)} {want} was asked for, the file has {found}" for name, want, found in wrong
            )
            raise UserError(f"{self.path} is another architecture: {told}; use the file's, or another file")


def size_name(width: int, depth: int) -> str:
    """The size of an encoder. Raises ``UserError`` where it is not a known ViT."""
    for name, size in SIZES.items():
        if (size.width, size.depth) == (width, depth):
            return name
    raise UserError(f"a ViT of width {width} and depth {depth} is none of {', '.join(SIZES)}")


def read_encoder(path: Path | str, *, image_size: int | Sequence[int] | None = None) -> EncoderFile:
    """Read the encoder of a weights file of any known format, a run directory, a checkpoint folder or a folder of timm
    or transformers; of a full MAE, the encoder alone.

    ``image_size`` of the images it is wanted for tells the grid of a file that is not square and does not say.

    Raises ``UserError`` where the file is broken or holds no encoder of a known size.
    """
    path = resolve_weights(path)
    file = read_described(path)
    report = LoadReport(str(path), notes=file.notes)
    try:
        parts = read_parts(file.state, report)
        sizes = sizes_of(parts.tensors)
        depth = 1 + max(int(name.split(".")[1]) for name in parts.tensors if name.startswith("blocks."))
        size = size_name(sizes["D"], depth)
        decoder = {name: parts.tensors.pop(name) for name in list(parts.tensors) if is_decoder(name)}
        official = write_parts(parts, FORMATS["official"], report, dict(file.metadata))
        state = {name: as_tensor(values) for name, values in {**official.tensors, **decoder}.items()}
        grid = grid_of(state["pos_embed"].shape[1] - 1, sizes["P"], file.metadata, image_size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    metadata = {"format": parts.format, **file.metadata}
    return EncoderFile(
        path,
        state,
        metadata,
        size,
        sizes["P"],
        sizes["C"],
        grid,
        format=metadata["format"],
        names={name: sources for name, sources in parts.sources.items() if name in state},
        notes=report.notes,
        unused=report.unused,
    )


def with_channels_of(source: EncoderFile, config: AnyRun) -> AnyRun:
    """``config`` with the ``data.channels`` of the weights, unless the user set another.

    Raises ``UserError`` where the rest of ``data`` does not go with them.
    """
    data = config.data  # type: ignore[attr-defined]
    if "channels" in data.model_fields_set or data.channels == source.in_chans:
        return config
    try:
        data = type(data).model_validate({**data.model_dump(exclude_unset=True), "channels": source.in_chans})
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{source.path} has {source.in_chans} channels, which data does not go with: {problem}"
        ) from None
    return config.model_copy(update={"data": data})


def fit_state(
    model: nn.Module,
    source: EncoderFile,
    *,
    grid: tuple[int, int],
    new: Sequence[str] = (),
    unused: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
) -> LoadReport:
    """Copy an encoder's tensors into ``model``; position embeddings are resized to ``grid``.

    ``new``: patterns of the model's tensors that the file cannot have. ``unused``: patterns of the file's tensors
    (official names) that the model does not take -> why. ``rename``: official name -> model name where they differ.
    ``allow_missing``: patterns of tensors that the user allows to start anew. Raises ``UserError`` when any other
    tensor is left over on either side or has another shape: a model never starts half loaded.
    """
    unused = {**UNUSED, **(unused or {})}
    rename = rename or {}
    wanted = model.state_dict()
    report = LoadReport(str(source.path), unused=dict(source.unused), notes=list(source.notes))
    ready: dict[str, Tensor] = {}
    for name, tensor in source.state.items():
        target = rename.get(name, name)
        theirs = source.names.get(name) or [name]
        if target not in wanted:
            why = matching(name, unused)
            if why is None:
                report.refused[theirs[0]] = UNKNOWN
            else:
                report.unused.update(dict.fromkeys(theirs, why))
            continue
        if target.endswith("pos_embed") and tensor.shape[0] == 1 and source.grid != tuple(grid):
            prefix = tensor.shape[1] - source.grid[0] * source.grid[1]
            tensor = resize_pos_embed(tensor, source.grid, grid, prefix=prefix)
            report.resized[target] = f"{source.grid[0]}x{source.grid[1]} -> {grid[0]}x{grid[1]}"
        if tensor.shape != wanted[target].shape:
            report.refused[theirs[0]] = f"file {tuple(tensor.shape)}, model {tuple(wanted[target].shape)}"
            continue
        ready[target] = tensor
        if target in report.resized:
            pass
        elif len(theirs) > 1:
            report.changed[target] = f"joined from {', '.join(theirs)}"
        elif target != theirs[0]:
            report.renamed[theirs[0]] = target
        else:
            report.loaded.append(target)
    for name in wanted.keys() - ready.keys():
        if matching(name, {pattern: "" for pattern in (*new, *allow_missing)}) is not None:
            report.new.append(name)
        elif name not in report.refused:
            report.refused[name] = LACKING
    report.new.sort()
    if report.refused:
        raise UserError(
            f"{source.path} does not fit this model: {describe_refused(report.refused)}; "
            f"the file holds a {source.size} encoder with patch {source.patch_size} and {source.in_chans} channels"
        )
    copy_into(model, ready, report)
    return report


def copy_into(model: nn.Module, ready: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copy ``ready``, by names of ``model``, into it; ``report`` gets the share of the parameters that they are."""
    wanted, learnable = model.state_dict(), dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in ready.items():
            wanted[name].copy_(tensor)
    report.total_parameters = sum(p.numel() for p in learnable.values())
    report.loaded_parameters = sum(learnable[name].numel() for name in ready if name in learnable)


def matching(name: str, patterns: Mapping[str, str]) -> str | None:
    """What the first pattern that fits ``name`` stands for; None where none fits."""
    return next((why for pattern, why in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)


def load_encoder(
    path: Path | str, *, image_size: int | Sequence[int] | None = None, in_chans: int | None = None
) -> ViTEncoder:
    """The encoder of any known weights file, run directory or checkpoint, in eval mode; positions resized to
    ``image_size``, the patch embedding adapted to ``in_chans`` with a warning.

    Raises ``UserError`` where the file does not hold one.
    """
    source = read_encoder(path, image_size=image_size)
    if not source.has_norm:
        kind = "a classifier on mean-pooled patches" if "fc_norm.weight" in source.state else f"a {source.format} file"
        raise UserError(
            f"{source.path} is {kind} and has no final norm of its tokens; load the encoder it was made from"
        )
    if in_chans is not None and in_chans != source.in_chans:
        method: ChannelMethod = "sum" if in_chans == 1 else "mean_tile"
        source.state[STEM] = adapt_channels(source.state[STEM], in_chans, method)
        warnings.warn(
            f"{source.path} has {source.in_chans} channels; its patch embedding was adapted to {in_chans} ({method}): "
            f"{STEM_WARNING}",
            stacklevel=2,
        )
    encoder = ViTEncoder(
        source.size,
        image_size=source.image_size if image_size is None else image_size,
        patch_size=source.patch_size,
        in_chans=in_chans or source.in_chans,
    )
    fit_state(encoder, source, grid=encoder.grid[:2], new=(), unused={"head.*": "a classifier's head"})
    encoder.transform = view_for(encoder, source.metadata)
    return encoder.eval()


def view_for(encoder: ViTEncoder, facts: Mapping[str, Any]) -> FileView:
    """What turns an image into what ``encoder`` was trained on; mean and std as its file says, else ImageNet's."""
    channels = encoder.in_channels
    mean, std = facts.get("mean"), facts.get("std")
    if not (mean and std and len(mean) == len(std) == channels):
        mean, std = DEFAULT_STATISTICS.get(channels, ((), ()))
    statistics = Statistics(tuple(mean), tuple(std)) if mean else None
    return FileView(encoder.grid.image_size, channels, statistics)


def classifier_from(
    source: EncoderFile,
    *,
    num_classes: int,
    pooling: Pooling = "mean",
    image_size: int | Sequence[int] | None = None,
    drop_path: float = 0.0,
    allow_missing: Sequence[str] = (),
) -> tuple[ViTEncoder, LoadReport]:
    """A classifier on a pre-trained encoder, and the report of what was loaded.

    ``allow_missing``: patterns of tensors that the file may lack and that start anew. Raises ``UserError`` where the
    file is a classifier already, or does not fit, or there is no class to tell.
    """
    source.check_pretrained()
    if num_classes < 1:
        raise UserError(f"a classifier has one class or more; num_classes={num_classes} was asked for")
    model = ViTEncoder(
        source.size,
        image_size=source.image_size if image_size is None else image_size,
        patch_size=source.patch_size,
        in_chans=source.in_chans,
        num_classes=num_classes,
        pooling=pooling,
        drop_path=drop_path,
    )
    unused = {}
    if pooling == "mean":
        unused["norm.*"] = "mean pooling learns a new norm after pooling"
    report = fit_state(
        model, source, grid=model.grid[:2], new=("head.*", "fc_norm.*"), unused=unused, allow_missing=allow_missing
    )
    return model, report


def build_classifier(
    encoder_file: Path | str, num_classes: int, pooling: Pooling = "mean", **options: Any
) -> ViTEncoder:
    """A classifier on the encoder of a weights file, for a loop of one's own (paper, A.1).

    ``pooling="mean"`` leaves the pre-trained final norm behind and learns a new one after pooling, as the paper does.
    ``options``: image_size, drop_path. Raises ``UserError`` where the file does not fit.
    """
    return classifier_from(read_encoder(encoder_file), num_classes=num_classes, pooling=pooling, **options)[0]


def load_mae(path: Path | str, *, target: str | None = None) -> MaskedAutoencoder:
    """Encoder and decoder, in eval mode, of our runs and checkpoints, of official files that have a decoder and of
    transformers' ViTMAE.

    ``target`` overrides what the metadata, the trainer's arguments or a config.json name; where none of them names it,
    a warning says what was assumed. Raises ``UserError`` where the file has no complete decoder.
    """
    path = resolve_weights(path, decoder=True)
    file = read_described(path)
    try:
        converted = convert_lazily(file.state, None, "mae_core", metadata=file.metadata)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    state = {name: as_tensor(values) for name, values in converted.tensors.items()}
    if "decoder.embed.weight" not in state:
        raise UserError(f"{path} has no decoder; give a run directory, a checkpoint, or an official _full file")
    if converted.report.new:
        raise UserError(f"{path} is not a complete MAE; it lacks {', '.join(converted.report.new[:4])}")
    metadata = converted.metadata
    if converted.parts.fit.reading.layout is MAE_CORE_FULL and not metadata.get("decoder_heads"):
        raise UserError(f"the metadata of {path} lacks decoder_heads; give the checkpoint as its run wrote it")
    model = build_mae(
        size_name(state["encoder.cls_token"].shape[2], len({n.split(".")[2] for n in state if ENCODER_BLOCK in n})),
        image_size=metadata["image_size"],
        patch_size=metadata["patch_size"],
        in_chans=metadata["in_chans"],
        decoder_depth=len({name.split(".")[2] for name in state if name.startswith("decoder.blocks.")}),
        decoder_width=state["decoder.embed.weight"].shape[0],
        decoder_heads=int(metadata.get("decoder_heads") or OFFICIAL_DECODER_HEADS),
        target=rebuild_target(
            target or metadata.get("target") or _assumed_target(path),
            metadata.get("target_options") or {},
            {name.removeprefix("target."): tensor for name, tensor in state.items() if name.startswith("target.")},
        ),
        **{name: metadata[name] for name in MAE_OPTIONS if metadata.get(name) is not None},
    )
    model.loss_on_all_patches = bool(metadata.get("loss_on_all_patches", False))
    shapes, wanted = ({name: tensor.shape for name, tensor in each.items()} for each in (state, model.state_dict()))
    differing = sorted(name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name))
    if differing:
        raise UserError(f"{path} is not a complete MAE; it differs in {', '.join(differing[:4])}")
    model.load_state_dict(state)
    return model.eval()


def _assumed_target(path: Path) -> str:
    """What a file that does not say was trained on: the catalogue's word for a published name, else the default."""
    target = published_target(path.name) or "normalized_pixels"
    warnings.warn(
        f"{path} does not say which target its decoder predicts; {target} is assumed (the released _full files predict "
        "normalized_pixels, the visualize files pixels); give target= to be sure",
        stacklevel=3,
    )
    return target


def describe_encoder(model: ViTEncoder | MaskedAutoencoder) -> dict[str, Any]:
    """The metadata every weights file of ours carries about its encoder."""
    encoder = model.encoder if isinstance(model, MaskedAutoencoder) else model
    grid: PatchGrid = encoder.grid
    shape = SIZES[encoder.size]
    return {
        "format": "mae_core",
        "size": encoder.size,
        "width": shape.width,
        "depth": shape.depth,
        "heads": shape.heads,
        "patch_size": grid.patch,
        "image_size": list(grid.image_size),
        "grid": [grid.rows, grid.cols],
        "in_chans": encoder.in_channels,
    }
