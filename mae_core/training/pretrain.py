"""``mae pretrain``: images without labels -> encoder.safetensors (paper, section 3 and A.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mae_core.counting import Counter
from mae_core.data.images import check_all, refuse_unreadable, statistics_of
from mae_core.data.jpeg import describe_decoder
from mae_core.data.loading import check_repeats, share_of, steps_for
from mae_core.data.sources import damaged_parts, open_source
from mae_core.data.unlabelled import PretrainBatch, UnlabelledImages, collate
from mae_core.errors import UserError
from mae_core.layout import ENCODER, best_checkpoint
from mae_core.masking import SampleMasks, build_masker
from mae_core.models.distillation import AttentionDistillation
from mae_core.models.mae import MaskedAutoencoder, build_mae
from mae_core.models.timm_trunk import checkpoint_blocks, compile_blocks
from mae_core.resuming import Resume
from mae_core.training import distributed
from mae_core.training.adapting import Adapted
from mae_core.training.classification import tell_of_weights
from mae_core.training.loop import FitResult, FitSettings, Hook, fit, seed_everything
from mae_core.training.micro_batch import with_micro_batch
from mae_core.training.pictures import fixed_mask, reconstruction_strip
from mae_core.training.precision import check_compiler, choose_precision
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import check_output, open_run, will_resume
from mae_core.training.same_data import Data
from mae_core.training.sharding import shard_if_asked
from mae_core.training.statistics import with_statistics
from mae_core.training.target_files import load_target
from mae_core.training.warm_start import load_start, load_teacher, started_from, weights_facts
from mae_core.training.watch import measure, split_images
from mae_core.weights.encoder_file import EncoderFile, EncoderInfo

NUM_PICTURES = 6


def build_pretrain_model(config: PretrainConfig, start: EncoderFile | None = None) -> MaskedAutoencoder:
    """The masked autoencoder a configuration describes, untrained, around the trunk of ``start`` where that is given.

    Raises ``UserError`` where a file of its target, or its teacher's, is missing or does not fit.
    """
    model = build_mae(
        config.model.shape if start is None else start.shape,
        image_size=config.data.image_size,
        patch_size=config.model.patch_size,
        in_chans=config.data.channels,
        decoder_depth=config.decoder.depth,
        decoder_width=config.decoder.width,
        decoder_heads=config.decoder.heads,
        target=load_target(config.target, **statistics_of(config.data)._asdict()),
        masking=build_masker(config.masking.kind, config.masking.ratio, config.masking.options),
        mask_tokens_in_encoder=config.masking.mask_tokens_in_encoder,
        fuse_blocks=config.decoder.fuse_blocks,
    )
    model.loss_on_all_patches = config.target.loss_on_all_patches
    if config.distill.teacher is not None:
        teacher = load_teacher(config.distill.teacher, model.encoder, statistics_of(config.data))
        wanted = config.distill
        model.distillation = AttentionDistillation(teacher, model.encoder, blocks=wanted.blocks, weight=wanted.weight)
    return model


def pretrain_metadata(model: MaskedAutoencoder, config: PretrainConfig) -> dict[str, Any]:
    """What the weights of a run say about themselves."""
    statistics = statistics_of(config.data)
    facts = {"mean": statistics.mean, "std": statistics.std, "epochs": config.optim.epochs}
    pooling = "cls token and patch tokens, normalised"
    return EncoderInfo.of(model, **model.describe(), **facts, pooling=pooling).to_metadata()


def pretrain_loss(model: nn.Module, batch: PretrainBatch) -> dict[str, Tensor]:
    """The masked autoencoder's loss under the masks of the batch, and what distillation adds to it."""
    output = model(batch.pixels, mask=batch.mask, predict_visible=False)
    parts = {"reconstruction": output.loss, "distillation": output.distillation}
    return {"loss": output.total, **({} if output.distillation is None else parts)}


def chance_loss(model: MaskedAutoencoder, config: PretrainConfig) -> float | None:
    """The loss of predicting the mean of every patch, where the target has a known variance: normalised pixels, by the
    unbiased estimate (paper, section 3)."""
    if config.target.kind != "normalized_pixels" or config.distill.teacher is not None:
        return None
    values = model.encoder.grid.patch**2 * config.data.channels
    return (values - 1) / values


def loss_of_zeros(model: MaskedAutoencoder, config: PretrainConfig) -> Callable[[int], Tensor]:
    """Number of images -> the loss of so many black ones, where the model is: what memory is planned with."""

    def loss(images: int) -> Tensor:
        device = model.encoder.pos_embed.device
        pixels = torch.zeros(images, config.data.channels, *model.encoder.grid.image_size, device=device)
        with choose_precision(config.precision, device).autocast(device):
            return model(pixels, generator=torch.Generator().manual_seed(0), predict_visible=False).total

    return loss


def pretrain_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """AdamW (paper, Table 8): biases and 1-D tensors are not decayed; the cls and mask tokens are, as in the official
    code."""
    groups = param_groups_weight_decay(model, config.optim.weight_decay)
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=True)


