"""``mae finetune``: an encoder and labelled images -> a classifier (paper, A.1, Table 9)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from mae_core.data.config import FinetuneData
from mae_core.data.images import ImageFiles, Statistics, statistics_of
from mae_core.data.labelled import LabelledBatch, TrainImages, collate
from mae_core.data.loading import share_of
from mae_core.errors import UserError
from mae_core.models.classifier import freeze_below, initialize_as_timm, learning_line
from mae_core.models.encoder import ViTEncoder
from mae_core.models.timm_trunk import Encoder, build_timm, checkpoint_blocks, compile_blocks, described
from mae_core.patches import as_pair
from mae_core.resuming import Resume
from mae_core.training import distributed
from mae_core.training.averaging import attach_average, steps_averaged
from mae_core.training.classification import (
    Splits,
    classifier_metadata,
    conclude,
    evaluation_loader,
    headline,
    in_words,
    measure,
    read_splits,
    steps_between,
    tell_of_weights,
)
from mae_core.training.finetune_config import FinetuneConfig, scratch_differences
from mae_core.training.groups import layer_decay_groups
from mae_core.training.loop import FitSettings, Hook, LossOf, fit, forward_share, seed_everything
from mae_core.training.micro_batch import with_micro_batch
from mae_core.training.precision import check_compiler, choose_precision
from mae_core.training.run import Run, check_output, open_run
from mae_core.training.sharding import shard_if_asked, unsharded
from mae_core.training.statistics import with_statistics
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import classifier_from, read_encoder, stated_in, with_file
from mae_core.weights.report import LoadReport

LARGE_RECIPE = "base_lr 1e-3, layer_decay 0.75, drop_path 0.2, 50 epochs"
RELEASED_RECIPES = {"large": LARGE_RECIPE, "huge": LARGE_RECIPE.replace("0.2,", "0.3,")}
"""FINETUNE.md of the official code, where it differs from the defaults."""


def unfit_recipe(config: FinetuneConfig) -> str | None:
    """A note where the defaults are the recipe of another size than the model's."""
    released = RELEASED_RECIPES.get(config.model.size)
    chosen = config.optim.model_fields_set & {"base_lr", "layer_decay", "epochs"}
    if released is None or chosen or config.from_scratch or "drop_path" in config.model.model_fields_set:
        return None
    return f"the defaults are ViT-B's; the released recipe for {config.model.size} is {released}"


def scratch_line(config: FinetuneConfig) -> str:
    """Which recipe a training from scratch has."""
    different = scratch_differences(config)
    if not different:
        return "recipe: the paper's for training from scratch (Table 11)"
    return (
        "recipe: this configuration, without weights; it differs from the paper's recipe for training from scratch "
        f"(Table 11): {'; '.join(different)}; for the paper's use configs/finetune/*_scratch.yaml, or "
        "from_scratch=true without a file"
    )


def build_model(
    config: FinetuneConfig, num_classes: int, source: EncoderFile | None = None
) -> tuple[Encoder, LoadReport | None, Statistics]:
    """The classifier, from ``source`` (the weights, read before) or from scratch, the report of its weights, and the
    pixel statistics its encoder was trained with. Raises ``UserError`` where the weights do not fit."""
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "pooling": config.model.pooling,
        "image_size": as_pair(config.data.image_size),
        "drop_path": config.model.drop_path,
    }
    if source is None and config.weights is not None:
        source = read_encoder(config.weights, **stated_in(config))
    if source is None and config.model.trunk is not None:
        own = {} if "pooling" in config.model.model_fields_set else {"pooling": described(config.model.trunk).pooling}
        trunk = build_timm(
            config.model.trunk, patch_size=config.model.patch_size, in_chans=config.data.channels, **(options | own)
        )
        return trunk, None, statistics_of(config.data)
    if source is None:
        model = ViTEncoder(
            config.model.shape, patch_size=config.model.patch_size, in_chans=config.data.channels, **options
        )
        if config.model.init == "timm":
            initialize_as_timm(model)
        freeze_below(model, config.trainable_blocks)
        return model, None, statistics_of(config.data)
    model, report = classifier_from(source, **options, allow_missing=config.allow_missing)
    freeze_below(model, config.trainable_blocks)
    return model, report, statistics_of(config.data, source.metadata)


