"""What an engine is to the rest: four functions, and the job that they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from torch import nn

from mae_core.data.images import Statistics, Unreadable
from mae_core.layout import METRICS
from mae_core.patches import as_pair
from mae_core.training.loop import FitSettings, seed_everything
from mae_core.training.run import Run
from mae_core.weights.load import LoadReport
from transfer.backbone import DenseViT
from transfer.detection.coco import CocoSet
from transfer.detection.config import DetectionConfig, DetectorConfig, InferenceConfig, SamplingConfig
from transfer.detection.evaluation import PREDICTIONS, write_evaluation
from transfer.detection.parts import Trunk, build_trunk
from transfer.detection.samples import WholeImages
from transfer.detection.scores import Detections, scores_table


class Job(NamedTuple):
    """A training: what to train on and how, where to write it, and what the file of the detector will say."""

    config: DetectionConfig
    train_set: CocoSet
    images: WholeImages
    statistics: Statistics
    settings: FitSettings
    run: Run
    resume: bool
    metadata: dict[str, Any]


class Fitted(NamedTuple):
    """The network to score; seconds of training, None where nothing was left to train; the mean loss at the end."""

    model: nn.Module
    seconds: float | None
    loss: float


class Detect(Protocol):
    """What ``model`` finds in the images of ``indices``, in original pixels, and the images that could not be read."""

    def __call__(
        self, model: nn.Module, images: WholeImages, run: Run, indices: Sequence[int], *, batch_size: int, workers: int
    ) -> tuple[list[Detections], list[Unreadable]]: ...


class Load(Protocol):
    """Fill ``network`` from the detector in ``path``; with ``other_classes`` but for what depends on the classes."""

    def __call__(self, network: nn.Module, path: Path, *, other_classes: bool = False) -> LoadReport: ...


class Zoo(NamedTuple):
    """Detectors of another project: whether a file holds one, and how it is read into our network."""

    holds: Callable[[Path | None], bool]
    load: Load


class DetectorEngine(NamedTuple):
    """An engine.

    build  (trunk, number of classes, network, sampling, test) -> a network whose trunk is ``backbone.vit``
    adapt  (network, statistics, (height, width) of the canvas): what the network has to know of its images
    fit    trains it
    detect see ``Detect``
    score  (network, images, run, configuration, more) -> metrics.json, which it writes with ``more`` in it
    zoo    reads whole detectors of other projects, where the engine knows any
    """

    build: Callable[[DenseViT, int, DetectorConfig, SamplingConfig, InferenceConfig], nn.Module]
    adapt: Callable[[nn.Module, Statistics, tuple[int, int]], None]
    fit: Callable[[nn.Module, Job], Fitted]
    detect: Detect
    score: Callable[[nn.Module, WholeImages, Run, DetectionConfig, dict[str, Any]], dict[str, Any]]
    zoo: Zoo | None = None


def finish(
    images: WholeImages,
    found: Sequence[Detections],
    unreadable: list[Unreadable],
    run: Run,
    config: DetectionConfig,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write the evaluation of ``found`` to the run directory and print its table; the metrics, on rank 0."""
    run.note_unreadable(unreadable)
    if not run.is_main:
        return {}
    test, channels = config.test, config.data.channels
    metrics = write_evaluation(run.folder, images.coco, found, unreadable, test=test, channels=channels, more=more)
    Console().print(scores_table(metrics))
    run.say(f"wrote {run.folder / METRICS} and {run.folder / PREDICTIONS}")
    return metrics


def build_network(config: DetectionConfig, engine: DetectorEngine, num_classes: int) -> tuple[Trunk, nn.Module]:
    """The trunk, and the engine's network on it, from the seed of the configuration.

    Raises ``UserError`` where the configuration contradicts the weights, or the engine.
    """
    seed_everything(config.seed)
    trunk = build_trunk(config)
    network = config.model
    if network.norm == "sync_bn" and config.device == "cpu":  # SyncBN exists on GPUs only, and there may be some
        network = network.model_copy(update={"norm": "bn"})
    model = engine.build(trunk.vit, num_classes, network, config.sampling, config.test)
    engine.adapt(model, trunk.statistics, as_pair(config.data.image_size))
    return trunk, model
