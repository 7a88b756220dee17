"""The plan of a run: ``mae pretrain --dry-run`` says what a run will be and take, with a few of its steps measured, and
writes nothing. The lines about batch, rate, steps, memory and time are those of the other dry runs too."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_core.config.load import config_differences
from mae_core.config.sections import JobConfig, ScheduleConfig
from mae_core.counting import clock
from mae_core.data.images import statistics_of
from mae_core.data.loading import check_repeats, share_of
from mae_core.data.rates import processes
from mae_core.data.sources import damaged_parts, open_source
from mae_core.data.unlabelled import UnlabelledImages, collate
from mae_core.errors import refusal_note
from mae_core.masking import PatchMask, SampleMasks
from mae_core.models.block import kernels_as_on
from mae_core.models.mae import MaskedAutoencoder
from mae_core.models.sizes import SIZES
from mae_core.models.timm_trunk import checkpoint_blocks
from mae_core.resuming import Resume
from mae_core.training import distributed
from mae_core.training.adapting import Adapted
from mae_core.training.loop import FitSettings, backward, seed_everything
from mae_core.training.memory import BYTES_PER_PARAMETER, GIB, available_memory, fixed_bytes, kept_per_image
from mae_core.training.micro_batch import with_micro_batch
from mae_core.training.pretrain import announce, build_pretrain_model, loss_of_zeros, pretrain_loss, pretrain_optimizer
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import Run, check_output
from mae_core.training.statistics import with_statistics
from mae_core.training.warm_start import load_start, started_from, weights_facts
from mae_core.training.watch import split_images

PAPER_SIZES = ("base", "large", "huge")
ALSO_IN_PAPER = {"optim.epochs": ("800.0", "1600.0"), "target.kind": ("pixels", "normalized_pixels")}
"""Leaves of which Table 8 or Table 1's default row has another value than the schema."""
COMPARED = ("model.", "decoder.", "masking.", "target.", "optim.", "data.", "watch.share", "weights", "adapt.")
NOT_A_RECIPE = (
    *("data.path", "data.source", "data.split", "data.workers", "data.on_error", "data.max_pixels"),
    *("data.cache", "data.cache_gb"),
    *("optim.micro_batch", "model.checkpointing", "model.compile"),
    "data.statistics",  # the mean and std themselves are compared
)
TIMED_STEPS = 3
IMAGES_READ = 16
GROWTH = 4
SECONDS_A_STEP = 5.0
"""A measured step takes fewer images where as many as the run's would take longer than this."""


class Cost(NamedTuple):
    """Of one image: FLOPs forward, forward and backward, and bytes that are kept for the backward pass."""

    forward: int
    total: int
    kept: int


class Speed(NamedTuple):
    """Measured: seconds an image to read it in one process, and to compute it; how many were computed at once, and how
    often."""

    reading: float
    computing: float
    at_once: int
    steps: int = TIMED_STEPS


@contextmanager
def planned(config: JobConfig, resume: Resume = False) -> Iterator[Run]:
    """A run that writes nothing, and the last lines of its plan."""
    try:
        run = Run(config, distributed.join(config.device, config.rank_timeout))
        yield run
        if note := output_note(config, resume):
            run.say(note)
        run.say("dry run: nothing was written")
    finally:
        distributed.leave()


def output_note(config: JobConfig, resume: Resume) -> str:
    """A line with why a run is refused its output folder; empty where it is not, and with "auto", which takes any."""
    return "" if resume == "auto" else refusal_note(lambda: check_output(config, resume=resume))


