"""``mae data-stats``: what is in a set of images, and its mean and standard deviation per channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, size_of, to_tensor, with_channels
from mae_core.data.images import ImageSource, Statistics, in_threads
from mae_core.data.sources import damaged_parts
from mae_core.errors import UserError

EXAMPLES = 10


@dataclass
class Moments:
    """Number, mean and sum of squared deviations of a channel's pixels, over any number of images (Chan's update)."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @classmethod
    def of(cls, pixels: Pixels) -> Moments:
        """Of one image, its pixels in 0..1 where it holds unsigned integers."""
        values = to_tensor(pixels)
        scale = 1.0 if values.is_floating_point() else 255.0
        flat = values.flatten(1).double() / scale
        mean = flat.mean(dim=1)
        return cls(flat.shape[1], mean, (flat - mean[:, None]).square().sum(dim=1))

    def add(self, other: Moments) -> None:
        """Take in other pixels."""
        if not self.count:
            self.count, self.mean, self.squares = other.count, other.mean, other.squares
            return
        total = self.count + other.count
        difference = other.mean - self.mean
        self.squares = self.squares + other.squares + difference.square() * self.count * other.count / total
        self.mean = self.mean + difference * other.count / total
        self.count = total

    def statistics(self) -> Statistics:
        """Mean and (population) standard deviation per channel."""
        std = (self.squares / max(self.count, 1)).sqrt()
        return Statistics(tuple(self.mean.tolist()), tuple(std.tolist()))


@dataclass
class Survey:
    """What was found in a set of images.

    sizes     (height, width) -> images
    channels  channels as stored -> images
    numbers   what a channel's values are -> images
    by_channels  channels -> moments of the images that have them, or can be brought to them
    """

    total: int
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)
    unreadable: list[Unreadable] = field(default_factory=list)
    by_channels: dict[int, Moments] = field(default_factory=dict)

    @property
    def usual_channels(self) -> int:
        """The number of channels that most images have."""
        return self.channels.most_common(1)[0][0]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        found = {count: moments.statistics() for count, moments in sorted(self.by_channels.items())}
        return {
            "images": self.total,
            "readable": self.sizes.total(),
            "sizes": [[*size, count] for size, count in sorted(self.sizes.items())],
            "channels": dict(sorted(self.channels.items())),
            "numbers": dict(self.numbers),
            "statistics": {count: statistics._asdict() for count, statistics in found.items()},
            "unreadable": [entry._asdict() for entry in self.unreadable],
        }


def survey(
    source: ImageSource, *, channels: int | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Survey:
    """Read every image of a source opened as stored. ``channels``: what to bring all to, as a training would; images
    that cannot be are unreadable. Without it images of each number of channels are measured apart.

    Raises ``UserError`` where no image can be read.
    """
    found = Survey(len(source), unreadable=damaged_parts(source))

    def look(index: int) -> tuple[tuple[int, int], int, str, Moments] | Unreadable:
        try:
            pixels = source.read(index)
            stored = len(to_tensor(pixels))
            try:
                moments = Moments.of(with_channels(pixels, channels))
            except ValueError as error:
                raise UnreadableImage(source.names[index], str(error)) from None
        except UnreadableImage as error:
            return error.unreadable
        return size_of(pixels), stored, kind_of_numbers(pixels), moments

    for done, result in enumerate(in_threads(look, len(source)), start=1):
        if isinstance(result, Unreadable):
            found.unreadable.append(result)
        else:
            size, stored, numbers, moments = result
            found.sizes[size] += 1
            found.channels[stored] += 1
            found.numbers[numbers] += 1
            found.by_channels.setdefault(channels or stored, Moments()).add(moments)
        if on_progress is not None:
            on_progress(done, len(source))
    if not found.sizes:
        path, reason = found.unreadable[0]
        raise UserError(f"none of {len(source)} images can be read; the first, {path}: {reason}")
    return found


def kind_of_numbers(pixels: Pixels) -> str:
    """8 bits, or more."""
    deep = isinstance(pixels, Tensor) and pixels.is_floating_point()
    return "more than 8 bits, or not whole numbers" if deep else "8 bits"


def describe(found: Survey, channels: int | None = None) -> str:
    """The survey as text, with what a configuration needs of it last."""
    readable = found.sizes.total()
    lines = [f"{found.total} images, {readable} readable, {len(found.unreadable)} not"]
    lines += [f"  unreadable: {path} ({reason})" for path, reason in found.unreadable[:EXAMPLES]]
    if len(found.unreadable) > EXAMPLES:
        lines.append(f"  and {len(found.unreadable) - EXAMPLES} more; --json names all")
    for axis, name in enumerate(("height", "width")):
        values = sorted(found.sizes.elements(), key=lambda size: size[axis])
        smallest, middle, largest = (values[place][axis] for place in (0, readable // 2, -1))
        lines.append(f"{name}: {smallest} to {largest} pixels, half of the images up to {middle}")
    common, count = found.sizes.most_common(1)[0]
    lines.append(f"sizes: {len(found.sizes)}, the commonest {common[0]}x{common[1]} ({count} images)")
    lines.append("channels: " + ", ".join(f"{n} in {count} images" for n, count in found.channels.most_common()))
    lines.append("values: " + ", ".join(f"{kind} in {count} images" for kind, count in found.numbers.most_common()))
    chosen = channels or found.usual_channels
    mean, std = found.by_channels[chosen].statistics()
    for number, (one_mean, one_std) in enumerate(zip(mean, std, strict=True)):
        lines.append(f"  channel {number}: mean {one_mean:.6g}, std {one_std:.6g}")
    if 0.0 in std:
        lines.append(f"channel {std.index(0.0)} never changes; leave it out, its std of 0 cannot divide")
    if channels is None and len(found.channels) > 1:
        others = found.sizes.total() - found.channels[chosen]
        lines.append(
            f"these are of the images with {chosen} channels; {others} others have not so many: --channels {chosen} "
            "counts them as a training would read them, or says that it cannot"
        )
    numbers = [", ".join(f"{value:.6g}" for value in values) for values in (mean, std)]
    lines.append(f"data: {{channels: {chosen}, mean: [{numbers[0]}], std: [{numbers[1]}]}}")
    return "\n".join(lines)
