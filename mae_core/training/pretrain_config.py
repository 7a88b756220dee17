"""Configuration of ``mae pretrain``; the defaults are the paper's (He et al. 2022, Table 8)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mae_core.config.schema import Beta, Count, Schema, Size, checked_options, row_of
from mae_core.config.sections import Branch, Distributed, MicroBatch, OptimConfig, RunConfig, TrainedModel
from mae_core.data.config import PretrainData
from mae_core.masking import MASKERS, masker_options, num_visible
from mae_core.patches import PatchGrid
from mae_core.targets import EPSILON, TARGETS, NormalizedPixelTarget


class DecoderConfig(Schema):
    """The pre-training decoder (paper, Table 1a and 1b)."""

    width: Count = Field(512, description="width of a token")
    depth: Count = Field(8, description="number of blocks")
    heads: Count = Field(16, description="attention heads")
    fuse_blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        description="encoder blocks (0-based) that the decoder reads beside the last one, with learned weights "
        "(MFF, arXiv 2308.00261)",
    )


class MaskingConfig(Schema):
    """What the encoder may not see (paper, Table 1f and Figure 5)."""

    kind: Annotated[str, row_of(MASKERS)] = Field("random", description="a row of mae_core.masking.MASKERS")
    ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is hidden")
    options: dict[str, Any] = Field({}, validate_default=True, description="further options of the strategy, by name")
    mask_tokens_in_encoder: bool = Field(
        False, description="the encoder runs on all patches, with mask tokens (paper, Table 1c: worse, and slower)"
    )

    @field_validator("options")
    @classmethod
    def _of_the_strategy(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        row = MASKERS.get(info.data.get("kind", ""))
        return given if row is None else checked_options(row, masker_options(row), given)


class TargetConfig(Schema):
    """What the decoder predicts (paper, Table 1d)."""

    kind: Annotated[str, row_of(TARGETS)] = Field("normalized_pixels", description="a row of mae_core.targets.TARGETS")
    options: dict[str, Any] = Field({}, validate_default=True, description="options of the target, by name")
    eps: Annotated[float, Field(gt=0)] = Field(
        EPSILON,
        description="of kind normalized_pixels: added to the variance of a patch; as published, or larger where many "
        "patches are near-constant, whose noise it would otherwise blow up (`mae check images` counts them)",
    )
    pca: Path | None = Field(None, description="of kind pca: the file that `mae fit-pca` writes")
    tokenizer: Path | None = Field(
        None, description="of kind tokens: a run of `mae train-tokenizer`, its file, or DALL-E's published encoder.pkl"
    )
    tokenizer_image_size: Size | None = Field(
        None, description="size at which the tokenizer sees the images, such as 112 for DALL-E's at 224 with patch 16"
    )
    loss_on_all_patches: bool = Field(False, description="count visible patches too (paper, footnote 1: worse)")

    @field_validator("options")
    @classmethod
    def _of_the_target(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        row = TARGETS.get(info.data.get("kind", ""))
        return given if row is None else checked_options(row, row.options(), given)

    @model_validator(mode="after")
    def _eps_is_of_normalised_pixels(self) -> TargetConfig:
        if self.eps != EPSILON and self.kind != NormalizedPixelTarget.name:
            raise ValueError(
                f"eps={self.eps:g} applies only to kind={NormalizedPixelTarget.name}, and the kind is {self.kind}; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _file_is_named(self) -> TargetConfig:
        for kind, option, command in (("pca", "pca", "fit-pca"), ("tokens", "tokenizer", "train-tokenizer")):
            if self.kind == kind and getattr(self, option) is None:
                raise ValueError(f"target.kind={kind} needs target.{option}=FILE; `mae {command}` writes one")
        return self


class PretrainOptim(OptimConfig):
    """Paper, Table 8."""

    epochs: Annotated[float, Field(gt=0)] = 800
    warmup_epochs: Annotated[float, Field(ge=0)] = 40
    batch_size: Count = 4096
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    micro_batch: MicroBatch = None  # type: ignore[assignment]  # with_micro_batch leaves a number


class WatchConfig(Schema):
    """What is measured while a pre-training runs, besides its loss: on images kept out of it, and by labels."""

    every_epochs: Annotated[float, Field(gt=0)] = Field(20, description="between measurements; also at the end")
    share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of data.path, kept out of training for the held-out loss (its masks never change)"
    )
    path: Path | None = Field(None, description="other images for the held-out loss, in place of a share")
    labelled: Path | None = Field(None, description="train/<class>/* and val/<class>/*, for k-NN top-1")
    neighbours: Count = Field(20, description="k of the k-NN")
    probes: tuple[Literal["linear", "attentive"], ...] = Field(
        (), description="trained on the frozen encoder of the moment too, on the images of labelled, unaugmented"
    )
    probe_epochs: Count = Field(50, description="passes of a probe over the training images of labelled")
    keep_best: Literal["held_out_loss", "knn_top1", "linear_top1", "attentive_top1"] | None = Field(
        None, description="a checkpoint is saved where this measure is the best so far, and never deleted while it is"
    )
    most_images: Count = Field(5000, description="of each kind, spread over all")
    batch: Count = Field(64, description="images at once")

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> WatchConfig:
        if self.share and self.path is not None:
            raise ValueError("give either share or path, not both")
        if self.probes and self.labelled is None:
            raise ValueError(
                "probes learn from labelled images; set watch.labelled=FOLDER too, or leave watch.probes out"
            )
        missing = self._missing_for(self.keep_best)
        if missing:
            raise ValueError(f"keep_best={self.keep_best} is not measured; set {missing} too, or leave keep_best out")
        return self

    def _missing_for(self, measure: str | None) -> str | None:
        """The option without which ``measure`` is not measured; None where it is."""
        if measure == "held_out_loss":
            return None if self.share or self.path is not None else "watch.share or watch.path"
        if measure == "knn_top1":
            return None if self.labelled is not None else "watch.labelled=FOLDER"
        probe = (measure or "").removesuffix("_top1")
        return f"watch.labelled=FOLDER and watch.probes=[{probe}]" if probe and probe not in self.probes else None


class AdaptConfig(Schema):
    """What of the encoder learns in a pre-training that starts from weights."""

    mode: Literal["full", "decoder", "lora"] = Field(
        "full", description="full: all; decoder: the decoder alone; lora: adapters of low rank, merged at the end"
    )
    frozen_epochs: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of mode full: epochs at the start in which only the decoder is trained"
    )
    rank: Count = Field(8, description="of mode lora: of the adapters")
    layers: Annotated[tuple[Literal["qkv", "proj", "fc1", "fc2"], ...], Field(min_length=1)] = Field(
        ("qkv",), description="of mode lora: the linear layers of a block that have adapters"
    )
    blocks: Annotated[int, Field(ge=0)] = Field(
        0, description="of mode lora: the last N blocks are trained in full, without adapters (ExPLoRA)"
    )

    @model_validator(mode="after")
    def _of_the_mode(self) -> AdaptConfig:
        owners = {"frozen_epochs": "full", "rank": "lora", "layers": "lora", "blocks": "lora"}
        for name, mode in owners.items():
            value = getattr(self, name)
            if self.mode != mode and value != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} belongs to adapt.mode={mode}, and the mode is {self.mode}")
        return self


class DistillConfig(Schema):
    """A larger encoder that a pre-training learns from beside its own target (MAE-Lite, arXiv 2205.14443)."""

    teacher: Path | None = Field(
        None, description="its weights: a plain ViT of any known format; None: no distillation"
    )
    blocks: Count = Field(1, description="how many of the last blocks' attention maps are compared")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="of their mean squared distance, beside the loss")

    @model_validator(mode="after")
    def _of_a_teacher(self) -> DistillConfig:
        if self.teacher is None and (self.blocks, self.weight) != (1, 1.0):
            raise ValueError("blocks and weight apply to distill.teacher=FILE; set that too, or leave them out")
        return self


class PretrainConfig(RunConfig):
    """``mae pretrain``."""

    recipes: ClassVar[str] = "pretrain"
    output: Path = Path("runs/pretrain")
    weights: Path | None = Field(
        None, description="start from these: an encoder, alone or with its decoder, of any known format; a new schedule"
    )
    branch: Branch = None
    adapt: AdaptConfig = AdaptConfig()
    model: TrainedModel = TrainedModel()
    decoder: DecoderConfig = DecoderConfig()
    masking: MaskingConfig = MaskingConfig()
    target: TargetConfig = TargetConfig()
    distill: DistillConfig = DistillConfig()
    data: PretrainData = PretrainData()
    optim: PretrainOptim = PretrainOptim()
    watch: WatchConfig = WatchConfig()
    distributed: Distributed = "ddp"

    @model_validator(mode="after")
    def _shards_what_learns(self) -> PretrainConfig:
        if self.distributed == "fsdp" and (self.adapt.mode != "full" or self.adapt.frozen_epochs):
            raise ValueError("distributed=fsdp trains all of the model; set adapt.mode=full and adapt.frozen_epochs=0")
        return self

    @model_validator(mode="after")
    def _distils_visible_patches(self) -> PretrainConfig:
        if self.distill.teacher is not None and self.masking.mask_tokens_in_encoder:
            raise ValueError(
                "distill.teacher compares attention among visible patches, and masking.mask_tokens_in_encoder shows "
                "the encoder all of them; leave one of them out"
            )
        if self.distill.teacher is not None and self.distributed == "fsdp":
            raise ValueError(
                "distill.teacher does not go with distributed=fsdp, which scatters the blocks whose attention is "
                "compared; set distributed=ddp"
            )
        return self

    @model_validator(mode="after")
    def _own_vit(self) -> PretrainConfig:
        if self.model.trunk is not None:
            raise ValueError(
                f"model.trunk={self.model.trunk}: masked pre-training hides patches from the toolkit's own ViT; leave "
                "model.trunk out and set model.size"
            )
        return self

    @model_validator(mode="after")
    def _adapts_weights(self) -> PretrainConfig:
        if self.weights is None and self.branch is not None:
            raise ValueError(f"branch={self.branch} chooses an encoder of weights=FILE; set that too, or leave it out")
        if self.weights is None and self.adapt != AdaptConfig():
            raise ValueError(
                "adapt applies only to a run that starts from weights; set weights=FILE, or leave adapt out"
            )
        if self.adapt.mode == "lora" and self.watch.keep_best is not None:
            raise ValueError(
                "watch.keep_best keeps checkpoints inside a training, whose adapters are merged at its end; leave it "
                "out, or set adapt.mode=full"
            )
        if self.adapt.frozen_epochs >= self.optim.epochs:
            raise ValueError(
                f"adapt.frozen_epochs={self.adapt.frozen_epochs:g} must be less than "
                f"optim.epochs={self.optim.epochs:g}; lower it, or set adapt.mode=decoder to keep the encoder frozen"
            )
        return self

    @model_validator(mode="after")
    def _patches_fit(self) -> PretrainConfig:
        if self.weights is not None:  # which may say patch and image size: looked at once they are read
            return self
        grid = PatchGrid.of(self.data.image_size, self.model.patch_size or self.model.shape.patch_size)
        num_visible(grid.num_patches, self.masking.ratio)
        return self