def print_plan(config: PretrainConfig, say: Callable[[str], None] = print, *, resume: Resume = False) -> None:
    """Print the plan of a run, its cost, and what differs from the paper. Raises ``UserError`` as the run would."""
    config, start = started_from(config, resume=False)
    source = open_source(config.data)
    for path, reason in damaged_parts(source):
        say(f"damaged: {path} ({reason})")
    config = with_statistics(config, source, resume=False, weights=weights_facts(start, config.data))
    watched = split_images(config, source)
    images = UnlabelledImages(watched.training, config.data, config.seed)
    images.fixed_views(1)
    check_repeats(config.optim.batch_size, distributed.world_size(), config.data.repeats)
    seed_everything(config.seed)
    model = build_pretrain_model(config, start).train()
    if start is not None:
        load_start(model, start, config.data).print()
    Adapted(model, config.adapt)
    checkpoint_blocks(model, on=config.model.checkpointing)
    config = with_micro_batch(config, model, loss_of_zeros(model, config), resume=False)
    settings = FitSettings.of(config.optim, len(images))
    images.masks = SampleMasks(model.masker, model.encoder.grid)
    with planned(config, resume) as run:
        announce(run.say, config, model, len(images), settings)
        for line in plan(config, model, settings, len(images), run.world):
            run.say(line)
        for line in parameter_lines(model):
            run.say(line)
        cost = cost_of(model, config, run.precision, run.device.type)
        micro = min(settings.micro_batch or config.optim.batch_size, share_of(config.optim.batch_size, run.world))
        for line in cost_lines(cost, model, config.optim.batch_size, micro):
            run.say(line)
        needed, there = fixed_bytes(model) + cost.kept, available_memory(run.device)
        if needed > there:
            run.say(f"time: not measured, one image needs {needed / GIB:.1f} GiB and {there / GIB:.1f} GiB are free")
        else:
            speed = measure_speed(model, images, config, run, micro)
            workers, batch = processes(config.data.workers), config.optim.batch_size
            for line in time_lines(speed, workers, batch, settings.total_steps, run.world):
                run.say(line)
        for line in differences_from_paper(config):
            run.say(line)


