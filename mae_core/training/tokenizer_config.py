"""Configuration of ``mae train-tokenizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from mae_core.config.schema import Beta, Count, Schema
from mae_core.config.sections import OptimConfig, RunConfig
from mae_core.data.config import PretrainData
from mae_core.patches import PatchGrid


class TokenizerModel(Schema):
    """A small discrete VAE, one token a patch (our own recipe; the paper uses DALL-E's)."""

    vocabulary: Count = Field(8192, description="how many tokens there are; DALL-E's number")
    patch_size: Count = Field(16, description="side, in pixels, of what a token stands for: the autoencoder's patch")
    width: Count = Field(256, description="channels of its convolutions")
    depth: Annotated[int, Field(ge=0)] = Field(2, description="residual blocks, in the encoder and in the decoder")


class TokenizerOptim(OptimConfig):
    """AdamW and a temperature that falls to that of DALL-E's dVAE; the rest is our own."""

    epochs: Annotated[float, Field(gt=0)] = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 2
    batch_size: Count = 256
    micro_batch: Count | None = Field(
        32, description="maximum images per device at once: their logits alone are patches x vocabulary x 4 bytes each"
    )
    base_lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1.0, 0.0625), description="temperature of the relaxed choice of a token, at the start and at the end"
    )
    divergence_weight: Annotated[float, Field(ge=0)] = Field(
        0.05, description="weight of the divergence of a batch's token frequencies from uniform ones, in nats"
    )


class TokenizerConfig(RunConfig):
    """``mae train-tokenizer``."""

    output: Path = Path("runs/tokenizer")
    model: TokenizerModel = TokenizerModel()
    data: PretrainData = PretrainData()
    optim: TokenizerOptim = TokenizerOptim()

    @model_validator(mode="after")
    def _patches_fit(self) -> TokenizerConfig:
        PatchGrid.of(self.data.image_size, self.model.patch_size)
        return self
