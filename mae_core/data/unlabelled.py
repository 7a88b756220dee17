"""Images without labels, for pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from mae_core.config import PretrainData
from mae_core.data.images import (
    Statistics,
    Unreadable,
    check_found,
    next_readable,
    read_image,
    read_some,
    statistics_of,
)
from mae_core.data.loading import Place
from mae_core.patches import as_pair
from mae_core.seeds import AUGMENT, MASK, derive_seed, seeded


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
    """Augmented images by (epoch, index). An unreadable file is replaced by the next readable one and reported."""

    def __init__(self, paths: Sequence[Path], data: PretrainData, seed: int) -> None:
        self.paths = list(paths)
        self.seed = seed
        self.channels = data.channels
        size, bicubic = as_pair(data.image_size), InterpolationMode.BICUBIC
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=data.crop_scale, interpolation=bicubic),
                v2.RandomHorizontalFlip(data.hflip),
                to_normalized(statistics_of(data)),
            ]
        )
        self.view = centre_view(size, statistics_of(data))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: Place) -> Sample:
        epoch, index = place
        mask_seed = derive_seed(self.seed, MASK, epoch, index)
        _, image, unreadable = next_readable(
            index, len(self), lambda place: read_image(self.paths[place], self.channels)
        )
        if image is None:
            return Sample(None, mask_seed, unreadable)
        with seeded(derive_seed(self.seed, AUGMENT, epoch, index)):
            return Sample(self.transform(image), mask_seed, unreadable)

    def fixed_views(self, count: int) -> Tensor:
        """(V, C, H, W), V <= count: centre crops of images spread over the data set, for pictures to compare over time.

        Raises ``UserError`` where none of the images tried can be read.
        """
        return torch.stack([self.view(image) for image in read_some(self.paths, self.channels, count)])


def collate(samples: list[Sample]) -> PretrainBatch:
    """Stack samples. Raises ``UserError`` where a place had no readable image near it."""
    check_found(samples)
    unreadable = [entry for sample in samples for entry in sample.unreadable]
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    return PretrainBatch(torch.stack(pixels), [sample.mask_seed for sample in samples], unreadable)


def centre_view(size: tuple[int, int], statistics: Statistics) -> v2.Compose:
    """PIL image -> (C, H, W): the largest centred part of the target's aspect ratio, resized (bicubic),
    standardised."""
    resize = v2.Resize(list(size), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([v2.Lambda(partial(_crop_to_ratio, size=size)), resize, to_normalized(statistics)])


def _crop_to_ratio(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of the aspect ratio of ``size`` (height, width)."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    return v2.functional.center_crop(image, [max(1, round(height * scale)), max(1, round(width * scale))])


def to_normalized(statistics: Statistics) -> v2.Compose:
    """PIL image -> (C, H, W) float32, standardised per channel."""
    return v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(statistics.mean), list(statistics.std))]
    )
