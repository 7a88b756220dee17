"""What happens to an image on its way into pre-training (paper, Table 1e), and how it is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple, TypeAlias

import torch
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, v2

from mae_core.config.schema import CropScale
from mae_core.data.config import PretrainData
from mae_core.data.decoding import Pixels, fill_no_data, size_of, to_tensor
from mae_core.data.images import Statistics
from mae_core.patches import as_pair

BICUBIC = InterpolationMode.BICUBIC
CROP_RATIO = 0.875
"""A fixed-size crop is this share of the resized image, as 224 of 256 in the recipes that evaluate; the paper names no
number."""

ASPECT_RATIOS = (3 / 4, 4 / 3)
"""Width by height of a random crop, from and to (torchvision's default, which the paper's code takes)."""

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


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def on(self, size: Size, whole: Size) -> Box:
        """The same part of an image of ``whole`` size that was decoded at ``size``."""
        if size == whole:
            return self
        down, right = size[0] / whole[0], size[1] / whole[1]
        top, left = min(round(self.top * down), size[0] - 1), min(round(self.left * right), size[1] - 1)
        bottom, end = round((self.top + self.height) * down), round((self.left + self.width) * right)
        return Box(top, left, max(1, min(bottom, size[0]) - top), max(1, min(end, size[1]) - left))


class RandomCrop:
    """The crop of torchvision's ``RandomResizedCrop`` (bicubic), from the same draws and in half of the time; its box
    is drawn apart from the cut, so that an image can be decoded at a smaller scale in between."""

    TRIES = 10

    def __init__(self, size: Size, scale: CropScale) -> None:
        self.size, self.scale = size, scale
        self.ratios = ASPECT_RATIOS
        self.log_ratios = torch.tensor(ASPECT_RATIOS).log().tolist()

    def draw(self, whole: Size) -> Box:
        """The box in an image of this size; draws from torch's global generator."""
        rows, cols = whole
        for _ in range(self.TRIES):
            area = rows * cols * torch.empty(1).uniform_(*self.scale).item()
            ratio = math.exp(torch.empty(1).uniform_(*self.log_ratios).item())
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= cols and 0 < height <= rows:
                top, left = (torch.randint(0, room + 1, (1,)).item() for room in (rows - height, cols - width))
                return Box(int(top), int(left), height, width)
        narrow, wide = self.ratios
        height = min(rows, round(cols / narrow)) if cols / rows < narrow else rows
        width = min(cols, round(rows * wide)) if cols / rows > wide else cols
        return Box((rows - height) // 2, (cols - width) // 2, height, width)

    def cut(self, image: torch.Tensor, box: Box) -> torch.Tensor:
        """The part of (C, H, W), resized."""
        part = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
        if part.shape[2:] == self.size:
            return part[0]
        if part.shape[1] == 3 and part.stride(1) == 1:  # torch's kernel for packed RGB wants no gaps between rows
            part = part.contiguous(memory_format=torch.channels_last)
        return interpolate(part, self.size, mode="bicubic", antialias=True)[0]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Draw and cut."""
        return self.cut(image, self.draw((image.shape[-2], image.shape[-1])))


Step: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def _centre(size: Size, data: PretrainData) -> list[Step]:
    return [centre_part(size)]


def _fixed_crop(size: Size, data: PretrainData) -> list[Step]:
    larger: Size = (round(size[0] / CROP_RATIO), round(size[1] / CROP_RATIO))
    return [v2.Lambda(partial(_resize_to_cover, size=larger)), v2.RandomCrop(list(size))]


def _random_crop(size: Size, data: PretrainData) -> list[Step]:
    return [RandomCrop(size, data.crop_scale)]


AUGMENTATIONS: dict[str, Callable[[Size, PretrainData], list[Step]]] = {
    "none": _centre,
    "fixed_crop": _fixed_crop,
    "random_crop": _random_crop,
}
"""Name in a config -> the steps that bring an image to the model's size. To add one: a function, a row here and a name
in ``mae_core.config.Augmentation``."""


FACTORS = (8, 4, 2)
"""By which libjpeg can divide the sides of an image as it decodes it."""


class TrainingView:
    """Image -> (C, H, W) as ``data`` says, uint8 or float32 like its source and not standardised yet; draws from
    torch's global generator."""

    def __init__(self, data: PretrainData, statistics: Statistics) -> None:
        self.size: Size = as_pair(data.image_size)
        self.mean = statistics.mean
        self.turns = data.quarter_turns
        self.steps = AUGMENTATIONS[data.augmentation](self.size, data)
        self.flips = tuple((axis, p) for axis, p in ((-1, data.flip_probability), (-2, data.vflip)) if p)
        strength = data.color_jitter
        self.jitter = v2.ColorJitter(strength, strength, strength, strength / 4) if strength else None

    def __call__(self, image: Pixels, whole: Size | None = None) -> torch.Tensor:
        """``whole``: the size of an image that was decoded at a smaller scale; its crop is drawn on the former."""
        pixels = to_tensor(fill_no_data(image, self.mean))
        quarters = self._quarters()
        pixels = torch.rot90(pixels, quarters, (-2, -1)) if quarters else pixels
        for step in self.steps:
            if whole is not None and isinstance(step, RandomCrop):
                size = _turned(whole, quarters)
                pixels = step.cut(pixels, step.draw(size).on(size_of(pixels), size))
            else:
                pixels = step(pixels)
        for axis, probability in self.flips:
            if torch.rand(1) < probability:
                pixels = pixels.flip(axis)
        return (pixels if self.jitter is None else self.jitter(pixels)).contiguous()

    def factor(self, height: int, width: int) -> int:
        """How much smaller an image of this size may be decoded for the crop that the call will draw, which stays at
        least as large as what it becomes."""
        size = _turned((height, width), self._quarters())
        (crop,) = (step for step in self.steps if isinstance(step, RandomCrop))
        box = crop.draw(size)
        times = min(box.height / self.size[0], box.width / self.size[1])
        return next((factor for factor in FACTORS if times >= factor), 1)

    def _quarters(self) -> int:
        """Turns by 90 degrees, each as likely."""
        return int(torch.randint(4, ())) if self.turns else 0


def _turned(size: Size, quarters: int) -> Size:
    return (size[1], size[0]) if quarters % 2 else size


def centre_view(size: Size, statistics: Statistics) -> v2.Compose:
    """Image -> (C, H, W): the largest centred part of the target's aspect ratio, resized (bicubic), standardised."""
    return v2.Compose([NoDataAsMean(statistics), to_tensor, centre_part(size), to_normalized(statistics)])


def centre_part(size: Size) -> v2.Compose:
    """Image -> the largest centred part of the aspect ratio of ``size`` (height, width), resized to it (bicubic)."""
    return v2.Compose([v2.Lambda(partial(_crop_to_ratio, size=size)), v2.Resize(list(size), interpolation=BICUBIC)])


def to_normalized(statistics: Statistics) -> v2.Compose:
    """Image -> (C, H, W) float32, standardised per channel."""
    return v2.Compose([to_tensor, partial(standardised, statistics=statistics)])


def standardised(pixels: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """(..., C, H, W) uint8, or float32 in shares, on any device -> float32 with mean 0 and standard deviation 1 per
    channel, by the operations of torchvision's ``ToDtype`` and ``Normalize``, in place of their copies."""
    mean, std = _constants(statistics, pixels.device)
    if pixels.dtype == torch.uint8:
        return pixels.float().mul_(1 / 255).sub_(mean).div_(std)
    return (pixels - mean).div_(std)


@lru_cache(maxsize=16)
def _constants(statistics: Statistics, device: torch.device) -> list[torch.Tensor]:
    """Mean and std (C, 1, 1): a copy to a GPU waits for it, so it is made once."""
    return [torch.tensor(values, device=device)[:, None, None] for values in statistics]


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
