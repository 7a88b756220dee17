"""A training from the config to metrics.json and segmenter.safetensors."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmseg.utils import register_all_modules
from torch import Tensor

from mae_core import layout
from mae_core.atomic import said_plainly, write_json
from mae_core.data.decoding import UnreadableImage
from mae_core.data.statistics import Measured, measure_statistics
from mae_core.errors import UserError, first_line
from mae_core.training.distributed import barrier, device_of, on_main, world_size
from mae_core.training.lock import claim, release
from mae_core.training.machine_faults import LoaderOptions, machine_faults
from mae_core.training.precision import choose_precision, prepare_process
from mae_core.training.run import environment
from mae_core.training.same_data import Data, fingerprint
from mae_core.training.same_data import check_data as check_same_data
from mae_core.training.signals import Signals
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import read_encoder
from transfer.segmentation import config as configs
from transfer.segmentation.engine_mmseg.checkpoints import (
    WholeCheckpoints,
    config_in,
    load_safely,
    newest_whole,
    read_checkpoint,
)
from transfer.segmentation.engine_mmseg.checks import (
    check_batches,
    check_data,
    check_model,
    check_optimizer,
    labelled_images,
)
from transfer.segmentation.engine_mmseg.data import name_bad_files
from transfer.segmentation.engine_mmseg.exact import SeededSteps
from transfer.segmentation.engine_mmseg.faults import Faults
from transfer.segmentation.engine_mmseg.metric import PerClassIoUMetric
from transfer.segmentation.engine_mmseg.options import read_config
from transfer.segmentation.engine_mmseg.record import RunRecord
from transfer.segmentation.engine_mmseg.runner import (
    WRITING,
    SegmentationRunner,
    bare_model,
    trained_model,
    worker_errors,
)
from transfer.segmentation.engine_mmseg.segmenter import fill_segmenter, write_segmenter
from transfer.segmentation.pixels import SegmentationImages
from transfer.segmentation.run_report import write_run_report
from transfer.segmentation.segmenter_file import SEGMENTER, SegmenterFile, read_segmenter, steps_saved


def train(
    config_path: Path | str,
    *,
    weights: Path | str | None,
    branch: str | None = None,
    work_dir: Path | str,
    options: Mapping[str, Any],
    checkpoints: Sequence[Path],
    amp: bool | None,
    dry_run: bool = False,
    auto: bool = False,
) -> dict[str, Any]:
    """Train, evaluate and write the run directory; returns what metrics.json holds. See `train_net.train_segmenter`."""
    register_all_modules()
    started = time.monotonic()
    work_dir = Path(work_dir)
    config = read_config(config_path, options)
    view = dict(config.items())
    notes = configs.fit_to_trunk(view, options)
    source: EncoderFile | None = None
    if world_size() > 1:
        notes.append(f"ranks: {world_size()}; the batch size is per rank")
    weights = weights or view["model"]["backbone"].get("weights")
    checkpoint, stored = newest_whole(checkpoints) if checkpoints else (None, {})
    if checkpoint is not None:
        if all((work_dir / name).is_file() for name in (SEGMENTER, layout.METRICS)):
            if auto and configs.all_steps_done(checkpoint, view):
                return leave_finished(work_dir)
            configs.check_steps_left(checkpoint, view)
        keep_seed(config, stored)
        notes.append(f"weights: from {checkpoint}")
        notes += configs.fit_to_run(view, config_in(stored), checkpoint, list(options))
        del stored  # the runner reads it again, into its model
    elif weights is not None:
        backbone = view["model"]["backbone"]
        source = read_encoder(
            weights,
            branch=branch,
            asked_as="--branch {0} (mae segment: branch={0})",
            trunk=backbone.get("trunk"),
            patch_size=backbone.get("patch_size"),
            named_statistics="model.data_preprocessor.mean" not in options,
        )
        notes += configs.fit_to_weights(view, source, list(options))
    else:
        configs.check_frozen_blocks_have_weights(view)
        notes.append("weights: none, training from scratch; --weights FILE starts from a pre-trained encoder")
    notes += fit_to_machine(view, amp)
    configs.check_widths(view)
    configs.check_schedule(view)
    configs.check_test_mode(view)
    known = fingerprint(training_data(view))
    if checkpoint is not None:
        check_same_data(
            work_dir,
            known,
            f"set {configs.DATA_ROOT} to the same files, or start a new run in another {configs.WORK_DIR}",
        )
    notes += [f"{part}: {found}" for part, found in check_data(view).items()]
    notes += configs.fit_statistics(view, None if source is None else source.metadata, partial(measured, view))
    notes += configs.fit_channels(view)
    check_batches(view, synchronised=world_size() > 1 and torch.cuda.is_available())
    model = check_model(view, source)
    check_optimizer(model, view)
    for note in notes if is_main_process() else ():
        print(note, flush=True)
    if dry_run:
        from transfer.segmentation.engine_mmseg.plan import plan_lines

        for line in [*plan_lines(view, model), "dry run: nothing was written"] if is_main_process() else ():
            print(line, flush=True)
        return {}

    if config.get("load_from"):
        raise UserError(
            "load_from is not read here; start from an encoder with --weights FILE, or continue with --resume"
        )
    config.resume, config.load_from = checkpoint is not None, str(checkpoint or "") or None
    with claimed(work_dir, resumed=checkpoint is not None):
        runner = build_runner(config, Path(config_path).stem, work_dir)
        runner.register_hook(Faults())
        runner.register_hook(SeededSteps())
        bare_model(runner.model).backbone.source = source
        smaller = ["lower batch_size", "start a run of a smaller crop_size or model"]
        if is_main_process():
            write_json(work_dir / layout.DATA, known)
        loader = LoaderOptions("train_dataloader.num_workers", "train_dataloader.timeout")
        with worker_errors(), Signals() as signals, machine_faults(smaller, loader):
            for hook in runner.hooks:
                if isinstance(hook, WholeCheckpoints):
                    hook.signals, signals.limit = signals, hook.stop_seconds
            done = configs.all_steps_done(checkpoint, view)
            runner.train()
            if done:  # it was ended before its results were whole
                runner.val_loop.run()
        return finish(runner, runner.val_evaluator, started, write_model=True)


def leave_finished(work_dir: Path) -> dict[str, Any]:
    """Say that a run which was queued again is complete -> its metrics."""
    if is_main_process():
        print(f"{work_dir} is a finished run, nothing is left to resume", flush=True)
    found: dict[str, Any] = json.loads((work_dir / layout.METRICS).read_text(encoding="utf-8"))
    return found


def measured(view: Mapping[str, Any]) -> Measured:
    """The statistics of the training images."""
    pairs, *_ = labelled_images(view["train_dataloader"]["dataset"])
    return measure_statistics(SegmentationImages([pair.image for pair in pairs], configs.channels_of(view)))


def training_data(view: Mapping[str, Any]) -> Data:
    """The images and label maps of a training, each pair by the image's name."""
    pairs, *_ = labelled_images(view["train_dataloader"]["dataset"])
    root = os.path.commonpath([pair.image.absolute().parent for pair in pairs])

    def content(index: int) -> bytes:
        try:
            return b"".join(path.read_bytes() for path in pairs[index])
        except OSError as error:
            raise UnreadableImage(pairs[index].image, first_line(error)) from None

    return Data([os.path.relpath(pair.image.absolute(), root) for pair in pairs], content)


