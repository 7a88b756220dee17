"""``mae linprobe``: train one linear layer on a frozen encoder (paper, A.1, Table 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mae_core.data.images import Statistics, statistics_of
from mae_core.data.labelled import (
    AugmentedImages,
    LabelledBatch,
    LabelledPaths,
    LabelledSample,
    collate,
    collate_readable,
)
from mae_core.data.loading import Place, share_of
from mae_core.data.views import probe_view
from mae_core.errors import UserError
from mae_core.layout import ATTENTIVE, ATTENTIVE_FORMAT, CLASSIFIER
from mae_core.measures.accuracy import Tally
from mae_core.models.probe import AttentiveProbe, LinearProbe, Probe
from mae_core.models.timm_trunk import Encoder
from mae_core.patches import as_pair
from mae_core.resuming import Resume
from mae_core.training import distributed
from mae_core.training.classification import (
    Splits,
    classifier_metadata,
    conclude,
    evaluation_loader,
    headline,
    in_words,
    read_splits,
    steps_between,
    tell_of_weights,
)
from mae_core.training.features import Rows, Viewer, check_cache, check_tokens_fit, features_of
from mae_core.training.frozen_config import LinprobeConfig, ProbeConfig, ProbeOptim
from mae_core.training.frozen_trunk import trunk_from, weights_of
from mae_core.training.loop import FitSettings, Hook, fit, forward_share, seed_everything
from mae_core.training.predictions import predict, total_of
from mae_core.training.run import Run, check_output, open_run
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import with_file
from mae_core.weights.report import LoadReport

ROWS_AT_ONCE = 4096
"""Cached features in a batch of the evaluation."""


class FeatureRows(Dataset[LabelledSample]):
    """Features as if they were images: by (epoch, index) for training, by index for measuring."""

    def __init__(self, features: Rows, files: LabelledPaths) -> None:
        self.features = features
        self.labels = [files.target(index) for index in features.indices.tolist()]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: Place | int) -> LabelledSample:
        row = place if isinstance(place, int) else place[1]
        return LabelledSample(self.features.values[row], self.labels[row], [])


def rates_of(optim: ProbeOptim) -> list[float]:
    """The base learning rates of one pass, each once."""
    return list(dict.fromkeys((optim.base_lr, *optim.sweep)))


def build_probe(
    config: ProbeConfig, trunk: Encoder | None, width: int, num_classes: int, *, heads: int, prefix: int = 1
) -> LinearProbe | AttentiveProbe:
    """The probe of a configuration on ``trunk``, or without one on what a trunk of ``width`` says. Raises ``UserError``
    where the queries do not divide the width."""
    if config.kind == "linear":
        return LinearProbe(trunk, width, num_classes, heads=heads, batch_norm=config.batch_norm)
    return AttentiveProbe(
        trunk, width, num_classes, queries=config.queries, heads=heads, batch_norm=config.batch_norm, prefix=prefix
    )


def probe_optimizer(probe: Probe, optim: ProbeOptim, lr: float) -> torch.optim.Optimizer:
    """LARS, or SGD with momentum, whose weight decay is for weights and not for biases."""
    if optim.kind == "lars":
        return lars(probe, optim, lr)
    groups = [
        {**group, "weight_decay": optim.weight_decay if group.pop("always_adapt") else 0.0}
        for group in rate_groups(probe, optim)
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum)


def rate_groups(probe: Probe, optim: ProbeOptim) -> list[dict[str, Any]]:
    """One group of weights and one of biases per head, with the head's learning rate as a multiple of the first's."""
    groups: list[dict[str, Any]] = []
    for head, rate in zip(probe.heads, rates_of(optim), strict=True):
        scale = rate / optim.base_lr
        for weights in (True, False):
            chosen = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == weights]
            groups.append({"params": chosen, "lr_scale": scale, "always_adapt": weights})
    return groups


def lars(probe: Probe, optim: ProbeOptim, lr: float) -> Lars:
    """LARS with one group of weights and one of biases per head; biases take plain steps with momentum, without
    adaptation and decay.

    The update of a weight w with gradient g: g' = g + decay w; v <- momentum v + trust |w| / |g'| g'; w <- w - lr v.
    """
    optimizer = Lars(
        rate_groups(probe, optim), lr=lr, momentum=optim.momentum, trust_coeff=optim.trust_coefficient, eps=0.0
    )
    if optim.weight_decay:
        # timm's own decay divides by |g| + decay |w| in place of |g + decay w|, which is another rate
        weights = [parameter for parameter in probe.heads.parameters() if parameter.ndim > 1]
        optimizer.register_step_pre_hook(lambda *_: _add_decay(weights, optim.weight_decay))
    if len(probe.heads) > 1:
        _contain_divergence(probe, optimizer)
    return optimizer


def _contain_divergence(probe: LinearProbe, optimizer: torch.optim.Optimizer) -> None:
    """Let a head whose rate is too high stand still at finite numbers: neither its gradient, which is NaN though its
    loss is left out, nor its weights then stop the others or their checkpoints."""
    parameters = list(probe.heads.parameters())
    for parameter in parameters:
        parameter.register_hook(lambda gradient: torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0))

    def hold(*_: Any) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.nan_to_num_(nan=torch.finfo(parameter.dtype).max)

    optimizer.register_step_post_hook(hold)


def _add_decay(weights: Sequence[Tensor], decay: float) -> None:
    for weight in weights:
        if weight.grad is not None:
            weight.grad.add_(weight.detach(), alpha=decay)


def probe_loss(model: nn.Module, batch: LabelledBatch) -> dict[str, Tensor]:
    """Cross-entropy of every head, summed: no head sees another's gradient, and one whose learning rate is too high
    for a finite loss does not stop the others."""
    losses = torch.stack([nn.functional.cross_entropy(logits, batch.labels) for logits in model(batch.pixels)])
    each = {f"loss_{number}": loss for number, loss in enumerate(losses)} if len(losses) > 1 else {}
    finite = losses.isfinite()
    return {"loss": losses[finite].sum() if finite.any() else losses.sum(), **each}


class ProbeData(NamedTuple):
    """What a probe trains on, how many of it, and this rank's share of what it is measured on."""

    images: Dataset[LabelledSample]
    num_images: int
    test_batches: DataLoader[Any]


