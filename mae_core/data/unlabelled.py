"""Images without labels, for pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_core.data.augmentation import centre_view, training_view
from mae_core.data.config import PretrainData
from mae_core.data.decoding import Unreadable, UnreadableImage
from mae_core.data.images import ImageSource, check_found, next_readable, read_some, statistics_of
from mae_core.data.loading import Place
from mae_core.patches import as_pair
from mae_core.seeds import AUGMENT, HELD_OUT, MASK, derive_seed, seeded


class Sample(NamedTuple):
    """An augmented image (C, H, W), the seed of its mask, and the unreadable files met on the way to it."""

    pixels: Tensor | None
    mask_seed: int
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class PretrainBatch:
    """pixels (B, C, H, W) float32, normalised; a mask seed per sample."""

    pixels: Tensor
    mask_seeds: list[int]
    unreadable: list[Unreadable]

    def __len__(self) -> int:
        return len(self.mask_seeds)

    def to(self, device: torch.device) -> PretrainBatch:
        """Pixels on ``device``."""
        return PretrainBatch(self.pixels.to(device, non_blocking=True), self.mask_seeds, self.unreadable)

    def split(self, size: int) -> list[PretrainBatch]:
        """Consecutive parts of at most ``size`` samples."""
        starts = range(0, len(self), size)
        return [PretrainBatch(self.pixels[s : s + size], self.mask_seeds[s : s + size], []) for s in starts]

    def generators(self) -> list[torch.Generator]:
        """A generator per sample, for its mask."""
        return [torch.Generator().manual_seed(seed) for seed in self.mask_seeds]


class UnlabelledImages(Dataset[Sample]):
    """Augmented images by (epoch, index). An unreadable one is replaced by the next readable one and reported."""

    def __init__(self, source: ImageSource, data: PretrainData, seed: int) -> None:
        self.source, self.seed = source, seed
        statistics = statistics_of(data)
        self.transform = training_view(data, statistics)
        self.view = centre_view(as_pair(data.image_size), statistics)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        mask_seed = derive_seed(self.seed, MASK, epoch, index)
        _, image, unreadable = next_readable(index, len(self), self.source.read)
        if image is None:
            return Sample(None, mask_seed, unreadable)
        with seeded(derive_seed(self.seed, AUGMENT, epoch, index)):
            return Sample(self.transform(image), mask_seed, unreadable)

    def fixed_views(self, count: int) -> Tensor:
        """(V, C, H, W), V <= count: centre crops of images spread over the data set, for pictures to compare over time.

        Raises ``UserError`` where none of the images tried can be read.
        """
        return torch.stack([self.view(image) for image in read_some(self.source, count)])


class CentreViews(Dataset[Sample]):
    """Centre crops by index, each with a mask seed that never changes: for the loss on images kept out of training.

    An unreadable image has no pixels.
    """

    def __init__(self, source: ImageSource, data: PretrainData, seed: int) -> None:
        self.source, self.seed = source, seed
        self.view = centre_view(as_pair(data.image_size), statistics_of(data))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        mask_seed = derive_seed(self.seed, HELD_OUT, index)
        try:
            return Sample(self.view(self.source.read(index)), mask_seed, [])
        except UnreadableImage as error:
            return Sample(None, mask_seed, [error.unreadable])


def collate(samples: list[Sample]) -> PretrainBatch:
    """A batch of training samples. Raises ``UserError`` where a place had no readable image near it."""
    check_found(samples)
    return collate_readable(samples)


def collate_readable(samples: list[Sample]) -> PretrainBatch:
    """A batch of the samples that could be read; it may be empty."""
    there = [(sample.pixels, sample.mask_seed) for sample in samples if sample.pixels is not None]
    pixels = torch.stack([pixels for pixels, _ in there]) if there else torch.empty(0)
    unreadable = [entry for sample in samples for entry in sample.unreadable]
    return PretrainBatch(pixels, [mask_seed for _, mask_seed in there], unreadable)
