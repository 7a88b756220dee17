"""From a weights file to a model, with an account of every tensor. The one strict loader behind every ``weights``
option."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mae_core.config.schema import Schema
from mae_core.config.sections import JobConfig
from mae_core.data.images import DEFAULT_STATISTICS, Statistics
from mae_core.data.views import FileView
from mae_core.errors import UserError, naming
from mae_core.layout import resolve_weights, stated_format
from mae_core.models.mae import MaskedAutoencoder, assemble_mae
from mae_core.models.sizes import Pooling, size_of
from mae_core.models.timm_trunk import Encoder
from mae_core.targets import rebuild_target
from mae_core.weights.catalogue import published_target
from mae_core.weights.encoder_file import HEADS, EncoderFile, EncoderInfo
from mae_core.weights.formats import BEIT, FORMATS, MAE_CORE_FULL, OWN_ONLY
from mae_core.weights.opening import open_weights
from mae_core.weights.parts import LACKING, UNKNOWN, Parts, check_finite, describe_refused, missing_decoder, told_trunk
from mae_core.weights.rename import Reading, is_decoder
from mae_core.weights.report import LoadReport
from mae_core.weights.resize import STEM_WARNING, Adaptation, adapt_stem, restandardise_stem, usual_method
from mae_core.weights.timm_file import read_timm
from mae_core.weights.wrappers import ASKED_IN_CONFIG
from mae_core.weights.writing import write_parts

AnyRun = TypeVar("AnyRun", bound=JobConfig)
AnySection = TypeVar("AnySection", bound=Schema)
DECODER_REASON = "the decoder is for pre-training only"
UNUSED = {"decoder_*": DECODER_REASON, "mask_token": DECODER_REASON, f"{OWN_ONLY}*": "for pre-training only"}
"""Patterns of official names -> why no encoder takes them."""
IN_A_RUN = Reading(FORMATS["mae_core"], MAE_CORE_FULL, "encoder.")
"""How a ``MaskedAutoencoder`` names its tensors."""
OFFICIAL_DECODER_HEADS = 16
"""Of every released model, whatever its size; the tensors do not tell."""


def read_encoder(
    path: Path | str,
    *,
    image_size: int | Sequence[int] | None = None,
    heads: int | None = None,
    decoder: bool = False,
    branch: str | None = None,
    asked_as: str = ASKED_IN_CONFIG,
    trunk: str | None = None,
    patch_size: int | None = None,
    named_statistics: bool = True,
) -> EncoderFile:
    """Read the encoder of a weights file of any known format, a run, a checkpoint or a folder of timm or transformers;
    of a full MAE the decoder's tensors come along.

    ``image_size`` of the images it is wanted for tells the grid of a file that is not square and does not say.
    ``heads``: of a file that does not say. ``decoder``: of a run the full model is meant. ``branch``: which of several
    encoders; ``asked_as``: how the caller's user writes it. ``trunk``: ``timm:NAME``, where the file is of a trunk of
    timm and does not say so itself; ``patch_size``, ``named_statistics``: see ``read_timm``.

    Raises ``UserError`` where the file is broken or holds no encoder, or several and ``branch`` names none, and where
    nothing tells its heads or its grid.
    """
    trunk = trunk or stated_format(resolve_weights(path, decoder=decoder), "timm") or None
    if trunk is not None:
        file = read_timm(
            resolve_weights(path),
            trunk,
            patch_size=patch_size,
            named_statistics=named_statistics,
            branch=branch,
            asked_as=asked_as,
        )
        if decoder:
            raise file.refusal()
        return file
    parts = open_weights(path, image_size=image_size, heads=heads, decoder=decoder, branch=branch, asked_as=asked_as)
    parts.check_decided()
    apart = [name for name in parts.tensors if is_decoder(name) or name.startswith(OWN_ONLY)]
    kept = {name: parts.tensors.pop(name) for name in apart}
    with naming(parts.path):
        tables = [each for name, each in parts.tensors.items() if name.endswith("relative_position_bias_table")]
        if "pos_embed" not in parts.tensors and any(table.count_nonzero() for table in tables):
            raise UserError(told_trunk(BEIT, parts.info.width or 0))
        official = write_parts(replace(parts, report=replace(parts.report, notes=[])), FORMATS["official"])
    if decoder:
        _check_decoder(parts, kept)
    tensors = {**official.tensors, **kept}
    names = {name: sources for name, sources in parts.sources.items() if name in tensors}
    return EncoderFile(parts.path, parts.info, tensors, names, parts.report, parts.assumptions)


def _check_decoder(parts: Parts, decoder: Mapping[str, Tensor]) -> None:
    path, reading = parts.path, parts.fit.reading
    if reading.layout is MAE_CORE_FULL and not parts.info.decoder_heads:
        raise UserError(f"the metadata of {path} lacks decoder_heads; give the checkpoint as its run wrote it")
    if not any(is_decoder(name) for name in decoder):
        raise UserError(f"{path} has no decoder; give a run directory, a checkpoint, or an official _full file")
    lost = [name for ours in missing_decoder(decoder) for name in reading.names(ours)]
    if lost:
        raise UserError(f"{path} is not a complete MAE; it lacks {', '.join(lost[:4])}")


# What the user said, else what the file says.


def settled(
    path: Path,
    given: Mapping[str, Any],
    *,
    must: Mapping[str, Any],
    may: Mapping[str, Any] | None = None,
    section: str = "",
) -> dict[str, Any]:
    """Options of a run on a weights file: what the user gave, else what the file says.

    ``given``: option -> value, of those that the user set. ``must``: option -> the file's value, which no option can
    change. ``may``: option -> the file's value, which holds where the user gave none. Values of None say nothing.
    ``section``: where the options are, for the message. Raises ``UserError`` where one of ``must`` was given otherwise.
    """
    wrong = [
        f"{section}{name} {_shown(given[name])} was asked for, but the file has {_shown(found)}"
        for name, found in must.items()
        if given.get(name) is not None and _shown(given[name]) != _shown(found)
    ]
    if wrong:
        raise UserError(
            f"{path} has another architecture: {'; '.join(wrong)}; use the values of the file, or another file"
        )
    said = {name: value for name, value in {**(may or {}), **must}.items() if value is not None}
    return {**said, **{name: given[name] for name in said.keys() & given.keys() if given[name] is not None}}


def _shown(value: Any) -> Any:
    """A value as messages show it and as it is compared: a described trunk by its name."""
    if isinstance(value, Mapping) and "depth" in value:
        return size_of(value).name
    return list(value) if isinstance(value, tuple) else value


def section_with(
    path: Path, section: AnySection, prefix: str, *, must: Mapping[str, Any], may: Mapping[str, Any] | None = None
) -> AnySection:
    """``settled`` for a section of a configuration, which options ``prefix.name`` set. Raises ``UserError`` where the
    rest of the section does not go with what the file says."""
    given = {name: getattr(section, name) for name in section.model_fields_set}
    new = settled(path, given, must=must, may=may, section="" if prefix == "model" else f"{prefix}.")
    if all(getattr(section, name) == value for name, value in new.items()):
        return section
    try:
        return type(section).model_validate({**section.model_dump(exclude_unset=True), **new})
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        told = ", ".join(f"{prefix}.{name}={value}" for name, value in new.items() if name not in given)
        raise UserError(f"{path} states {told}, which contradicts the rest of {prefix}: {problem}") from None


def with_file(source: EncoderFile, config: AnyRun, *, frozen: bool = False) -> AnyRun:
    """``config`` as the weights say: their channels, and of a trained model its size; with ``frozen`` also the image
    size and, of a classifier, the test crop where the user set none, for it is measured as it was trained. Raises
    ``UserError`` where the user set another architecture than the file's."""
    data, model = config.data, getattr(config, "model", None)  # type: ignore[attr-defined]
    may = {"image_size": source.image_size, "test_crop": source.info.test_crop} if frozen else {}
    may = {name: value for name, value in may.items() if name in type(data).model_fields}
    update = {"data": section_with(source.path, data, "data", must={"channels": source.in_chans}, may=may)}
    if model is not None and {"size", "trunk"} & type(model).model_fields.keys():
        update["model"] = section_with(
            source.path, model, "model", must=source.model_facts(model), may=source.model_defaults(model)
        )
    return config.model_copy(update=update)


