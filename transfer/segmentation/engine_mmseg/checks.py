"""What is found out before a training begins: the data it will read, the model and weights it will build."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.runner.utils import set_random_seed
from mmseg.registry import DATASETS, MODELS

from mae_core.errors import UserError
from transfer.segmentation import config as configs
from transfer.segmentation.engine_mmseg.backbone import MAECoreViT
from transfer.segmentation.engine_mmseg.data import name_bad_files
from transfer.segmentation.label_maps import LabelledImage, check_label_maps, check_maps_exist
from transfer.weights import load_pretrained


def check_data(config: Mapping[str, Any]) -> dict[str, str]:
    """Read what the training will read; a sentence each for the training and the validation data.

    Raises ``UserError`` with the file and the remedy for the first thing that would go wrong.
    """
    num_classes = configs.heads_of(config)[0]["num_classes"]
    seed = (config.get("randomness") or {}).get("seed") or 0
    sentences = {}
    for part in ("train", "val"):
        section = config[f"{part}_dataloader"]["dataset"]
        on_error = section.get("on_error", "skip")
        pairs, classes, reduce_zero_label = labelled_images(section)
        if len(classes) != num_classes:
            raise UserError(
                f"the config has num_classes={num_classes}, and the {part} data {len(classes)} classes "
                f"({_shorten(classes)}); set num_classes={len(classes)}, or correct classes.txt or reduce_zero_label"
            )
        found = check_label_maps(pairs, num_classes, reduce_zero_label=reduce_zero_label, seed=seed, on_error=on_error)
        leave_out(section, pairs, {path for path, _ in found.unreadable})
        name_bad_files(section, num_classes, on_error if part == "train" else "raise")
        sentences[f"{part} data"] = found.describe(classes)
    return sentences


def leave_out(section: MutableMapping[str, Any], pairs: Sequence[LabelledImage], unreadable: Collection[str]) -> None:
    """Make a dataset section hold the readable ones of its ``pairs``."""
    if not unreadable:
        return
    given = section.get("indices")
    if not isinstance(given, list | tuple):
        given = range(len(pairs)) if given is None or given >= 0 else range(-len(pairs), 0)
    section["indices"] = [index for index, pair in zip(given, pairs, strict=True) if str(pair.image) not in unreadable]


def labelled_images(section: Mapping[str, Any]) -> tuple[list[LabelledImage], list[str], bool]:
    """Files, class names and ``reduce_zero_label`` of a dataset section; ``UserError`` where it cannot be read."""
    for folder in (section.get("data_prefix") or {}).values():
        path = Path(section.get("data_root") or "", folder)
        if not path.is_dir():
            raise UserError(f"data folder {path} does not exist; set data_root, which is {section.get('data_root')!r}")
    try:
        dataset = DATASETS.build(section)
        records = [dataset.get_data_info(index) for index in range(len(dataset))]
        classes = list(dataset.metainfo["classes"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the {section.get('type')} data set cannot be read: {type(error).__name__}: {error}") from None
    pairs = [LabelledImage(Path(record["img_path"]), Path(record["seg_map_path"])) for record in records]
    check_maps_exist(pairs)
    return pairs, classes, bool(dataset.metainfo.get("reduce_zero_label", False))


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def check_model(config: Mapping[str, Any]) -> None:
    """Build the model, load its weights and throw it away: what does not fit is found before anything is written."""
    batch_size = config["train_dataloader"].get("batch_size", 1)
    norms = {section.get("type") for section in configs.sections(config["model"])}
    if batch_size < 2 and norms & {"BN", "SyncBN"} and config.get("launcher", "none") == "none":
        raise UserError("train_dataloader.batch_size is 1, and batch norm needs at least 2 images; set it to 2 or more")
    try:
        set_random_seed(0)
        model = MODELS.build(config["model"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the config's model cannot be built: {type(error).__name__}: {error}") from None
    if isinstance(model.backbone, MAECoreViT) and model.backbone.weights is not None:
        load_pretrained(model.backbone, model.backbone.weights)
