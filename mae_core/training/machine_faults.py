"""What a machine does to a training, in a sentence: too little GPU memory, a rank or a loading process that is gone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mae_core.errors import UserError, first_line
from mae_core.training.distributed import world_size

CONTINUES = "the last checkpoint is whole, and --resume continues from it"
LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo")
"""What errors of gloo say, which have no type of their own."""


class LoaderOptions(NamedTuple):
    """The options of a training that are about its loading processes."""

    workers: str = "data.workers"
    timeout: str = "data.timeout"


@contextmanager
def machine_faults(smaller: Sequence[str], loader: LoaderOptions = LoaderOptions()) -> Iterator[None]:
    """Around a training: what the machine does becomes a ``UserError``; other errors stay what they are.

    smaller  what takes less memory, in the order in which to try it
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = ", or ".join(smaller)
        raise UserError(f"out of GPU memory ({first_line(error)}); {ways}; {CONTINUES}") from None
    except RuntimeError as error:
        told = _in_a_sentence(error, loader)
        if told is None:
            raise
        raise UserError(told) from None


def _in_a_sentence(error: RuntimeError, loader: LoaderOptions) -> str | None:
    """A loading process or a rank that is gone, in words; None for another error."""
    text = str(error)
    if "DataLoader timed out" in text:
        return (
            f"the loading processes gave no batch for {loader.timeout} seconds: a disk hangs, a process was stopped, "
            f"or images are very large; check the disk, or raise {loader.timeout}; {CONTINUES}"
        )
    if text.startswith("DataLoader worker"):
        return (
            f"a loading process is gone ({first_line(error)}), most often for want of memory or of room in /dev/shm; "
            f"lower {loader.workers}, or make room; {CONTINUES}"
        )
    if world_size() > 1 and (isinstance(error, dist.DistError) or any(words in text for words in LOST_RANK)):
        return (
            f"another rank is gone or hangs ({first_line(error)}); what ended it stands in its own output; {CONTINUES}"
        )
    return None


def smaller_runs(config: Any) -> list[str]:
    """What makes a run of ``config`` take less memory, of the options that it has and that may still be changed."""
    ways = []
    optim: Any = getattr(config, "optim", None)
    model = getattr(config, "model", None)
    if hasattr(optim, "micro_batch"):
        at_once = optim.micro_batch if optim.micro_batch is not None else optim.batch_size
        ways.append(f"lower optim.micro_batch (now {at_once} images at once)")
    if getattr(model, "checkpointing", True) is False:
        ways.append("set model.checkpointing=true")
    return [*ways, "start a run of a smaller model or data.image_size"]