def stated_in(config: Any) -> dict[str, Any]:
    """What a configuration states of its weights that the file does not: ``model.heads``, which of several encoders
    (``branch``), and ``model.trunk``, whose mean and std hold unless the configuration sets its own; options of
    ``read_encoder``."""
    model, data = getattr(config, "model", None), getattr(config, "data", None)
    own = any(getattr(data, name, default) != default for name, default in DATA_DEFAULTS.items())
    return {
        "heads": getattr(model, "heads", None),
        "branch": config.branch,
        "trunk": getattr(model, "trunk", None),
        "patch_size": getattr(model, "patch_size", None),
        "named_statistics": not own,
    }


DATA_DEFAULTS = {"mean": None, "std": None, "statistics": "auto"}
"""The options of the data that say what pixels are standardised with."""


# The strict loader.


def load_state(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path | str,
    *,
    new: Iterable[str] = (),
    unused: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    names: Mapping[str, list[str]] | None = None,
    report: LoadReport | None = None,
    remedy: str = "use the file with the configuration it was trained with",
) -> LoadReport:
    """Copy ``tensors`` into ``model``, all or nothing; returns the account of every tensor on both sides.

    ``new``: patterns of the model's tensors that may be missing. ``unused``: patterns of tensors that it does not take
    -> why. ``rename``, ``names``: name in ``tensors`` -> name in the model, names in the file, where they differ.
    ``report``: what was done before, whose ``resized`` names are the model's. Raises ``UserError`` (file, first
    tensors, ``remedy``) when any other tensor is left over, has another shape, or is not finite.
    """
    report = report or LoadReport(str(path))
    wanted, unused, may_be_new = model.state_dict(), unused or {}, dict.fromkeys(new, "")
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        target = (rename or {}).get(name, name)
        theirs = (names or {}).get(name) or [name]
        if target not in wanted:
            why = matching(name, unused)
            if why is None:
                report.refused[theirs[0]] = UNKNOWN
            else:
                report.unused.update(dict.fromkeys(theirs, why))
            continue
        if tensor.shape != wanted[target].shape:
            report.refused[theirs[0]] = f"file {tuple(tensor.shape)}, model {tuple(wanted[target].shape)}"
            continue
        ready[target] = tensor
        report.place(target, theirs)
    lacking = wanted.keys() - ready.keys()
    report.new = sorted([*report.new, *(name for name in lacking if matching(name, may_be_new) is not None)])
    for name in lacking - set(report.new):
        report.refused.setdefault(name, LACKING)
    if report.refused:
        raise UserError(f"{path} does not fit this model: {describe_refused(report.refused)}; {remedy}")
    with naming(path):
        check_finite(ready)
    with torch.no_grad():
        for name, tensor in ready.items():
            wanted[name].copy_(tensor)
    learnable = {name: parameter.numel() for name, parameter in model.named_parameters()}
    report.total_parameters = sum(learnable.values())
    report.loaded_parameters = sum(number for name, number in learnable.items() if name in ready)
    return report