def plan(config: PretrainConfig, model: MaskedAutoencoder, settings: FitSettings, length: int, world: int) -> list[str]:
    """Batch, learning rate, steps and tokens."""
    optim = config.optim
    mask = model.masker(1, model.encoder.grid, torch.Generator().manual_seed(0))
    hidden, visible = mask.hidden_ids.shape[1], mask.visible_ids.shape[1]
    seen = model.encoder.grid.num_patches if model.mask_token is not None else visible
    dropped = round(length // optim.batch_size * optim.epochs)
    return [
        batch_line(optim, world) + repeats_in_words(config),
        f"{rate_line(optim, settings)}; weight decay {optim.weight_decay:g}, betas {optim.betas[0]:g}, "
        f"{optim.betas[1]:g}",
        steps_line(optim, settings, length)
        + (f"; {dropped} where the end of an epoch is dropped, as in the official code" if dropped else ""),
        f"tokens: {hidden + visible} patches, {hidden} masked and {visible} visible ({config.masking.kind}, "
        f"{config.masking.ratio:g}); the encoder runs on {seen} + 1, the decoder on {hidden + visible} + 1",
    ]


def devices_in_words(number: int) -> str:
    """1 device, 8 devices."""
    return f"{number} device{'s' if number > 1 else ''}"


def batch_line(optim: ScheduleConfig, devices: int) -> str:
    """How the images of a step fall to devices and micro-batches."""
    share = share_of(optim.batch_size, devices)
    micro = min(optim.micro_batch or share, share)
    line = f"batch: {optim.batch_size} images per step: {devices_in_words(devices)} x {share}"
    if micro == share:
        return line
    return f"{line}, in {math.ceil(share / micro)} micro-batches of {'at most ' if share % micro else ''}{micro}"


def repeats_in_words(config: PretrainConfig) -> str:
    """How many images are decoded for a batch, where it is not as many as it has."""
    repeats = config.data.repeats
    if repeats == 1:
        return ""
    return f"; {config.optim.batch_size // repeats} images decoded, {repeats} crops and masks of each"


def rate_line(optim: ScheduleConfig, settings: FitSettings) -> str:
    """The learning rate by the linear rule, and its schedule."""
    drops = ", ".join(f"step {round(share * settings.total_steps)}" for share in settings.milestones)
    shape = f"a tenth from {drops} on" if drops else f"half-cosine to {settings.min_lr:g}"
    return (
        f"learning rate: {optim.base_lr:g} x {optim.batch_size} / 256 = {settings.lr:.6g} at its peak, warm-up "
        f"{settings.warmup_steps} steps, {shape}"
    )


def steps_line(optim: ScheduleConfig, settings: FitSettings, length: int) -> str:
    """Steps and epochs of ``length`` images, and a note where a step takes more than there are."""
    line = f"steps: {settings.total_steps} = {optim.epochs:g} epochs of {length / optim.batch_size:.6g} steps"
    if optim.batch_size <= length:
        return line
    return (
        f"{line}; note: optim.batch_size={optim.batch_size} is more than the {length} images, so that a step takes "
        f"each of them again; set optim.batch_size={length} or less"
    )


def parameter_lines(model: MaskedAutoencoder) -> list[str]:
    """Totals, and fvcore's table where it is installed."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    total = sum(p.numel() for p in model.parameters())
    lines = [f"parameters: {total:,}: encoder {counts['encoder']:,}, decoder {counts['decoder']:,}"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fvcore's own, of torch.jit
            from fvcore.nn import parameter_count_table
    except ImportError:
        return [*lines, "  pip install fvcore for a table of them"]
    return [*lines, str(parameter_count_table(model, max_depth=2))]


def cost_of(model: MaskedAutoencoder, config: PretrainConfig, precision: torch.dtype, device_type: str = "cpu") -> Cost:
    """Of one image of a pre-training, see ``cost_of_loss``."""

    def loss(images: int) -> Tensor:
        pixels = torch.zeros(images, config.data.channels, *model.encoder.grid.image_size)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            return model(pixels, generator=torch.Generator().manual_seed(0), predict_visible=False).loss

    return cost_of_loss(model.cpu(), loss, device_type)


def cost_of_loss(model: nn.Module, loss: Callable[[int], Tensor], device_type: str) -> Cost:
    """Of one image of what ``loss`` computes of so many with ``model`` on the CPU: torch's counter, attention as plain
    matrix products, whatever kernel the run uses; the bytes are those of the kernels of a device of ``device_type``."""
    forward, whole = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), whole:
        with forward:
            found = loss(1)
        found.backward()
    model.zero_grad(set_to_none=True)
    with kernels_as_on(device_type):
        kept = kept_per_image(loss, model)
    return Cost(forward.get_total_flops(), whole.get_total_flops(), kept)


def cost_lines(cost: Cost, model: nn.Module, batch_size: int, micro: int) -> list[str]:
    """FLOPs and memory."""
    fixed = fixed_bytes(model)
    return [
        f"FLOPs: {cost.total * batch_size:.4g} per step = {batch_size} images x {cost.total:.4g} forward and backward "
        f"({cost.forward:.4g} forward), a multiplication and an addition counted as two",
        f"memory, estimated: {(fixed + cost.kept * micro) / GIB:.2f} GiB = {fixed / GIB:.2f} GiB for "
        f"{', '.join(BYTES_PER_PARAMETER)}, and {cost.kept * micro / GIB:.2f} GiB for {micro} images at once "
        f"({cost.kept / 2**20:.1f} MiB each)",
    ]


def measure_speed(
    model: MaskedAutoencoder, images: UnlabelledImages, config: PretrainConfig, run: Run, micro: int
) -> Speed:
    """Time reading and a few optimizer steps of the model, which is changed by them."""
    chosen = spread_over(len(images))
    before = time.perf_counter()
    samples = images.__getitems__([(repeat, index) for index in chosen for repeat in range(config.data.repeats)])
    reading = (time.perf_counter() - before) / len(samples)
    batch: Any = collate(samples)
    model.to(run.device)
    optimizer = pretrain_optimizer(model, config)
    precision = run.autocast()

    def step(at_once: int) -> None:
        chosen = [index % len(batch) for index in range(at_once)]
        mask = PatchMask.cat([batch.mask.samples(index, index + 1) for index in chosen])
        part: Any = replace(batch, pixels=batch.pixels[chosen], mask=mask)
        backward(model, part, pretrain_loss, run.device, precision, None)

    speed = measured(step, micro, run.device)
    update = seconds_of(optimizer.step, run.device) * run.world / config.optim.batch_size
    return speed._replace(reading=reading, computing=speed.computing + update)


def spread_over(length: int) -> list[int]:
    """Places of the images that are read to time it, some twice where there are fewer than two."""
    count = min(IMAGES_READ, max(length, 2))
    return [index * length // count for index in range(count)]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(work: Callable[[int], object], most: int, device: torch.device) -> Speed:
    """How long ``work`` takes for an image of as many at once as a step of ``most`` allows; a slow one is done once."""

    def timed(images: int) -> float:
        return seconds_of(lambda: work(images), device)

    first, at_once = timed(1), 1  # it is slower than the others
    if first > 2 * SECONDS_A_STEP:
        return Speed(0.0, first, 1, 1)
    while at_once < most and timed(at_once) * GROWTH < SECONDS_A_STEP:
        at_once = min(most, at_once * GROWTH)
    return Speed(0.0, min(timed(at_once) for _ in range(TIMED_STEPS)) / at_once, at_once, TIMED_STEPS)


def paired(reading: float, computing: float, workers: int) -> float:
    """Seconds for images that one process reads, and a device computes, in so many: at once with ``workers``."""
    return max(reading / workers, computing) if workers else reading + computing


def time_lines(
    speed: Speed, workers: int, batch_size: int, steps: int, world: int, beside: Mapping[str, float] | None = None
) -> list[str]:
    """How long a run of ``steps`` will take, and what it waits for. ``beside``: seconds of what else is in the run,
    by what it is; without any the run is that of its steps."""
    share = batch_size / world
    seconds = paired(speed.reading * share, speed.computing * share, workers)
    whole = steps * seconds + sum((beside or {}).values())
    days = f" ({whole / 86400:.1f} days)" if whole > 2 * 86400 else ""
    known = "".join(f", {clock(value)} of it {what}" for what, value in (beside or {}).items())
    left_out = "checkpoints" if beside else "pictures, checkpoints and measurements"
    lines = [
        f"time, from {speed.steps} measured step{'s' * (speed.steps > 1)} of {speed.at_once} images on "
        f"{'each of ' if world > 1 else ''}{devices_in_words(world)}: "
        f"{seconds:.3g} s per step, {clock(whole)}{days} for the run{known}; without {left_out}",
        f"  computing {1 / speed.computing:.4g} images/s per device"
        + (f", reading {1 / speed.reading:.4g} per process" if speed.reading else ""),
    ]
    if workers and speed.reading / workers > speed.computing:
        lines.append(f"  reading with {workers} workers is the bottleneck; raise data.workers")
    return lines


def differences_from_paper(config: PretrainConfig) -> list[str]:
    """What is not the paper's recipe (Tables 1 and 8), a line each."""
    size = config.model.size if config.model.size in PAPER_SIZES else "base"
    paper = PretrainConfig.model_validate({"model": {"size": size}})
    lines = []
    if config.model.size not in PAPER_SIZES:
        lines.append(f"  model.size: {', '.join(PAPER_SIZES)} -> {config.model.size}")
    plain = config.model_copy(update={"model": config.model.model_copy(update={"size": size})})
    if config.model.patch_size == SIZES[config.model.size].patch_size:
        plain = plain.model_copy(update={"model": plain.model.model_copy(update={"patch_size": None})})
    for line in config_differences(paper, plain):
        key, _, values = line.partition(": ")
        if not key.startswith(COMPARED) or key.startswith(NOT_A_RECIPE):
            continue
        if values.rpartition(" -> ")[2] not in ALSO_IN_PAPER.get(key, ()):
            lines.append(f"  {line}")
    mean, std = statistics_of(config.data)
    if len(mean) == 3 and (mean, std) == statistics_of(paper.data):
        lines = [line for line in lines if not line.startswith(("  data.mean", "  data.std"))]
    return ["differs from the paper's recipe:", *lines] if lines else ["this is the paper's recipe"]
