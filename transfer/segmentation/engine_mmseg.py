"""mmseg: what is registered with it, and a training on its runner. The only file that imports mmseg, mmengine and mmcv.

A config names this module under ``custom_imports``; then mmseg's own tools can run it too.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import pickle
import re
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmseg.registry
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.utils import set_random_seed
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.evaluation.metrics import IoUMetric
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS
from mmseg.utils import register_all_modules
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mae_core import layout
from mae_core.atomic import write_json, write_text
from mae_core.conversion.files import write_weights
from mae_core.conversion.loading import LoadReport, describe_encoder, read_encoder
from mae_core.errors import UserError
from mae_core.training.distributed import barrier, world_size
from mae_core.training.groups import layer_decay_groups
from transfer.backbone import DenseViT
from transfer.segmentation import config as configs
from transfer.segmentation.drawing import Example, draw_examples, palette
from transfer.segmentation.label_maps import (
    IGNORED,
    LabelledImage,
    check_label_maps,
    check_maps_exist,
    pair_files,
    read_classes,
)
from transfer.weights import load_pretrained

PUBLISHED_TAPS = {"base": (3, 5, 7, 11), "large": (7, 11, 15, 23)}
"""The blocks that BEiT's UperNet reads, which the MAE paper took over (A.4); other sizes: the last of each quarter."""

SEGMENTER = "segmenter.safetensors"

np_multiarray: Any = getattr(np, "_core" if hasattr(np, "_core") else "core").multiarray

CONFIG_ONLY_KEYS = {
    "activation_checkpointing",
    "compile",
    "custom_imports",
    "efficient_conv_bn_eval",
    "model_wrapper_cfg",
}
"""Top-level keys of a config that mmengine reads besides the arguments of its runner."""


