"""detectron2's trainer on our samples: its loop, AMP and hooks, the core's checkpoints and log."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.solver import WarmupParamScheduler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger
from fvcore.common.param_scheduler import CosineParamScheduler, ParamScheduler
from torch import nn

from mae_core.data.images import Statistics
from mae_core.data.loading import make_loader
from mae_core.errors import UserError
from mae_core.seeds import STEP, derive_seed
from mae_core.training.loop import FitSettings, seed_everything
from mae_core.training.run import Run
from transfer.detection.engine import Fitted, Job
from transfer.detection.engine_detectron2.network import BRIGHTEST
from transfer.detection.heads import HEADS
from transfer.detection.samples import DetectionBatch, TrainingSamples, collate
from transfer.trunk import parameter_groups

WARMUP_START = 0.001
"""Share of the rate that ViTDet starts from."""
GAMMA = 0.1
"""What a milestone multiplies the rate with."""


def fit(model: nn.Module, job: Job) -> Fitted:
    """Train ``model`` with detectron2's trainer. Raises ``UserError`` where the loss becomes infinite."""
    config, run, settings = job.config, job.run, job.settings
    optim = config.optim
    groups = parameter_groups(
        model, layer_decay=optim.layer_decay, weight_decay=optim.weight_decay, decayed=optim.decayed
    )
    for group in groups:
        group["lr"] = group["initial_lr"] = settings.lr * group["lr_scale"]
    optimizer = ClippedAdamW(groups, lr=settings.lr, betas=config.optim.betas)
    optimizer.largest_norm = settings.clip_grad
    start = run.restore(model, optimizer) if job.resume else 0
    sampler = run.sampler(
        len(job.train_set.images), config.optim.batch_size, total_steps=settings.total_steps, start_step=start
    )
    masks, plain = HEADS[config.model.head].learns_masks, plain_pixels(config.data.channels)
    samples = TrainingSamples(job.train_set, config.data, plain, config.seed, masks=masks)
    loader = make_loader(samples, sampler, collate, workers=config.data.workers, pin=run.device.type == "cuda")
    devices = [run.device.index] if run.device.type == "cuda" else None
    parallel = create_ddp_model(model, device_ids=devices, broadcast_buffers=False)
    batches = Batches(loader, run, start)
    if run.device.type == "cuda" and run.precision != torch.float32:
        scaler = torch.amp.GradScaler(enabled=False)  # bf16 needs none, and the trainer would make one
        trainer: SimpleTrainer = AMPTrainer(parallel, batches, optimizer, grad_scaler=scaler, precision=run.precision)
    else:
        trainer = SimpleTrainer(parallel, batches, optimizer)
    log = config.log
    writers = [Lines(run, log.every, settings.total_steps)]
    if run.is_main:
        writers.append(CommonMetricPrinter(settings.total_steps))
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, rate_schedule(settings)),
            Checkpoints(run, model, optimizer, log.checkpoint_every, job.metadata),
            hooks.PeriodicWriter(writers, period=log.every),
        ]
    )
    model.train()
    began = time.perf_counter()
    if start < settings.total_steps:
        setup_logger(distributed_rank=run.rank)
        try:
            trainer.train(start, settings.total_steps)
        except FloatingPointError:
            raise UserError("the loss is not finite; lower optim.base_lr") from None
    loss = writers[0].loss
    return Fitted(model, time.perf_counter() - began if start < settings.total_steps else None, loss)


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips the norm of all gradients, where ``largest_norm`` is set, before a step."""

    largest_norm: float | None = None

    def step(self, closure: Any = None) -> Any:
        """One step."""
        if self.largest_norm is not None:
            every = [parameter for group in self.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(every, self.largest_norm)
        return super().step(closure)


class Steps(ParamScheduler):
    """A tenth from each milestone on. fvcore's own refuses runs so short that two milestones fall on one step, or on
    the end; here both count, or neither is reached, as in the core's loop."""

    def __init__(self, settings: FitSettings) -> None:
        self.total = settings.total_steps
        self.places = [round(share * self.total) for share in settings.milestones]

    def __call__(self, where: float) -> float:
        """Share of the run that is done -> multiplier of the rate."""
        return GAMMA ** bisect_right(self.places, int((where + self.WHERE_EPSILON) * self.total))


def rate_schedule(settings: FitSettings) -> WarmupParamScheduler:
    """detectron2's multiplier of the rate: steps at the milestones, else half a cosine, after a linear warm-up."""
    if settings.milestones:
        after: Any = Steps(settings)
    else:
        after = CosineParamScheduler(1.0, settings.min_lr / settings.lr)
    warmup = min(settings.warmup_steps, settings.total_steps - 1) / settings.total_steps
    return WarmupParamScheduler(after, warmup_factor=WARMUP_START, warmup_length=warmup)


def plain_pixels(channels: int) -> Statistics:
    """Statistics that leave pixels in 0..1: detectron2's networks standardise by themselves."""
    return Statistics((0.0,) * channels, (1.0,) * channels)


class Batches:
    """Batches as detectron2 takes them: lists of records of an image and its instances, padding cut off.

    Each seeds the step it is for, as the core's loop does, with (seed, step, rank) alone, so that a resume is exact;
    not earlier, because a starting loader draws.
    """

    def __init__(self, loader: Any, run: Run, start: int) -> None:
        self.loader, self.run, self.start = loader, run, start

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for step, batch in enumerate(self.loader, start=self.start):
            self.run.note_unreadable(batch.unreadable)
            seed_everything(derive_seed(self.run.config.seed, STEP, step, self.run.rank))
            yield records(batch)


def records(batch: DetectionBatch) -> list[dict[str, Any]]:
    """One record per sample, of pixels in 0..255; labels count from 0, as detectron2's do."""
    found = []
    for pixels, (rows, cols), target in zip(batch.pixels, batch.sizes, batch.targets, strict=True):
        instances = Instances((rows, cols))
        instances.gt_boxes = Boxes(target["boxes"])
        instances.gt_classes = target["labels"] - 1
        if "masks" in target:
            instances.gt_masks = BitMasks(target["masks"][:, :rows, :cols])
        image = BRIGHTEST * pixels[:, :rows, :cols]
        found.append({"image": image, "instances": instances, "height": rows, "width": cols})
    return found


class Checkpoints(HookBase):
    """The core's checkpoints, whole or absent, at their interval and at the end."""

    def __init__(
        self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, every: int, metadata: dict[str, Any]
    ) -> None:
        self.run, self.model, self.optimizer, self.every, self.metadata = run, model, optimizer, every, metadata

    def after_step(self) -> None:
        """Save where it is time to."""
        done = self.trainer.iter + 1
        if done % self.every == 0 or done == self.trainer.max_iter:
            self.run.checkpoint(done, self.model, self.optimizer, self.metadata)


class Lines(EventWriter):
    """Lines of log.jsonl and TensorBoard, as the core writes them."""

    def __init__(self, run: Run, every: int, steps: int) -> None:
        self.run, self.every, self.steps, self.loss = run, every, steps, float("nan")

    def write(self) -> None:
        """One line of the latest values, smoothed over the interval."""
        storage = get_event_storage()
        if storage.iter >= self.steps:  # the trainer calls once more after its last step
            return
        latest = storage.latest_with_smoothing_hint(self.every)
        values = {name: value for name, (value, _) in latest.items()}
        self.loss = values.get("total_loss", self.loss)
        self.run.record({"step": storage.iter + 1, "loss": self.loss, **values})
