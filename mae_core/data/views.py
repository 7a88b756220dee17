"""Views of labelled images: augmented for fine-tuning, cropped for a linear probe, as they are measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mae_core.config.schema import CropScale
from mae_core.data.augmentation import BICUBIC, NoDataAsMean, Size, to_normalized
from mae_core.data.config import FinetuneData, usual_test_crop
from mae_core.data.decoding import Pixels, UnreadableImage
from mae_core.data.given import AnyImage, name_of, pixels_of
from mae_core.data.images import Statistics
from mae_core.errors import UserError

View: TypeAlias = Callable[[Pixels], Tensor]
"""Image -> (C, H, W) float32, standardised per channel; a random one draws from the global generators."""

CROP_RATIO = (3 / 4, 4 / 3)
"""Width / height of a random crop."""


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize, where no bits leave a black image."""
    return auto_augment.posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)


# timm (up to 1.0.31 at least) lets RandAugment ask for ``ImageOps.posterize(image, 0)``, which Pillow 13 refuses with a
# ValueError and Pillow <= 12 answered with a black image. Remove this once timm no longer asks.
auto_augment.NAME_TO_OP.update({name: _posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")})


class PictureOrTensor:
    """A view for PIL images and one for tensors: timm's transforms take pictures only."""

    def __init__(self, of_pictures: View, of_tensors: View) -> None:
        self.of_pictures, self.of_tensors = of_pictures, of_tensors

    def __call__(self, image: Pixels) -> Tensor:
        return (self.of_tensors if isinstance(image, Tensor) else self.of_pictures)(image)


def finetune_view(data: FinetuneData, size: Size, statistics: Statistics) -> View:
    """The augmentation of fine-tuning, by timm (paper, Table 9). Of images that are no 8-bit grey or RGB pictures the
    crop, the flip and the erasing remain.

    Raises ``UserError`` for an auto-augment string that timm does not know.
    """
    try:
        of_pictures = create_transform(
            (len(statistics.mean), *size),
            is_training=True,
            scale=data.crop_scale,
            hflip=data.hflip,
            color_jitter=None,
            auto_augment=data.auto_augment,
            interpolation="bicubic",
            mean=statistics.mean,
            std=statistics.std,
            re_prob=data.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"data.auto_augment={data.auto_augment} is not understood by timm ({error}); "
            "use rand-m9-mstd0.5-inc1, or null for none"
        ) from None
    of_tensors = v2.Compose(
        [
            NoDataAsMean(statistics),
            v2.RandomResizedCrop(list(size), scale=data.crop_scale, interpolation=BICUBIC),
            v2.RandomHorizontalFlip(data.hflip),
            to_normalized(statistics),
            RandomErasing(data.random_erasing, mode="pixel", device="cpu"),
        ]
    )
    return PictureOrTensor(of_pictures, of_tensors)


def check_pictures(images: list[Pixels], data: FinetuneData) -> None:
    """Raise ``UserError`` where auto-augmentation, which is for 8-bit pictures, is asked for of other images."""
    if data.auto_augment and any(isinstance(image, Tensor) for image in images):
        raise UserError(
            f"data.auto_augment={data.auto_augment} works only on 8-bit grey and RGB images, and these are "
            "not; set data.auto_augment=null"
        )


class SingleDrawCrop(nn.Module):
    """A random crop of one draw, resized (bicubic): what the linear probe of the paper trains on (Table 10, official
    ``crop.py``).

    Area and aspect ratio are drawn once, and a crop that would not fit is clamped to the image, where torchvision's
    ``RandomResizedCrop`` draws again.
    """

    def __init__(self, size: Size, scale: CropScale) -> None:
        super().__init__()
        self.size, self.scale = list(size), scale

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, rows, columns) of a crop; draws from torch's global generator."""
        area = height * width * float(torch.empty(()).uniform_(*self.scale))
        low, high = (math.log(ratio) for ratio in CROP_RATIO)
        ratio = math.exp(float(torch.empty(()).uniform_(low, high)))
        cols = max(1, min(width, round(math.sqrt(area * ratio))))
        rows = max(1, min(height, round(math.sqrt(area / ratio))))
        top = int(torch.randint(height - rows + 1, ()))
        left = int(torch.randint(width - cols + 1, ()))
        return top, left, rows, cols

    def forward(self, image: Pixels) -> Pixels:
        """The crop at ``size``."""
        return F.resized_crop(image, *self.box(*F.get_size(image)), size=self.size, interpolation=BICUBIC)


def probe_view(crop_scale: CropScale, hflip: float, size: Size, statistics: Statistics) -> View:
    """Single-draw crop and flip alone (paper, Table 10)."""
    crop, flip = SingleDrawCrop(size, crop_scale), v2.RandomHorizontalFlip(hflip)
    return v2.Compose([NoDataAsMean(statistics), crop, flip, to_normalized(statistics)])


def evaluation_view(test_crop: float | None, size: Size, statistics: Statistics) -> View:
    """Shorter side resized (bicubic), centre crop: ``test_crop`` of it, see ``usual_test_crop``. Where the size is not
    square, the image is resized until it covers ``size / test_crop`` on both sides."""
    share = test_crop or usual_test_crop(size)
    of_pictures = create_transform(
        (len(statistics.mean), *size),
        is_training=False,
        interpolation="bicubic",
        mean=statistics.mean,
        std=statistics.std,
        crop_pct=share,
    )
    whole = [math.floor(side / share) for side in size]
    square = size[0] == size[1]
    resize = v2.Resize(whole[0], interpolation=BICUBIC) if square else ResizeKeepRatio(whole, interpolation="bicubic")
    of_tensors = v2.Compose([NoDataAsMean(statistics), resize, v2.CenterCrop(list(size)), to_normalized(statistics)])
    return PictureOrTensor(of_pictures, of_tensors)


class FileView:
    """Image -> what an encoder was trained on: shorter side resized, centre crop, standardised per channel."""

    def __init__(self, size: Size, channels: int, statistics: Statistics | None) -> None:
        self.size, self.channels, self.statistics = size, channels, statistics

    def __call__(self, image: AnyImage) -> Tensor:
        """A file, a PIL image, an array (height, width[, C]) or a tensor (C, height, width) -> (C, H, W) float32.

        Raises ``UserError`` for a file that cannot be read, and where the mean and std of the channels are not known.
        """
        try:
            pixels = pixels_of(image, self.channels, name_of(image, 0))
        except UnreadableImage as error:
            raise UserError(f"image {error.unreadable.path} cannot be read ({error.unreadable.reason})") from None
        return self.of_pixels()(pixels)

    def of_pixels(self) -> View:
        """The view of images that are read already. Raises ``UserError`` where mean and std are not known."""
        if self.statistics is None:
            raise UserError(
                f"the weights do not state the mean and std of their {self.channels} channels; standardise "
                "the images yourself, with the mean and std that mae data-stats prints"
            )
        return evaluation_view(1.0, self.size, self.statistics)
