"""``mae bench-data``: how fast the loader of a recipe is, without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mae_core.data import labelled, unlabelled
from mae_core.data.config import ImagesConfig
from mae_core.data.images import ImageFiles, ImageSource, Statistics
from mae_core.data.jpeg import describe_decoder
from mae_core.data.labelled import TrainImages
from mae_core.data.rates import candidates, cores, loader_rate, rate_lines, time_stages
from mae_core.data.sources import open_source
from mae_core.data.unlabelled import UnlabelledImages
from mae_core.errors import UserError
from mae_core.masking import SampleMasks, build_masker
from mae_core.patches import PatchGrid, as_pair
from mae_core.training.classification import read_splits
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.pretrain_config import PretrainConfig

MOST_AT_ONCE = 64
"""Images of a batch: a training's may be larger, and would take long to fill."""
Loaded = tuple[ImageSource, Any, Callable[[list[Any]], Any]]


def loaded_by(config: PretrainConfig | FinetuneConfig) -> Loaded:
    """What a training reads: its images, its samples by (epoch, index), and what makes a batch of them. Mean and std
    cost the same whatever they are, so none are measured."""
    data = with_any_statistics(config.data)
    if isinstance(config, FinetuneConfig):
        splits = read_splits(config.data)
        size, statistics = as_pair(data.image_size), Statistics(data.mean, data.std)
        samples = TrainImages(splits.train, data, size, statistics, config.seed)
        return ImageFiles(splits.train.paths, data.reading), samples, labelled.collate
    source = open_source(data)
    grid = PatchGrid.of(data.image_size, config.model.patch_size or config.model.shape.patch_size)
    masks = SampleMasks(build_masker(config.masking.kind, config.masking.ratio, config.masking.options), grid)
    return source, UnlabelledImages(source, data, config.seed, masks), unlabelled.collate


def with_any_statistics(data: ImagesConfig) -> Any:
    """``data`` with a mean and std, whatever they are."""
    half = (0.5,) * data.channels
    return data.model_copy(update={"mean": data.mean or half, "std": data.std or half})


def bench_data(config: Any, rate: float, *, seconds: float = 2.0, say: Callable[[str], None] = print) -> None:
    """Print images per second by stage and by number of processes, and what a GPU that trains ``rate`` needs.

    Raises ``UserError`` for another recipe than a pre-training's or a fine-tuning's, and where no image can be read.
    """
    if not isinstance(config, PretrainConfig | FinetuneConfig):
        raise UserError("mae bench-data reads recipes of pretrain and finetune; name one of these")
    source, samples, collate = loaded_by(config)
    size = as_pair(config.data.image_size)
    say(f"{len(source)} images to {size[0]}x{size[1]}x{config.data.channels}; JPEG decoder: {describe_decoder()}")
    stages = time_stages(source, samples, collate)
    batch = min(config.optim.batch_size, MOST_AT_ONCE)
    asked = [] if config.data.workers == "auto" else [config.data.workers]
    numbers = sorted({0, *candidates(cores()), *asked})
    rates = {number: loader_rate(samples, collate, number, batch=batch, seconds=seconds) for number in numbers}
    for line in rate_lines(stages, rates, rate):
        say(line)