def finetune_loss(config: FinetuneConfig, num_classes: int) -> LossOf:
    """(model, batch) -> losses, with mixup and label smoothing as configured."""
    data = config.data
    if data.multi_label:
        return multi_label_loss(data)
    if not (data.mixup or data.cutmix):
        plain = LabelSmoothingCrossEntropy(data.label_smoothing) if data.label_smoothing else nn.CrossEntropyLoss()

        def simple(model: nn.Module, batch: LabelledBatch) -> dict[str, Tensor]:
            return {"loss": plain(model(batch.pixels), batch.labels)}

        return simple
    mixup = Mixup(data.mixup, data.cutmix, label_smoothing=data.label_smoothing, num_classes=num_classes)
    soft = SoftTargetCrossEntropy()

    def mixed(model: nn.Module, batch: LabelledBatch) -> dict[str, Tensor]:
        pixels, labels = mixup(batch.pixels, batch.labels)
        return {"loss": soft(model(pixels), labels)}

    return mixed


def multi_label_loss(data: FinetuneData) -> LossOf:
    """Binary cross-entropy of every class; smoothing moves a target towards 1/2, and mixing mixes the targets too."""
    mixup = Mixup(data.mixup, data.cutmix, label_smoothing=0.0) if data.mixup or data.cutmix else None

    def loss(model: nn.Module, batch: LabelledBatch) -> dict[str, Tensor]:
        pixels, targets = batch.pixels, batch.labels
        if mixup is not None:
            # Mixing the images' numbers as if they were classes gives the share of each image in each mixed one.
            mixup.num_classes = len(batch)
            pixels, shares = mixup(pixels, torch.arange(len(batch), device=pixels.device))
            targets = shares.to(targets.dtype) @ targets
        targets = targets * (1 - data.label_smoothing) + data.label_smoothing / 2
        return {"loss": nn.functional.binary_cross_entropy_with_logits(model(pixels), targets)}

    return loss


def logits_of_zeros(model: Encoder, config: FinetuneConfig) -> Callable[[int], Tensor]:
    """Number of images -> the sum of the logits of so many black ones, where the model is: for a plan of memory."""

    def loss(images: int) -> Tensor:
        device = next(model.parameters()).device
        pixels = torch.zeros(images, model.in_channels, *model.grid.image_size, device=device)
        with choose_precision(config.precision, device).autocast(device):
            logits: Tensor = model.train()(pixels)
        return logits.float().sum()

    return loss


def check_pairs(config: FinetuneConfig) -> None:
    """Raise ``UserError`` where mixup, which mixes an image with its counterpart, finds an odd number of them."""
    share, micro = share_of(config.optim.batch_size, distributed.world_size()), config.optim.micro_batch
    if (config.data.mixup or config.data.cutmix) and (share % 2 or (micro if isinstance(micro, int) else 0) % 2):
        raise UserError(
            f"mixup and cutmix need an even number of images per rank (optim.batch_size gives each rank "
            f"{share}) and an even optim.micro_batch; change these, or set data.mixup=0 data.cutmix=0"
        )


class Prepared(NamedTuple):
    """All that a fine-tuning has before anything of it is written; ``config`` says what was found out by then."""

    config: FinetuneConfig
    splits: Splits
    model: Encoder
    report: LoadReport | None
    statistics: Statistics
    settings: FitSettings
    images: TrainImages


def prepare(config: FinetuneConfig, source: EncoderFile | None, *, resume: bool) -> Prepared:
    """Read the data and build the model. Raises ``UserError`` for what a user can get wrong."""
    splits = read_splits(config.data)
    check_pairs(config)
    weights = None if source is None else source.metadata
    training = ImageFiles(splits.train.paths, config.data.reading)
    config = with_statistics(config, training, resume=resume, weights=weights)
    seed_everything(config.seed)
    model, report, statistics = build_model(config, len(splits.classes), source)
    checkpoint_blocks(model, on=config.model.checkpointing)
    mixes = bool(config.data.mixup or config.data.cutmix)
    config = with_micro_batch(config, model, logits_of_zeros(model, config), resume=resume, even=mixes)
    settings = FitSettings.of(config.optim, len(splits.train.paths))
    images = TrainImages(splits.train, config.data, as_pair(config.data.image_size), statistics, config.seed)
    return Prepared(config, splits, model, report, statistics, settings, images)


