"""The file of a trained detector: what its metadata say, and how it is read into a network again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from torch import nn

from mae_core.config.schema import Schema
from mae_core.data.images import Statistics
from mae_core.errors import UserError
from mae_core.models.sizes import size_of
from mae_core.patches import as_pair
from mae_core.weights.files import WeightsFile, read_file
from mae_core.weights.load import load_state
from transfer.detection.annotations import Category
from transfer.detection.config import DetectionConfig, DetectorConfig
from transfer.detection.engine import DetectorEngine, assemble, build_network, trunk_options
from transfer.detection.heads import HEADS, Head
from transfer.detection.translation import translated
from transfer.pyramid import PYRAMIDS
from transfer.timm_backbone import Dense
from transfer.trunk import dense_trunk

DETECTOR = "detector.safetensors"
DETECTOR_FORMAT = "mae_core_detector"
Section = TypeVar("Section", bound=Schema)


def describe_detector(
    config: DetectionConfig, vit: Dense, statistics: Statistics, categories: Sequence[Category]
) -> dict[str, Any]:
    """The metadata of a detector's file: all that is needed to build it again and to read its answers."""
    return {
        "format": DETECTOR_FORMAT,
        "engine": config.engine,
        "detector": {**config.model.model_dump(mode="json"), **vit.section},
        "trunk": asdict(vit.shape),
        "sampling": config.sampling.model_dump(mode="json"),
        "test": config.test.model_dump(mode="json"),
        "image_size": list(as_pair(config.data.image_size)),
        "position_size": list(vit.grid.image_size),
        "in_chans": vit.in_channels,
        "mean": statistics.mean,
        "std": statistics.std,
        "categories": [list(category) for category in categories],
        "epochs": config.optim.epochs,
    }


class Trained(NamedTuple):
    """A trained detector, its classes and pixel statistics, and the configuration for inference: network, channels and
    canvas are the file's, and so is what the user's configuration does not give of sampling and test."""

    model: nn.Module
    categories: tuple[Category, ...]
    statistics: Statistics
    config: DetectionConfig


def read_detector(weights: Path | None) -> WeightsFile:
    """The file of a run directory, or the file itself, opened once a command. Raises ``UserError`` for a folder without
    one."""
    if weights is None:
        raise UserError("--eval-only needs a trained detector; set weights=detector.safetensors or its run")
    file = weights / DETECTOR if weights.is_dir() else weights
    if weights.is_dir() and not file.is_file():
        raise UserError(f"{weights} holds no {DETECTOR}; give the folder of a finished detector run")
    return read_file(file)


def is_detector(file: WeightsFile) -> bool:
    """Whether ``train_net.py`` wrote a file."""
    return file.metadata.get("format") == DETECTOR_FORMAT


def head_of(file: WeightsFile, config: DetectionConfig) -> Head:
    """The head of a detector: what the file says, else, of a file without metadata, the configuration."""
    model = (
        _stated(file.path, "model", DetectorConfig, file.metadata["detector"]) if is_detector(file) else config.model
    )
    return HEADS[model.head]


def engines_note(file: WeightsFile, engine: str) -> str:
    """A note that ``engine`` runs a detector trained with another engine; empty if it is its own."""
    trained = file.metadata.get("engine", engine)
    return "" if trained == engine else f"{file.path} was trained with engine {trained}; it runs with engine {engine}"


def trained_detector(
    file: WeightsFile, config: DetectionConfig, engine: DetectorEngine, categories: Sequence[Category] = ()
) -> Trained:
    """The trained detector in a file.

    A file of the engine's zoo has no metadata: it is read into the network of the configuration, for ``categories``. A
    detector of another engine is translated where both engines have its network. Raises ``UserError`` where the file
    is broken, or holds something else.
    """
    if engine.zoo is not None and engine.zoo.holds(file):
        built = build_network(config, engine, len(categories))
        engine.zoo.load(built.network, file).print()
        return Trained(built.network, tuple(categories), built.statistics, config)
    metadata, state = file.metadata, file.state
    if not is_detector(file):
        raise UserError(f"{file.path} is not a detector of engine {config.engine}; give the {DETECTOR} of such a run")
    config = settings_of_training(config, file)
    if metadata["engine"] != config.engine:
        state = translated(state, config.model, source=metadata["engine"], engine=config.engine, path=file.path)
    model = rebuilt_network(config, metadata, engine)
    load_state(model, state, file.path, remedy="its metadata describes another network; export it again")
    statistics = Statistics(tuple(metadata["mean"]), tuple(metadata["std"]))
    return Trained(model, tuple(Category(*entry) for entry in metadata["categories"]), statistics, config)


def rebuilt_network(config: DetectionConfig, metadata: dict[str, Any], engine: DetectorEngine) -> nn.Module:
    """The network that the metadata of a file describe, with random weights; ``config`` is that of inference."""
    detector, canvas = config.model, as_pair(metadata["image_size"])
    size = size_of(metadata["trunk"]) if "trunk" in metadata else detector.trunk_on(detector.size or "base")
    vit = dense_trunk(
        detector.trunk,
        size=size,
        patch_size=detector.patch_size,
        in_chans=metadata["in_chans"],
        image_size=metadata["position_size"],
        taps=PYRAMIDS[detector.pyramid].taps,
        **trunk_options(detector, canvas),
    )
    classes = len(metadata["categories"])
    model = assemble(vit, classes, detector, config.sampling, config.test, engine=config.engine)
    engine.adapt(model, Statistics(tuple(metadata["mean"]), tuple(metadata["std"])), canvas)
    return model


def settings_of_training(config: DetectionConfig, file: WeightsFile) -> DetectionConfig:
    """``config`` with the network, the channels and the canvas of a detector's file, and, in sampling and test, with
    the file's values wherever ``config`` was not given one. Raises ``UserError`` for a file of a newer version."""
    metadata = file.metadata
    images = {"image_size": tuple(metadata["image_size"]), "channels": metadata["in_chans"]}
    update: dict[str, Any] = {
        "data": config.data.model_copy(update=images),
        "model": _stated(file.path, "model", DetectorConfig, metadata["detector"]),
    }
    for name in ("sampling", "test"):
        section = getattr(config, name)
        given = section.model_dump(include=section.model_fields_set)
        update[name] = _stated(file.path, name, type(section), {**metadata.get(name, {}), **given})
    return config.model_copy(update=update)


def _stated(path: Path, prefix: str, section: type[Section], values: dict[str, Any]) -> Section:
    """A section of the configuration from the metadata of ``path``. Raises ``UserError`` where a newer version wrote
    them: it had options, or values of them, that this one has not."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join([prefix, *map(str, problem["loc"])])
        raise UserError(
            f"{path} was trained with {option}={problem['input']}, which this version of the toolkit does not know; "
            "use the version that wrote the file, or a newer one"
        ) from None
