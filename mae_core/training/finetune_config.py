"""Configuration of ``mae finetune``; the defaults are the released ViT-B recipe (FINETUNE.md of the official code)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mae_core.config.schema import Beta, Count, Fraction
from mae_core.config.sections import ModelConfig, OptimConfig, TransferConfig
from mae_core.data.config import FinetuneData


class FinetuneOptim(OptimConfig):
    """The released ViT-B's fine-tuning recipe (for normalised-pixel models)."""

    epochs: Annotated[float, Field(gt=0)] = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    batch_size: Count = 1024
    base_lr: Annotated[float, Field(gt=0)] = 5e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65


class ClassifierConfig(ModelConfig):
    """The classifier; the trunk's size comes from the weights file where one is given."""

    pooling: Literal["mean", "cls"] = "mean"
    drop_path: Fraction = 0.1


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
        "betas": (0.9, 0.95),
        "layer_decay": 1.0,
    },
}
"""Supervised training from scratch (paper, Table 11): what ``from_scratch=true`` means for options that are not set."""


LARGE_SCRATCH_RECIPE: dict[str, Any] = {"model": {"drop_path": 0.2}, "optim": {"epochs": 200}}
"""Where Table 11 differs for ViT-L and ViT-H."""


class FinetuneConfig(TransferConfig):
    """``mae finetune``."""

    output: Path = Path("runs/finetune")
    trainable_blocks: float | None = Field(
        None, description="tune the last so many blocks alone; 0.5 is the MLP of the last one; all when empty"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an average of the weights, which is then what is evaluated and saved"
    )
    model: ClassifierConfig = ClassifierConfig()
    data: FinetuneData = FinetuneData()
    optim: FinetuneOptim = FinetuneOptim()
    evaluate_every: Annotated[float, Field(gt=0)] = Field(10, description="epochs between evaluations; also at the end")
    evaluation_batch: Count = 64

    @model_validator(mode="before")
    @classmethod
    def _scratch_recipe(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("from_scratch") is not True:
            return given
        model = given.get("model")
        size = model.get("size") if isinstance(model, Mapping) else None
        recipe = _filled(LARGE_SCRATCH_RECIPE, SCRATCH_RECIPE) if size in ("large", "huge") else SCRATCH_RECIPE
        return _filled(given, recipe)

    @field_validator("trainable_blocks")
    @classmethod
    def _whole_or_half(cls, value: float | None) -> float | None:
        if value is not None and value != 0.5 and (value < 1 or value % 1):
            raise ValueError(
                "tune a whole number of blocks from 1 on, or 0.5 for the MLP of the last one; mae linprobe tunes none"
            )
        return value

    @model_validator(mode="after")
    def _frozen_blocks_come_from_weights(self) -> FinetuneConfig:
        if self.from_scratch and self.trainable_blocks is not None:
            raise ValueError(
                "trainable_blocks keeps the other blocks as weights=FILE has them, and from_scratch=true would leave "
                "them random; give weights, or drop trainable_blocks"
            )
        return self


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with ``defaults`` where it sets nothing, section by section."""
    filled = {**defaults, **given}
    for name in defaults.keys() & given.keys():
        if isinstance(defaults[name], Mapping) and isinstance(given[name], Mapping):
            filled[name] = _filled(given[name], defaults[name])
    return filled