def matching(name: str, patterns: Mapping[str, str]) -> str | None:
    """What the first pattern that fits ``name`` stands for; None where none fits."""
    return next((why for pattern, why in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)


def fit_state(
    model: nn.Module,
    source: EncoderFile,
    *,
    grid: tuple[int, int],
    trunk: nn.Module | None = None,
    new: Sequence[str] = (),
    unused: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
) -> LoadReport:
    """``load_state`` for an encoder: positions are resized to ``grid``, a decoder is left out unless ``rename`` says
    where it goes. ``trunk``: the part of ``model`` that is the encoder, where ``model`` is more. ``allow_missing``:
    patterns of tensors that the user allows to start anew."""
    rename = rename or {}
    ready = source.adapted(trunk or model, grid, rename)
    return load_state(
        model,
        ready.tensors,
        source.path,
        new=(*new, *allow_missing),
        unused={**UNUSED, **ready.unused, **(unused or {})},
        rename=rename,
        names=ready.names,
        report=ready.report,
        remedy=ready.remedy,
    )


def opened_once(source: EncoderFile | Path | str, **options: Any) -> EncoderFile:
    """``source``, read where it is still a path."""
    return source if isinstance(source, EncoderFile) else read_encoder(source, **options)


def _opened(source: EncoderFile | Path | str, **options: Any) -> EncoderFile:
    """``opened_once``, with a warning of what the file does not say and was assumed."""
    found = opened_once(source, asked_as='branch="{}"', **options)
    for sentence in found.assumptions:
        warnings.warn(f"{found.path}: {sentence}", stacklevel=3)
    return found


def load_encoder(
    path: EncoderFile | Path | str,
    *,
    image_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    heads: int | None = None,
    branch: str | None = None,
    trunk: str | None = None,
) -> Encoder:
    """The encoder of any known weights file, run directory or checkpoint, in eval mode; positions resized to
    ``image_size``, the patch embedding adapted to ``in_chans`` with a warning. ``heads``: attention heads, for a file
    that does not say. ``branch``: which encoder of a file that holds several, such as "teacher". ``trunk``:
    ``timm:NAME``, for a file of a ViT of timm's, whose tokens it then gives. Raises ``UserError`` where the file does
    not hold one."""
    source = _opened(path, image_size=image_size, heads=heads, branch=branch, trunk=trunk)
    if source.info.timm is None and not source.has_norm:
        pooled = "fc_norm.weight" in source.tensors
        kind = "a classifier on mean-pooled patches" if pooled else f"a {source.info.format} file"
        raise UserError(
            f"{source.path} is {kind} and has no final norm of its tokens; load the encoder it was made from"
        )
    if in_chans is not None and in_chans != source.in_chans:
        method = usual_method(in_chans)
        warnings.warn(
            f"{source.path} has {source.in_chans} channels; its patch embedding was adapted to {in_chans} ({method}): "
            f"{STEM_WARNING}",
            stacklevel=2,
        )
        source = with_stem(source, in_chans=in_chans)
    encoder = source.build(image_size)
    fit_state(encoder, source, grid=encoder.grid[:2], unused={"head.*": "a classifier's head"})
    encoder.transform = view_for(encoder, source.info)
    return encoder.eval()


def with_stem(source: EncoderFile, *, patch_size: int | None = None, in_chans: int | None = None) -> EncoderFile:
    """``source`` with its patch embedding adapted to another patch size and other channels, and without its decoder
    where they differ, as ``mae convert`` does; its own mean and std are of its own channels."""
    patch_size, in_chans = patch_size or source.patch_size, in_chans or source.in_chans
    if (patch_size, in_chans) == (source.patch_size, source.in_chans):
        return source
    tensors, old = dict(source.tensors), source.report
    report = replace(old, resized={**old.resized}, unused={**old.unused}, notes=[*old.notes])
    adapt_stem(tensors, source.names, Adaptation(patch_size=patch_size, in_chans=in_chans), report)
    info = source.info.with_facts(patch_size=patch_size, in_chans=in_chans, image_size=None)
    if in_chans != source.in_chans:
        info = info.with_facts(mean=None, std=None)
    return replace(source, tensors=tensors, info=info, report=report)


def with_statistics_of(source: EncoderFile, statistics: Statistics) -> EncoderFile:
    """``source`` for pixels that are standardised with ``statistics``: its patch embedding takes up the difference, so
    that it computes the same of the same image. Unchanged where these are its own, or it states none."""
    mean, std = source.info.mean, source.info.std
    if not (mean and std) or Statistics(tuple(mean), tuple(std)) == statistics:
        return source
    tensors, report = dict(source.tensors), source.report
    restandardise_stem(tensors, Statistics(tuple(mean), tuple(std)), statistics)
    told = f"the patch embedding was adapted from the weights' mean and std to {statistics.mean} and {statistics.std}"
    info = source.info.with_facts(mean=list(statistics.mean), std=list(statistics.std))
    return replace(source, tensors=tensors, info=info, report=replace(report, notes=[*report.notes, told]))


def view_for(encoder: Encoder, info: EncoderInfo) -> FileView:
    """What turns an image into what ``encoder`` was trained on; mean and std as its file says, else ImageNet's."""
    channels = encoder.in_channels
    mean, std = info.mean, info.std
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
) -> tuple[Encoder, LoadReport]:
    """A classifier on a pre-trained encoder, and the report of what was loaded. ``allow_missing``: see ``fit_state``.
    A classifier's trunk is taken, and its norm after pooling, but not its head. Raises ``UserError`` where the file
    does not fit, or there is no class to tell."""
    source.check_pooling(pooling)
    if num_classes < 1:
        raise UserError(f"a classifier has one class or more; num_classes={num_classes} was asked for")
    unused = {"norm.*": "mean pooling learns a new norm after pooling"} if pooling == "mean" else {}
    source = source.headless()
    model = source.build(image_size, num_classes=num_classes, pooling=pooling, drop_path=drop_path)
    new = (*(f"{head}*" for head in HEADS), "fc_norm.*", *allow_missing)
    return model, fit_state(model, source, grid=model.grid[:2], new=new, unused=unused)


