"""From samples to a stream of batches whose content depends on (run seed, step) alone, never on workers or ranks."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mae_core.data.images import Unreadable
from mae_core.errors import UserError
from mae_core.seeds import SHUFFLE, generator_at

Place = tuple[int, int]
"""(epoch, index): with the run's seed, all that a sample's augmentation and mask depend on."""


class Batch(Protocol):
    """What a loader yields: samples of one rank for one optimizer step."""

    unreadable: list[Unreadable]

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        ...

    def split(self, size: int) -> list[Batch]:
        """Consecutive parts of at most ``size`` samples."""
        ...


def steps_for(length: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of a run; the last one may reach into a further epoch so that no image is left out."""
    return max(1, math.ceil(length * epochs / batch_size - 1e-9))


def share_of(batch_size: int, world: int) -> int:
    """Images of each batch that fall to one of ``world`` ranks. Raises ``UserError`` where they do not divide."""
    if batch_size % world:
        raise UserError(f"batch size {batch_size} does not divide among {world} ranks; use a multiple of {world}")
    return batch_size // world


def check_repeats(batch_size: int, world: int, repeats: int) -> None:
    """Raise ``UserError`` where a rank's share of a batch does not hold every image ``repeats`` times."""
    if share_of(batch_size, world) % repeats:
        ranks = f" and {world} ranks" if world > 1 else ""
        raise UserError(
            f"batch size {batch_size} does not divide by data.repeats={repeats}{ranks}; set optim.batch_size to a "
            f"multiple of {repeats * world}"
        )


class StepSampler(Sampler[list[Place]]):
    """A batch sampler: one list of (epoch, index) per optimizer step, this rank's share of it.

    The order is the seeded permutations of all epochs, one after another; a batch may span two epochs, so that a data
    set of any size works and no tail is lost. All of its state is the step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        total_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
    ) -> None:
        check_repeats(batch_size, world, repeats)
        self.repeats = repeats
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_step, self.total_steps = start_step, total_steps
        self.rank, self.share = rank, share_of(batch_size, world)

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[Place]]:
        orders: dict[int, list[int]] = {}
        for step in range(self.start_step, self.total_steps):
            yield self.places(step, orders)

    def places(self, step: int, orders: dict[int, list[int]] | None = None) -> list[Place]:
        """(epoch, index) of this rank's share of a step; ``orders`` keeps the permutations of the last two passes."""
        orders = {} if orders is None else orders
        first = (step * self.batch_size + self.rank * self.share) // self.repeats
        places = []
        for position in range(first, first + self.share // self.repeats):
            turn, cursor = divmod(position, self.length)
            if turn not in orders:
                for old in [kept for kept in orders if kept != turn - 1]:
                    del orders[old]
                generator = generator_at(self.seed, SHUFFLE, turn)
                orders[turn] = torch.randperm(self.length, generator=generator).tolist()
            index = orders[turn][cursor]
            places += [(turn * self.repeats + repeat, index) for repeat in range(self.repeats)]
        return places


def make_loader(
    dataset: Dataset[Any],
    sampler: Sampler[Any],
    collate: Callable[[list[Any]], Any],
    *,
    workers: int,
    pin: bool = False,
    timeout: float = 0,
) -> DataLoader[Any]:
    """A DataLoader over ``sampler``; worker processes leave no trace in what it yields, nor in a ``UserError`` of
    ``collate``. ``timeout``: seconds that a batch may take; 0 is for ever."""
    return _Loader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(_batch_or_refusal, collate),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        timeout=timeout if workers else 0,
        persistent_workers=workers > 0,  # of a loader that is gone through again: an evaluation's
        worker_init_fn=worker_setup(),
    )


def worker_setup() -> Callable[[int], None]:
    """What a worker process does first: signals that go to a whole group of processes are for the main one, which
    finishes its step with its workers; but when the main one ends, the signal that it sends them ends them."""
    ending = RawValue("b", 0)
    Finalize(None, partial(setattr, ending, "value", 1), exitpriority=10)
    return partial(_outlive_first_signal, ending)


def _outlive_first_signal(ending: Any, _: int) -> None:
    def once(number: int, frame: Any) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        if ending.value:  # torch's main process takes a worker that a signal ended for a failure
            os._exit(0)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    for each in signals:
        signal.signal(each, once)


class _Loader(DataLoader[Any]):
    """Raises the refusals that ``_batch_or_refusal`` made of batches: a worker would wrap them in its traceback."""

    def __iter__(self) -> Iterator[Any]:
        return _raise_refusals(super().__iter__())  # not a generator itself: torch draws a seed when iteration starts


def _end_processes(batches: Any) -> None:
    """End the processes of an iterator for good: one that was stopped would not heed the signal that torch sends it,
    and be waited for without end."""
    for process in getattr(batches, "_workers", ()):
        process.kill()


def _batch_or_refusal(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    try:
        return collate(samples)
    except UserError as error:
        return error


def _raise_refusals(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError:  # a process that is gone, or hangs
        _end_processes(batches)
        raise
