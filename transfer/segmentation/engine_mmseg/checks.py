"""What is found out before a training begins: the data it will read, the model and weights it will build."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.runner.utils import set_random_seed
from mmseg.registry import DATASETS, MODELS
from mmseg.utils import register_all_modules
from torch import nn

from mae_core.errors import UserError, explained, first_line
from mae_core.texts import shortened
from mae_core.weights.encoder_file import EncoderFile
from transfer.segmentation import config as configs
from transfer.segmentation.engine_mmseg.backbone import is_ours
from transfer.segmentation.engine_mmseg.data import LabelledFolder, name_bad_files
from transfer.segmentation.engine_mmseg.options import accepted_keys, read_config
from transfer.segmentation.label_check import check_label_maps
from transfer.segmentation.label_coding import BYTE, LabelCoding, Names
from transfer.segmentation.label_maps import LabelledImage, check_maps_exist, read_classes
from transfer.trunk import load_pretrained


def check_data(config: MutableMapping[str, Any], parts: Sequence[str] = ("train", "val")) -> dict[str, str]:
    """Read what the run will read; a sentence each for the training and the validation data.

    Makes the pipelines name bad files and, where there are more than 255 classes, pad and ignore with another class
    than 255. Raises ``UserError`` with the file and the remedy for the first thing that would go wrong.
    """
    num_classes = configs.heads_of(config)[0]["num_classes"]
    channels = configs.channels_of(config)
    seed = (config.get("randomness") or {}).get("seed") or 0
    sentences = {}
    for part in parts:
        section = config[f"{part}_dataloader"]["dataset"]
        on_error = section.get("on_error", "skip")
        pairs, classes, coding = labelled_images(section)
        if len(classes) != num_classes:
            raise UserError(_class_count(num_classes, part, classes, reduced=coding.reduced))
        found = check_label_maps(
            pairs, coding, channels=channels, seed=seed, on_error=on_error, names=origin_of_names(section)
        )
        leave_out(section, pairs, {path for path, _ in found.unreadable})
        name_bad_files(section, coding, on_error if part == "train" else "raise", channels)
        sentences[f"{part} data"] = found.describe(classes)
        if coding.ignore_index != BYTE:
            ignore_with(config, coding.ignore_index)
    return sentences


def ignore_with(config: MutableMapping[str, Any], index: int) -> None:
    """Make every part of a config that pads or ignores with 255 do so with ``index``: 255 is a class."""
    for section in configs.sections(config):
        for key in ("ignore_index", "seg_pad_val"):
            if isinstance(section.get("type"), str) and key in accepted_keys("a section", section):
                section[key] = index


def folders_to_check(config_path: Path, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per part of a config the fields of ``check_data.LabelledFolders``."""
    register_all_modules()
    config = read_config(config_path, options)
    num_classes = configs.heads_of(config)[0]["num_classes"]
    found = []
    for part in ("train", "val"):
        section = config[f"{part}_dataloader"]["dataset"]
        root, prefix = Path(section.get("data_root") or ""), section.get("data_prefix") or {}
        dataset = DATASETS.get(section["type"])
        stated = inspect.signature(dataset.__init__).parameters.get("reduce_zero_label")
        reduced = bool(section.get("reduce_zero_label", stated.default if stated is not None else False))
        meaning = {key: section.get(key) for key in ("label_values", "ignored_values")}
        file = root / (section.get("classes_file") or "classes.txt")
        origin, names = origin_of_names(section), None
        if origin != "unknown":
            known = (section.get("metainfo") or {}).get("classes") or dataset.METAINFO.get("classes")
            values = None
            if meaning["label_values"] is not None:
                values = LabelCoding.of(num_classes, reduce_zero_label=reduced, **meaning).values
            names = list(known or read_classes(file, values, reduce_zero_label=reduced))
            if len(names) != num_classes:
                raise UserError(_class_count(num_classes, part, names, reduced=reduced))
        found.append(
            {
                "part": f"{part} data",
                "images": root / prefix.get("img_path", ""),
                "label_maps": root / prefix.get("seg_map_path", ""),
                "coding": LabelCoding.of(num_classes, reduce_zero_label=reduced, **meaning),
                "classes": names,
                "map_suffix": section.get("seg_map_suffix", ".png"),
                "origin": origin,
                "channels": configs.channels_of(config),
            }
        )
    return found


def origin_of_names(section: Mapping[str, Any]) -> Names:
    """Who has named the classes of a dataset section; see ``label_coding.Names``."""
    if (section.get("metainfo") or {}).get("classes"):
        return "written"
    if section.get("type") != LabelledFolder.__name__:
        return "dataset"
    file = section.get("classes_file", "classes.txt")
    return "written" if file is not None and Path(section.get("data_root") or "", file).is_file() else "unknown"


