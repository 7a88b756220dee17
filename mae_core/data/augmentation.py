"""What happens to an image on its way into pre-training (paper, Table 1e), and how it is looked at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torchvision.transforms import InterpolationMode, v2

from mae_core.data.config import PretrainData
from mae_core.data.decoding import Pixels, fill_no_data
from mae_core.data.images import Statistics
from mae_core.patches import as_pair

BICUBIC = InterpolationMode.BICUBIC
CROP_RATIO = 0.875
"""A fixed-size crop is this share of the resized image, as 224 of 256 in the recipes that evaluate; the paper names no
number."""

Size = tuple[int, int]


class NoDataAsMean(torch.nn.Module):
    """Pixels without data become the mean of their channel, first of all: what a resize blends with them is then near
    0 once it is standardised."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.mean = statistics.mean

    def forward(self, image: Pixels) -> Pixels:
        """See ``fill_no_data``."""
        return fill_no_data(image, self.mean)


class QuarterTurn(torch.nn.Module):
    """A turn by 0, 90, 180 or 270 degrees, each as likely, of a picture or a tensor (C, H, W)."""

    def forward(self, image: Pixels) -> Pixels:
        """Draws from torch's global generator."""
        turns = int(torch.randint(4, ()))
        if isinstance(image, torch.Tensor):
            return torch.rot90(image, turns, (-2, -1))
        return image.rotate(90 * turns, expand=True)


def _centre(size: Size, data: PretrainData) -> list[Callable[[Pixels], Pixels]]:
    return [centre_part(size)]


def _fixed_crop(size: Size, data: PretrainData) -> list[Callable[[Pixels], Pixels]]:
    larger: Size = (round(size[0] / CROP_RATIO), round(size[1] / CROP_RATIO))
    return [v2.Lambda(partial(_resize_to_cover, size=larger)), v2.RandomCrop(list(size))]


def _random_crop(size: Size, data: PretrainData) -> list[Callable[[Pixels], Pixels]]:
    return [v2.RandomResizedCrop(list(size), scale=data.crop_scale, interpolation=BICUBIC)]


AUGMENTATIONS: dict[str, Callable[[Size, PretrainData], list[Callable[[Pixels], Pixels]]]] = {
    "none": _centre,
    "fixed_crop": _fixed_crop,
    "random_crop": _random_crop,
}
"""Name in a config -> the steps that bring an image to the model's size. To add one: a function, a row here and a name
in ``mae_core.config.Augmentation``."""


def training_view(data: PretrainData, statistics: Statistics) -> v2.Compose:
    """Image -> (C, H, W), random as ``data`` says; draws from torch's global generator."""
    steps: list[Callable[..., object]] = [NoDataAsMean(statistics)]
    steps += [QuarterTurn()] if data.quarter_turns else []
    steps += AUGMENTATIONS[data.augmentation](as_pair(data.image_size), data)
    if data.flip_probability:
        steps.append(v2.RandomHorizontalFlip(data.flip_probability))
    if data.vflip:
        steps.append(v2.RandomVerticalFlip(data.vflip))
    if data.color_jitter:
        strength = data.color_jitter
        steps.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    return v2.Compose([*steps, to_normalized(statistics)])


def centre_view(size: Size, statistics: Statistics) -> v2.Compose:
    """Image -> (C, H, W): the largest centred part of the target's aspect ratio, resized (bicubic), standardised."""
    return v2.Compose([NoDataAsMean(statistics), centre_part(size), to_normalized(statistics)])


def centre_part(size: Size) -> v2.Compose:
    """Image -> the largest centred part of the aspect ratio of ``size`` (height, width), resized to it (bicubic)."""
    return v2.Compose([v2.Lambda(partial(_crop_to_ratio, size=size)), v2.Resize(list(size), interpolation=BICUBIC)])


def to_normalized(statistics: Statistics) -> v2.Compose:
    """Image -> (C, H, W) float32, standardised per channel."""
    return v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(statistics.mean), list(statistics.std))]
    )


def _crop_to_ratio(image: Pixels, size: Size) -> Pixels:
    """The largest centred part of the aspect ratio of ``size``."""
    height, width = size
    rows, cols = v2.functional.get_size(image)
    scale = min(cols / width, rows / height)
    return v2.functional.center_crop(image, [max(1, round(height * scale)), max(1, round(width * scale))])


def _resize_to_cover(image: Pixels, size: Size) -> Pixels:
    """Resized, aspect ratio kept, to the smallest size that covers ``size``."""
    rows, cols = v2.functional.get_size(image)
    scale = max(size[0] / rows, size[1] / cols)
    wanted = [max(size[0], round(rows * scale)), max(size[1], round(cols * scale))]
    return v2.functional.resize(image, wanted, interpolation=BICUBIC)
