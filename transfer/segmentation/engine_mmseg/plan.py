"""``mae segment train --dry-run``: what a training will be and take, with a step of it measured; writes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mae_core.counting import clock
from mae_core.training.distributed import device_of, world_size
from mae_core.training.memory import GIB, available_memory, fixed_bytes, kept_storages
from mae_core.training.plan import devices_in_words
from mae_core.training.precision import choose_precision

TIMED_STEPS = 2


def plan_lines(view: Mapping[str, Any], model: nn.Module) -> Iterator[str]:
    """The plan of a config whose data and model were checked.

    The time is that of steps of two images, taken as often as the batch has them; reading is not in it.
    """
    steps, batch = int(view["train_cfg"]["max_iters"]), int(view["train_dataloader"]["batch_size"])
    ranks = world_size()
    crop = tuple(view["model"]["data_preprocessor"]["size"])
    total = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rate = view["optim_wrapper"]["optimizer"]["lr"]
    yield f"network: {total / 1e6:.1f} M parameters, {learning / 1e6:.1f} M of them learn; crops of {crop[0]}x{crop[1]}"
    yield f"batch: {batch * ranks} images per step: {devices_in_words(ranks)} x {batch}; learning rate {rate:g}"
    device = device_of()
    chosen = choose_precision("auto", device)
    mixed = chosen.mixed and view["optim_wrapper"].get("type") != "OptimWrapper"
    model.to(device).train()

    def loss(images: int) -> Tensor:
        with torch.autocast(device.type, chosen.dtype, enabled=mixed):
            found = model.loss(*_stand_in(model, images, crop, device))
        return torch.stack([value for name, value in found.items() if "loss" in name]).sum()

    fixed = fixed_bytes(model)
    kept = sum(kept_storages(lambda: loss(2), model)) // 2
    yield (
        f"memory, estimated: {(fixed + kept * batch) / GIB:.2f} GiB = {fixed / GIB:.2f} GiB for parameters, gradients "
        f"and moments, and {kept * batch / GIB:.2f} GiB for {batch} images"
    )
    if fixed + kept * batch > available_memory(device):
        yield f"  {available_memory(device) / GIB:.1f} GiB are free: lower batch_size or crop_size"
    seconds = min(_timed(lambda: loss(2).backward(), device) for _ in range(TIMED_STEPS)) / 2 * batch
    yield f"steps: {steps}; time, from {TIMED_STEPS} measured steps of 2 images: {seconds:.3g} s per step, " + (
        f"{clock(steps * seconds)} for the run; without evaluation and pictures"
    )


def _stand_in(model: Any, images: int, crop: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[Any]]:
    pixels = torch.zeros(images, model.backbone.in_channels, *crop, device=device)
    labels = torch.randint(model.decode_head.num_classes, (images, 1, *crop), device=device)
    samples = [SegDataSample(metainfo={"img_shape": crop}) for _ in range(images)]
    for sample, label in zip(samples, labels, strict=True):
        sample.set_data({"gt_sem_seg": PixelData(data=label)})
    return pixels, samples


def _timed(work: Any, device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