def keep_seed(config: Config, checkpoint: Mapping[str, Any]) -> None:
    """Give a config without a seed the one that the run of a checkpoint drew."""
    randomness = config.setdefault("randomness", {})
    if randomness.get("seed") is None:
        randomness["seed"] = checkpoint["meta"].get("seed")


@contextmanager
def made(work_dir: Path) -> Iterator[None]:
    """Inside, ``work_dir`` exists. Raises ``UserError`` where the disk refuses it, or what is written there."""
    with said_plainly(work_dir, f"choose another with {configs.WORK_DIR}, or free disk space"):
        work_dir.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def claimed(work_dir: Path, *, resumed: bool) -> Iterator[None]:
    """Inside, this run alone writes ``work_dir``; one that starts removes what a killed run left before its first
    checkpoint. Raises ``UserError`` where another process has it."""

    def take() -> None:
        with made(work_dir):
            claim(work_dir)
            for leftover in work_dir.glob(f"{WRITING}*"):
                leftover.unlink()
            if not resumed:
                if (work_dir / SEGMENTER).exists() or steps_saved(work_dir):
                    release(work_dir)
                    raise UserError(
                        f"{work_dir} holds a run of another process by now; give another {configs.WORK_DIR}"
                    )
                (work_dir / layout.LOG).unlink(missing_ok=True)
                for name in (layout.PICTURES, "tensorboard"):
                    shutil.rmtree(work_dir / name, ignore_errors=True)

    barrier()  # every rank has found its input in order, and the work dir as it was
    on_main(take, is_main=is_main_process())
    try:
        yield
    finally:
        if is_main_process():
            release(work_dir)


def fit_to_machine(view: dict[str, Any], amp: bool | None = None) -> list[str]:
    """``config.fit_to_machine`` for this machine."""
    device = device_of()
    prepare_process(device)
    return configs.fit_to_machine(view, gpu=device.type == "cuda", bf16=choose_precision("auto", device).mixed, amp=amp)


def build_runner(config: Config, name: str, work_dir: Path) -> SegmentationRunner:
    """The runner of a config that has been checked; all ranks make it together, and from here on files are written."""
    config.launcher = "pytorch" if world_size() > 1 else "none"
    config.work_dir = str(work_dir)
    config.experiment_name = f"{name}_{uuid.uuid4().hex[:8]}"  # mmengine keeps a global logger and hub for each name
    if config.get("visualizer") is not None:
        config.visualizer.save_dir = str(work_dir / "tensorboard")
    runner = SegmentationRunner.from_cfg(config)
    if is_main_process():
        write_json(work_dir / layout.ENVIRONMENT, environment(next(runner.model.parameters()).device))
    return runner


