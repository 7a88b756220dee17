"""A pre-training that starts from weights: its configuration as the file says, and the file in its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_core.config.load import load_config
from mae_core.data.config import ImagesConfig
from mae_core.data.images import Statistics, statistics_of
from mae_core.errors import UserError
from mae_core.layout import CLASSIFIER, CONFIG, newest_undamaged
from mae_core.models.encoder import ViTEncoder
from mae_core.models.mae import MaskedAutoencoder
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import (
    fit_state,
    load_encoder,
    name_in_mae,
    read_encoder,
    section_with,
    stated_in,
    with_statistics_of,
    with_stem,
)
from mae_core.weights.parts import missing_decoder
from mae_core.weights.rename import is_decoder
from mae_core.weights.report import LoadReport
from mae_core.weights.resize import STEM


def started_from(config: PretrainConfig, *, resume: bool) -> tuple[PretrainConfig, EncoderFile | None]:
    """``config`` as its ``weights`` say, and the file, its patch embedding adapted to ``config``; None without weights.

    The trunk is the file's. Image size, channels, patch size and decoder are the file's where the configuration gives
    none, and so are mean and std, except with ``data.statistics=own``. Raises ``UserError`` where the configuration
    asks for another trunk, and where ``weights`` and ``--resume`` exclude each other.
    """
    check_start(config, resume=resume)
    if config.weights is None:
        return config, None
    file = read_encoder(full_model_in(config.weights), image_size=config.data.image_size, **stated_in(config))
    file.check_pretrained()
    patch = config.model.patch_size or file.patch_size
    facts = {name: value for name, value in file.model_facts(config.model).items() if name != "patch_size"}
    model = section_with(file.path, config.model, "model", must={**facts, "patch_size": patch})
    sides = {"channels": file.in_chans, "image_size": file.image_size}
    data = section_with(file.path, config.data, "data", must={}, may=sides)
    decoder = section_with(file.path, config.decoder, "decoder", must={}, may=decoder_facts(file))
    adapted = with_stem(file, patch_size=patch, in_chans=data.channels)
    if adapted.info.mean and not has_other_statistics(adapted, data):
        data = data.model_copy(update=statistics_of(data, adapted.metadata)._asdict())
    return config.model_copy(update={"model": model, "data": data, "decoder": decoder}), adapted


def check_start(config: PretrainConfig, *, resume: bool) -> None:
    """Raise ``UserError`` where an existing run would start again from weights, and where weights are named that are
    not those of the run to be continued."""
    weights, stored = config.weights, config.output / CONFIG
    if not resume:
        if weights is not None and stored.is_file() and weights.resolve().is_relative_to(config.output.resolve()):
            raise UserError(
                f"weights={weights} lies in the output folder: --resume without weights continues the schedule of that "
                "run, and a new run from its weights needs another folder: set output=FOLDER"
            )
        return
    if not stored.is_file():
        return
    started = load_config(PretrainConfig, stored).weights
    if weights is not None and weights != started:
        what = f"from weights={started}" if started else "without weights"
        raise UserError(
            f"--resume continues {config.output}, which started {what}: leave weights={weights} out to continue it, or "
            "leave --resume out and choose output=FOLDER to start a new run from these weights"
        )
    if weights is None and started is not None:
        raise UserError(f"{config.output} started from weights={started}; give them with --resume too")


def full_model_in(path: Path) -> Path:
    """Of a pre-training's run directory its last undamaged checkpoint, which has the decoder too; else ``path``."""
    if not path.is_dir() or (path / CLASSIFIER).is_file():
        return path
    return newest_undamaged(path) or path


def has_other_statistics(start: EncoderFile, data: ImagesConfig) -> bool:
    """Whether the pixels are to be standardised with other numbers than those the weights state."""
    theirs = (tuple(values or ()) for values in (start.info.mean, start.info.std))
    return data.statistics == "own" or any(
        ours not in (None, found) for ours, found in zip((data.mean, data.std), theirs, strict=True)
    )