def build_classifier(
    encoder_file: EncoderFile | Path | str,
    num_classes: int,
    pooling: Pooling = "mean",
    *,
    heads: int | None = None,
    branch: str | None = None,
    **options: Any,
) -> Encoder:
    """A classifier on the encoder of a weights file, for a loop of one's own (paper, A.1).

    ``pooling="mean"`` leaves the pre-trained final norm behind and learns a new one after pooling, as the paper does.
    ``heads``: attention heads of a file that does not say. ``branch``: which encoder of a file that holds several.
    ``options``: image_size, drop_path. Raises ``UserError`` where the file does not fit.
    """
    source = _opened(encoder_file, heads=heads, branch=branch)
    return classifier_from(source, num_classes=num_classes, pooling=pooling, **options)[0]


def load_mae(
    path: EncoderFile | Path | str,
    *,
    target: str | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    branch: str | None = None,
) -> MaskedAutoencoder:
    """Encoder and decoder, in eval mode, of our runs and checkpoints, of official files that have a decoder and of
    transformers' ViTMAE.

    ``target`` overrides what the metadata, the trainer's arguments or a config.json name; where none of them names it,
    a warning says what was assumed. ``heads`` and ``decoder_heads``: attention heads, for a file that does not say;
    where nothing states those of the decoder, a warning says that 16 are assumed. ``branch``: which of several models
    in the file. Raises ``UserError`` where the file has no complete decoder.
    """
    source = _opened(path, heads=heads, decoder=True, branch=branch)
    info, tensors = source.info, source.tensors
    width = tensors["decoder_embed.weight"].shape[0]
    decoder = {
        "width": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")}),
        "heads": decoder_heads_of(info, decoder_heads, source.path),
        "mlp_ratio": tensors["decoder_blocks.0.mlp.fc1.bias"].shape[0] / width,
    }
    fitted = f"{OWN_ONLY}target."
    objective = rebuild_target(
        target or info.target or _assumed_target(source.path),
        info.target_options or {},
        {name.removeprefix(fitted): each for name, each in tensors.items() if name.startswith(fitted)},
    )
    model = assemble_mae(source.build(), objective, decoder, fuse_blocks=info.fuse_blocks or (), **masking_of(info))
    model.loss_on_all_patches = bool(info.loss_on_all_patches)
    rename = {name: name_in_mae(name) for name in tensors}
    load_state(model, tensors, source.path, rename=rename, names=source.names, remedy="it is not a complete MAE")
    return model.eval()