def leave_out(section: MutableMapping[str, Any], pairs: Sequence[LabelledImage], unreadable: Collection[str]) -> None:
    """Make a dataset section hold the readable ones of its ``pairs``."""
    if not unreadable:
        return
    given = section.get("indices")
    if not isinstance(given, list | tuple):
        given = range(len(pairs)) if given is None or given >= 0 else range(-len(pairs), 0)
    section["indices"] = [index for index, pair in zip(given, pairs, strict=True) if str(pair.image) not in unreadable]


def labelled_images(section: Mapping[str, Any]) -> tuple[list[LabelledImage], list[str], LabelCoding]:
    """Files, class names and coding of a dataset section; ``UserError`` where it cannot be read."""
    for folder in (section.get("data_prefix") or {}).values():
        path = Path(section.get("data_root") or "", folder)
        if not path.is_dir():
            raise UserError(
                f"data folder {path} does not exist; set {configs.DATA_ROOT}, which is {section.get('data_root')!r}"
            )
    with explained(f"the {section.get('type')} data set cannot be read"):
        dataset = DATASETS.build(section)
        records = [dataset.get_data_info(index) for index in range(len(dataset))]
        classes = list(dataset.metainfo["classes"])
    pairs = [LabelledImage(Path(record["img_path"]), Path(record["seg_map_path"])) for record in records]
    check_maps_exist(pairs)
    reduced = bool(dataset.metainfo.get("reduce_zero_label", False))
    return pairs, classes, getattr(dataset, "coding", LabelCoding.of(len(classes), reduce_zero_label=reduced))


def _class_count(num_classes: int, part: str, classes: Sequence[str], *, reduced: bool) -> str:
    void = not reduced and len(classes) == num_classes + 1
    other = f"reduce_zero_label=True where {classes[0]} is void, no class" if void else "correct classes.txt"
    return (
        f"the config has num_classes={num_classes}, but the {part} data have {len(classes)} classes "
        f"({shortened(classes, 4)}); set num_classes={len(classes)}, or {other}"
    )


def check_model(config: Mapping[str, Any], source: EncoderFile | None = None) -> nn.Module:
    """Build the model, pass an image through it and load its weights (``source``, where they were read before): what
    does not fit is found before anything is written."""
    with explained("the config's model cannot be built"):
        set_random_seed(0)
        model = MODELS.build(config["model"])
        if is_ours(model.backbone):
            pass_an_image(model)
    backbone = model.backbone
    if is_ours(backbone) and backbone.weights is not None:
        load_pretrained(backbone, source or backbone.weights, allow_missing=backbone.allow_missing)
    return model


def pass_an_image(model: Any) -> None:
    """Run neck and heads once on small maps. Raises ``UserError`` where there are not as many maps as the neck takes,
    and whatever mmseg raises where a head does not fit them."""
    backbone, levels = model.backbone, len(getattr(model.neck, "rescales", ())) if model.with_neck else 0
    if levels and levels != len(backbone.taps):
        raise UserError(f"the backbone's taps {list(backbone.taps)} do not match the {levels} maps that the neck takes")
    grid = backbone.grid
    size = [min(4, patches) * grid.patch for patches in (grid.rows, grid.cols)]
    model.eval()
    with torch.no_grad():
        try:
            features = model.extract_feat(torch.zeros(1, backbone.in_channels, *size))
        except RuntimeError as error:
            if min(size) == 4 * grid.patch:
                raise
            raise UserError(
                f"a crop of {grid.rows}x{grid.cols} patches leaves nothing in the coarsest map ({first_line(error)}); "
                f"set crop_size={4 * grid.patch} or more"
            ) from None
        auxiliary = model.auxiliary_head if model.with_auxiliary_head else []
        for head in (model.decode_head, *(auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary])):
            head.forward(features)
    model.train()


def check_batches(config: Mapping[str, Any], *, synchronised: bool) -> None:
    """Raise ``UserError`` for a training's batches that cannot be loaded or normalised.

    ``synchronised``: batch norm sees the images of several GPUs, so that one on each is enough.
    """
    for name in ("train_dataloader", "val_dataloader"):
        loader = config[name]
        for key, least in (("batch_size", 1), ("num_workers", 0)):
            if loader.get(key, least) < least:
                raise UserError(f"{name}.{key} is {loader[key]}; set it to {least} or more")
    norms = {section.get("type") for section in configs.sections(config["model"])}
    alone = norms & {"BN"} if synchronised else norms & {"BN", "SyncBN"}
    if alone and config["train_dataloader"].get("batch_size", 1) < 2:
        raise UserError("train_dataloader.batch_size is 1, and batch norm needs at least 2 images; set it to 2 or more")


def check_optimizer(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Build the optimizer of a config once. Raises ``UserError`` where it cannot be."""
    with explained("the config's optim_wrapper cannot be built"):
        build_optim_wrapper(model, ConfigDict(copy.deepcopy(dict(config["optim_wrapper"]))))
