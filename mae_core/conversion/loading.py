"""From a weights file to a model, with an account of every tensor. The one loader behind every ``weights`` option."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mae_core.config import JobConfig
from mae_core.conversion.files import read_weights
from mae_core.errors import UserError
from mae_core.layout import resolve_weights
from mae_core.masking import MASKERS
from mae_core.models.encoder import Pooling, ViTEncoder
from mae_core.models.mae import MaskedAutoencoder, build_mae
from mae_core.models.sizes import SIZES, ViTSize
from mae_core.patches import PatchGrid
from mae_core.pos_embed import resize_pos_embed
from mae_core.targets import rebuild_target

ENCODER_PREFIX = "encoder."
OPTIONS = {"in_chans": "data.channels"}
"""Attribute of an ``EncoderFile`` -> the option that asks for it, where they differ."""
AnyRun = TypeVar("AnyRun", bound=JobConfig)
DECODER_REASON = "the decoder is for pre-training only"
DECODER_KEYS = {
    pattern: DECODER_REASON
    for pattern in ("decoder.*", "decoder_*", "mask_token", "target.*")  # ours, and the official names
}


@dataclass
class LoadReport:
    """Where every tensor of a file went and where every tensor of a model came from."""

    path: str
    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    loaded_parameters: int = 0
    total_parameters: int = 0

    @property
    def share(self) -> float:
        """Share of the model's parameters that came from the file."""
        return self.loaded_parameters / max(self.total_parameters, 1)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "share": self.share}

    def print(self, console: Console | None = None) -> None:
        """A table: one line a category, with examples."""
        table = Table(title=f"weights from {self.path}", title_justify="left")
        table.add_column("what")
        table.add_column("tensors", justify="right")
        table.add_column("which", overflow="fold")
        rows: list[tuple[str, Sequence[str]]] = [
            ("loaded", self.loaded),
            ("renamed", [f"{old} -> {new}" for old, new in self.renamed.items()]),
            ("resized", [f"{name} {how}" for name, how in self.resized.items()]),
            ("newly initialised", self.new),
            ("not used", [f"{name} ({why})" for name, why in self.unused.items()]),
            ("refused", [f"{name}: {why}" for name, why in self.refused.items()]),
        ]
        for label, names in rows:
            shown = ", ".join(names[:3]) + (f", ... ({len(names) - 3} more)" if len(names) > 3 else "")
            table.add_row(label, str(len(names)), shown or "-")
        console = console or Console()
        console.print(table)
        console.print(f"{self.share:.1%} of the model's {self.total_parameters:,} parameters come from the file")


def shape_of_state(state: Mapping[str, Tensor]) -> tuple[str, int, int, int]:
    """(size name, patch, channels, positions) of an encoder's tensors. Raises ``UserError`` where they are not a
    known ViT."""
    try:
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        _, length, _ = state["pos_embed"].shape
    except (KeyError, ValueError):
        raise UserError(
            "no MAE encoder in it: patch_embed.proj.weight or pos_embed is missing or of another shape; it starts with "
            f"{', '.join(list(state)[:4])}"
        ) from None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for name, size in SIZES.items():
        if (size.width, size.depth) == (width, depth):
            return name, patch, channels, length - 1
    raise UserError(f"a ViT of width {width} and depth {depth} is none of {', '.join(SIZES)}")


@dataclass(frozen=True)
class EncoderFile:
    """An encoder's tensors and what is known of them."""

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, Any]
    size: str
    patch_size: int
    in_chans: int
    grid: tuple[int, int]

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
        """Whether it has the norm that follows the last block; a classifier on mean-pooled patches has none."""
        return "norm.weight" in self.state or "fc_norm.weight" not in self.state

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