def weights_facts(start: EncoderFile | None, data: ImagesConfig) -> Mapping[str, Any] | None:
    """What ``with_statistics`` takes of the weights: nothing where they were trained on other channels, or where the
    pixels are to be standardised with other numbers, which ``load_start`` adapts them to."""
    if start is None or "channels" in start.report.resized.get(STEM, "") or has_other_statistics(start, data):
        return None
    return start.metadata


def decoder_facts(file: EncoderFile) -> dict[str, Any]:
    """Width, depth and heads of the file's decoder in the words of the ``decoder`` section; empty without one."""
    if "decoder_embed.weight" not in file.tensors:
        return {}
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("decoder_blocks.")}
    return {
        "width": file.tensors["decoder_embed.weight"].shape[0],
        "depth": len(blocks) or None,
        "heads": file.info.decoder_heads,
        "fuse_blocks": file.info.fuse_blocks,
    }


def load_start(model: MaskedAutoencoder, start: EncoderFile, data: ImagesConfig) -> LoadReport:
    """Load the encoder of ``start`` into ``model``, and its decoder where it has one that fits; returns the report,
    whose notes say why a decoder is random. Where ``data`` standardises pixels with other numbers than the file's, its
    patch embedding is adapted to them. Raises ``UserError`` where the encoder does not fit."""
    start = with_statistics_of(start, statistics_of(data))
    why = decoder_obstacle(model, start)
    rename = {name: name_in_mae(name) for name in start.tensors if not why or not is_decoder(name)}
    fusion = model.fusion is not None and model.fusion.blocks == tuple(start.info.fuse_blocks or ()) and not why
    new = ["target.*", "mask_token", *(["decoder.*"] if why else []), *([] if fusion else ["fusion.*"])]
    unused = {"decoder_*": why, "mask_token": why} if why else {}
    apart = ("target.",) if fusion else ("target.", "fusion.")
    rename = {name: target for name, target in rename.items() if not target.startswith(apart)}
    report = fit_state(model, start, grid=model.encoder.grid[:2], new=new, unused=unused, rename=rename)
    report.notes.append(f"the decoder is random: {why}" if why else "the decoder is the file's")
    if not why and start.info.decoder_heads is None:
        report.notes.append(
            f"the file does not say how many attention heads its decoder has; decoder.heads={model.decoder.heads} of "
            "the configuration are assumed"
        )
    return report


def load_teacher(path: Path, student: ViTEncoder, statistics: Statistics) -> ViTEncoder:
    """The encoder of any known weights file, to be learnt from by ``student``, of whose patches and channels it is, on
    pixels that are standardised with ``statistics``. Raises ``UserError`` for a file that is no plain ViT."""
    grid = student.grid
    file = read_encoder(path, image_size=grid.image_size)
    if file.info.timm is not None:
        raise UserError(f"distill.teacher={path} is {file.info.timm} of timm; give the weights of a plain ViT")
    file.check_pretrained()
    file = with_statistics_of(with_stem(file, patch_size=grid.patch, in_chans=student.in_channels), statistics)
    return load_encoder(file, image_size=grid.image_size)


def decoder_obstacle(model: MaskedAutoencoder, start: EncoderFile) -> str:
    """Why the decoder of ``start`` cannot be the one of ``model``; empty where it can."""
    theirs = {name: tensor for name, tensor in start.tensors.items() if is_decoder(name)}
    if not theirs:
        dropped = any(told.startswith("the decoder predicts") for told in start.report.unused.values())
        return "the file's predicts patches of another size or other channels" if dropped else "the file has none"
    if lost := missing_decoder(start.tensors):
        return f"the file's is not complete, it lacks {lost[0]}"
    if start.info.target not in (None, model.target.name):
        return f"the file's predicts {start.info.target}, and target.kind is {model.target.name}"
    if start.info.decoder_heads not in (None, model.decoder.heads):
        return f"the file's has {start.info.decoder_heads} heads, and decoder.heads={model.decoder.heads} was asked for"
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith("decoder.")}
    shapes = {name_in_mae(name): tensor.shape for name, tensor in theirs.items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if name != "decoder.pos_embed" and wanted.get(name) != shapes.get(name):
            here, there = (tuple(each[name]) if name in each else "none" for each in (wanted, shapes))
            return f"the file's is another one ({name}: file {there}, asked for {here})"
    return ""
