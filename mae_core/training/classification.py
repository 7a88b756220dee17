"""What fine-tuning and linear probing share: the labelled images, their loaders, the measure, and what is written."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import DataLoader

from mae_core.atomic import write_json
from mae_core.counting import Counter
from mae_core.data.config import FinetuneData, ImagesConfig, LabelledData
from mae_core.data.images import ImageFiles, Statistics, check_all, describe_passed_over, read_some
from mae_core.data.labelled import (
    LabelledBatch,
    LabelledPaths,
    TestImages,
    collate_readable,
    read_image_folder,
    read_label_lists,
)
from mae_core.data.views import check_pictures
from mae_core.layout import CLASSIFIER, LOADING
from mae_core.models.timm_trunk import Encoder
from mae_core.patches import as_pair
from mae_core.training import distributed
from mae_core.training.predictions import evaluate_classifier, evaluate_multi_label
from mae_core.training.run import Run
from mae_core.training.same_data import Data
from mae_core.weights.encoder_file import EncoderInfo
from mae_core.weights.report import LoadReport

IMAGES_TRIED = 4


class Splits(NamedTuple):
    """Training and validation images of the same classes; all of them as one source; and the lists that name them."""

    train: LabelledPaths
    val: LabelledPaths
    source: ImageFiles
    lists: tuple[Path, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Class names by index."""
        return self.train.classes

    @property
    def data(self) -> Data:
        """What a run reads."""
        return Data(self.source.names, self.source.content, self.lists)


def read_splits(data: LabelledData) -> Splits:
    """The images of a configuration: class folders, or lists of files with several labels each.

    A few images are tried, or all are read through with ``data.on_error=raise``. Raises ``UserError`` for what
    ``read_image_folder`` and ``read_label_lists`` refuse and for a split without a readable image.
    """
    several = isinstance(data, FinetuneData) and data.multi_label
    train, val = read_label_lists(data.path) if several else read_image_folder(data.path)
    passed_over = Tally(train.passed_over) + Tally(val.passed_over)
    source = ImageFiles(train.paths + val.paths, data.reading, data.path, passed_over)
    if passed_over and distributed.announced_rank() == 0:
        print(f"note: {describe_passed_over(passed_over)}", flush=True)
    check_all_if_asked(source, data)
    for files in (train, val):
        tried = read_some(ImageFiles(files.paths, data.reading), IMAGES_TRIED)
        if isinstance(data, FinetuneData):
            check_pictures(tried, data)
    lists = [data.path / f"{split}.csv" for split in ("train", "val")] if several and data.path else []
    return Splits(train, val, source, tuple(lists))


def check_all_if_asked(source: ImageFiles, data: ImagesConfig) -> None:
    """With ``data.on_error=raise``, decode all images and raise ``UserError`` at the first that cannot be read."""
    if data.on_error == "raise":
        check_all(source, on_progress=Counter("checking images"))


def evaluation_loader(
    files: LabelledPaths, data: LabelledData, statistics: Statistics, batch: int, run: Run
) -> DataLoader[Any]:
    """This rank's share of ``files`` as they are evaluated, each image on one rank and once."""
    images = TestImages(files, data, as_pair(data.image_size), statistics)
    return run.loader(images, collate_readable, batch)


def measure(
    model: nn.Module, batches: Iterable[LabelledBatch], run: Run, classes: list[str], *, multi_label: bool
) -> dict[str, Any]:
    """The metrics of a classifier with one label per image, or several, in per cent, as metrics.json holds them."""
    if multi_label:
        return evaluate_multi_label(model, batches, run).as_dict(classes)
    return evaluate_classifier(model, batches, run, len(classes)).as_dict(classes)


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a measurement that a log line shows."""
    return {name: metrics[name] for name in ("top1", "top5", "mAP") if name in metrics}


def in_words(metrics: Mapping[str, Any]) -> str:
    """A measurement as a line on the screen."""
    names = {"top1": "top-1", "top5": "top-5"}
    numbers = ", ".join(f"{names.get(name, name)} {value:.2f} %" for name, value in headline(metrics).items())
    return f"{numbers} on {metrics['images']} images"


def tell_of_weights(run: Run, report: LoadReport | None) -> None:
    """Print what came from the weights file and keep it in loading.json; or say that nothing did."""
    if report is None:
        run.say("training from scratch: no weights are loaded")
    elif run.is_main:
        report.print()
        write_json(run.folder / LOADING, report.as_dict())


def steps_between(epochs: float, images: int, batch_size: int) -> int:
    """Steps in so many epochs, at least one."""
    return max(1, round(epochs * images / batch_size))


def classifier_metadata(model: Encoder, config: Any, statistics: Statistics, classes: list[str]) -> dict[str, Any]:
    """What the file of a classifier says about itself; without a test crop it is the usual one of its image size."""
    return EncoderInfo.of(
        model,
        **statistics._asdict(),
        pooling=config.model.pooling,
        classes=classes,
        epochs=config.optim.epochs,
        test_crop=config.data.test_crop,
        multi_label=getattr(config.data, "multi_label", None),
    ).to_metadata()


def conclude(
    run: Run,
    state: Mapping[str, Any],
    metadata: Mapping[str, Any],
    metrics: Mapping[str, Any],
    name: str = CLASSIFIER,
) -> None:
    """Write the classifier and its metrics, on rank 0, and close the run."""
    run.write_weights(name, state, metadata)
    run.close(metrics)
