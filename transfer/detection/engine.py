"""The interface of an engine: five functions, and the job that they get. What it can do is its row in
``transfer.engines``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol

from torch import nn
from torch.utils.data import DataLoader

from mae_core.data.config import Workers
from mae_core.data.images import Statistics, Unreadable, statistics_of
from mae_core.errors import UserError
from mae_core.patches import as_pair
from mae_core.training.loop import FitSettings, seed_everything
from mae_core.training.run import Run
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.files import WeightsFile
from mae_core.weights.report import LoadReport
from transfer.detection.coco import CocoSet
from transfer.detection.config import DetectionConfig, DetectorConfig, InferenceConfig, SamplingConfig
from transfer.detection.heads import HEADS, BuildNetwork, Detections
from transfer.detection.samples import TrainingSamples, WholeImages, collate
from transfer.engines import DETECTION, require
from transfer.pyramid import PYRAMIDS, PyramidBackbone, check_canvas
from transfer.timm_backbone import Dense
from transfer.trunk import Trunk, build_trunk, parameter_groups


class Job(NamedTuple):
    """A training: what to train on and how, where to write it, and the metadata of the detector's file."""

    config: DetectionConfig
    train_set: CocoSet
    images: WholeImages
    statistics: Statistics
    settings: FitSettings
    run: Run
    metadata: dict[str, Any]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups of ``model`` for AdamW, with rates by layer, and what is exempt from the weight decay."""
        optim = self.config.optim
        decay = {"layer_decay": optim.layer_decay, "weight_decay": optim.weight_decay}
        return parameter_groups(model, **decay, decayed=optim.decayed)

    def batches(self, start: int, statistics: Statistics) -> DataLoader[Any]:
        """This rank's batches from step ``start`` on, pixels standardised with ``statistics``."""
        config, masks = self.config, HEADS[self.config.model.head].learns_masks
        samples = TrainingSamples(self.train_set, config.data, statistics, config.seed, masks=masks)
        return self.run.training_loader(samples, collate, total_steps=self.settings.total_steps, start_step=start)


class Fitted(NamedTuple):
    """The network to score; seconds of training, None where nothing was left to train; the mean loss at the end."""

    model: nn.Module
    seconds: float | None
    loss: float


class Detect(Protocol):
    """What ``model`` finds in the images of ``indices``, in original pixels, and the images that could not be read."""

    def __call__(
        self,
        model: nn.Module,
        images: WholeImages,
        run: Run,
        indices: Sequence[int],
        *,
        batch_size: int,
        workers: Workers,
    ) -> tuple[list[Detections], list[Unreadable]]: ...


class Load(Protocol):
    """Fill ``network`` from the detector in ``file``; with ``other_classes`` but for what depends on the classes."""

    def __call__(self, network: nn.Module, file: WeightsFile, *, other_classes: bool = False) -> LoadReport: ...


class Zoo(NamedTuple):
    """Detectors of another project: whether a file holds one, and how it is read into our network."""

    holds: Callable[[WeightsFile], bool]
    load: Load


class DetectorEngine(NamedTuple):
    """An engine, ``ENGINE`` of its package.

    backbone  (trunk, network) -> the pyramid on it, as the engine's heads take it; its trunk is ``vit``
    adapt     (network, statistics, (height, width) of the canvas): what the network has to know of its images
    fit       trains it
    detect    see ``Detect``
    score     (network, images, run, configuration, more) -> metrics.json, which it writes with ``more`` in it
    zoo       reads whole detectors of other projects, where the engine's row says that it can
    """

    backbone: Callable[[Dense, DetectorConfig], PyramidBackbone]
    adapt: Callable[[nn.Module, Statistics, tuple[int, int]], None]
    fit: Callable[[nn.Module, Job], Fitted]
    detect: Detect
    score: Callable[[nn.Module, WholeImages, Run, DetectionConfig, dict[str, Any]], dict[str, Any]]
    zoo: Zoo | None = None


def load_engine(name: str) -> DetectorEngine:
    """``ENGINE`` of the package that alone imports the framework. Raises ``UserError`` where it is not installed."""
    require(name)
    return resolve_name(f"{DETECTION[name].module}:ENGINE")


def builder_of(head: str, engine: str) -> BuildNetwork:
    """What builds the network of a row of ``HEADS`` with an engine. Raises ``UserError`` where the engine lacks it."""
    builders = HEADS[head].builders
    if engine not in builders:
        raise UserError(f"model.head={head} needs engine={' or '.join(builders)}, not {engine}")
    builder = builders[engine]
    return resolve_name(builder) if isinstance(builder, str) else builder


def assemble(
    vit: Dense,
    num_classes: int,
    config: DetectorConfig,
    sampling: SamplingConfig,
    test: InferenceConfig,
    *,
    engine: str = "torchvision",
) -> nn.Module:
    """The engine's network of the configuration's head on ``vit``, for ``num_classes`` classes without background."""
    backbone = load_engine(engine).backbone(vit, config)
    return builder_of(config.head, engine)(backbone, num_classes, config, sampling, test)


def trunk_options(model: DetectorConfig, canvas: tuple[int, int]) -> dict[str, Any]:
    """Arguments of ``DenseViT`` that a configuration states, for a ``canvas`` of (height, width)."""
    return {
        "relative_size": canvas,
        "window": model.window,
        "relative_positions": model.relative_positions,
        "drop_path": model.drop_path,
        "checkpointing": model.checkpointing,
    }


def trunk_of(config: DetectionConfig, source: EncoderFile | None) -> Trunk:
    """The trunk of a configuration, from the encoder ``source``, or random.

    Raises ``UserError`` where the configuration contradicts the encoder, or the canvas does not split into patches.
    """
    model, canvas = config.model, as_pair(config.data.image_size)
    return build_trunk(
        source,
        trunk=model.trunk,
        size=model.trunk_on(model.size or "base") if source is None else model.size,
        patch_size=model.patch_size,
        in_chans=config.data.channels,
        taps=PYRAMIDS[model.pyramid].taps,
        positions=canvas if model.positions == "canvas" else None,
        allow_missing=config.allow_missing,
        trainable_blocks=model.trainable_blocks,
        **trunk_options(model, canvas),
    )


class Built(NamedTuple):
    """The trunk with the report of its weights, the network on it, and the statistics its images are standardised
    with."""

    trunk: Trunk
    network: nn.Module
    statistics: Statistics


def build_network(
    config: DetectionConfig, engine: DetectorEngine, num_classes: int, source: EncoderFile | None = None
) -> Built:
    """The trunk, from ``source`` or random, and the engine's network on it, from the seed of the configuration.

    Raises ``UserError`` where the configuration contradicts the weights, or the engine.
    """
    seed_everything(config.seed)
    trunk = trunk_of(config, source)
    check_canvas(config.model.pyramid, as_pair(config.data.image_size), trunk.vit.grid.patch)
    statistics = statistics_of(config.data, None if source is None else source.metadata)
    network = config.model
    if network.norm == "sync_bn" and config.device == "cpu":  # SyncBN exists on GPUs only, and there may be some
        network = network.model_copy(update={"norm": "bn"})
    model = assemble(trunk.vit, num_classes, network, config.sampling, config.test, engine=config.engine)
    engine.adapt(model, statistics, as_pair(config.data.image_size))
    return Built(trunk, model, statistics)