def augmented_images(config: LinprobeConfig, splits: Splits, statistics: Statistics) -> AugmentedImages:
    """The training images through the probe's random view."""
    view = probe_view(config.data.crop_scale, config.data.hflip, as_pair(config.data.image_size), statistics)
    return AugmentedImages(splits.train, view, config.data.channels, config.seed)


def probe_data(config: LinprobeConfig, splits: Splits, frozen: Viewer, run: Run) -> ProbeData:
    """Augmented images, or with ``cache`` their features as rows, computed once."""
    if config.cache is None:
        images = augmented_images(config, splits, frozen.statistics)
        batches = evaluation_loader(splits.val, config.data, frozen.statistics, config.evaluation_batch, run)
        return ProbeData(images, len(images), batches)
    train, val = (
        FeatureRows(features_of(files.paths, frozen, run, cache=config.cache), files)
        for files in (splits.train, splits.val)
    )
    at_once = ROWS_AT_ONCE if val.features.values.ndim == 2 else config.evaluation_batch
    return ProbeData(train, len(train), run.loader(val, collate_readable, at_once, workers=0))


def check_batches(optim: ProbeOptim) -> None:
    """Raise ``UserError`` where batch norm would see a single image at once."""
    share = share_of(optim.batch_size, distributed.world_size())
    parts = optim.micro_batch or share
    if 1 in (share, parts) or share % parts == 1:
        raise UserError(
            f"batch norm needs at least two images per micro-batch; optim.batch_size={optim.batch_size} in "
            f"micro-batches of {parts} leaves one image alone; change optim.batch_size or optim.micro_batch"
        )


class Prepared(NamedTuple):
    """All that a probe has before anything of it is written."""

    splits: Splits
    trunk: Encoder
    probe: Probe
    report: LoadReport
    statistics: Statistics


def prepare(config: LinprobeConfig, source: EncoderFile) -> Prepared:
    """Read the data and build the probe on its trunk. Raises ``UserError`` for what a user can get wrong."""
    check_cache(config.cache)
    if config.probe.batch_norm:
        check_batches(config.optim)
    splits = read_splits(config.data)
    attentive = config.probe.kind == "attentive"
    pooling = None if attentive else config.model.pooling
    trunk, report = trunk_from(source, pooling=pooling, image_size=config.data.image_size)
    seed_everything(config.seed)
    on, heads = trunk if config.cache is None else None, len(rates_of(config.optim))
    probe = build_probe(config.probe, on, trunk.num_features, len(splits.classes), heads=heads, prefix=trunk.prefix)
    if config.cache is not None and attentive:
        images = len(splits.train.paths) + len(splits.val.paths)
        check_tokens_fit(images, trunk, config.cache, torch.device("cpu"))
    return Prepared(splits, trunk, probe, report, statistics_of(config.data, source.metadata))