@MODELS.register_module()
class MAECoreViT(DenseViT):
    """``DenseViT`` as an mmseg backbone: global attention, the cls token kept in the sequence, four maps of one stride.

    taps     0-based blocks whose output is emitted; ``PUBLISHED_TAPS`` or the quarter taps when None
    weights  a file, run directory or checkpoint that ``init_weights`` loads; None for a random start
    """

    def __init__(
        self,
        size: str = "base",
        *,
        image_size: int | Sequence[int] = 512,
        patch_size: int | None = None,
        in_chans: int | None = None,
        taps: Sequence[int] | None = None,
        drop_path: float = 0.0,
        tap_norm: bool = False,
        checkpointing: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__(
            size,
            image_size=image_size,
            patch_size=patch_size,
            in_chans=in_chans or 3,
            taps=PUBLISHED_TAPS.get(size) if taps is None else taps,
            cls_token=True,
            drop_path=drop_path,
            tap_norm=tap_norm,
            checkpointing=checkpointing,
        )
        self.weights = weights
        self.loading: LoadReport | None = None

    def init_weights(self) -> None:
        """Load ``weights`` and print the report; called by mmengine before training.

        timm's method of this name would draw the whole trunk anew. Raises ``UserError`` where the file does not fit.
        """
        if self.weights is not None:
            self.loading = load_pretrained(self, self.weights)
            if is_main_process():
                self.loading.print()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(B, C, H, W) -> a (B, D, ceil(H/patch), ceil(W/patch)) map per tap."""
        return tuple(super().forward(images))


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MAECoreLayerDecay(DefaultOptimWrapperConstructor):
    """Learning rates that fall layer by layer towards the input: ``paramwise_cfg=dict(layer_decay_rate=0.65)``.

    Embeddings are layer 0, block i is layer i + 1 and gets rate ** (depth - i) of the learning rate; neck and heads get
    all of it. Positions, cls token, biases and norms are not decayed. The constructors of BEiT and mmseg mean the same,
    but compare ``backbone.pos_embed`` with ``pos_embed`` and do decay positions and cls token.
    """

    def add_params(self, params: list[dict], module: nn.Module, **_: Any) -> None:
        """Append the groups of ``module``, a segmentor whose backbone has ``blocks``, to ``params``; heads first."""
        groups = layer_decay_groups(
            module,
            len(module.backbone.blocks),
            layer_decay=self.paramwise_cfg["layer_decay_rate"],
            weight_decay=self.base_wd,
            trunk="backbone.",
        )
        params += [{**group, "lr": group["lr_scale"] * self.base_lr} for group in groups]


@DATASETS.register_module()
class LabelledFolder(BaseSegDataset):
    """Images of any format with label maps of the same relative name; class names from a file.

    classes_file  ``value<TAB>name`` a line, relative to ``data_root``; or give ``metainfo=dict(classes=...)``
    num_classes   names the classes after their values ("class 1") where there is no such file
    on_error      what `train` does about unreadable images: skip or raise
    """

    def __init__(
        self,
        *,
        classes_file: str | None = "classes.txt",
        num_classes: int | None = None,
        on_error: str = "skip",
        metainfo: dict | None = None,
        **options: Any,
    ) -> None:
        self.on_error = on_error
        if classes_file is not None and not (metainfo or {}).get("classes"):
            path = Path(options.get("data_root") or "", classes_file)
            reduce_zero_label = options.get("reduce_zero_label", False)
            if num_classes is None or path.is_file():
                classes = read_classes(path, reduce_zero_label=reduce_zero_label)
            else:
                first = 1 if reduce_zero_label else 0
                classes = [f"class {value}" for value in range(first, first + num_classes)]
            metainfo = {**(metainfo or {}), "classes": classes, "palette": palette(len(classes))}
        super().__init__(metainfo=metainfo, **options)

    def load_data_list(self) -> list[dict]:
        """A record per image, as mmseg's pipelines expect it."""
        folders = self.data_prefix["img_path"], self.data_prefix["seg_map_path"]
        shared = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        return [
            {"img_path": str(image), "seg_map_path": str(label_map), "seg_fields": [], **shared}
            for image, label_map in pair_files(*folders, map_suffix=self.seg_map_suffix)
        ]


@TRANSFORMS.register_module()
class NamedImage(LoadImageFromFile):
    """mmcv's image reader; a file that it cannot read is named and left out (``on_error="skip"``, in training), or
    raises a ``UserError``."""

    def __init__(self, *, on_error: str = "raise", **options: Any) -> None:
        super().__init__(**options)
        self.on_error = on_error
        self.skipped: set[str] = set()

    def transform(self, results: dict) -> dict | None:
        """As mmcv's; None makes the data set draw another image."""
        path = results["img_path"]
        try:
            return super().transform(results)
        except Exception as error:
            if self.on_error == "raise":
                raise UserError(f"image {path} cannot be read ({_first_line(error)}); mend or remove it") from None
            if path not in self.skipped:
                self.skipped.add(path)
                number = len(self.skipped)
                print(f"image {path} cannot be read and is skipped; {number} so far in this process", flush=True)
            return None


@TRANSFORMS.register_module()
class NamedLabels(LoadAnnotations):
    """mmseg's label map reader; a map that would break the training raises a ``UserError`` with its name."""

    def __init__(self, *, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = num_classes

    def _load_seg_map(self, results: dict) -> None:
        path = results["seg_map_path"]
        try:
            super()._load_seg_map(results)
        except Exception as error:
            raise UserError(
                f"label map {path} cannot be read ({_first_line(error)}); replace it or take it out"
            ) from None
        labels = results["gt_seg_map"]
        size = tuple(results.get("ori_shape", labels.shape))
        if labels.shape != size:
            raise UserError(f"label map {path} has the shape {labels.shape}, and its image {size}; correct the map")
        wrong = labels[(labels >= self.num_classes) & (labels != IGNORED)]
        if wrong.size:
            value = int(wrong[0]) + bool(results.get("reduce_zero_label"))
            raise UserError(
                f"label map {path} holds the value {value}, which is none of the {self.num_classes} classes; "
                "correct the map, num_classes or reduce_zero_label"
            )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


@METRICS.register_module()
class PerClassIoUMetric(IoUMetric):
    """mmseg's IoU metric that also keeps the values of each class, in percent, None where a class never occurs."""

    per_class: dict[str, dict[str, float | None]] = {}
    """Set on the rank that computes."""

    def compute_metrics(self, results: list) -> dict[str, float]:
        """mIoU, mAcc and aAcc in percent; sets ``per_class``: name -> IoU, Acc."""
        areas = [sum(column) for column in zip(*results, strict=True)]
        values = self.total_area_to_metrics(*areas, self.metrics, self.nan_to_num, self.beta)
        self.per_class = {
            name: {key: _percent(values[key][index]) for key in ("IoU", "Acc")}
            for index, name in enumerate(self.dataset_meta["classes"])
        }
        return super().compute_metrics(results)


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else round(100 * float(value), 2)


@HOOKS.register_module()
class RunRecord(Hook):
    """Writes log.jsonl, pictures of predictions beside the truth and, before the first step, the loading report.

    interval  training steps between two lines; num_pictures: validation images drawn, evenly spaced
    """

    priority = "LOW"  # after the hooks that compute what is written here

    def __init__(self, interval: int = 20, num_pictures: int = 6) -> None:
        self.interval = interval
        self.num_pictures = num_pictures
        self.examples: list[Example] = []
        self.metrics: dict[str, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Write the loading report; of a resumed run's log, drop the steps that will be done again."""
        if not is_main_process():
            return
        loading = getattr(getattr(_bare(runner.model), "backbone", None), "loading", None)
        if loading is not None:
            write_json(Path(runner.work_dir, layout.LOADING), loading.as_dict())
        log = Path(runner.work_dir, layout.LOG)
        if log.exists():
            lines = log.read_text().splitlines()
            write_text(log, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= runner.iter))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """A line of losses, learning rate and seconds."""
        if not (self.every_n_train_iters(runner, self.interval) or runner.iter + 1 == runner.max_iters):
            return
        scalars = runner.message_hub.log_scalars
        losses = {key[6:]: scalars[key].mean(self.interval) for key in scalars if re.match(r"train/.*(loss|acc)", key)}
        rest = {key: scalars[f"train/{key}"].current() for key in ("lr", "time", "data_time")}
        self._record(runner, {"step": runner.iter + 1, **losses, **rest})

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keep the predictions of the images that are drawn."""
        total = len(runner.val_dataloader.dataset)
        first = batch_idx * runner.val_dataloader.batch_size
        drawn = {round(index * total / self.num_pictures) for index in range(self.num_pictures)}
        for position, sample in enumerate(outputs or []):
            if first + position in drawn and is_main_process():
                with Image.open(sample.img_path) as image:
                    picture = ImageOps.exif_transpose(image).convert("RGB")
                labels = [part.data.squeeze(0).cpu().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg)]
                self.examples.append(Example(picture, *labels))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """A line of metrics, and the picture."""
        found = (metrics or {}).items()
        self.metrics = {key: round(float(value), 2) for key, value in found if not key.endswith("time")}
        self._record(runner, {"step": runner.iter, **self.metrics})
        meta = runner.val_dataloader.dataset.metainfo
        if self.examples and is_main_process():
            folder = Path(runner.work_dir, layout.PICTURES)
            folder.mkdir(exist_ok=True)
            sheet = draw_examples(self.examples, meta["classes"], [tuple(colour) for colour in meta["palette"]])
            sheet.save(folder / f"step_{runner.iter:06d}.png")
        self.examples = []

    def _record(self, runner: Runner, event: dict[str, Any]) -> None:
        if is_main_process():
            event = {key: round(value, 8) if isinstance(value, float) else value for key, value in event.items()}
            with Path(runner.work_dir, layout.LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(event) + "\n")


class SegmentationRunner(Runner):
    """mmengine's runner; dumps of many lines (environment, config, hooks) go to its log file alone."""

    def build_logger(self, *args: Any, **options: Any) -> MMLogger:
        """The run's logger, with a filter on what it shows on the screen."""
        logger = super().build_logger(*args, **options)
        for handler in logger.handlers:
            if not hasattr(handler, "baseFilename"):
                handler.addFilter(is_news)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """mmengine's wrapping for several ranks, which knows GPUs alone; on CPUs, batch norm is each rank's own."""
        if not self.distributed or torch.cuda.is_available() or model_wrapper_cfg is not None:
            return super().wrap_model(model_wrapper_cfg, model)
        return MMDistributedDataParallel(module=revert_sync_batchnorm(model), broadcast_buffers=False)


def history_method(owner: Any, name: str) -> Any:
    """What ``getattr`` does in a checkpoint of mmengine's, and nothing else: methods of ``HistoryBuffer``."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r}")
    return getattr(owner, name)


SAFE_GLOBALS: list[Any] = [
    HistoryBuffer,
    (history_method, "builtins.getattr"),
    (history_method, "__builtin__.getattr"),
    (np.ndarray, "numpy.ndarray"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")},
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in (("scalar", np_multiarray.scalar), ("_reconstruct", np_multiarray._reconstruct))
    ),
]
"""What mmengine's checkpoints hold besides tensors and plain values."""


def load_safely(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A local checkpoint, read without running code in it; takes the place of mmengine's loader, which would run it.

    The stored config is left out: mmengine executes it. Raises ``UserError`` for a file that holds anything else.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is refused, for it is broken or holds more than tensors and plain values "
            f"({_first_line(error)[:200]}); use one that this toolkit wrote"
        ) from None
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("meta"), dict):
        checkpoint["meta"].pop("cfg", None)
        checkpoint["meta"].pop("config", None)
    return checkpoint


CheckpointLoader.register_scheme("", load_safely, force=True)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a message of mmengine's belongs on the screen: progress, metrics, checkpoints and most warnings."""
    message = record.getMessage()
    if record.levelno >= logging.WARNING:
        return not re.search(r"deprecated|The prefix is not set", message)
    return bool(re.match(r"Iter\(|Epoch\(|Saving checkpoint|resumed|Advance dataloader", message))


def train(
    config_path: Path | str,
    *,
    weights: Path | str | None,
    work_dir: Path | str,
    options: Mapping[str, Any],
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Train, evaluate and write the run directory; returns what metrics.json holds. See `train_net.train_segmenter`."""
    register_all_modules()
    started = time.monotonic()
    work_dir = Path(work_dir)
    config = read_config(config_path, options)
    view = dict(config.items())
    notes: list[str] = []
    distributed = world_size() > 1
    if distributed:
        config.launcher = "pytorch"
        notes.append(f"ranks: {world_size()}, and the batch size is that of each")
    if checkpoint is not None:
        configs.check_steps_left(checkpoint, view)
        load_safely(str(checkpoint), "cpu")
    if weights is not None and checkpoint is None:
        notes += configs.fit_to_weights(view, read_encoder(weights), list(options))
    elif checkpoint is not None:
        notes.append(f"weights: those of {checkpoint}")
        view["model"]["backbone"].pop("weights", None)
    elif not view["model"]["backbone"].get("weights"):
        notes.append("weights: none, training from scratch; --weights FILE starts from a pre-trained encoder")
    gpu = torch.cuda.is_available()
    notes += configs.fit_to_machine(view, gpu=gpu, bf16=gpu and torch.cuda.is_bf16_supported())
    configs.check_widths(view)
    configs.check_schedule(view)
    notes += [f"{part}: {found}" for part, found in check_data(view).items()]
    check_model(view)
    for note in notes if is_main_process() else ():
        print(note, flush=True)

    barrier()  # every rank has found its input in order, and the work dir as it was
    stem = Path(config_path).stem
    config.work_dir = str(work_dir)
    config.experiment_name = f"{stem}_{uuid.uuid4().hex[:8]}"  # mmengine keeps a global logger and hub for each name
    config.resume, config.load_from = checkpoint is not None, str(checkpoint or "") or None
    if config.get("visualizer") is not None:
        config.visualizer.save_dir = str(work_dir / "tensorboard")
    runner = SegmentationRunner.from_cfg(config)
    with worker_errors():
        runner.train()
    return finish(runner, started, write_model=True)


def finish(runner: Runner, started: float, *, write_model: bool) -> dict[str, Any]:
    """Write metrics.json and, with ``write_model``, segmenter.safetensors; returns what metrics.json holds."""
    work_dir = Path(runner.work_dir)
    record = next((hook for hook in runner.hooks if isinstance(hook, RunRecord)), RunRecord())
    metrics = [metric for metric in runner.val_evaluator.metrics if isinstance(metric, PerClassIoUMetric)]
    per_class = metrics[0].per_class if metrics else {}
    seconds = round(time.monotonic() - started, 1)
    results = {**record.metrics, "per_class": per_class, "steps": runner.iter, "seconds": seconds}
    runner.visualizer.close()
    if is_main_process():
        write_json(work_dir / layout.METRICS, results)
        if write_model:
            write_segmenter(work_dir / SEGMENTER, runner)
    return results


@contextmanager
def worker_errors() -> Iterator[None]:
    """A ``UserError`` of a data loader's worker arrives with its traceback as text; its sentence alone goes on."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """``["a.b=1", "c=[x,y]"]`` -> values by key, read as mmengine reads ``--cfg-options``."""
    for item in items:
        if not re.match(r"[\w.]+=", item):
            raise UserError(f"{item!r} is not a config option; write key=value, such as train_cfg.max_iters=1000")
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="*", action=DictAction)
    try:
        return parser.parse_args(["--cfg-options", *items]).cfg_options or {}
    except AssertionError as error:
        raise UserError(f"config options {' '.join(items)}: {error}") from None


def read_config(path: Path | str, options: Mapping[str, Any]) -> Config:
    """An mmseg config with options: variables of the file are set before it is evaluated, other keys after.

    Raises ``UserError`` for a broken file and for an option that nothing would read.
    """
    path = Path(path)
    try:
        source = path.read_text(encoding="utf-8")
        variables = configs.variables_of(source) - runner_keys()
        chosen = {key: value for key, value in options.items() if key in variables}
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, path.name)
            copy.write_text(configs.with_variables(source, chosen, path.resolve().parent), encoding="utf-8")
            config = Config.fromfile(copy)
    except UserError:
        raise
    except Exception as error:  # a config is a program
        raise UserError(f"config {path} cannot be read: {type(error).__name__}: {error}") from None
    rest = {key: value for key, value in options.items() if key not in chosen}
    for key in rest:
        if key.split(".")[0] in set(config.keys()) - runner_keys():
            if key.split(".")[0] in variables:
                raise UserError(f"{key.split('.')[0]} is a variable of {path}; set it as a whole")
            raise UserError(f"{key!r} is a variable of a base of {path}, already used there; set the keys made from it")
        configs.check_key(dict(config.items()), key, accepted_keys)
        config.merge_from_dict({key: rest[key]})
    missing = {"model", "train_dataloader", "train_cfg", "optim_wrapper", "val_dataloader"} - set(config.keys())
    if missing:
        raise UserError(f"config {path} has no {', '.join(sorted(missing))}; a training needs them")
    return config


