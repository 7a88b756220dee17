"""Images without labels, for pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_core.data.augmentation import Size, TrainingView, centre_view, standardised
from mae_core.data.config import PretrainData
from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, usable
from mae_core.data.images import ImageSource, Statistics, check_found, next_readable, read_some, statistics_of
from mae_core.data.jpeg import scaled_decoding
from mae_core.data.loading import Place
from mae_core.masking import PatchMask, SampleMasks
from mae_core.patches import as_pair
from mae_core.seeds import AUGMENT, HELD_OUT, MASK, derive_seed, torch_seeded


class Sample(NamedTuple):
    """A view of an image (C, H, W), its mask where masks are drawn, and the unreadable files met on the way to it.

    The pixels are uint8, to be standardised on the device with ``statistics``, or float32, standardised already.
    """

    pixels: Tensor | None
    mask: PatchMask | None
    unreadable: list[Unreadable]
    statistics: Statistics | None = None


@dataclass(frozen=True)
class PretrainBatch:
    """pixels (B, C, H, W), see ``Sample``; the samples' masks, where masks are drawn."""

    pixels: Tensor
    mask: PatchMask | None
    unreadable: list[Unreadable]
    statistics: Statistics | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> PretrainBatch:
        """Pixels and masks on ``device``, the pixels standardised there: bytes travel, a quarter of the floats."""
        mask = None if self.mask is None else self.mask.to(device)
        pixels = self.pixels.to(device, non_blocking=True)
        if pixels.dtype == torch.uint8 and self.statistics is not None:
            pixels = standardised(pixels, self.statistics)
        return PretrainBatch(pixels, mask, self.unreadable)

    def pin_memory(self) -> PretrainBatch:
        """The same batch in page-locked memory; a DataLoader with ``pin_memory`` calls this."""
        mask = None if self.mask is None else self.mask.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), mask=mask)

    def split(self, size: int) -> list[PretrainBatch]:
        """Consecutive parts of at most ``size`` samples."""
        return [
            PretrainBatch(
                self.pixels[start : start + size],
                None if self.mask is None else self.mask.samples(start, start + size),
                [],
                self.statistics,
            )
            for start in range(0, len(self), size)
        ]


class UnlabelledImages(Dataset[Sample]):
    """Augmented images, and with ``masks`` their masks, by (epoch, index). An unreadable one is replaced by the next
    readable one and reported."""

    def __init__(self, source: ImageSource, data: PretrainData, seed: int, masks: SampleMasks | None = None) -> None:
        self.source, self.seed, self.masks = source, seed, masks
        self.statistics, self.scaled = statistics_of(data), data.scaled_decoding
        self.transform = TrainingView(data, self.statistics)
        self.view = centre_view(as_pair(data.image_size), self.statistics)

    def __len__(self) -> int:
        return len(self.source)

    def name_of(self, index: int) -> str:
        """What identifies an image."""
        return self.source.names[index]

    def __getitem__(self, place: Place) -> Sample:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[Place]) -> list[Sample]:
        """The samples of a batch; an image that follows itself, see ``data.repeats``, is decoded once."""
        samples: list[Sample] = []
        for index, same in groupby(places, key=itemgetter(1)):
            epochs = [epoch for epoch, _ in same]
            if self.scaled:  # each crop asks for a scale of its own
                samples += [self._scaled(epoch, index) for epoch in epochs]
                continue
            _, image, unreadable = next_readable(index, len(self), self.source.read)
            samples += [self._view(epoch, index, image, unreadable) for epoch in epochs]
        if self.masks is None:
            return samples
        masks = self.masks.draw(*(derive_seed(self.seed, MASK, *place) for place in places))
        return [
            sample if sample.pixels is None else sample._replace(mask=masks.samples(number, number + 1))
            for number, sample in enumerate(samples)
        ]

    def _view(
        self, epoch: int, index: int, image: Pixels | None, unreadable: list[Unreadable], whole: Size | None = None
    ) -> Sample:
        """A sample without its mask."""
        if image is None:
            return Sample(None, None, unreadable)
        with torch_seeded(derive_seed(self.seed, AUGMENT, epoch, index)):
            pixels = self.transform(image, whole)
        if pixels.dtype != torch.uint8:
            pixels = standardised(pixels, self.statistics)
        return Sample(pixels, None, unreadable, self.statistics)

    def _scaled(self, epoch: int, index: int) -> Sample:
        """A sample whose file is decoded at the scale of its crop, where it is a JPEG."""
        sizes: list[Size] = []

        def factor(height: int, width: int) -> int:
            sizes[:] = [(height, width)]
            with torch_seeded(derive_seed(self.seed, AUGMENT, epoch, index)):
                return self.transform.factor(height, width)

        def read(place: int) -> Pixels:
            sizes.clear()
            with scaled_decoding(factor):
                return self.source.read(place)

        _, image, unreadable = next_readable(index, len(self), read)
        return self._view(epoch, index, image, unreadable, sizes[0] if sizes else None)

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
        self.names = source.names
        self.view = centre_view(as_pair(data.image_size), statistics_of(data))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            pixels = usable(self.view(self.source.read(index)), self.names[index])
        except UnreadableImage as error:
            return Sample(None, None, [error.unreadable])
        return Sample(pixels, self.masks.draw(derive_seed(self.seed, HELD_OUT, index)), [])


def collate(samples: list[Sample]) -> PretrainBatch:
    """A batch of training samples. Raises ``UserError`` where a place had no readable image near it."""
    check_found(samples)
    return collate_readable(samples)


def collate_readable(samples: list[Sample]) -> PretrainBatch:
    """A batch of the samples that could be read; it may be empty. Where some hold bytes and some floats, all become
    floats."""
    there = [sample for sample in samples if sample.pixels is not None]
    pixels = [sample.pixels for sample in there if sample.pixels is not None]
    statistics = there[0].statistics if there else None
    if statistics is not None and len({values.dtype for values in pixels}) > 1:
        pixels = [standardised(x, statistics) if x.dtype == torch.uint8 else x for x in pixels]
    masks = [sample.mask for sample in there if sample.mask is not None]
    unreadable = [entry for sample in samples for entry in sample.unreadable]
    stacked = torch.stack(pixels) if pixels else torch.empty(0)
    return PretrainBatch(stacked, PatchMask.cat(masks) if masks else None, unreadable, statistics)
