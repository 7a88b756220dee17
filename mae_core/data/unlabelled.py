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
from mae_core.masking import PatchMask, SampleMasks
from mae_core.patches import as_pair
from mae_core.seeds import AUGMENT, HELD_OUT, MASK, derive_seed, seeded


class Sample(NamedTuple):
    """An augmented image (C, H, W), its mask where masks are drawn, and the unreadable files met on the way to it."""

    pixels: Tensor | None
    mask: PatchMask | None
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class PretrainBatch:
    """pixels (B, C, H, W) float32, normalised; the samples' masks, where masks are drawn."""

    pixels: Tensor
    mask: PatchMask | None
    unreadable: list[Unreadable]

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> PretrainBatch:
        """Pixels and masks on ``device``."""
        mask = None if self.mask is None else self.mask.to(device)
        return PretrainBatch(self.pixels.to(device, non_blocking=True), mask, self.unreadable)

    def pin_memory(self) -> PretrainBatch:
        """The same batch in page-locked memory; a DataLoader with ``pin_memory`` calls this."""
        mask = None if self.mask is None else self.mask.pin_memory()
        return PretrainBatch(self.pixels.pin_memory(), mask, self.unreadable)

    def split(self, size: int) -> list[PretrainBatch]:
        """Consecutive parts of at most ``size`` samples."""
        return [
            PretrainBatch(
                self.pixels[start : start + size],
                None if self.mask is None else self.mask.samples(start, start + size),
                [],
            )
            for start in range(0, len(self), size)
        ]


class UnlabelledImages(Dataset[Sample]):
    """Augmented images, and with ``masks`` their masks, by (epoch, index). An unreadable one is replaced by the next
    readable one and reported."""

    def __init__(self, source: ImageSource, data: PretrainData, seed: int, masks: SampleMasks | None = None) -> None:
        self.source, self.seed, self.masks = source, seed, masks
        statistics = statistics_of(data)
        self.transform = training_view(data, statistics)
        self.view = centre_view(as_pair(data.image_size), statistics)

    def __len__(self) -> int:
        return len(self.source)

    def name_of(self, index: int) -> str:
        """What identifies an image."""
        return self.source.names[index]

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        _, image, unreadable = next_readable(index, len(self), self.source.read)
        if image is None:
            return Sample(None, None, unreadable)
        mask = None if self.masks is None else self.masks.draw(derive_seed(self.seed, MASK, epoch, index))
        with seeded(derive_seed(self.seed, AUGMENT, epoch, index)):
            return Sample(self.transform(image), mask, unreadable)

    def fixed_views(self, count: int) -> Tensor:
        """(V, C, H, W), V <= count: centre crops of images spread over the data set, for pictures to compare over time.

        Raises ``UserError`` where none of the images tried can be read.
        """
        return torch.stack([self.view(image) for image in read_some(self.source, count)])


class CentreViews(Dataset[Sample]):
    """Centre crops by index, each with a mask that never changes: for the loss on images kept out of training.

    An unreadable image has no pixels.
    """

    def __init__(self, source: ImageSource, data: PretrainData, seed: int, masks: SampleMasks) -> None:
        self.source, self.seed, self.masks = source, seed, masks
        self.view = centre_view(as_pair(data.image_size), statistics_of(data))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            pixels = self.view(self.source.read(index))
        except UnreadableImage as error:
            return Sample(None, None, [error.unreadable])
        return Sample(pixels, self.masks.draw(derive_seed(self.seed, HELD_OUT, index)), [])


def collate(samples: list[Sample]) -> PretrainBatch:
    """A batch of training samples. Raises ``UserError`` where a place had no readable image near it."""
    check_found(samples)
    return collate_readable(samples)


def collate_readable(samples: list[Sample]) -> PretrainBatch:
    """A batch of the samples that could be read; it may be empty."""
    there = [sample for sample in samples if sample.pixels is not None]
    pixels = torch.stack([sample.pixels for sample in there if sample.pixels is not None]) if there else torch.empty(0)
    masks = [sample.mask for sample in there if sample.mask is not None]
    unreadable = [entry for sample in samples for entry in sample.unreadable]
    return PretrainBatch(pixels, PatchMask.cat(masks) if masks else None, unreadable)