def weights_for(config: FinetuneConfig) -> tuple[FinetuneConfig, EncoderFile | None]:
    """The file of the weights, read once, None from scratch; and the configuration with what it states."""
    source = None if config.weights is None else read_encoder(config.weights, **stated_in(config))
    return (config if source is None else with_file(source, config)), source


def finetune_optimizer(model: Encoder, config: FinetuneConfig, lr: float) -> torch.optim.Optimizer:
    """AdamW, with rates and decay by layer."""
    optim = config.optim
    groups = layer_decay_groups(model, model, layer_decay=optim.layer_decay, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=True)


def finetune(config: FinetuneConfig, *, resume: Resume = False) -> dict[str, Any]:
    """Fine-tune and evaluate; returns what metrics.json holds. Raises ``UserError`` for what a user can get wrong."""
    config, source = weights_for(config)
    resume = check_output(config, resume=resume)
    config, splits, model, report, statistics, settings, images = prepare(config, source, resume=resume)
    if config.model.compile:
        check_compiler(distributed.join(config.device, config.rank_timeout).device)

    run = open_run(config, resume=resume, data=splits.data)
    tell_of_weights(run, report)
    if config.from_scratch:
        run.say(scratch_line(config))
    if (advice := unfit_recipe(config)) is not None:
        run.say(advice)
    model.to(run.device)
    shard_if_asked(model, config.distributed)
    optimizer = finetune_optimizer(model, config, settings.lr)
    average = None if config.ema is None else attach_average(optimizer, model, config.ema)
    start = run.restore(model, optimizer)
    if config.model.compile:
        compile_blocks(model)
    train_batches = run.training_loader(images, collate, total_steps=settings.total_steps, start_step=start)
    test_batches = evaluation_loader(splits.val, config.data, statistics, config.evaluation_batch, run)
    announce(config, run, model, settings, len(images), len(splits.val.paths), len(splits.classes))
    metrics: dict[str, Any] = {}
    measuring = len(splits.val.paths) * (1 if average is None else 2) * forward_share(model)

    def measured(classifier: nn.Module) -> dict[str, Any]:
        return measure(classifier, test_batches, run, splits.classes, multi_label=config.data.multi_label)

    def evaluate(step: int) -> None:
        metrics.update(measured(model if average is None else average))
        run.record({"step": step, **headline(metrics)})
        run.say(f"step {step}: {in_words(metrics)}")
        if average is not None:
            metrics["without_ema"] = headline(measured(model))
            run.record({"step": step, **{f"{name}_without_ema": v for name, v in metrics["without_ema"].items()}})

    metadata = classifier_metadata(model, config, statistics, splits.classes)
    fit(
        model,
        train_batches,
        finetune_loss(config, len(splits.classes)),
        optimizer,
        run=run,
        settings=settings,
        start_step=start,
        hooks=[Hook(steps_between(config.evaluate_every, len(images), config.optim.batch_size), evaluate, measuring)],
        metadata=metadata,
        chance_loss=math.log(2 if config.data.multi_label else len(splits.classes)),
    )
    if not metrics:
        with unsharded(model):
            evaluate(settings.total_steps)
    conclude(run, (model if average is None else average).state_dict(), metadata, metrics)
    return metrics


def announce(
    config: FinetuneConfig,
    run: Run,
    model: Encoder,
    settings: FitSettings,
    training: int,
    validation: int,
    num_classes: int,
) -> None:
    """Print what the run will do, and options that the user may not have intended."""
    run.say(
        f"{training} training and {validation} validation images of {num_classes} classes; "
        f"{settings.total_steps} steps of {config.optim.batch_size}, peak lr {settings.lr:.3g}; writing to {run.folder}"
    )
    if learning := learning_line(model, config.trainable_blocks):
        run.say(learning)
    if config.ema is not None and steps_averaged(config.ema) > settings.total_steps:
        run.say(
            f"ema={config.ema} averages over {steps_averaged(config.ema):.0f} steps, more than the "
            f"{settings.total_steps} of this run, so the averaged model stays near its initial weights; "
            "lower it, or set ema=null"
        )
