"""What is measured while a pre-training runs: the loss on images kept out of it, and k-NN where labels exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mae_core.data.augmentation import centre_view
from mae_core.data.config import PretrainData
from mae_core.data.decoding import UnreadableImage
from mae_core.data.images import ImageFiles, ImageSource, read_some, statistics_of
from mae_core.data.labelled import LabelledPaths, LabelledSample, read_image_folder
from mae_core.data.labelled import collate_readable as collate_labelled
from mae_core.data.loading import make_loader
from mae_core.data.reading import ReadAs
from mae_core.data.sources import Part, open_places
from mae_core.data.unlabelled import CentreViews, collate_readable
from mae_core.errors import UserError
from mae_core.masking import SampleMasks
from mae_core.measures.knn import knn_accuracy
from mae_core.models.mae import MaskedAutoencoder
from mae_core.patches import as_pair
from mae_core.seeds import SPLIT, generator_at
from mae_core.training import distributed
from mae_core.training.frozen_config import FrozenModel
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import Run

IMAGES_TRIED = 4
POOLING = FrozenModel().pooling
"""What k-NN looks at: the default of ``mae knn``, so that both measure the same."""


class Watched(NamedTuple):
    """Images of a pre-training: those it learns from, those kept out, and the labelled ones; see ``WatchConfig``."""

    training: ImageSource
    held_out: ImageSource | None
    labelled: tuple[LabelledPaths, LabelledPaths] | None

    def only_looked_at(self, read_as: ReadAs) -> list[ImageSource]:
        """The images that the run measures on and does not learn from."""
        held_out = [] if self.held_out is None else [self.held_out]
        return [*held_out, *(ImageFiles(files.paths, read_as) for files in self.labelled or ())]


def split_images(config: PretrainConfig, source: ImageSource) -> Watched:
    """Divide ``source`` as the configuration says; equal seed and images, equal parts.

    Raises ``UserError`` where nothing is left to train on, or a folder to watch is not what it should be.
    """
    watch, seed = config.watch, config.seed
    training: ImageSource = source
    held_out: ImageSource | None = None
    if watch.share:
        order = torch.randperm(len(source), generator=generator_at(seed, SPLIT)).tolist()
        count = max(1, round(watch.share * len(source)))
        if count >= len(source):
            raise UserError(
                f"watch.share={watch.share:g} keeps {count} of {len(source)} images out, so that none is left to train "
                "on; lower it, or name other images with watch.path"
            )
        training, held_out = Part(source, sorted(order[count:])), Part(source, sorted(order[:count]))
    elif watch.path is not None:
        held_out = open_places([watch.path], config.data.reading)
    if held_out is not None and len(held_out) > watch.most_images:
        held_out = Part(held_out, spread(len(held_out), watch.most_images))
    labelled = None
    if watch.labelled is not None:
        train, val = (some_of(files, watch.most_images) for files in read_image_folder(watch.labelled))
        if len(train.paths) < watch.neighbours:
            raise UserError(
                f"watch.neighbours={watch.neighbours} is more than the {len(train.paths)} images of "
                f"{watch.labelled}/train; lower it"
            )
        labelled = train, val
    watched = Watched(training, held_out, labelled)
    for images in watched.only_looked_at(config.data.reading):
        read_some(images, IMAGES_TRIED)
    return watched


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices, evenly over ``length``."""
    count = min(count, length)
    return [number * length // count for number in range(count)]


def some_of(files: LabelledPaths, count: int) -> LabelledPaths:
    """At most ``count`` files, evenly over all classes."""
    chosen = spread(len(files.paths), count)
    return files._replace(paths=[files.paths[i] for i in chosen], labels=[files.labels[i] for i in chosen])


@torch.inference_mode()
def held_out_loss(model: MaskedAutoencoder, source: ImageSource, config: PretrainConfig, run: Run) -> float | None:
    """The loss on centre crops with a mask per image that is always the same, over all ranks; None where no image can
    be read any more."""
    views = CentreViews(source, config.data, config.seed, SampleMasks(model.masker, model.encoder.grid))
    loader = _loader(views, collate_readable, config, run)
    total = torch.zeros(2, dtype=torch.float64)
    for batch in loader:
        run.note_unreadable(batch.unreadable)
        if len(batch):
            with run.autocast():
                loss = model(batch.pixels.to(run.device), mask=batch.mask).loss
            total += torch.tensor([float(loss) * len(batch), len(batch)])
    total = distributed.sum_over_ranks(total.to(run.device, torch.float32))
    return float(total[0] / total[1]) if total[1] else None


@torch.inference_mode()
def knn_top1(
    model: MaskedAutoencoder, labelled: tuple[LabelledPaths, LabelledPaths], config: PretrainConfig, run: Run
) -> float | None:
    """Top-1 accuracy in percent of the validation images by their nearest training images; features are those of
    ``mae knn`` by default. None where too few images can be read any more."""
    (bank, bank_labels), (queries, labels) = (_features(model, files, config, run) for files in labelled)
    if len(bank) < config.watch.neighbours or not len(queries):
        return None
    k = config.watch.neighbours
    classes = len(labelled[0].classes)
    return 100 * knn_accuracy(queries, labels, bank, bank_labels, classes, neighbours=(k,))[k]


class _LabelledViews(Dataset[LabelledSample]):
    """Centre crops with their labels."""

    def __init__(self, files: LabelledPaths, data: PretrainData) -> None:
        self.source, self.labels = ImageFiles(files.paths, data.reading), files.labels
        self.view = centre_view(as_pair(data.image_size), statistics_of(data))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledSample:
        try:
            return LabelledSample(self.view(self.source.read(index)), self.labels[index], [])
        except UnreadableImage as error:
            return LabelledSample(None, self.labels[index], [error.unreadable])


def _features(
    model: MaskedAutoencoder, files: LabelledPaths, config: PretrainConfig, run: Run
) -> tuple[Tensor, Tensor]:
    """(n, D) features and (n,) labels of all ranks' images."""
    features, labels = [torch.zeros(0, model.encoder.embed_dim)], [torch.zeros(0, dtype=torch.int64)]
    for batch in _loader(_LabelledViews(files, config.data), collate_labelled, config, run):
        run.note_unreadable(batch.unreadable)
        if len(batch):
            with run.autocast():
                tokens = model.encoder.encode(batch.pixels.to(run.device))
            pooled = tokens[:, 0] if POOLING == "cls" else tokens[:, 1:].float().mean(dim=1)
            features.append(pooled.float().cpu())
            labels.append(batch.labels)
    parts = distributed.gather((torch.cat(features), torch.cat(labels)))
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


def _loader(
    images: CentreViews | _LabelledViews, collate: Callable[..., Any], config: PretrainConfig, run: Run
) -> DataLoader[Any]:
    mine = BatchSampler(range(run.rank, len(images), run.world), config.watch.batch, drop_last=False)
    return make_loader(images, mine, collate, workers=config.data.workers, pin=run.device.type == "cuda")


def measure(model: MaskedAutoencoder, watched: Watched, config: PretrainConfig, run: Run, step: int) -> None:
    """Measure what the configuration asks for, log it and print it. The model is left in eval mode."""
    model.eval()
    found: dict[str, float | None] = {}
    if watched.held_out is not None:
        found["held_out_loss"] = held_out_loss(model, watched.held_out, config, run)
    if watched.labelled is not None:
        found["knn_top1"] = knn_top1(model, watched.labelled, config, run)
    if found:
        run.record({"step": step, **found})
        told = {"held_out_loss": "loss on images kept out {:.4f}", "knn_top1": "k-NN top-1 {:.2f} %"}
        texts = [
            f"{name} not measured, too few images can be read" if value is None else told[name].format(value)
            for name, value in found.items()
        ]
        run.say(f"step {step}: {', '.join(texts)}")
