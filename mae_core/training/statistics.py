"""Which mean and standard deviation a run standardises its pixels with: one rule for every training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from mae_core.config.load import load_config
from mae_core.config.sections import JobConfig
from mae_core.data.images import DEFAULT_STATISTICS, ImageSource, describe_passed_over, passed_over_in, statistics_of
from mae_core.data.statistics import describe_statistics, measure_statistics, must_be_measured, with_measured
from mae_core.layout import CONFIG
from mae_core.training import distributed

Config = TypeVar("Config", bound=JobConfig)


def with_statistics(
    config: Config, source: ImageSource, *, resume: bool, weights: Mapping[str, Any] | None = None
) -> Config:
    """``config`` with the mean and std that its run uses, printed with where they come from.

    In this order: those that the run which is resumed started with; those of the metadata of the ``weights`` (None:
    from scratch), else the configuration's; ImageNet's, where ``data.statistics=imagenet`` or the weights say nothing;
    else they are measured on ``source``, by rank 0 for all. Raises ``UserError`` where the configuration contradicts
    the weights.
    """
    data: Any = config.data  # type: ignore[attr-defined]
    notes: list[str] = []
    if resume and (config.output / CONFIG).is_file():
        config = with_stored_statistics(config, load_config(type(config), config.output / CONFIG))
        where = "as the run started with"
    elif must_be_measured(data, weights):
        found = _measured_by_rank_0(config, source)
        config = _updated(config, with_measured(data, found.statistics))
        notes = found.notes
        where = f"measured on {found.images} of {len(source)} training images"
    elif weights is not None and weights.get("mean"):
        where = "those of the weights"
    elif data.mean is not None or data.std is not None:
        where = "as configured"
    else:
        unstated = "ImageNet's: the weights file does not state them"
        where = "ImageNet's, as asked for" if data.statistics == "imagenet" else unstated
    statistics = statistics_of(config.data, weights)  # type: ignore[attr-defined]
    passed_over = describe_passed_over(passed_over_in(source))
    _say(f"pixels are standardised with {describe_statistics(statistics)} ({where})")
    for text in (*notes, passed_over):
        if text:
            _say(f"note: {text}")
    return config


def with_stored_statistics(config: Config, stored: Config) -> Config:
    """``config`` with the numbers of the run that it continues, where it states none itself.

    Runs from before they were measured have none in their config.yaml, and used ImageNet's.
    """
    ours: Any = config.data  # type: ignore[attr-defined]
    theirs: Any = stored.data  # type: ignore[attr-defined]
    mean, std = DEFAULT_STATISTICS.get(theirs.channels, (None, None))
    if getattr(config, "weights", None) is not None:
        mean, std = None, None
    return _updated(config, {"mean": ours.mean or theirs.mean or mean, "std": ours.std or theirs.std or std})


def _updated(config: Config, values: Mapping[str, Any]) -> Config:
    data: Any = config.data  # type: ignore[attr-defined]
    return config.model_copy(update={"data": data.model_copy(update=dict(values))})


def _measured_by_rank_0(config: JobConfig, source: ImageSource) -> Any:
    if distributed.world_size() == 1:
        return measure_statistics(source)
    place, found = distributed.join(config.device, config.rank_timeout), list[Any]()
    distributed.on_main(lambda: found.append(measure_statistics(source)), is_main=place.is_main)
    return distributed.gather(found)[0][0]


def _say(text: str) -> None:
    if distributed.announced_rank() == 0:
        print(text, flush=True)