def evaluate(
    config_path: Path | str, checkpoint: Path, *, work_dir: Path | str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluate a trained segmenter on a config's validation data; see ``train_net.evaluate_segmenter``."""
    register_all_modules()
    started = time.monotonic()
    config = read_config(config_path, options)
    view = dict(config.items())
    state, file = read_trained(checkpoint)
    notes = configs.fit_to_trunk(view, options)
    if file is not None:
        view["model"].update(take_model(file, view["model"]))
        notes.append(f"model, mean and std come from {file.path}; data, metric and test mode from the config")
    else:
        notes += configs.fit_to_run(view, config_in(read_checkpoint(checkpoint)), checkpoint, list(options))
        notes += configs.fit_statistics(view, {}, partial(measured, view))
    notes += configs.fit_channels(view)
    configs.check_test_mode(view)
    fit_to_machine(view)
    _, classes, coding = labelled_images(view["val_dataloader"]["dataset"])
    if file is not None and file.classes != classes:
        wrong = next((pair for pair in zip(file.classes, classes, strict=False) if pair[0] != pair[1]), None)
        told = f"{wrong[0]!r} against {wrong[1]!r}" if wrong else f"{len(file.classes)} against {len(classes)}"
        raise UserError(f"{file.path} was trained on other classes than the data has ({told}); correct classes.txt")
    if file is not None and options.get("num_classes", len(classes)) != len(classes):
        raise UserError(
            f"num_classes={options['num_classes']} was asked for, but {file.path} and the data have {len(classes)} "
            f"classes; set num_classes={len(classes)}"
        )
    notes += [f"{part}: {found}" for part, found in check_data(view, ("val",)).items()]
    fill_segmenter(check_model(view), state, str(checkpoint))
    if view.get("tta_model") and view.get("tta_pipeline"):
        config.model = {**view["tta_model"], "module": view["model"]}
        config.val_dataloader.batch_size = 1
        config.val_dataloader.dataset.pipeline = view["tta_pipeline"]
        name_bad_files(config.val_dataloader.dataset, coding, "raise", configs.channels_of(view))
        views = math.prod(len(step) for step in view["tta_pipeline"][-1]["transforms"])
        notes.append(f"each image is the average over {views} scaled and mirrored views")
    for note in notes if is_main_process() else ():
        print(note, flush=True)
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "load_from"):
        config[key] = None
    # the test loop, for mmseg averages over views in no other
    config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    config.test_cfg = {"type": "TestLoop"}
    config.val_dataloader = config.val_evaluator = config.val_cfg = None
    barrier()  # every rank has found its input in order
    with made(Path(work_dir)):
        runner = build_runner(config, Path(config_path).stem, Path(work_dir))
    fill_segmenter(trained_model(runner.model), state, str(checkpoint))
    with worker_errors():
        runner.test()
    return finish(runner, runner.test_evaluator, started, write_model=False)


def read_trained(checkpoint: Path) -> tuple[Mapping[str, Tensor], SegmenterFile | None]:
    """The tensors of a segmenter file, of a run directory or of mmengine's checkpoint; and the file, if it is one."""
    if checkpoint.is_dir() or checkpoint.suffix == ".safetensors":
        file = read_segmenter(checkpoint)
        return file.state, file
    content = load_safely(str(checkpoint), "cpu")
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{checkpoint} holds no state_dict; give a segmenter.safetensors, or a checkpoint of a run")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}, None


def take_model(file: SegmenterFile, model: Mapping[str, Any]) -> dict[str, Any]:
    """The model section of a segmenter file, to be tested and padded as the one of another config."""
    taken = dict(file.config["model"])
    taken["backbone"] = {key: value for key, value in taken["backbone"].items() if key != "weights"}
    if model.get("test_cfg"):
        taken["test_cfg"] = model["test_cfg"]
    return taken


def finish(runner: Runner, evaluator: Evaluator, started: float, *, write_model: bool) -> dict[str, Any]:
    """Write metrics.json, report.html and, with ``write_model``, segmenter.safetensors; returns the metrics."""
    work_dir = Path(runner.work_dir)
    record = next((hook for hook in runner.hooks if isinstance(hook, RunRecord)), RunRecord())
    metrics = [metric for metric in evaluator.metrics if isinstance(metric, PerClassIoUMetric)]
    per_class = metrics[0].per_class if metrics else {}
    seconds = round(time.monotonic() - started, 1)
    results = {**record.metrics, "per_class": per_class, "steps": runner.iter, "seconds": seconds}
    runner.visualizer.close()
    if is_main_process():
        write_json(work_dir / layout.METRICS, results)
        write_run_report(work_dir, results)
        if write_model:
            write_segmenter(work_dir / SEGMENTER, runner)
    return results
