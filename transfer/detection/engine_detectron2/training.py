"""detectron2's trainer on our samples: its loop and hooks, the core's precision, rates, checkpoints and log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from mae_core.data.images import Statistics
from mae_core.errors import UserError
from mae_core.seeds import STEP, derive_seed
from mae_core.training.distributed import refuse_unused
from mae_core.training.finite import SkippedSteps, gradient_norm
from mae_core.training.loop import FitSettings, cosine_schedule, seed_everything, step_schedule
from mae_core.training.machine_faults import machine_faults, smaller_runs
from mae_core.training.run import Run
from mae_core.training.signals import Signals
from transfer.detection.engine import Fitted, Job
from transfer.detection.engine_detectron2.network import BRIGHTEST
from transfer.detection.samples import DetectionBatch


def fit(model: nn.Module, job: Job) -> Fitted:
    """Train ``model`` with detectron2's trainer, under the laws of the core's loop for signals, checkpoints and numbers
    that are not finite."""
    config, run, settings = job.config, job.run, job.settings
    groups = job.parameter_groups(model)
    for group in groups:
        group["lr"] = group["initial_lr"] = settings.lr * group["lr_scale"]
    optimizer = ClippedAdamW(groups, lr=settings.lr, betas=config.optim.betas)
    optimizer.largest_norm, optimizer.skipped = settings.clip_grad, SkippedSteps(run.record, run.say)
    start = run.restore(model, optimizer)
    devices = [run.device.index] if run.device.type == "cuda" else None
    parallel = refuse_unused(create_ddp_model(InPrecision(model, run), device_ids=devices, broadcast_buffers=False))
    batches = Batches(job.batches(start, plain_pixels(config.data.channels)), run, start)
    trainer = Trainer(parallel, batches, optimizer)  # AMPTrainer refuses CPUs
    trainer.smaller = smaller_runs(config)
    log, signals = config.log, Signals(config.log.stop_seconds)
    writers = [Lines(run, log.every, settings.total_steps)]
    if run.is_main:
        writers.append(CommonMetricPrinter(settings.total_steps))
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, CoreRate(settings)),
            Checkpoints(run, model, optimizer, job.metadata, signals),
            hooks.PeriodicWriter(writers, period=log.every),
        ]
    )
    model.train()
    began = time.perf_counter()
    if start < settings.total_steps:
        setup_logger(distributed_rank=run.rank)
        logging.getLogger(SimpleTrainer.__module__).addFilter(is_no_mistake)
        with signals:
            trainer.train(start, settings.total_steps)
        optimizer.skipped.summary()
    loss = writers[0].loss
    return Fitted(model, time.perf_counter() - began if start < settings.total_steps else None, loss)


def is_no_mistake(record: logging.LogRecord) -> bool:
    """Whether a message of the trainer's is not the traceback of what is said in one sentence elsewhere."""
    return record.exc_info is None or not isinstance(record.exc_info[1], UserError | FloatingPointError)


class Trainer(SimpleTrainer):
    """detectron2's, which ends at the first loss that is not finite; here the optimizer decides by the gradient, which
    is the same on all ranks."""

    smaller: Sequence[str] = ()

    def run_step(self) -> None:
        """detectron2's; what the machine does to it is said in a sentence."""
        with machine_faults(self.smaller):
            super().run_step()

    def _write_metrics(self, *args: Any, **more: Any) -> None:
        try:
            super()._write_metrics(*args, **more)
        except FloatingPointError:
            return


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips the norm of all gradients, where ``largest_norm`` is set, before a step, and takes none where
    it is not finite."""

    largest_norm: float | None = None
    skipped: SkippedSteps

    def step(self, closure: Any = None) -> Any:
        """One step."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = gradient_norm(every)
        if not bool(torch.isfinite(norm)):
            self.skipped.skip(get_event_storage().iter + 1, None, float(norm))
            return None
        if self.largest_norm is not None:
            nn.utils.clip_grads_with_norm_(every, self.largest_norm, norm)
        self.skipped.taken()
        return super().step(closure)


class CoreRate(ParamScheduler):
    """The multiplier of the rate that the core's loop would set, so that a recipe has one law on both engines: linear
    warm-up, then half a cosine over the rest (as MAE's own fine-tuning code), or a tenth from each milestone on (as
    ViTDet)."""

    def __init__(self, settings: FitSettings) -> None:
        self.settings = settings
        self.probe = torch.optim.SGD([torch.zeros(1)], lr=settings.lr)
        self.schedule = (step_schedule if settings.milestones else cosine_schedule)(self.probe, settings)

    def __call__(self, where: float) -> float:
        """Share of the run that is done -> multiplier of the rate."""
        self.schedule.step_update(round(where * self.settings.total_steps))
        return self.probe.param_groups[0]["lr"] / self.settings.lr


class InPrecision(nn.Module):
    """A network whose training pass runs in the run's precision, on a GPU or a CPU; where it finds that its numbers are
    not finite, so are the loss and all gradients, and the step is skipped on all ranks."""

    def __init__(self, network: nn.Module, run: Run) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Records -> losses."""
        try:
            with self.run.autocast():
                return self.network(batch)
        except FloatingPointError:
            every = [parameter.sum() for parameter in self.network.parameters() if parameter.requires_grad]
            return {"loss_not_finite": torch.stack(every).sum() * float("nan")}


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
    """The core's checkpoints, whole or absent, by their interval, by time, at the end, and before a signal ends it."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        metadata: dict[str, Any],
        signals: Signals,
    ) -> None:
        self.run, self.state, self.signals = run, (model, optimizer, metadata), signals
        self.log, self.saved = run.config.log, time.monotonic()

    def after_step(self) -> None:
        """Save where it is time to; end the training after a signal."""
        done, total = self.trainer.iter + 1, self.trainer.max_iter
        late = time.monotonic() - self.saved > 60 * self.log.checkpoint_minutes
        stop, due = self.signals.agreed(late, self.run.device)
        if done % self.log.checkpoint_every == 0 or due or stop or done == total:
            self.run.checkpoint(done, *self.state)
            self.saved = time.monotonic()
        if stop and done < total:
            self.run.say(self.signals.told(done, total))
            self.run.close()
            raise self.signals.stopped()


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
