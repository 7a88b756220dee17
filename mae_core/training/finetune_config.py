"""Configuration of ``mae finetune``; the defaults are the released ViT-B recipe (FINETUNE.md of the official code)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mae_core.config.load import config_differences
from mae_core.config.schema import Beta, Count, Fraction
from mae_core.config.sections import Distributed, MicroBatch, OptimConfig, TrainedModel, TransferConfig
from mae_core.data.config import FinetuneData
from mae_core.models.sizes import Pooling


class FinetuneOptim(OptimConfig):
    """The released ViT-B's fine-tuning recipe (for normalised-pixel models)."""

    epochs: Annotated[float, Field(gt=0)] = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    batch_size: Count = 1024
    base_lr: Annotated[float, Field(gt=0)] = 5e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    micro_batch: MicroBatch = None  # type: ignore[assignment]  # with_micro_batch leaves a number
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.65, description="factor of the learning rate from a block to the one before it; 1 is none"
    )


class ClassifierConfig(TrainedModel):
    """The classifier; the trunk's size comes from the weights file where one is given."""

    pooling: Pooling = Field(
        "mean",
        description="of the patch tokens, or cls, the cls token, or map, the attention pooling of a trunk of timm; "
        "such a trunk's own where none is set",
    )
    drop_path: Fraction = Field(0.1, description="stochastic depth of the last block; rises linearly from 0")
    init: Literal["mae", "timm"] = Field(
        "mae",
        description="initialisation with from_scratch=true: mae, xavier-uniform and sine-cosine positions, "
        "as in "
        "pre-training (what was measured here); timm, normal of std 0.02, as in the authors' fine-tuning code",
    )


SCRATCH_RECIPE: dict[str, Any] = {
    "ema": 0.9999,
    "model": {"drop_path": 0.1},
    "data": {"random_erasing": 0.0},
    "optim": {
        "epochs": 300,
        "warmup_epochs": 20,
        "batch_size": 4096,
        "base_lr": 1e-4,
        "weight_decay": 0.3,
        "betas": [0.9, 0.95],
        "layer_decay": 1.0,
    },
}
LARGE_SCRATCH_RECIPE: dict[str, Any] = {"model": {"drop_path": 0.2}, "optim": {"epochs": 200}}
"""Supervised training from scratch (paper, Table 11), and where it differs for ViT-L and ViT-H: what
``from_scratch=true`` means where no configuration file is given. With a file it means that file without weights; the
files ``configs/finetune/*_scratch.yaml`` are Table 11."""


class FinetuneConfig(TransferConfig):
    """``mae finetune``."""

    recipes: ClassVar[str] = "finetune"
    output: Path = Path("runs/finetune")
    trainable_blocks: float | None = Field(
        None, description="train only the last N blocks; 0.5: only the MLP of the last block; empty: all blocks"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of a moving average of the weights; when set, the average is evaluated and saved"
    )
    model: ClassifierConfig = ClassifierConfig()
    data: FinetuneData = FinetuneData()
    optim: FinetuneOptim = FinetuneOptim()
    evaluate_every: Annotated[float, Field(gt=0)] = Field(10, description="epochs between evaluations; also at the end")
    evaluation_batch: Count = Field(64, description="images at once when measuring")
    distributed: Distributed = "ddp"

    @model_validator(mode="after")
    def _shards_what_learns(self) -> FinetuneConfig:
        if self.distributed == "fsdp" and self.model.trunk is not None:
            raise ValueError(
                "distributed=fsdp shards the toolkit's own ViT alone; leave distributed or model.trunk out"
            )
        if self.distributed == "fsdp" and (self.ema is not None or self.trainable_blocks is not None):
            raise ValueError(
                "distributed=fsdp trains all of the model, without an average; leave ema and trainable_blocks out"
            )
        return self

    @classmethod
    def without_file(cls, typed: Mapping[str, Any]) -> dict[str, Any]:
        """``from_scratch=true`` alone is the paper's recipe for training from scratch."""
        if typed.get("from_scratch") is not True:
            return {}
        model = typed.get("model")
        return scratch_recipe(model.get("size") if isinstance(model, Mapping) else None)

    @field_validator("trainable_blocks")
    @classmethod
    def _whole_or_half(cls, value: float | None) -> float | None:
        if value is not None and value != 0.5 and (value < 1 or value % 1):
            raise ValueError(
                "give a whole number of blocks, 1 or more, or 0.5 for the MLP of the last block; to train "
                "none of them use mae linprobe"
            )
        return value

    @model_validator(mode="after")
    def _frozen_blocks_come_from_weights(self) -> FinetuneConfig:
        if self.from_scratch and self.trainable_blocks is not None:
            raise ValueError(
                "trainable_blocks freezes the other blocks, and with from_scratch=true they would stay "
                "random; set weights=FILE, or leave trainable_blocks out"
            )
        return self

    @model_validator(mode="after")
    def _init_is_for_new_weights(self) -> FinetuneConfig:
        if self.model.init != "mae" and not self.from_scratch:
            raise ValueError(
                f"model.init={self.model.init} applies only to training from scratch, but "
                f"weights={self.weights} is set; leave one of them out"
            )
        return self


def scratch_recipe(size: str | None) -> dict[str, Any]:
    """Table 11 for a size; a new dictionary."""
    larger = LARGE_SCRATCH_RECIPE if size in ("large", "huge") else {}
    return {
        name: {**value, **larger.get(name, {})} if isinstance(value, Mapping) else value
        for name, value in SCRATCH_RECIPE.items()
    }


def scratch_differences(config: FinetuneConfig) -> list[str]:
    """Where ``config`` differs from the paper's recipe for training from scratch (Table 11): ``key: paper -> here``."""
    recipe = scratch_recipe(config.model.size)
    paper = FinetuneConfig.model_validate({"from_scratch": True, **recipe})
    stated = {
        f"{name}.{leaf}" if leaf else name
        for name, value in recipe.items()
        for leaf in (value if isinstance(value, Mapping) else ("",))
    }
    return [line for line in config_differences(paper, config) if line.partition(":")[0] in stated]
