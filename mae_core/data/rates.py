"""How fast images come from a loader, stage by stage, and how many processes are worth it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from mae_core.data.config import Workers
from mae_core.data.images import ImageSource, UnreadableImage, spread_indices
from mae_core.data.loading import StepSampler, make_loader
from mae_core.errors import UserError
from mae_core.seeds import torch_seeded

SECONDS = 1.0
"""That a number of processes is measured."""
AT_ONCE = 8
"""Images of a batch while the number of processes is chosen."""
NEAR_BEST = 0.9
"""Share of the best rate from which on more processes are not worth their memory."""


def cores() -> int:
    """CPU cores of this rank: those of the process, shared with the other ranks of its machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def processes(workers: Workers) -> int:
    """How many processes ``data.workers`` asks for where its auto is not measured: one a core."""
    return cores() if workers == "auto" else workers


def loader_rate(images: Any, collate: Callable[[list[Any]], Any], workers: int, *, batch: int, seconds: float) -> float:
    """Images per second from a loader with so many processes; the batches that they make while they start are not
    counted. ``images`` are taken by (epoch, index)."""
    length: int = len(images)
    with torch_seeded(0):  # a loader that starts draws
        batches = iter(make_loader(images, StepSampler(length, batch, 0, total_steps=2**31), collate, workers=workers))
        for _ in range(max(1, workers)):
            next(batches)
        started, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < seconds or count == 0:
            count += len(next(batches))
    del batches
    return count / passed


def candidates(most: int) -> list[int]:
    """Numbers of processes to try: powers of two, and ``most``."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), max(1, most)})


def best_number(rates: dict[int, float]) -> int:
    """The smallest number of processes that is near the best rate."""
    return min(number for number, rate in rates.items() if rate >= NEAR_BEST * max(rates.values()))


class Stage(NamedTuple):
    """What happens to an image, and the seconds that one takes in one process."""

    name: str
    seconds: float


def time_stages(source: ImageSource, images: Any, collate: Callable[[list[Any]], Any], count: int = 64) -> list[Stage]:
    """Time of each stage for ``count`` images spread over the set, in this process: reading files (from the cache of
    the system where it has them), decoding, augmenting with masks, collating.

    Raises ``UserError`` where none of them can be read.
    """
    readable = [index for index in spread_indices(len(source), count) if _reads(source, index)]
    if not readable:
        raise UserError(f"none of {count} images can be read; mae check images says what is wrong with them")

    def seconds(work: Callable[[int], Any]) -> float:
        started = time.perf_counter()
        for index in readable:
            work(index)
        return (time.perf_counter() - started) / len(readable)

    images[(0, readable[0])]  # what is imported and built at the first image is no stage
    reading = seconds(source.content)
    decoding = seconds(source.read)
    samples: list[Any] = []
    whole = seconds(lambda index: samples.append(images[(0, index)]))
    started = time.perf_counter()
    collate(samples)
    collating = (time.perf_counter() - started) / len(readable)
    return [
        Stage("read", reading),
        Stage("decode", max(decoding - reading, 0.0)),
        Stage("augment", max(whole - decoding, 0.0)),
        Stage("collate", collating),
        Stage("all", whole + collating),
    ]


def _reads(source: ImageSource, index: int) -> bool:
    with suppress(UnreadableImage):
        source.read(index)
        return True
    return False


def needed(rate: float, rates: dict[int, float]) -> float:
    """Processes for ``rate`` images per second, by the best rate of a process."""
    return rate / max(measured / number for number, measured in rates.items() if number)


def rate_lines(stages: Sequence[Stage], rates: dict[int, float], wanted: float) -> list[str]:
    """What ``mae bench-data`` prints: a line a stage, a line a number of processes, and what a GPU needs."""
    lines = [
        f"{stage.name:>8}  {1 / stage.seconds if stage.seconds else math.inf:>9.0f} images/s  "
        f"{1000 * stage.seconds:.3f} ms each"
        for stage in stages
    ]
    lines += [f"{number} processes: {rate:.0f} images/s" for number, rate in rates.items()]
    processes, here = needed(wanted, rates), max(rates.values())
    verdict = "this machine can" if here >= wanted else f"this machine reaches {here:.0f}"
    return [
        *lines,
        f"a GPU that trains {wanted:g} images/s needs {math.ceil(processes)} processes ({processes:.1f}); {verdict}",
        f"data.workers={best_number(rates)} reads near the best rate of this machine",
    ]
