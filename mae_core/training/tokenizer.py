"""``mae train-tokenizer``: a small discrete VAE on images without labels, for the token target (paper, Table 1d and
7)."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mae_core.counting import Counter
from mae_core.data.images import Statistics, check_all, refuse_unreadable, statistics_of
from mae_core.data.loading import check_repeats
from mae_core.data.sources import damaged_parts, open_source
from mae_core.data.unlabelled import PretrainBatch, UnlabelledImages, collate
from mae_core.layout import TOKENIZER
from mae_core.resuming import Resume
from mae_core.tokenizers import DiscreteVAE
from mae_core.training import distributed
from mae_core.training.loop import FitResult, FitSettings, Hook, fit, seed_everything
from mae_core.training.pictures import Display, Strip, tile
from mae_core.training.run import check_output, open_run
from mae_core.training.same_data import Data
from mae_core.training.statistics import with_statistics
from mae_core.training.target_files import TOKENIZER_FORMAT
from mae_core.training.tokenizer_config import TokenizerConfig

NUM_PICTURES = 6


class TokenizerTraining(nn.Module):
    """A tokenizer, and what its training changes over time."""

    def __init__(self, tokenizer: DiscreteVAE, divergence_weight: float) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.divergence_weight = divergence_weight
        self.temperature = 1.0

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W), standardised -> named losses."""
        images = pixels * self.tokenizer.std + self.tokenizer.mean
        return self.tokenizer.loss(
            images, temperature=self.temperature, divergence_weight=self.divergence_weight
        )._asdict()


def temperature_at(step: int, total: int, ends: tuple[float, float]) -> float:
    """From the first of ``ends`` to the second, along half a cosine."""
    first, last = ends
    return last + (first - last) * (1 + math.cos(math.pi * min(step / total, 1.0))) / 2


def tokenizer_loss(model: nn.Module, batch: PretrainBatch) -> dict[str, Tensor]:
    """The losses of a batch; its tokens are drawn from the global generator."""
    return model(batch.pixels)


def train_tokenizer(config: TokenizerConfig, *, resume: Resume = False) -> FitResult:
    """Train a tokenizer; writes the run directory. Raises ``UserError`` for everything a user can get wrong."""
    resume = check_output(config, resume=resume)
    source = open_source(config.data)
    if config.data.on_error == "raise":
        refuse_unreadable(damaged_parts(source))
        check_all(source, on_progress=Counter("checking images"))
    check_repeats(config.optim.batch_size, distributed.world_size(), config.data.repeats)
    settings = FitSettings.of(config.optim, len(source))
    config = with_statistics(config, source, resume=resume)
    dataset = UnlabelledImages(source, config.data, config.seed)
    views, statistics = dataset.fixed_views(NUM_PICTURES), statistics_of(config.data)
    seed_everything(config.seed)
    tokenizer = DiscreteVAE(
        vocabulary=config.model.vocabulary,
        stride=config.model.patch_size,
        width=config.model.width,
        depth=config.model.depth,
        **statistics._asdict(),
    )
    metadata: dict[str, Any] = {
        "format": TOKENIZER_FORMAT,
        "tokenizer": tokenizer.describe(),
        "epochs": config.optim.epochs,
    }
    run = open_run(config, resume=resume, data=Data(source.names, source.content))
    run.note_unreadable(damaged_parts(source))
    training = TokenizerTraining(tokenizer, config.optim.divergence_weight).to(run.device)
    optimizer = torch.optim.AdamW(
        training.parameters(),
        lr=settings.lr,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
    )
    start = run.restore(training, optimizer)
    run.say(
        f"{len(dataset)} images; {sum(p.numel() for p in tokenizer.parameters()) / 1e6:.1f} M parameters, a token of "
        f"{tokenizer.vocabulary} for each {tokenizer.stride}x{tokenizer.stride} pixels; {settings.total_steps} steps "
        f"of {config.optim.batch_size} images; writing to {run.folder}"
    )

    def cool(step: int) -> None:
        training.temperature = temperature_at(step, settings.total_steps, config.optim.temperature)

    def draw(step: int) -> None:
        if run.is_main:
            run.picture(f"step_{step:08d}", token_strip(tokenizer, views, statistics), step)

    cool(start)
    steps = {"total_steps": settings.total_steps, "start_step": start}
    loader = run.training_loader(dataset, collate, repeats=config.data.repeats, **steps)
    hooks = [Hook(1, cool), Hook(config.log.pictures_every, draw)]
    parts = (training, loader, tokenizer_loss, optimizer)
    result = fit(*parts, run=run, settings=settings, start_step=start, hooks=hooks, metadata=metadata)
    run.write_weights(TOKENIZER, tokenizer.state_dict(), metadata)
    run.say(f"wrote {run.folder / TOKENIZER}")
    run.close()
    return result


@torch.no_grad()
def token_strip(tokenizer: DiscreteVAE, pixels: Tensor, statistics: Statistics) -> Image.Image:
    """A row per image (B, C, H, W), standardised: the image, and what its tokens alone give back."""
    display = Display.of(statistics)
    images = pixels.to(tokenizer.mean.device) * tokenizer.std + tokenizer.mean
    grid = (images.shape[2] // tokenizer.stride, images.shape[3] // tokenizer.stride)
    back = tokenizer.decode(tokenizer(images).unflatten(1, grid)).cpu()
    rows = []
    for image, decoded in zip(images.cpu(), back, strict=True):
        limits = display.limits(image)
        rows.append(Strip("", [display.picture(values, limits) for values in (image, decoded)]))
    note = display.note(tokenizer.channels)
    return tile(rows, ["input", "from its tokens"], [note] if note else [])
