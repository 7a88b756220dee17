"""Sections that several commands share; the defaults are the paper's (He et al. 2022)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mae_core.config.schema import Beta, Count, Schema, row_of
from mae_core.models.sizes import SIZES, ViTSize, trunk_of


class TrunkOptions(Schema):
    """Numbers that replace those of the named size; with ``weights`` they state what the file does not say."""

    width: Count | None = Field(None, description="width of a token; empty: as in size")
    depth: Count | None = Field(None, description="number of blocks; empty: as in size")
    heads: Count | None = Field(None, description="attention heads; empty: as in size or in the weights file")
    mlp_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="hidden units of a block's MLP, as a multiple of the width; empty: as in size"
    )

    def trunk_on(self, size: str) -> ViTSize:
        """The trunk: a named size with the numbers given here. Raises ``UserError`` where they do not make a ViT."""
        return trunk_of(size, width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio)


Trunk = Annotated[
    str | None,
    Field(
        description="timm:NAME, such as timm:vit_small_patch14_dinov2: a ViT of timm; weights=FILE is in its names or "
        "those of the model's own project; empty: the toolkit's own ViT, or what the weights file says"
    ),
]


class ModelConfig(TrunkOptions):
    """The encoder."""

    size: Annotated[str, row_of(SIZES)] = Field("base", description="a row of mae_core.models.sizes.SIZES")
    patch_size: Count | None = Field(
        None, description="side of a patch in pixels; empty: as in size (14 for huge, else 16)"
    )
    cls_token: bool = Field(
        True, description="false: patch tokens alone, which works as well with mean pooling (paper, A.1)"
    )

    @property
    def shape(self) -> ViTSize:
        """Width, depth, heads and MLP ratio."""
        return replace(self.trunk_on(self.size), cls_token=self.cls_token)

    @model_validator(mode="after")
    def _is_a_vit(self) -> ModelConfig:
        self.trunk_on(self.size)
        return self


OWN_ALONE = ("size", "width", "depth", "heads", "mlp_ratio", "cls_token")
"""Options of the toolkit's own ViT, which the name of a trunk of timm decides."""


OF_OUR_VIT = ("window", "relative_positions", "relative_size", "global_blocks", "layer_scale")
"""Options that a dense task adds to the toolkit's own ViT, and to no other."""


def check_trunk(section: Schema, alone: Sequence[str] = OWN_ALONE) -> None:
    """Raise ``ValueError`` where a section names a trunk of timm and sets an option of the toolkit's own ViT."""
    fields = type(section).model_fields
    given = [name for name in alone if name in fields and getattr(section, name) != fields[name].default]
    trunk = getattr(section, "trunk", None)
    if trunk is not None and given:
        raise ValueError(
            f"{', '.join(f'model.{name}' for name in given)} {'are' if len(given) > 1 else 'is'} of the toolkit's own "
            f"ViT, and model.trunk={trunk} decides the architecture; leave out one of them"
        )


class TrainedModel(ModelConfig):
    """An encoder that a run trains."""

    trunk: Trunk = None

    checkpointing: bool = Field(
        False, description="compute blocks again in the backward pass: less memory, about a third more time"
    )
    compile: bool = Field(False, description="torch.compile the blocks; needs a C++ compiler, on a GPU triton too")

    @model_validator(mode="after")
    def _trunk_decides(self) -> TrainedModel:
        check_trunk(self)
        return self


MicroBatch = Annotated[
    Count | Literal["auto"] | None,
    Field(
        description="maximum images per device at once; gradients of the rest are accumulated; auto: the most that fit"
    ),
]


