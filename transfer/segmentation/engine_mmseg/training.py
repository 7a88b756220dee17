"""A training from the config to metrics.json and segmenter.safetensors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from mmseg.utils import register_all_modules

from mae_core import layout
from mae_core.atomic import write_json
from mae_core.conversion.loading import read_encoder
from mae_core.training.distributed import barrier, world_size
from transfer.segmentation import config as configs
from transfer.segmentation.engine_mmseg.checkpoints import load_safely
from transfer.segmentation.engine_mmseg.checks import check_data, check_model
from transfer.segmentation.engine_mmseg.metric import PerClassIoUMetric
from transfer.segmentation.engine_mmseg.options import read_config
from transfer.segmentation.engine_mmseg.record import RunRecord
from transfer.segmentation.engine_mmseg.runner import SegmentationRunner, worker_errors
from transfer.segmentation.engine_mmseg.segmenter import SEGMENTER, write_segmenter


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