def masking_of(info: EncoderInfo) -> dict[str, Any]:
    """The options of ``build_mae`` about masking that a file states."""
    names = ("masking", "mask_ratio", "masking_options", "mask_tokens_in_encoder")
    return {name: value for name in names if (value := getattr(info, name))}  # transformers says a ratio of 0 for none


def name_in_mae(name: str) -> str:
    """Our name in an encoder's file -> the name in a ``MaskedAutoencoder``."""
    return IN_A_RUN.names(name)[0]


def decoder_heads_of(info: EncoderInfo, asked: int | None, path: Path) -> int:
    """Attention heads of the decoder: stated by the file, else asked for, else the released models' 16, with a warning.
    Raises ``UserError`` where file and caller contradict each other."""
    stated = info.decoder_heads
    if stated is not None and asked not in (None, stated):
        raise UserError(f"decoder_heads={asked} was given, but {path} has {stated}; leave it out, or use another file")
    if stated is None and asked is None:
        warnings.warn(f"{path}: {DECODER_HEADS_ASSUMED}", stacklevel=3)
    return int(stated or asked or OFFICIAL_DECODER_HEADS)


DECODER_HEADS_ASSUMED = (
    f"the file does not say how many attention heads its decoder has; {OFFICIAL_DECODER_HEADS}, as the released models "
    "have, are assumed (another number: decoder_heads=N in Python, --decoder-heads N on the command line)"
)


def _assumed_target(path: Path) -> str:
    """What a file that does not say was trained on: the catalogue's word for a published name, else the default."""
    target = published_target(path.name) or "normalized_pixels"
    warnings.warn(
        f"{path} does not say which target its decoder predicts; {target} is assumed (the released _full files predict "
        "normalized_pixels, the visualize files pixels); set target= to choose it",
        stacklevel=3,
    )
    return target
