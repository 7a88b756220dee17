"""``optim.micro_batch=auto``: the most images that a device takes at once, found once and stored with the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mae_core.config.load import load_config
from mae_core.config.sections import RunConfig
from mae_core.data.loading import share_of
from mae_core.errors import UserError
from mae_core.layout import CONFIG
from mae_core.training import distributed
from mae_core.training.memory import GIB, available_memory, fixed_bytes, kept_per_image

AUTO = "auto"
ROOM = 0.8
"""Of a machine's free memory that a run may plan with: workers and libraries take some too."""
MOMENTS = 8
"""Bytes of AdamW's moments, a parameter."""

Config = TypeVar("Config", bound=RunConfig)
LossOfImages = Callable[[int], Tensor]
"""Number of images -> the loss of so many, on the device of the model."""


def with_micro_batch(
    config: Config, model: nn.Module, loss: LossOfImages, *, resume: bool, even: bool = False
) -> Config:
    """``config`` with a number in place of ``auto``: the stored one of a run that is resumed, else the largest that
    fits on every rank; with ``even`` an even one, for what mixes pairs. All ranks must call it.

    On a CPU memory is planned, on a GPU it is tried. Raises ``UserError`` where one image does not fit on a GPU.
    """
    section: Any = getattr(config, "optim")  # noqa: B009  # every training has it, their base does not
    if section.micro_batch != AUTO:
        return config
    place = distributed.join(config.device, config.rank_timeout)
    share = share_of(section.batch_size, place.world)
    stored = stored_micro_batch(config) if resume else None
    if stored is None:
        most = _tried(model, loss, place.device, share) if place.device.type == "cuda" else _planned(model, loss, share)
        stored = min(distributed.gather(most))
        stored = stored - stored % 2 if even and 1 < stored < share else stored
        if place.is_main:
            print(f"optim.micro_batch: {stored} images at once are the most that fit, of {share} a device", flush=True)
    return config.model_copy(update={"optim": section.model_copy(update={"micro_batch": stored})})


def stored_micro_batch(config: RunConfig) -> int | None:
    """The number in the config.yaml of the run that is resumed."""
    file = config.output / CONFIG
    optim: Any = getattr(load_config(type(config), file), "optim", None) if file.is_file() else None
    found = None if optim is None else optim.micro_batch
    return found if isinstance(found, int) else None


def _planned(model: nn.Module, loss: LossOfImages, share: int) -> int:
    room = ROOM * available_memory(torch.device("cpu")) - fixed_bytes(model)
    return max(1, min(share, int(room // max(1, kept_per_image(loss, model)))))


def _tried(model: nn.Module, loss: LossOfImages, device: torch.device, share: int) -> int:
    model.to(device)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    moments = torch.empty(MOMENTS * trained, dtype=torch.uint8, device=device)

    def fits(images: int) -> bool:
        try:
            loss(images).backward()
            torch.cuda.synchronize(device)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    found = largest_that_fits(fits, share)
    del moments
    if not found:
        free = available_memory(device) / GIB
        raise UserError(
            f"one image does not fit in the memory of {device} ({free:.1f} GiB free); set model.checkpointing=true, or "
            "take a smaller model or data.image_size"
        )
    return found


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, to an eighth of it; 0 where not even 1 does."""
    low, high = 0, 1
    while fits(high):
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