def linprobe(config: LinprobeConfig, *, resume: Resume = False) -> dict[str, Any]:
    """Train and measure; returns what metrics.json holds: the best head's numbers, and every learning rate's.

    classifier.safetensors holds the trunk, as it was, and the best head with its batch norm folded in; of an attentive
    probe it is attentive_classifier.safetensors, with the pooling; evaluating and classifying take both. Raises
    ``UserError`` for what a user can get wrong.
    """
    source = weights_of(config)
    config = with_file(source, config, frozen=True)
    resume = check_output(config, resume=resume)
    splits, trunk, probe, report, statistics = prepare(config, source)
    rates, cached, attentive = rates_of(config.optim), config.cache is not None, config.probe.kind == "attentive"

    run = open_run(config, resume=resume, data=splits.data)
    tell_of_weights(run, report)
    frozen = Viewer(trunk.to(run.device), config.data, statistics, config.evaluation_batch)
    data = probe_data(config, splits, frozen, run)
    settings = FitSettings.of(config.optim, data.num_images)
    optimizer = probe_optimizer(probe.to(run.device), config.optim, settings.lr)
    start = run.restore(probe, optimizer)
    workers = 0 if cached else config.data.workers
    what = "numbers per patch token" if attentive else f"{config.model.pooling} features"
    steps = {"total_steps": settings.total_steps, "start_step": start}
    train_batches = run.training_loader(data.images, collate, workers=workers, **steps)
    run.say(
        f"{data.num_images} training and {len(splits.val.paths)} validation images of {len(splits.classes)} classes; "
        f"{trunk.num_features} {what} {'kept' if cached else 'of augmented images'}; "
        f"{settings.total_steps} steps of {config.optim.batch_size}, base lr {', '.join(f'{r:g}' for r in rates)}"
        f"{', the loss is their sum' if len(rates) > 1 else ''}; writing to {run.folder}"
    )
    metrics: dict[str, Any] = {}
    measuring = len(splits.val.paths) * (forward_share(probe) if cached else 1.0)  # a frozen trunk has no backward pass

    def evaluate(step: int) -> None:
        distributed.share_buffers(probe)  # all ranks measure the probe that is saved
        metrics.update(measure_heads(probe, data.test_batches, run, splits.classes, rates))
        run.record({"step": step, **headline(metrics)})
        best = f" with base lr {metrics['base_lr']:g}, the best of {len(rates)}" if len(rates) > 1 else ""
        run.say(f"step {step}: {in_words(metrics)}{best}")

    metadata = classifier_metadata(trunk, config, statistics, splits.classes)
    fit(
        probe,
        train_batches,
        probe_loss,
        optimizer,
        run=run,
        settings=settings,
        start_step=start,
        hooks=[
            Hook(steps_between(config.evaluate_every, data.num_images, config.optim.batch_size), evaluate, measuring)
        ],
        metadata=metadata,
    )
    if not metrics:
        evaluate(settings.total_steps)
    state = {**trunk.state_dict(), **probe.exported(rates.index(metrics["base_lr"]))}
    if attentive:
        metadata |= {"format": ATTENTIVE_FORMAT, "pooling": f"{config.probe.queries} queries over patch tokens"}
    conclude(run, state, metadata, metrics, ATTENTIVE if attentive else CLASSIFIER)
    return metrics


def measure_heads(probe: Probe, batches: Any, run: Run, classes: list[str], rates: list[float]) -> dict[str, Any]:
    """The metrics of the head with the best top-1, its base learning rate, and top-1 and top-5 of every head."""
    tallies = [Tally(len(classes), run.device) for _ in rates]
    for logits, labels in predict(probe, batches, run):
        for tally, of_head in zip(tallies, logits, strict=True):
            tally.add(of_head, labels)
    found = [total_of(tally).as_dict(classes) for tally in tallies]
    best = max(range(len(rates)), key=lambda number: found[number]["top1"])
    sweep = {f"{rate:g}": headline(each) for rate, each in zip(rates, found, strict=True)}
    return {**found[best], "base_lr": rates[best], "sweep": sweep}
