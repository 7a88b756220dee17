"""The plan of a classifier's training: ``mae classify train --dry-run`` and ``mae linprobe --dry-run`` say what a run
will be and take, with a few of its steps measured, and write nothing."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mae_core.data.labelled import LabelledPaths, TestImages
from mae_core.data.loading import share_of
from mae_core.data.rates import processes
from mae_core.models.classifier import learning_line
from mae_core.patches import as_pair
from mae_core.resuming import Resume
from mae_core.training.classification import Splits, steps_between
from mae_core.training.finetune import (
    finetune_optimizer,
    logits_of_zeros,
    prepare,
    scratch_line,
    unfit_recipe,
    weights_for,
)
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.frozen_config import LinprobeConfig
from mae_core.training.frozen_trunk import weights_of
from mae_core.training.linprobe import augmented_images, probe_optimizer, rates_of
from mae_core.training.linprobe import prepare as prepare_probe
from mae_core.training.loop import FitSettings
from mae_core.training.memory import GIB, available_memory, fixed_bytes
from mae_core.training.plan import (
    batch_line,
    cost_lines,
    cost_of_loss,
    measured,
    paired,
    planned,
    rate_line,
    seconds_of,
    spread_over,
    steps_line,
    time_lines,
)
from mae_core.training.precision import choose_precision
from mae_core.training.run import Run
from mae_core.weights.load import with_file

NAMES_SHOWN = 10
"""Classes that a plan names."""


class Training(NamedTuple):
    """What is measured of a training.

    whole       all parameters that are in memory, frozen ones too
    loss        number of images -> a scalar that depends on all that a step of so many computes, where ``whole`` is
    optimizer   of the parameters that learn
    images      the training images, by (epoch, index); None where a step reads none
    beside      seconds of what is in the run beside its steps, by what it is
    """

    whole: nn.Module
    loss: Callable[[int], Tensor]
    optimizer: torch.optim.Optimizer
    images: Dataset[Any] | None
    beside: Callable[[], dict[str, float]]


def print_finetune_plan(config: FinetuneConfig, *, resume: Resume = False) -> None:
    """Print the plan of a fine-tuning. Raises ``UserError`` as the run would."""
    config, source = weights_for(config)
    config, splits, model, report, statistics, settings, images = prepare(config, source, resume=False)
    optim, length = config.optim, len(images)
    loss = logits_of_zeros(model, config)
    views = TestImages(splits.val, config.data, as_pair(config.data.image_size), statistics)

    def evaluations() -> dict[str, float]:
        number = math.ceil(settings.total_steps / steps_between(config.evaluate_every, length, optim.batch_size))
        models = 1 if config.ema is None else 2  # the averaged one and the trained one
        seconds = number * models * passing(views, len(views), loss, config, run)
        return {evaluations_in_words(number, len(views)): seconds}

    with planned(config, resume) as run:
        if report is not None and run.is_main:
            report.print()
        rate = f"{rate_line(optim, settings)}; per block x {optim.layer_decay:g}; weight decay {optim.weight_decay:g}"
        lines = [scratch_line(config) if config.from_scratch else "", unfit_recipe(config) or "", *data_lines(splits)]
        lines += [batch_line(optim, run.world), rate, steps_line(optim, settings, length)]
        lines += [f"parameters: {sum(p.numel() for p in model.parameters()):,}"]
        tell(run, [*lines, learning_line(model, config.trainable_blocks)])
        training = Training(model, loss, finetune_optimizer(model, config, settings.lr), images, evaluations)
        tell(run, cost_and_time(config, settings, training, length, run))


def print_probe_plan(config: LinprobeConfig, *, resume: Resume = False) -> None:
    """Print the plan of a probe. Raises ``UserError`` as the run would."""
    source = weights_of(config)
    config = with_file(source, config, frozen=True)
    splits, trunk, probe, report, statistics = prepare_probe(config, source)
    optim, length, validation = config.optim, len(splits.train.paths), len(splits.val.paths)
    settings, rates, whole = FitSettings.of(optim, length), rates_of(optim), nn.ModuleList([trunk, probe.eval()])
    views = TestImages(splits.val, config.data, as_pair(config.data.image_size), statistics)
    pixels = (trunk.in_channels, *trunk.grid.image_size)
    features: tuple[int, ...] = (trunk.num_features,)
    if config.probe.kind == "attentive":
        features = (trunk.prefix + trunk.grid.num_patches, *features)

    def loss_with(model: nn.Module, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
        def loss(images: int) -> Tensor:
            device = next(whole.parameters()).device
            with choose_precision(config.precision, device).autocast(device):
                return model(torch.zeros(images, *shape, device=device)).float().sum()

        return loss

    def evaluations() -> dict[str, float]:
        number = math.ceil(settings.total_steps / steps_between(config.evaluate_every, length, optim.batch_size))
        seconds = number * passing(views, validation, loss_with(probe, pixels), config, run)
        return {evaluations_in_words(number, validation): seconds}

    def kept_features() -> dict[str, float]:
        seconds = passing(views, length + validation, loss_with(trunk, pixels), config, run)
        return {f"for the features of {length + validation} images, computed once": seconds}

    with planned(config, resume) as run:
        if run.is_main:
            report.print()
        more = f", {len(rates)} rates in the same pass" if len(rates) > 1 else ""
        rate = f"{rate_line(optim, settings)}; {optim.kind.upper()}, momentum {optim.momentum:g}{more}"
        learning, frozen = (sum(p.numel() for p in part.parameters()) for part in (probe, trunk))
        lines = [*data_lines(splits), batch_line(optim, run.world), rate, steps_line(optim, settings, length)]
        tell(run, [*lines, f"parameters: {learning:,} learn, {frozen:,} are frozen"])
        optimizer = probe_optimizer(probe, optim, settings.lr)
        if config.cache is None:
            images = augmented_images(config, splits, statistics)
            training = Training(whole, loss_with(probe, pixels), optimizer, images, evaluations)
        else:
            training = Training(whole, loss_with(probe, features), optimizer, None, kept_features)
        tell(run, cost_and_time(config, settings, training, length, run))


def tell(run: Run, lines: Sequence[str]) -> None:
    """Print the lines that are not empty."""
    for line in lines:
        if line:
            run.say(line)


def data_lines(splits: Splits) -> list[str]:
    """Images and classes, and how many training images a class has."""
    train, val, classes = splits.train, splits.val, splits.classes
    of_class = per_class(train)
    shown = ", ".join(classes[:NAMES_SHOWN])
    more = f", and {len(classes) - NAMES_SHOWN} more" if len(classes) > NAMES_SHOWN else ""
    spread = f"{min(of_class)} to {max(of_class)}" if min(of_class) < max(of_class) else f"{of_class[0]}"
    return [
        f"data: {len(train.paths)} training and {len(val.paths)} validation images of {len(classes)} classes, {spread} "
        "training images each",
        f"classes: {shown}{more}",
    ]


def per_class(files: LabelledPaths) -> list[int]:
    """Images of each class."""
    found = Counter(x for label in files.labels for x in ((label,) if isinstance(label, int) else label))
    return [found[label] for label in range(len(files.classes))]


def evaluations_in_words(number: int, images: int) -> str:
    """What the time of the evaluations is for."""
    return f"in {number} evaluation{'s' * (number > 1)} of {images} images"


def seconds_to_read(images: Any, places: Sequence[Any]) -> float:
    """Of one image, in one process."""
    started = time.perf_counter()
    for place in places:
        images[place]
    return (time.perf_counter() - started) / len(places)


def passing(views: TestImages, count: int, loss: Callable[[int], Tensor], config: Any, run: Run) -> float:
    """Seconds of ``count`` images, read as ``views`` reads its own, once through what ``loss`` computes."""

    def forward(images: int) -> Tensor:
        with torch.no_grad():
            return loss(images)

    computing = measured(forward, config.evaluation_batch, run.device).computing
    reading = seconds_to_read(views, spread_over(len(views)))
    return count / run.world * paired(reading, computing, processes(config.data.workers))


def cost_and_time(config: Any, settings: FitSettings, training: Training, length: int, run: Run) -> list[str]:
    """FLOPs, memory and time."""
    optim, images = config.optim, training.images
    share = share_of(optim.batch_size, run.world)
    micro = min(optim.micro_batch or share, share)
    cost = cost_of_loss(training.whole, training.loss, run.device.type)
    lines = cost_lines(cost, training.whole, optim.batch_size, micro)
    needed, there = fixed_bytes(training.whole) + cost.kept, available_memory(run.device)
    if needed > there:
        needs = f"one image needs {needed / GIB:.1f} GiB and {there / GIB:.1f} GiB are free"
        return [*lines, f"time: not measured, {needs}"]
    training.whole.to(run.device)
    speed = measured(lambda number: training.loss(number).backward(), micro, run.device)
    update = seconds_of(training.optimizer.step, run.device) * run.world / optim.batch_size
    reading, workers = 0.0, 0
    if images is not None:
        reading = seconds_to_read(images, [(0, index) for index in spread_over(length)])
        workers = processes(config.data.workers)
    speed = speed._replace(reading=reading, computing=speed.computing + update)
    return [*lines, *time_lines(speed, workers, optim.batch_size, settings.total_steps, run.world, training.beside())]
