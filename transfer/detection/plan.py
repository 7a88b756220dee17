"""``train_net.py --dry-run``: what a run will be and take, with a few of its steps measured; nothing is written."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mae_core.data.loading import share_of
from mae_core.data.rates import processes
from mae_core.models.block import kernels_as_on
from mae_core.models.classifier import learning_line
from mae_core.patches import as_pair
from mae_core.resuming import Resume
from mae_core.training import distributed
from mae_core.training.memory import GIB, StepMemory, available_memory, step_memory
from mae_core.training.plan import (
    batch_line,
    measured,
    output_note,
    paired,
    rate_line,
    spread_over,
    steps_line,
    time_lines,
)
from mae_core.training.run import Run
from mae_core.weights.load import read_encoder, stated_in, with_file
from transfer.detection.config import DetectionConfig
from transfer.detection.data_sets import read_data, shared_files
from transfer.detection.engine import build_network, load_engine
from transfer.detection.heads import HEADS
from transfer.detection.run import settings_of, zoo_detector
from transfer.detection.samples import TrainingSamples, collate

MEASURED = "torchvision"
"""The engine whose network the memory is measured on."""
CASCADE_STAGES = 3
POSITIVES = 4
"""One of so many sampled regions is an object, at most."""


def print_plan(
    config: DetectionConfig, devices: int, say: Callable[[str], None] = print, *, resume: Resume = False
) -> None:
    """Print the plan of a run on ``devices`` devices, what a step of it takes, and whether its output folder is taken.

    Raises ``UserError`` as the run would. The memory is that of the torchvision engine's network, whose tensors have
    the sizes of detectron2's; of heads of other kinds than Mask R-CNN's it is not estimated.
    """
    engine, source = load_engine(config.engine), None
    if config.weights is not None and zoo_detector(engine, config.weights) is None:
        source = read_encoder(config.weights, **stated_in(config))
        config = with_file(source, config)
    optim = config.optim
    train_set, val_set = read_data(config)
    settings, share = settings_of(config, len(train_set.images)), share_of(optim.batch_size, devices)
    micro = min(optim.micro_batch or share, share)
    objects = [len(image.instances) for image in train_set.images]
    height, width = as_pair(config.data.image_size)
    planned = config
    if MEASURED in HEADS[config.model.head].builders:
        plain = {"engine": MEASURED, "model": config.model.model_copy(update={"cascade": False})}
        planned = config.model_copy(update=plain)
    trunk, model, _ = build_network(planned, load_engine(planned.engine), len(train_set.categories), source)
    if config.model.cascade:
        add_cascade(model)
    numbers = sum(p.numel() for p in model.parameters())
    for line in (
        f"data: {len(train_set.images)} training images with {sum(objects)} objects, at most {max(objects)} on one; "
        f"{len(val_set.images)} validation images; {len(train_set.categories)} classes",
        batch_line(optim, devices),
        f"{rate_line(optim, settings)}; per block x {optim.layer_decay:g}; weight decay {optim.weight_decay:g}",
        steps_line(optim, settings, len(objects)),
        f"network: {numbers / 1e6:.1f} M parameters, ViT {trunk.vit.size}, patch {trunk.vit.grid.patch}, canvas "
        f"{height}x{width}, engine {config.engine}",
        learning_line(model, config.model.trainable_blocks),
        f"note: {note}" if (note := shared_files(train_set, val_set)) else "",
        output_note(config, resume),
    ):
        if line:
            say(line)
    if not (hasattr(model, "rpn") and hasattr(model, "roi_heads")):
        say(f"memory: not estimated for model.head={config.model.head}, which has no proposals and regions")
        say("dry run: nothing was written")
        return
    run = Run(config, distributed.join(config.device, config.rank_timeout))
    precision = run.precision
    distributed.leave()
    with kernels_as_on(run.device.type):
        needed = memory_of(model, config, micro, precision)
    kind = str(precision).removeprefix("torch.")
    say(
        f"memory, estimated: {needed.peak / GIB:.1f} GiB at the peak of a step of {micro} images at once in {kind}, "
        f"{needed.fixed / GIB:.1f} GiB of it parameters, gradients and moments; a GPU's own libraries take about 1 GiB "
        "more"
    )
    one, free = needed.fixed + (needed.peak - needed.fixed) // micro, available_memory(run.device)
    if one > free:
        say(f"time: not measured, one image needs {one / GIB:.1f} GiB and {free / GIB:.1f} GiB are free")
    else:
        _, model, statistics = build_network(planned, load_engine(planned.engine), len(train_set.categories), source)
        masks = HEADS[config.model.head].learns_masks
        samples = TrainingSamples(train_set, config.data, statistics, config.seed, masks=masks)
        for line in time_of(model, config, samples, len(val_set.images), run, (micro, settings.total_steps, devices)):
            say(line)
    say("dry run: nothing was written")


def time_of(
    model: nn.Module,
    config: DetectionConfig,
    samples: TrainingSamples,
    scored: int,
    run: Run,
    size: tuple[int, int, int],
) -> list[str]:
    """How long a run on so many images at once, steps and devices (``size``) takes, by steps of the torchvision
    engine's network on real images; ``scored`` images are scored at the end, each in about the time of a step's."""
    micro, steps, devices = size
    began = time.perf_counter()
    read = [samples[(0, index)] for index in spread_over(len(samples))]
    reading = (time.perf_counter() - began) / len(read)
    model.to(run.device).train()

    def step(images: int) -> None:
        batch = collate([read[index % len(read)] for index in range(images)])
        with run.autocast():
            losses = model(batch.pixels.to(run.device), batch.sizes, batch.targets)
        torch.stack(list(losses.values())).sum().backward()

    speed, workers = measured(step, micro, run.device)._replace(reading=reading), processes(config.data.workers)
    beside = {f"for scoring {scored} images": scored / devices * paired(reading, speed.computing, workers)}
    return time_lines(speed, workers, config.optim.batch_size, steps, devices, beside)


def memory_of(model: nn.Module, config: DetectionConfig, images: int, precision: torch.dtype) -> StepMemory:
    """Of a step of ``images`` images at once; ``model`` is moved to the meta device.

    What chooses among boxes (suppression, sampling) is left out, it is small; the heads run on as many regions as the
    configuration samples. With checkpointing, one block at a time is there in whole.
    """

    def measured() -> StepMemory:
        return step_memory(model, lambda: stand_in_loss(model, config, images), precision)

    found = measured()
    if not config.model.checkpointing:
        return found
    vit = model.backbone.vit
    vit.checkpointing = False
    a_block = (measured().kept - found.kept) // max(len(vit.blocks) - vit.frozen_blocks, 1)
    vit.checkpointing = True
    return found._replace(kept=found.kept + a_block)


def add_cascade(model: nn.Module) -> None:
    """Give ``model`` the two more box heads of a cascade, for ``stand_in_loss``."""
    one = nn.ModuleList([model.roi_heads.box_head, model.roi_heads.box_predictor])
    model.more_box_heads = nn.ModuleList(copy.deepcopy(one) for _ in range(CASCADE_STAGES - 1))


def stand_in_loss(model: nn.Module, config: DetectionConfig, images: int) -> Tensor:
    """A scalar that depends on everything a step of ``images`` images computes, without choosing among boxes."""
    vit, heads = model.backbone.vit, model.roi_heads
    features = model.backbone(torch.empty(images, vit.in_channels, *as_pair(config.data.image_size)))
    outputs = model.rpn.head([x.float() for x in features.values()])
    total = sum(x.sum() for level in outputs for x in level)

    def regions(number: int, cells: int) -> Tensor:
        return torch.empty(number * images, config.model.fpn_channels, cells, cells, requires_grad=True)

    rois = config.sampling.rois
    for head, predictor in ((heads.box_head, heads.box_predictor), *getattr(model, "more_box_heads", ())):
        total += sum(x.sum() for x in predictor(head(regions(rois, heads.box_roi_pool.cells))))
    if heads.has_mask():
        masks = heads.mask_head(regions(rois // POSITIVES, heads.mask_roi_pool.cells))
        total += heads.mask_predictor(masks).sum()
    return total
