"""The training loop: one function, for pre-training, fine-tuning and the engines that bring no loop of their own.

The batch size is that of an optimizer step over all ranks and accumulation rounds, so that neither changes what is
computed where each sample is computed by itself, as in pre-training. Mixup, drop path and batch norm look at, or draw
for, the images that a device has at once: with these, ranks and accumulation rounds change the numbers.
All randomness of a step comes from (run seed, step, rank); with the sampler's, the state of a run is model,
optimizer, step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mae_core.config.sections import ScheduleConfig
from mae_core.data.loading import Batch, Place, StepSampler, share_of, steps_for
from mae_core.seeds import STEP, derive_seed
from mae_core.training.culprit import write_dump
from mae_core.training.deciding import Decisions
from mae_core.training.distributed import gather, mean_over_ranks, refuse_unused, world_size
from mae_core.training.finite import SkippedSteps, bad_samples, gradient_norm, non_finite
from mae_core.training.machine_faults import machine_faults, smaller_runs
from mae_core.training.progress import OtherWork, Progress
from mae_core.training.run import Run
from mae_core.training.sharding import is_sharded, unsharded, whole
from mae_core.training.signals import Signals

LossOf = Callable[[nn.Module, Any], dict[str, Tensor]]
"""(model, batch) -> named scalars; "loss" is what is minimised, the mean over the batch."""


class Hook(NamedTuple):
    """What to ``call`` with the number of steps, after ``every`` so many and after the last one. ``worth``: how many
    images of a training step take as long, as a guess until it was measured."""

    every: int
    call: Callable[[int], None]
    worth: float = 0.0


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast; ``milestones``, shares of the steps, make the schedule one of steps."""

    total_steps: int
    warmup_steps: int
    lr: float
    min_lr: float = 0.0
    micro_batch: int | None = None
    clip_grad: float | None = None
    milestones: tuple[float, ...] = ()

    @classmethod
    def of(cls, optim: ScheduleConfig, length: int) -> FitSettings:
        """From a configuration and the number of training images.

        Raises ``UserError`` where the batch does not divide among the ranks, before anything is written.
        """
        share_of(optim.batch_size, world_size())
        return cls(
            total_steps=steps_for(length, optim.batch_size, optim.epochs),
            warmup_steps=round(length * optim.warmup_epochs / optim.batch_size),
            lr=optim.lr,
            min_lr=optim.min_lr,
            micro_batch=optim.micro_batch,
            clip_grad=optim.clip_grad,
        )


class FitResult(NamedTuple):
    """The mean loss of the last log interval, seconds this process trained, images per second over them."""

    loss: float
    seconds: float
    images_per_second: float


def forward_share(model: nn.Module) -> float:
    """How much of a training step is its forward pass: a third where all learns, all where nothing does."""
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    learning = sum(number for number, learns in numbers if learns) / max(1, sum(number for number, _ in numbers))
    return 1 / (1 + 2 * learning)


