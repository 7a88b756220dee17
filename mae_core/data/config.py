"""How images are read and augmented, task by task; the defaults are the paper's (He et al. 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mae_core.config.schema import Count, CropScale, Fraction, Schema, Size
from mae_core.data.reading import MAX_PIXELS, TIMEOUT, Pages, Reading, ShardCache

Workers = Annotated[int, Field(ge=0)] | Literal["auto"]
"""A number of processes, or to measure which is best."""


class ImagesConfig(Schema):
    """How images are read, in every task."""

    path: Path | None = Field(None, description="the folder of images; each command's page says what else it takes")
    image_size: Size = Field(224, description="side, or [height, width], of what the network sees, in pixels")
    channels: Annotated[int, Field(ge=1, le=16)] = Field(
        3, description="1 reads images as greyscale, 3 as RGB, any other number as stored (TIFF, .npy)"
    )
    statistics: Literal["auto", "imagenet", "own"] = Field(
        "auto",
        description="mean and std where none are set: own: measured on the training images; auto: own from "
        "scratch; with weights, those that the file states, else ImageNet's",
    )
    mean: tuple[float, ...] | None = Field(
        None, description="per channel, or one for all, of pixels in 0..1; see statistics when empty"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, description="per channel, as mean")
    max_pixels: Count = Field(
        MAX_PIXELS, description="height times width of the largest image that is read; guards against broken headers"
    )
    pages: Pages = Field(
        "auto",
        description="files of several pages: bands: the pages are the channels of one image; first: "
        "only the first page is read",
    )
    workers: Workers = Field(
        2, description="processes that read images, per rank; auto: measured once, as few as read near the best rate"
    )
    timeout: Annotated[float, Field(ge=0)] = Field(
        TIMEOUT, description="seconds without a batch from the reading processes after which a run stops; 0: never"
    )
    on_error: Literal["skip", "raise"] = Field(
        "skip",
        description="skip: unreadable images are named, skipped and counted; raise: all images are "
        "read first, and an unreadable one stops the run",
    )

    @property
    def reading(self) -> Reading:
        """How the files become pixels."""
        return Reading(self.channels, self.max_pixels, self.pages)

    @property
    def searched(self) -> tuple[Path, ...]:
        """Folders of which every image is read, however deep it lies."""
        return ()

    @field_validator("mean", "std")
    @classmethod
    def _one_per_channel(cls, values: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        channels = info.data.get("channels")
        if values is None or channels in (None, len(values)):
            return values
        if len(values) != 1:
            raise ValueError(f"{len(values)} values for {channels} channels; give one for each, or one for all")
        return values * channels


Address = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]+://")]
"""Where a program of the network finds files; as a path it would lose slashes."""
Augmentation = Literal["none", "fixed_crop", "random_crop"]
"""Rows of mae_core.data.augmentation.AUGMENTATIONS, which needs torchvision."""


class PretrainData(ImagesConfig):
    """Unlabelled images, from a folder (nested as it likes), a list of files, tar shards or a Hugging Face data set,
    or several of them; and what is done to them (paper, Table 1e)."""

    path: Address | Path | tuple[Address | Path, ...] | None = Field(  # type: ignore[assignment]  # several, where no labels must agree
        None,
        description="a folder, an image, a .txt list of files, .tar shards here or at an address (https://, s3://), a "
        "data set on disk; or several: [A, B]",
    )
    source: Literal["auto", "files", "list", "shards", "huggingface"] = Field(
        "auto", description="how to read path: a row of mae_core.data.sources.SOURCES; auto looks at what is there"
    )
    split: str | None = Field(None, description="of a Hugging Face data set; train, or the first, when empty")
    cache: Path | None = Field(
        None, description="folder that keeps shards from an address; ~/.cache/mae-transfer/shards when empty"
    )
    cache_gb: Annotated[float, Field(ge=0)] = Field(
        50, description="gigabytes that it may hold; of shards beyond, each image is read from the address every time"
    )
    augmentation: Augmentation = Field(
        "random_crop", description="the crop: none is the centre, without flips; fixed_crop; random_crop (bicubic)"
    )
    crop_scale: CropScale = Field((0.2, 1.0), description="area of a random_crop")
    hflip: Fraction | None = Field(
        None, description="probability of a horizontal flip; when empty 0.5, or 0 with augmentation=none"
    )
    vflip: Fraction = Field(0.0, description="probability of a vertical flip: where images have no up and down")
    quarter_turns: bool = Field(False, description="turn by 0, 90, 180 or 270 degrees: where images have no up")
    color_jitter: Fraction = Field(
        0.0,
        description="strength of brightness, contrast and saturation jitter, hue by a quarter of it "
        "(paper, Table 1e: worse)",
    )
    repeats: Count = Field(
        1, description="crops, with a mask each, of one decoded image in a batch; each counts as an image of an epoch"
    )
    scaled_decoding: bool = Field(
        False,
        description="decode a JPEG at 1/2, 1/4 or 1/8 where a random_crop is at least so many times image_size: "
        "faster for large photos, with other pixels than a resize of the whole",
    )

    @property
    def reading(self) -> Reading:
        """How the files become pixels: tensors all."""
        return super().reading._replace(tensors=True)

    @property
    def searched(self) -> tuple[Path, ...]:
        """The folders among ``path``."""
        given = self.path if isinstance(self.path, tuple) else (self.path,)
        return tuple(path for path in given if isinstance(path, Path) and path.is_dir())

    @property
    def shard_cache(self) -> ShardCache:
        """Where shards from an address are kept."""
        return ShardCache(self.cache, round(self.cache_gb * 1e9))

    @property
    def flip_probability(self) -> float:
        """Of a horizontal flip."""
        if self.hflip is None:
            return 0.0 if self.augmentation == "none" else 0.5
        return self.hflip

    @model_validator(mode="after")
    def _jitter_has_colours(self) -> PretrainData:
        if self.color_jitter and self.channels not in (1, 3):
            raise ValueError(f"color_jitter is for 1 or 3 channels, not {self.channels}; set it to 0")
        if self.scaled_decoding and self.augmentation != "random_crop":
            raise ValueError("scaled_decoding works with augmentation=random_crop; set scaled_decoding=false")
        if isinstance(self.path, tuple) and not self.path:
            raise ValueError("path is an empty list; name a folder")
        return self


def usual_test_crop(image_size: tuple[int, int]) -> float:
    """Centre crop as a share of the resized image: 0.875 (224 of 256) up to 224 pixels, all above (FINETUNE.md)."""
    return 0.875 if max(image_size) <= 224 else 1.0


class EvaluationData(ImagesConfig):
    """Images as they are measured: shorter side resized (bicubic), centre crop."""

    test_crop: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="centre crop as a share of the resized image; 0.875 up to 224 pixels and 1.0 above when empty"
    )


class LabelledData(EvaluationData):
    """``path/train/<class>/*`` and ``path/val/<class>/*`` (ImageFolder)."""

    @property
    def searched(self) -> tuple[Path, ...]:
        """Both halves."""
        return () if self.path is None else (self.path / "train", self.path / "val")


class FinetuneData(LabelledData):
    """Augmentation, through timm: the paper's Table 9, and the random erasing of the released recipe (FINETUNE.md of
    the official code)."""

    multi_label: bool = Field(
        False, description="any number of classes per image, from path/train.csv and path/val.csv: file,labels"
    )
    auto_augment: str | None = Field("rand-m9-mstd0.5-inc1", description="timm's auto-augment string; null for none")
    crop_scale: CropScale = Field((0.08, 1.0), description="area of the random crop, as a share of the image's")
    hflip: Fraction = Field(0.5, description="probability of a horizontal flip")
    random_erasing: Fraction = Field(0.25, description="probability that a rectangle is erased")
    mixup: Annotated[float, Field(ge=0)] = Field(0.8, description="alpha of mixup; 0: none")
    cutmix: Annotated[float, Field(ge=0)] = Field(1.0, description="alpha of CutMix; 0: none")
    label_smoothing: Fraction = Field(0.1, description="share of a label that is spread over all classes")