def read_encoder(path: Path | str) -> EncoderFile:
    """Read the encoder of a weights file, a run directory or a checkpoint folder; of a full MAE, the encoder alone.

    Raises ``UserError`` where the file is broken or holds no encoder of a known size.
    """
    path = resolve_weights(path)
    state, metadata = read_weights(path)
    if any(name.startswith(ENCODER_PREFIX) for name in state):
        state = {name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in state.items()}
    try:
        size, patch, channels, positions = shape_of_state(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    side = int(positions**0.5)
    grid = metadata.get("grid") or (side, positions // max(side, 1))
    if not (isinstance(grid, list | tuple) and len(grid) == 2 and all(type(cells) is int for cells in grid)):
        raise UserError(
            f"{path}: its metadata names the grid {grid!r}, which is not [rows, columns]; the file is damaged"
        )
    grid = (grid[0], grid[1])
    if grid[0] * grid[1] != positions:
        raise UserError(f"{path}: {positions} positions do not fill a {grid[0]}x{grid[1]} grid; the file is damaged")
    return EncoderFile(path, state, metadata, size, patch, channels, grid)


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
) -> LoadReport:
    """Copy an encoder's tensors into ``model``; position embeddings are resized to ``grid``.

    ``new``: patterns of the model's tensors that the file cannot have. ``unused``: patterns of the file's tensors
    that the
    model does not take -> why. ``rename``: file name -> model name where they differ. Raises ``UserError`` when any
    other
    tensor is left over on either side or has another shape: a model never starts half loaded.
    """
    unused = {**DECODER_KEYS, **(unused or {})}
    rename = rename or {}
    wanted = model.state_dict()
    report = LoadReport(str(source.path), total_parameters=sum(p.numel() for p in model.parameters()))
    ready: dict[str, Tensor] = {}
    for name, tensor in source.state.items():
        target = rename.get(name, name)
        if target not in wanted:
            reasons = [why for pattern, why in unused.items() if fnmatch.fnmatchcase(name, pattern)]
            if reasons:
                report.unused[name] = reasons[0]
            else:
                report.refused[name] = "the model has no such tensor"
            continue
        if target.endswith("pos_embed") and tensor.shape[0] == 1 and source.grid != tuple(grid):
            prefix = tensor.shape[1] - source.grid[0] * source.grid[1]
            tensor = resize_pos_embed(tensor, source.grid, grid, prefix=prefix)
            report.resized[target] = f"{source.grid[0]}x{source.grid[1]} -> {grid[0]}x{grid[1]}"
        if tensor.shape != wanted[target].shape:
            report.refused[name] = f"file {tuple(tensor.shape)}, model {tuple(wanted[target].shape)}"
            continue
        ready[target] = tensor
        if target in report.resized:
            pass
        elif target != name:
            report.renamed[name] = target
        else:
            report.loaded.append(name)
    for name in wanted.keys() - ready.keys():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in new):
            report.new.append(name)
        elif name not in report.refused:
            report.refused[name] = "missing from the file"
    report.new.sort()
    if report.refused:
        examples = "; ".join(f"{name}: {why}" for name, why in sorted(report.refused.items())[:3])
        raise UserError(
            f"{source.path} does not fit this model, {len(report.refused)} tensors are left over ({examples}); "
            f"the file holds a {source.size} encoder with patch {source.patch_size} and {source.in_chans} channels"
        )
    with torch.no_grad():
        for name, tensor in ready.items():
            wanted[name].copy_(tensor)
    learnable = dict(model.named_parameters())
    report.loaded_parameters = sum(learnable[name].numel() for name in ready if name in learnable)
    return report


def load_encoder(
    path: Path | str, *, image_size: int | Sequence[int] | None = None, in_chans: int | None = None
) -> ViTEncoder:
    """The encoder of any known weights file, run directory or checkpoint, in eval mode; positions resized to
    ``image_size``.

    Raises ``UserError`` where the file does not hold one, or was trained on another number of channels.
    """
    source = read_encoder(path)
    if not source.has_norm:
        raise UserError(
            f"{source.path} is a classifier on mean-pooled patches and has no final norm of its tokens; "
            "load the encoder it was fine-tuned from"
        )
    encoder = ViTEncoder(
        source.size,
        image_size=source.image_size if image_size is None else image_size,
        patch_size=source.patch_size,
        in_chans=in_chans or source.in_chans,
    )
    fit_state(encoder, source, grid=encoder.grid[:2], new=(), unused={"head.*": "a classifier's head"})
    return encoder.eval()


def classifier_from(
    source: EncoderFile,
    *,
    num_classes: int,
    pooling: Pooling = "mean",
    image_size: int | Sequence[int] | None = None,
    drop_path: float = 0.0,
) -> tuple[ViTEncoder, LoadReport]:
    """A classifier on a pre-trained encoder, and the report of what was loaded.

    Raises ``UserError`` where the file is a classifier already, or does not fit.
    """
    source.check_pretrained()
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
    report = fit_state(model, source, grid=model.grid[:2], new=("head.*", "fc_norm.*"), unused=unused)
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
    """Encoder and decoder of a run directory, a checkpoint folder or its model.safetensors, in eval mode.

    ``target`` overrides what the metadata names. Raises ``UserError`` where the file has no decoder.
    """
    path = resolve_weights(path, decoder=True)
    state, metadata = read_weights(path)
    if "decoder.embed.weight" not in state:
        raise UserError(
            f"{path} has no decoder (decoder.embed.weight); give the run directory or a checkpoint's model.safetensors"
        )
    metadata = {**metadata, "target": target or metadata.get("target")}
    unsaid = [name for name in ("decoder_heads", "target") if metadata.get(name) is None]
    if unsaid:
        raise UserError(f"the metadata of {path} lacks {' and '.join(unsaid)}; give the checkpoint as its run wrote it")
    source = read_encoder(path)
    decoder_width = state["decoder.embed.weight"].shape[0]
    model = build_mae(
        source.size,
        image_size=source.image_size,
        patch_size=source.patch_size,
        in_chans=source.in_chans,
        decoder_depth=len({name.split(".")[2] for name in state if name.startswith("decoder.blocks.")}),
        decoder_width=decoder_width,
        decoder_heads=int(metadata["decoder_heads"]),
        target=rebuild_target(metadata["target"], metadata.get("target_options") or {}, _below("target.", state)),
        masking=metadata.get("masking", next(iter(MASKERS))),
        mask_ratio=float(metadata.get("mask_ratio", 0.75)),
        mask_tokens_in_encoder=bool(metadata.get("mask_tokens_in_encoder", False)),
    )
    model.loss_on_all_patches = bool(metadata.get("loss_on_all_patches", False))
    shapes, wanted = ({name: tensor.shape for name, tensor in each.items()} for each in (state, model.state_dict()))
    differing = sorted(name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name))
    if differing:
        raise UserError(f"{path} is not a complete MAE; it differs in {', '.join(differing[:4])}")
    model.load_state_dict(state)
    return model.eval()


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


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
