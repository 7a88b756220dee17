"""mmengine's loop with the core's law of randomness: a sample depends on (seed, epoch, index), a step on (seed, step,
rank), so that a resumed training ends in bitwise the weights of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from mae_core.data.loading import Place, worker_setup
from mae_core.seeds import AUGMENT, SHUFFLE, STEP, derive_seed, generator_at, seeded
from mae_core.training.loop import seed_everything


class PlacedSamples(Dataset[Any]):
    """The samples of a data set of mmengine's, each drawn with the seed of its place."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Any:
        with seeded(derive_seed(self.seed, AUGMENT, *place)):
            return self.dataset[place[1]]

    @property
    def metainfo(self) -> Any:
        """Classes and palette, which mmengine asks for."""
        return self.dataset.metainfo


class PlacedSampler(Sampler[Place]):
    """(epoch, index) of this rank's samples, without end; every epoch is another permutation. ``skip`` is mmengine's
    way to say that a resumed run has had so many."""

    def __init__(self, length: int, seed: int, *, shuffle: bool, rank: int, world: int) -> None:
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.world, self.first = rank, world, 0

    def __len__(self) -> int:
        """An epoch's, over all ranks, as mmengine's endless sampler has it."""
        return self.length

    def skip(self, num_samples: int) -> None:
        """Begin after ``num_samples`` of this rank."""
        self.first = num_samples

    def __iter__(self) -> Iterator[Place]:
        epoch, order = -1, list(range(self.length))
        for position in count(self.rank + self.first * self.world, self.world):
            if position // self.length != epoch:
                epoch = position // self.length
                if self.shuffle:
                    order = torch.randperm(self.length, generator=generator_at(self.seed, SHUFFLE, epoch)).tolist()
            yield epoch, order[position % self.length]


def placed(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """``loader`` under the law above, where it has mmengine's endless sampler and plain batches, as every config here
    has; another stays as it is."""
    if not isinstance(loader.sampler, InfiniteSampler) or type(loader.batch_sampler) is not BatchSampler:
        return loader
    rank, world = get_dist_info()
    order = PlacedSampler(len(loader.dataset), seed, shuffle=loader.sampler.shuffle, rank=rank, world=world)
    return DataLoader(
        PlacedSamples(loader.dataset, seed),
        sampler=order,
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        worker_init_fn=worker_setup(),
    )


class SeededSteps(Hook):
    """What a step draws, such as dropped paths, depends on the run's seed, the step and the rank alone."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """After the batch is there: a starting loader draws too."""
        seed_everything(derive_seed(runner.seed, STEP, runner.iter, runner.rank))
