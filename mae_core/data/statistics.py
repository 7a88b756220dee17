"""Mean and standard deviation of the pixels of a set of images, measured on a sample that is always the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mae_core.data.config import ImagesConfig
from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, size_of, to_tensor
from mae_core.data.images import ImageSource, Statistics, in_threads
from mae_core.data.reading import notes_taken
from mae_core.errors import UserError
from mae_core.seeds import SPLIT, generator_at

MOST_IMAGES = 400
MOST_PIXELS = 100_000_000
"""A sample ends with whichever comes first: some seconds of reading, and a standard error of the mean below 1/20 of the
spread between images."""
TINY = 1e-9
"""Stands for the standard deviation of a channel that never changes where it is compared."""
DIGITS = 5
"""Significant digits kept: the same numbers on every machine, readable in a configuration."""


@dataclass
class Moments:
    """Number, mean and sum of squared deviations of each channel's pixels, over any number of images (Chan's update).

    Pixels without data (NaN) are left out.
    """

    count: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @classmethod
    def of(cls, pixels: Pixels) -> Moments:
        """Of one image, its pixels in 0..1 where it holds unsigned integers.

        Bytes are counted by value, so that their sums are exact and take little memory.
        """
        values = to_tensor(pixels).flatten(1)
        if not values.is_floating_point():
            counts = torch.stack([torch.bincount(channel, minlength=256) for channel in values]).double()
            shares = torch.arange(256, dtype=torch.float64) / 255
            count = counts.sum(dim=1)
            mean = (counts * shares).sum(dim=1) / count
            return cls(count, mean, (counts * (shares - mean[:, None]).square()).sum(dim=1))
        known = ~values.isnan()
        count = known.sum(dim=1).double()
        flat = values.nan_to_num().double()
        mean = flat.sum(dim=1) / count.clamp(min=1)
        return cls(count, mean, ((flat - mean[:, None]).square() * known).sum(dim=1))

    def add(self, other: Moments) -> None:
        """Take in other pixels."""
        if not len(self.count):
            self.count, self.mean, self.squares = other.count, other.mean, other.squares
            return
        total = self.count + other.count
        share = other.count / total.clamp(min=1)
        difference = other.mean - self.mean
        self.squares = self.squares + other.squares + difference.square() * self.count * share
        self.mean = self.mean + difference * share
        self.count = total

    def statistics(self) -> Statistics:
        """Mean and (population) standard deviation per channel."""
        std = (self.squares / self.count.clamp(min=1)).sqrt()
        return Statistics(tuple(self.mean.tolist()), tuple(std.tolist()))


@dataclass
class PatchVariances:
    """How much the pixels of a patch differ, counted over any number of images, in ``BINS`` steps of a tenth of a
    decade.

    A patch is ``SIDE`` x ``SIDE`` pixels of an image as it is stored; its variance is the mean of its channels'.
    """

    SIDE: ClassVar[int] = 16
    BINS: ClassVar[int] = 160
    counts: Tensor = field(default_factory=lambda: torch.zeros(PatchVariances.BINS, dtype=torch.int64))

    @classmethod
    def of(cls, pixels: Pixels) -> PatchVariances:
        """Of one image; what is left at its right and its lower edge does not count."""
        values = to_tensor(pixels)
        values = values.float() if values.is_floating_point() else values.float() / 255
        rows, columns = (side // cls.SIDE for side in values.shape[1:])
        if not (rows and columns):
            return cls()
        whole = values[:, : rows * cls.SIDE, : columns * cls.SIDE].nan_to_num()
        patches = whole.unflatten(2, (columns, cls.SIDE)).unflatten(1, (rows, cls.SIDE))
        variances = patches.var(dim=(2, 4), correction=0).mean(dim=0).flatten()
        places = (10 * variances.clamp(min=1e-15).log10()).floor().long() + cls.BINS
        return cls(torch.bincount(places.clamp(0, cls.BINS - 1), minlength=cls.BINS))

    def add(self, other: PatchVariances) -> None:
        """Take in other patches."""
        self.counts = self.counts + other.counts

    def share_below(self, variance: float) -> float:
        """The share of the patches whose variance is below ``variance``, to a tenth of a decade; 0 of no patches."""
        edge = round(10 * math.log10(variance)) + self.BINS
        return float(self.counts[: max(edge, 0)].sum()) / max(int(self.counts.sum()), 1)


class Measured(NamedTuple):
    """What was found on a sample: the statistics, the number of images, and what a user should know of them."""

    statistics: Statistics
    images: int
    notes: list[str]


def measure_statistics(source: ImageSource) -> Measured:
    """Mean and standard deviation per channel of at most ``MOST_IMAGES`` images of ``source``, as it reads them.

    The sample depends on the number of images alone, never on the seed of a run, its ranks or workers. The spread of a
    channel that never changes is taken as 1. Raises ``UserError`` where none of the images tried can be read.
    """
    order = torch.randperm(len(source), generator=generator_at(0, SPLIT)).tolist()
    moments, images, pixels = Moments(), 0, 0
    first: Unreadable | None = None

    def look(number: int) -> tuple[Moments, int] | Unreadable:
        try:
            image = source.read(order[number])
        except UnreadableImage as error:
            return error.unreadable
        height, width = size_of(image)
        return Moments.of(image), height * width

    with notes_taken() as noted:
        for found in in_threads(look, len(order), chunk=16):
            if isinstance(found, Unreadable):
                first = first or found
                continue
            moments.add(found[0])
            images, pixels = images + 1, pixels + found[1]
            if images >= MOST_IMAGES or pixels >= MOST_PIXELS:
                break
        notes = noted.sentences(images) if images else []
    if not images:
        assert first is not None
        raise UserError(f"none of {len(source)} images can be read; the first, {first.path}: {first.reason}")
    mean, std = (tuple(float(f"{value:.{DIGITS}g}") for value in values) for values in moments.statistics())
    constant = [channel for channel, value in enumerate(std) if value == 0]
    if constant:
        notes.append(
            f"channel {', '.join(map(str, constant))} never changes in the images measured; its std is set to 1"
        )
    return Measured(Statistics(mean, tuple(value or 1.0 for value in std)), images, notes)


def with_measured(data: ImagesConfig, measured: Statistics) -> dict[str, Any]:
    """The fields of ``data`` that say its statistics, those that it leaves open as ``measured``."""
    return {"mean": data.mean or measured.mean, "std": data.std or measured.std}


def must_be_measured(data: ImagesConfig, weights: Mapping[str, Any] | None) -> bool:
    """Whether neither the configuration nor the metadata of the weights (None: from scratch) says the statistics.

    Weights that say nothing were trained with ImageNet's: those of the authors, of timm and of transformers. Other
    statistics are measured for them where ``data.statistics=own`` asks for it.
    """
    if data.mean is not None and data.std is not None:
        return False
    if weights is not None and weights.get("mean"):
        return False
    return data.statistics == "own" or (data.statistics == "auto" and weights is None)


def describe_statistics(statistics: Statistics) -> str:
    """The numbers as a configuration takes them; one of each where all channels have the same."""
    lists = []
    for name, values in zip(("mean", "std"), statistics, strict=True):
        shown = values[:1] if len(set(values)) == 1 else values
        lists.append(f"{name} {', '.join(f'{value:.{DIGITS}g}' for value in shown)}")
    return "; ".join(lists)


def distance(one: Statistics, other: Statistics) -> tuple[float, float]:
    """How far the statistics of images are from those that a model expects: the mean, in standard deviations of the
    model, and the spread, as a factor of 1 or more; the largest over the channels."""
    means = zip(one.mean, other.mean, other.std, strict=True)
    away = max(abs(a - b) / spread for a, b, spread in means)
    ratios = [max(a, TINY) / b for a, b in zip(one.std, other.std, strict=True)]
    return away, max(max(ratio, 1 / ratio) for ratio in ratios)
