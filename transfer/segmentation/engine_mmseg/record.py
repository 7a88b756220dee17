"""The hook that writes what a run directory holds while the run goes on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch.utils.data import DataLoader

from mae_core import layout
from mae_core.atomic import write_json, write_text
from mae_core.training.distributed import mean_over_ranks
from mae_core.training.progress import OtherWork, Progress
from mae_core.training.run import logged_by
from transfer.segmentation.drawing import Example, draw_examples
from transfer.segmentation.engine_mmseg.runner import bare_model
from transfer.segmentation.pixels import picture_of


class Screen:
    """Where the progress of a training is shown; the log is written beside it."""

    held_out: float | None = None

    def say(self, text: str) -> None:
        """A line, on rank 0."""
        if is_main_process():
            print(text, flush=True)

    def record(self, event: dict[str, Any]) -> None:
        """Nothing: the log has its own entry."""

    def share_unreadable(self) -> None:
        """Nothing: unreadable images are named where they are met."""


@HOOKS.register_module()
class RunRecord(Hook):
    """Writes log.jsonl, pictures of predictions beside the truth and, before the first step, the loading report; shows
    the progress that every training of the toolkit shows.

    interval  training steps between two lines; num_pictures: validation images drawn, evenly spaced
    """

    priority = "LOW"  # after the hooks that compute what is written here

    def __init__(self, interval: int = 20, num_pictures: int = 6) -> None:
        self.interval = interval
        self.num_pictures = num_pictures
        self.examples: list[Example] = []
        self.metrics: dict[str, Any] = {}
        self.progress: Progress | None = None
        self.validation, self.saving = OtherWork(1), OtherWork(1)
        self.ended = self.began = self.saved = 0.0

    def before_train(self, runner: Runner) -> None:
        """Write the loading report; of a resumed run's log, drop the steps that will be done again."""
        saves = [hook.interval for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.interval > 0]
        images = len(runner.val_loop.dataloader.dataset) if runner.val_loop is not None else 0
        # an image is tested whole, and its scores at its own size: about as long as a step of a crop (CamVid, CPU)
        self.validation = OtherWork(runner.train_loop.val_interval, worth=images)
        self.saving = OtherWork(max(saves, default=runner.max_iters))
        besides = [self.validation, self.saving]
        self.progress = Progress(Screen(), runner.iter, runner.max_iters, self.interval, besides=besides)
        self.ended = time.perf_counter()
        if not is_main_process():
            return
        loading = getattr(getattr(bare_model(runner.model), "backbone", None), "loading", None)
        if loading is not None:
            write_json(Path(runner.work_dir, layout.LOADING), loading.as_dict())
        log = Path(runner.work_dir, layout.LOG)
        if log.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(log, "".join(f"{line}\n" for line in lines if logged_by(line, runner.iter)))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Count how long the batch was waited for, and what was saved before."""
        if self.progress is None:
            return
        so_far = getattr(runner, "seconds_saving", 0.0)  # mmengine's own runner does not count them
        saving, self.saved = so_far - self.saved, so_far
        if saving:
            self.progress.took(saving, self.saving)
        self.progress.waited(max(0.0, time.perf_counter() - self.ended - saving))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """A line of losses, learning rate and seconds in the log, and the progress."""
        self._log_step(runner)
        if self.progress is not None:
            images = len(data_batch["inputs"]) * get_world_size()
            rate = max(runner.optim_wrapper.get_lr()["lr"])
            self.progress.step(runner.iter + 1, images, {"loss": outputs["loss"].detach()}, rate)
            self.ended = time.perf_counter()

    def before_val(self, runner: Runner) -> None:
        """Note when it began."""
        self.began = time.perf_counter()

    def after_val(self, runner: Runner) -> None:
        """Count what it took, which is no training."""
        if self.progress is not None:
            self.progress.took(time.perf_counter() - self.began, self.validation)
            self.ended = time.perf_counter()

    def _log_step(self, runner: Runner) -> None:
        if not (self.every_n_train_iters(runner, self.interval) or runner.iter + 1 == runner.max_iters):
            return
        scalars = runner.message_hub.log_scalars
        losses = {key[6:]: scalars[key].mean(self.interval) for key in scalars if re.match(r"train/.*(loss|acc)", key)}
        device = next(runner.model.parameters()).device
        means = mean_over_ranks(torch.tensor([*losses.values()], dtype=torch.float64, device=device))
        losses = dict(zip(losses, means.tolist(), strict=True))
        rest = {key: scalars[f"train/{key}"].current() for key in ("lr", "time", "data_time")}
        self._record(runner, {"step": runner.iter + 1, **losses, **rest})

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keep the predictions of the images that are drawn."""
        self._keep(runner.val_dataloader, batch_idx, outputs)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """As in validation."""
        self._keep(runner.test_dataloader, batch_idx, outputs)

    def _keep(self, loader: DataLoader, batch_idx: int, outputs: Any) -> None:
        total = len(loader.dataset)
        first = batch_idx * (loader.batch_size or 1)
        drawn = {round(index * total / self.num_pictures) for index in range(self.num_pictures)}
        for position, sample in enumerate(outputs or []):
            if first + position in drawn and is_main_process():
                labels = [part.data.squeeze(0).cpu().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg)]
                self.examples.append(Example(picture_of(sample.img_path), *labels))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """A line of metrics, and the picture."""
        self._tell(runner, runner.val_dataloader.dataset.metainfo, metrics)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """As in validation."""
        self._tell(runner, runner.test_dataloader.dataset.metainfo, metrics)

    def _tell(self, runner: Runner, meta: Mapping[str, Any], metrics: dict[str, float] | None) -> None:
        found = (metrics or {}).items()
        self.metrics = {key: round(float(value), 2) for key, value in found if not key.endswith("time")}
        self._record(runner, {"step": runner.iter, **self.metrics})
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