class ScheduleConfig(Schema):
    """Linear warm-up, half-cosine decay. lr = base_lr * batch_size / 256."""

    epochs: Annotated[float, Field(gt=0)] = Field(description="passes over the training images")
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(description="in which the learning rate rises linearly")
    batch_size: Count = Field(description="images per step, over all ranks and accumulation rounds")
    micro_batch: Count | None = Field(
        None, description="maximum images per device at once; gradients of the rest are accumulated"
    )
    base_lr: Annotated[float, Field(gt=0)] = Field(
        description="learning rate per 256 images: lr = base_lr * batch_size / 256"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate at the end")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(
        None, description="gradients are clipped to this norm; the paper does not clip"
    )

    @property
    def lr(self) -> float:
        """Peak learning rate, by the linear scaling rule (paper, Table 8)."""
        return self.base_lr * self.batch_size / 256


class OptimConfig(ScheduleConfig):
    """AdamW."""

    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.05, description="decoupled, as in AdamW; none for biases and norms"
    )
    betas: tuple[Beta, Beta] = Field(description="of AdamW: decay of the mean of the gradients and of their squares")


class LogConfig(Schema):
    """How often a run writes what; in steps."""

    every: Count = Field(20, description="a line in log.jsonl, TensorBoard and on the screen")
    pictures_every: Count = Field(1000, description="reconstruction strips, or drawn predictions")
    checkpoint_every: Count = Field(1000, description="a checkpoint, from which --resume continues")
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(10, description="save too when the last is older")
    stop_seconds: Annotated[float, Field(ge=0)] = Field(
        0, description="from a signal on, in which a training must have saved; then it ends without; 0: no limit"
    )
    keep_checkpoints: Count = Field(2, description="the last ones; older ones are deleted")
    keep_every: Count | None = Field(None, description="those of every so many steps are never deleted")
    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="what shows numbers and pictures, beside log.jsonl and pictures/"
    )


class JobConfig(Schema):
    """What every command has that computes and writes a folder."""

    output: Path = Field(description="the run directory; never overwritten")
    precision: Literal["auto", "bf16", "fp32", "tf32"] = Field(
        "auto", description="auto: bf16 on a GPU or CPU that has it, else fp32; tf32: fp32 with TF32 products on a GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    rank_timeout: Annotated[float, Field(gt=0)] = Field(
        1800, description="seconds that several ranks wait for one another before the run ends"
    )


class RunConfig(JobConfig):
    """What every training has."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of all that is random in the run")
    log: LogConfig = LogConfig()


Distributed = Annotated[
    Literal["ddp", "fsdp"],
    Field(description="several ranks: ddp: each has the whole model; fsdp: parameters and moments in shards (FSDP2)"),
]


Branch = Annotated[
    str | None,
    Field(
        description="which encoder of a weights file that holds several: teacher or student, base_encoder or "
        "momentum_encoder, model or model_ema"
    ),
]


class TransferConfig(RunConfig):
    """A training that starts from an encoder, or, by request, from nothing."""

    weights: Path | None = Field(
        None, description="an encoder.safetensors, a run that has one, or an official MAE file"
    )
    branch: Branch = None
    from_scratch: bool = Field(False, description="random initialisation instead of weights")
    allow_missing: tuple[str, ...] = Field(
        (),
        description="patterns of encoder tensors that the weights may lack, such as cls_token; they are "
        "newly initialised",
    )

    @classmethod
    def gives_way(cls, typed: Mapping[str, Any]) -> Collection[str]:
        """A recipe's ViT, for a trunk that the user names."""
        model = typed.get("model")
        trunk = model.get("trunk") if isinstance(model, Mapping) else None
        return [f"model.{name}" for name in (*OWN_ALONE, "patch_size", *OF_OUR_VIT)] if trunk else ()

    @model_validator(mode="after")
    def _weights_or_scratch(self) -> TransferConfig:
        if (self.weights is None) != self.from_scratch:
            raise ValueError("give either weights=FILE or from_scratch=true")
        if self.branch is not None and self.weights is None:
            raise ValueError(f"branch={self.branch} chooses an encoder of weights=FILE; set that too, or leave it out")
        return self
