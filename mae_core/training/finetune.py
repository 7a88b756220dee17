"""``mae finetune``: an encoder and labelled images -> a classifier (paper, A.1, Table 9)."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from mae_core.atomic import write_json
from mae_core.config import FinetuneConfig
from mae_core.conversion.files import write_weights
from mae_core.conversion.loading import (
    LoadReport,
    classifier_from,
    describe_encoder,
    read_encoder,
    with_channels_of,
)
from mae_core.data.images import ImageFiles, Statistics, check_all, read_some, statistics_of
from mae_core.data.labelled import (
    LabelledBatch,
    TestImages,
    TrainImages,
    collate,
    collate_readable,
    read_image_folder,
)
from mae_core.data.loading import make_loader, share_of
from mae_core.errors import UserError
from mae_core.evaluation.classification import evaluate_classifier
from mae_core.layout import CLASSIFIER, LOADING, METRICS
from mae_core.models.encoder import ViTEncoder
from mae_core.patches import as_pair
from mae_core.training import distributed
from mae_core.training.groups import layer_decay_groups
from mae_core.training.loop import FitSettings, fit, seed_everything
from mae_core.training.progress import Counter
from mae_core.training.run import check_output, open_run

LARGE_RECIPE = "base_lr 1e-3, layer_decay 0.75, drop_path 0.2, 50 epochs"
RELEASED_RECIPES = {"large": LARGE_RECIPE, "huge": LARGE_RECIPE.replace("0.2,", "0.3,")}
"""FINETUNE.md of the official code, where it differs from the defaults."""
IMAGES_TRIED = 4


def as_weights_say(config: FinetuneConfig) -> FinetuneConfig:
    """``config`` with the size and the channels of its weights file where the user set none: what config.yaml records.

    Raises ``UserError`` where the file is broken.
    """
    if config.weights is None:
        return config
    source = read_encoder(config.weights)
    if "size" not in config.model.model_fields_set:
        config = config.model_copy(update={"model": config.model.model_copy(update={"size": source.size})})
    return with_channels_of(source, config)


def unfit_recipe(config: FinetuneConfig) -> str | None:
    """What to say of the defaults where they are for another size than the model's."""
    released = RELEASED_RECIPES.get(config.model.size)
    chosen = config.optim.model_fields_set & {"base_lr", "layer_decay", "epochs"}
    if released is None or chosen or "drop_path" in config.model.model_fields_set:
        return None
    return f"the defaults are ViT-B's; the released recipe for {config.model.size} is {released}"


def build_model(config: FinetuneConfig, num_classes: int) -> tuple[ViTEncoder, LoadReport | None, Statistics]:
    """The classifier, the report of its weights (None from scratch), and the pixel statistics its encoder was trained
    with.

    Raises ``UserError`` where the configuration contradicts the weights file.
    """
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "pooling": config.model.pooling,
        "image_size": as_pair(config.data.image_size),
        "drop_path": config.model.drop_path,
    }
    if config.weights is None:
        model = ViTEncoder(
            config.model.size, patch_size=config.model.patch_size, in_chans=config.data.channels, **options
        )
        return model, None, statistics_of(config.data)
    source = read_encoder(config.weights)
    source.check_asked(
        size=config.model.size if "size" in config.model.model_fields_set else None,
        patch_size=config.model.patch_size,
        in_chans=config.data.channels,
    )
    model, report = classifier_from(source, **options)
    return model, report, statistics_of(config.data, source.metadata)


def finetune_loss(config: FinetuneConfig, num_classes: int) -> Any:
    """(model, batch) -> losses, with mixup and label smoothing as configured."""
    data = config.data
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


def finetune(config: FinetuneConfig, *, resume: bool = False) -> dict[str, Any]:
    """Fine-tune and evaluate; returns what metrics.json holds. Raises ``UserError`` for what a user can get wrong."""
    config = as_weights_say(config)
    check_output(config, resume=resume)
    train_files, val_files = read_image_folder(config.data.path)
    num_classes = len(train_files.classes)
    all_files = ImageFiles(train_files.paths + val_files.paths, config.data.channels, config.data.path)
    if config.data.on_error == "raise":
        check_all(all_files, on_progress=Counter("checking images"))
    for files in (train_files, val_files):
        read_some(ImageFiles(files.paths, config.data.channels), IMAGES_TRIED)
    share = share_of(config.optim.batch_size, distributed.world_size())
    if (config.data.mixup or config.data.cutmix) and (share % 2 or (config.optim.micro_batch or 0) % 2):
        raise UserError(
            f"mixup and cutmix need an even number of images on a rank ({share} of optim.batch_size fall to each) and "
            "an even optim.micro_batch; or set data.mixup=0 data.cutmix=0"
        )
    seed_everything(config.seed)
    model, report, statistics = build_model(config, num_classes)
    settings = FitSettings.of(config.optim, len(train_files.paths))
    size = as_pair(config.data.image_size)
    train_images = TrainImages(train_files, config.data, size, statistics, config.seed)
    test_images = TestImages(val_files, config.data, size, statistics)

    run = open_run(config, resume=resume, names=all_files.names)
    if report is not None and run.is_main:
        report.print()
        write_json(run.folder / LOADING, report.as_dict())
    elif report is None:
        run.say("training from scratch: no weights are loaded")
    if (advice := unfit_recipe(config)) is not None:
        run.say(advice)
    model.to(run.device)
    groups = layer_decay_groups(
        model, len(model.blocks), layer_decay=config.optim.layer_decay, weight_decay=config.optim.weight_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=config.optim.betas, fused=True)
    start = run.restore(model, optimizer) if resume else 0
    sampler = run.sampler(
        len(train_files.paths), config.optim.batch_size, total_steps=settings.total_steps, start_step=start
    )
    on_gpu = run.device.type == "cuda"
    train_loader = make_loader(train_images, sampler, collate, workers=config.data.workers, pin=on_gpu)
    mine = BatchSampler(range(run.rank, len(val_files.paths), run.world), config.evaluation_batch, drop_last=False)
    test_loader = make_loader(test_images, mine, collate_readable, workers=config.data.workers, pin=on_gpu)
    run.say(
        f"{len(train_files.paths)} training and {len(val_files.paths)} validation images of {num_classes} classes; "
        f"{settings.total_steps} steps of {config.optim.batch_size}, peak lr {settings.lr:.3g}; writing to {run.folder}"
    )
    metrics: dict[str, Any] = {}

    def evaluate(step: int) -> None:
        metrics.update(evaluate_classifier(model, test_loader, run, num_classes).as_dict(train_files.classes))
        run.record({"step": step, "top1": metrics["top1"], "top5": metrics["top5"]})
        run.say(
            f"step {step}: top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} % on {metrics['images']} images"
        )

    every = max(1, round(config.evaluate_every * len(train_files.paths) / config.optim.batch_size))
    metadata = {
        **describe_encoder(model),
        "mean": statistics.mean,
        "std": statistics.std,
        "pooling": config.model.pooling,
        "classes": train_files.classes,
        "epochs": config.optim.epochs,
    }
    fit(
        model,
        train_loader,
        finetune_loss(config, num_classes),
        optimizer,
        run=run,
        settings=settings,
        start_step=start,
        hooks=[(every, evaluate)],
        metadata=metadata,
    )
    if not metrics:
        evaluate(settings.total_steps)
    if run.is_main:
        write_weights(run.folder / CLASSIFIER, model.state_dict(), metadata)
        write_json(run.folder / METRICS, metrics)
    run.close()
    distributed.leave()
    return metrics