def cosine_schedule(optimizer: torch.optim.Optimizer, settings: FitSettings) -> CosineLRScheduler:
    """Linear warm-up from 0, half-cosine to ``min_lr``, per step (paper, A.1; official ``lr_sched.py``); honours
    lr_scale."""
    warmup = min(settings.warmup_steps, settings.total_steps - 1)
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
        group["initial_lr"] = settings.lr
    return CosineLRScheduler(
        optimizer,
        t_initial=settings.total_steps - warmup,
        lr_min=settings.min_lr,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def step_schedule(optimizer: torch.optim.Optimizer, settings: FitSettings) -> MultiStepLRScheduler:
    """Linear warm-up from a thousandth, then a tenth of the rate from each milestone on (ViTDet, A.2); honours
    lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
        group["initial_lr"] = settings.lr
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[round(share * settings.total_steps) + 1 for share in settings.milestones],  # timm is a step early
        decay_rate=0.1,
        warmup_t=min(settings.warmup_steps, settings.total_steps - 1),
        warmup_lr_init=0.001 * settings.lr,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_of: LossOf,
    optimizer: torch.optim.Optimizer,
    *,
    run: Run,
    settings: FitSettings,
    start_step: int = 0,
    hooks: Sequence[Hook] = (),
    changes: Mapping[int, Callable[[], None]] | None = None,
    metadata: dict[str, Any] | None = None,
    chance_loss: float | None = None,
    after: float = 0.0,
) -> FitResult:
    """Train from ``start_step`` to ``settings.total_steps``; ``batches`` yields one batch (this rank's share) per step.

    ``chance_loss`` is that of a prediction which does not depend on the image: staying there is said. ``after``: what
    the command does after the last step, as ``Hook.worth``, for the time left.
    Logs, checkpoints and calls the hooks as the run's configuration says. A step whose loss or gradient is not finite
    on any rank is skipped on all and recorded; too many of them end the run with a ``UserError``.
    """
    log = run.config.log
    schedule: Scheduler = (step_schedule if settings.milestones else cosine_schedule)(optimizer, settings)
    parallel = over_ranks(model, run)
    precision = run.autocast()
    between = [OtherWork(hook.every, hook.worth) for hook in hooks]
    saving, ending_work = OtherWork(log.checkpoint_every), OtherWork(settings.total_steps, after)
    besides = [*between, saving, ending_work]
    progress = Progress(run, start_step, settings.total_steps, log.every, chance_loss, besides)
    skipped = SkippedSteps(run.record, run.say)

    def ending(batch: Batch, step: int) -> str:
        if not any(gather(non_finite(whole(model.state_dict())))):
            run.checkpoint(step + 1, model, optimizer, metadata or {})
        return dump_step(model, batches, batch, loss_of, step, run, settings)

    decisions = Decisions(
        model,
        optimizer,
        skipped,
        files_of=lambda batch, step: bad_files(batches, batch, step),
        ending=ending,
        device=run.device,
        clip_grad=settings.clip_grad,
    )
    saved = time.monotonic()
    with Signals(log.stop_seconds) as signals, machine_faults(smaller_runs(run.config)), saved_to_the_end(run):
        stream = iter(batches)
        model.train()
        for step in range(start_step, settings.total_steps):
            if changes and step in changes:
                changes[step]()
                parallel = over_ranks(model, run)  # it gathers the gradients of what learnt when it was made
            schedule.step_update(step)
            with progress.waiting():
                batch = next(stream)
            seed_everything(derive_seed(run.config.seed, STEP, step, run.rank))  # a starting loader draws
            run.note_unreadable(batch.unreadable)
            optimizer.zero_grad(set_to_none=True)
            decisions.statistics.keep()
            losses = backward(parallel, batch, loss_of, run.device, precision, settings.micro_batch)
            norm = gradient_norm(model.parameters())
            done = step + 1
            losses |= {"gradient_norm": norm}
            if settings.clip_grad is not None:
                losses |= {"clipped": (norm > settings.clip_grad).float()}
            losses, counted = decisions.take(step, batch, losses, norm)
            rate = max(group["lr"] for group in optimizer.param_groups)
            progress.step(done, len(batch) * run.world, losses, rate, counted)
            last = done == settings.total_steps
            late = time.monotonic() - saved > 60 * log.checkpoint_minutes
            late = late or run.saving.error is not None  # all ranks save again, and wait
            stop, due = signals.agreed(late, run.device, deferred=decisions.deferred)
            due = due or done % log.checkpoint_every == 0
            if stop or due or last or any(done % hook.every == 0 for hook in hooks):
                decisions.settle()
            if stop and not last:  # before pictures and evaluations, for which there may be no time
                run.checkpoint(done, model, optimizer, metadata or {}, wait=True)
                signals.saved = True
            for hook, beside in zip(hooks, between, strict=True):
                if done % hook.every == 0 or last:
                    run.saving.join()  # a hook may start processes, which should not be copies of a writing one
                    with progress.paused(beside), unsharded(model):
                        hook.call(done)
                    model.train()
            if last or (due and not stop) or run.best_so_far(done):
                with progress.paused(saving):
                    run.checkpoint(done, model, optimizer, metadata or {}, wait=last)
                saved = time.monotonic()
            if stop and not last:
                run.say(signals.told(done, settings.total_steps))
                run.close()
                raise signals.stopped()
    skipped.summary()
    return FitResult(progress.loss, progress.seconds, progress.images_per_second)


@contextmanager
def saved_to_the_end(run: Run) -> Iterator[None]:
    """Around a training: however it ends, a checkpoint that is being written is written first."""
    try:
        yield
    finally:
        run.saving.join()


def bad_files(batches: Iterable[Batch], batch: Batch, step: int) -> list[str]:
    """Names of the images, on all ranks, whose pixels are not finite or far from any picture's; all ranks must call
    it."""
    pixels, (_, names) = getattr(batch.to(torch.device("cpu")), "pixels", None), samples_of(batches, step)
    mine = [names[position] for position in bad_samples(pixels)] if pixels is not None and names else []
    return list(dict.fromkeys(name for found in gather(mine) for name in found))


def samples_of(batches: Iterable[Batch], step: int) -> tuple[list[Place], list[str]]:
    """Places and names of this rank's images of a step; empty where the loader does not say them by
    ``batch_sampler.places`` and ``dataset.name_of``."""
    sampler = getattr(batches, "batch_sampler", None)
    name_of = getattr(getattr(batches, "dataset", None), "name_of", None)
    places = sampler.places(step) if isinstance(sampler, StepSampler) else []
    return places, [] if name_of is None else [name_of(index) for _, index in places]


def dump_step(
    model: nn.Module,
    batches: Iterable[Batch],
    batch: Batch,
    loss_of: LossOf,
    step: int,
    run: Run,
    settings: FitSettings,
) -> str:
    """Do a step that was skipped again, watched, and write what ``mae replay`` needs -> what to tell."""
    seed = derive_seed(run.config.seed, STEP, step, run.rank)

    def compute(watched: nn.Module) -> dict[str, Tensor]:
        seed_everything(seed)
        return backward(watched, batch, loss_of, run.device, run.autocast(), settings.micro_batch)

    places, names = samples_of(batches, step)
    return write_dump(run, step + 1, model, compute, places=places, files=names, step_seed=seed)


def over_ranks(model: nn.Module, run: Run) -> nn.Module:
    """``model``, with gradients averaged over all ranks where there are several; a sharded one does that by itself."""
    alone = run.world == 1 or is_sharded(model)
    return model if alone else refuse_unused(DistributedDataParallel(model))


def backward(
    model: nn.Module,
    batch: Batch,
    loss_of: LossOf,
    device: torch.device,
    precision: torch.autocast,
    micro_batch: int | None,
) -> dict[str, Tensor]:
    """Gradients of the mean loss over ``batch``, in parts of ``micro_batch`` -> the losses, averaged over all ranks."""
    parts = batch.split(micro_batch or len(batch))
    totals: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        wait = isinstance(model, DistributedDataParallel) and number < len(parts) - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == len(parts) - 1)
        with model.no_sync() if wait else nullcontext():
            with precision:
                losses = loss_of(model, part.to(device))
            share = len(part) / len(batch)
            (losses["loss"] * share).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() * share
    averaged = mean_over_ranks(torch.stack(list(totals.values())))
    return dict(zip(totals, averaged, strict=True))


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