def pretrain(config: PretrainConfig, *, resume: Resume = False) -> FitResult:
    """Run a pre-training; writes the run directory. Raises ``UserError`` for everything a user can get wrong."""
    config, start = started_from(config, resume=will_resume(config.output, resume))
    resume = check_output(config, resume=resume)
    if resume and config.adapt.mode == "lora" and (config.output / ENCODER).is_file():
        raise UserError(f"{config.output} is a finished run whose adapters are merged; nothing is left to resume")
    source = open_source(config.data)
    watched = split_images(config, source)
    if config.data.on_error == "raise":
        refuse_unreadable(damaged_parts(source))
        for images_read in (source, *watched.only_looked_at(config.data.reading)):
            check_all(images_read, on_progress=Counter("checking images"))
    check_repeats(config.optim.batch_size, distributed.world_size(), config.data.repeats)
    share_of(config.optim.batch_size, distributed.world_size())
    config = with_statistics(config, source, resume=resume, weights=weights_facts(start, config.data))
    images = UnlabelledImages(watched.training, config.data, config.seed)
    views = images.fixed_views(NUM_PICTURES)
    seed_everything(config.seed)
    model = build_pretrain_model(config, start)
    report = None if start is None else load_start(model, start, config.data)
    adapted = Adapted(model, config.adapt)
    checkpoint_blocks(model, on=config.model.checkpointing)
    config = with_micro_batch(config, model, loss_of_zeros(model, config), resume=resume)
    settings = FitSettings.of(config.optim, len(watched.training))
    images.masks = SampleMasks(model.masker, model.encoder.grid)
    if config.model.compile:
        check_compiler(distributed.join(config.device, config.rank_timeout).device)
    metadata = pretrain_metadata(model, config)

    run = open_run(config, resume=resume, data=Data(source.names, source.content))
    run.note_unreadable(damaged_parts(source))
    if report is not None:
        tell_of_weights(run, report)
    model.to(run.device)
    shard_if_asked(model, config.distributed)
    optimizer = pretrain_optimizer(model, config)
    first_step = run.restore(model, optimizer)
    if config.model.compile:
        compile_blocks(model)
    frozen = config.adapt.frozen_epochs
    frozen_steps = steps_for(len(images), config.optim.batch_size, frozen) if frozen else 0
    adapted.set_frozen(first_step < frozen_steps)
    announce(run.say, config, model, len(images), settings)
    steps = {"total_steps": settings.total_steps, "start_step": first_step}
    loader = run.training_loader(images, collate, repeats=config.data.repeats, **steps)
    mask = fixed_mask(model, len(views), config.seed)

    def draw(step: int) -> None:
        if run.is_main and model.target.gives_pixels:
            strip = reconstruction_strip(model, views, mask, statistics_of(config.data))
            run.picture(f"step_{step:08d}", strip, step)

    def look(step: int) -> None:
        measure(model, watched, config, run, step)

    look_every = steps_for(len(images), config.optim.batch_size, config.watch.every_epochs)
    result = fit(
        model,
        loader,
        pretrain_loss,
        optimizer,
        run=run,
        settings=settings,
        start_step=first_step,
        hooks=[Hook(config.log.pictures_every, draw, len(views)), Hook(look_every, look, watched.worth)],
        changes={frozen_steps: lambda: adapted.set_frozen(False)} if frozen_steps else {},
        metadata=metadata,
        chance_loss=chance_loss(model, config),
    )
    merging = adapted.lora is not None
    adapted.merge()
    run.write_weights(ENCODER, model.encoder.state_dict(), metadata)
    if merging:  # the last checkpoint becomes one that every command reads
        run.checkpoint(settings.total_steps, model, optimizer, metadata)
    run.say(f"wrote {run.folder / ENCODER}")
    if kept_by := config.watch.keep_best:
        best = best_checkpoint(run.folder, kept_by)
        run.say(f"best {kept_by}: " + (f"{best[1]:.4g}, in {best[0]}" if best else "never measured"))
    run.close()
    return result


def announce(
    say: Any, config: PretrainConfig, model: MaskedAutoencoder, num_images: int, settings: FitSettings
) -> None:
    """Print what the run will do."""
    grid = model.encoder.grid
    parameters = sum(p.numel() for part in (model.encoder, model.decoder) for p in part.parameters()) / 1e6
    hidden = fixed_mask(model, 1, 0).hidden_ids.shape[1]
    say(
        f"{num_images} images, {grid.image_size[0]}x{grid.image_size[1]}x{config.data.channels}; "
        f"ViT-{config.model.shape.name} with {grid.patch}x{grid.patch} patches, {parameters:.1f} M parameters with "
        "decoder; "
        f"{hidden} of {grid.num_patches} patches hidden; target {config.target.kind}"
        + ("" if model.target.gives_pixels else ", whose tokenizer has no decoder: no pictures are drawn")
    )
    if model.distillation is not None:
        size = sum(p.numel() for p in model.distillation.teacher.parameters()) / 1e6
        say(
            f"teacher: {config.distill.teacher}, {size:.1f} M parameters, attention of the last {config.distill.blocks}"
        )
    if config.weights is not None:
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        first = f" for the first {config.adapt.frozen_epochs:g} epochs" if config.adapt.frozen_epochs else ""
        say(f"adapt.mode={config.adapt.mode}: {learning:.1f} M parameters learn{first}")
    say(
        f"{settings.total_steps} steps of {config.optim.batch_size} images = {config.optim.epochs:g} epochs, "
        f"warm-up {settings.warmup_steps} steps, peak lr {settings.lr:.3g}; writing to {config.output}"
    )
    say(f"JPEG decoder: {describe_decoder()}")