def runner_keys() -> set[str]:
    """Top-level keys that mmengine reads."""
    return set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"} | CONFIG_ONLY_KEYS


def accepted_keys(place: str, node: Mapping[str, Any]) -> set[str]:
    """What a section of a config takes: the arguments of the class its ``type`` names."""
    if not place:
        return runner_keys()
    if place.endswith("_dataloader"):
        return set(inspect.signature(DataLoader.__init__).parameters) - {"self"}
    keys = {"_delete_"}
    for found in registered(node.get("type")):
        for parent in inspect.getmro(found) if inspect.isclass(found) else [found]:
            if parent is object:
                continue
            parameters = inspect.signature(parent.__init__ if inspect.isclass(parent) else parent).parameters
            keys |= {name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
                break
    return keys - {"self"}


def registered(kind: Any) -> list[Any]:
    """The classes and functions that mmseg and mmengine know under the name ``kind``."""
    registries = [entry for entry in vars(mmseg.registry).values() if isinstance(entry, Registry)]
    found = [registry.get(kind) for registry in registries] if isinstance(kind, str) else []
    return [entry for entry in found if entry is not None]


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


def name_bad_files(section: MutableMapping[str, Any], num_classes: int, on_error: str) -> None:
    """Put readers that name a bad file into a pipeline: the check before the training is a sample of large folders."""
    for step in section.get("pipeline", []):
        if step["type"] in ("LoadImageFromFile", "NamedImage"):
            step.update(type="NamedImage", on_error=on_error)
        elif step["type"] in ("LoadAnnotations", "NamedLabels"):
            step.update(type="NamedLabels", num_classes=num_classes)


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


def write_segmenter(path: Path, runner: Runner) -> None:
    """The trained segmenter's tensors, with the classes and the config that rebuilds it as metadata."""
    model = _bare(runner.model)
    meta = runner.val_dataloader.dataset.metainfo
    facts = {"format": "mae_core segmenter", "classes": list(meta["classes"]), "steps": runner.iter}
    facts["palette"] = [list(map(int, colour)) for colour in meta["palette"]]
    facts["reduce_zero_label"] = bool(meta.get("reduce_zero_label", False))
    if isinstance(model.backbone, MAECoreViT):
        facts["encoder"] = describe_encoder(model.backbone)
    facts["config"] = runner.cfg.pretty_text
    write_weights(path, model.state_dict(), facts)


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)
