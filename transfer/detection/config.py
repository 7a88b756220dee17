"""Configuration of a detector run. The defaults are the MAE paper's detector.

Numbers: "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv 2111.11429, sections 2.1 to 2.5)
for backbone, schedule and augmentation; detectron2's Mask R-CNN FPN configuration for what the paper leaves open.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mae_core.config.schema import Beta, Count, Fraction, Schema, Size, row_of
from mae_core.config.sections import (
    OF_OUR_VIT,
    OWN_ALONE,
    OptimConfig,
    TransferConfig,
    Trunk,
    TrunkOptions,
    check_trunk,
)
from mae_core.data.config import ImagesConfig
from mae_core.models.sizes import SIZES
from transfer.attention import RELATIVE_POSITIONS
from transfer.detection.heads import HEADS
from transfer.engines import DETECTION
from transfer.pyramid import NORMS, PYRAMIDS

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class DetectorConfig(TrunkOptions):
    """The network: a trunk, a pyramid, and a head."""

    trunk: Trunk = None
    size: Annotated[str, row_of(SIZES)] | None = Field(
        None, description="empty: as in the weights file; base from scratch"
    )
    patch_size: Count | None = Field(None, description="empty: as in the weights file; from scratch as in size")
    window: Count | None = Field(
        14, description="side of the attention windows in patches; null for global attention; not with trunk"
    )
    relative_positions: Annotated[str, row_of(RELATIVE_POSITIONS)] = Field(
        "none", description="shared_table as the MAE paper's detector, decomposed as ViTDet; learned from zero"
    )
    positions: Literal["canvas", "weights"] = Field(
        "canvas", description="the grid of the learned positions: the canvas', or the weights', resized on every pass"
    )
    pyramid: Annotated[str, row_of(PYRAMIDS)] = Field(
        "four_stage", description="maps from four depths, as the MAE paper's detector, or from the last block (ViTDet)"
    )
    head: Annotated[str, row_of(HEADS)] = Field("mask_rcnn", description="faster_rcnn: boxes alone, no masks needed")
    cascade: bool = Field(False, description="three box heads, one after another (Cascade R-CNN); engine detectron2")
    drop_path: Fraction = Field(0.1, description="stochastic depth of the last block; rises linearly from 0")
    trainable_blocks: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="number of last trunk blocks that learn, the others keep the weights of the file; 0: none",
    )
    checkpointing: bool = Field(False, description="recompute blocks in the backward pass: less memory, more time")
    norm: Annotated[str, row_of(NORMS)] = Field("sync_bn", description="in FPN and heads; gn or ln for small batches")
    fpn_channels: Count = Field(256, description="width of the pyramid's maps")
    anchor_scale: Positive = Field(8.0, description="side of an anchor in strides of its level: 32..512 with patch 16")
    anchor_ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="height / width")
    rpn_convs: Count = Field(2, description="convolutions of the proposal network")
    head_channels: Count = Field(256, description="width of the heads' convolutions")
    box_convs: Annotated[int, Field(ge=0)] = Field(4, description="convolutions of the box head")
    box_features: Count = Field(1024, description="width of the box head's linear layer")
    mask_convs: Annotated[int, Field(ge=0)] = Field(4, description="convolutions of the mask head")

    @model_validator(mode="before")
    @classmethod
    def _timm_has_its_own_windows(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("trunk") and "window" not in given:
            return {**given, "window": None}
        return given

    @model_validator(mode="after")
    def _trunk_decides(self) -> DetectorConfig:
        check_trunk(self, OWN_ALONE)
        given = [name for name in OF_OUR_VIT if getattr(self, name, None) not in (None, "none")]
        if self.trunk is not None and given:
            told = " and ".join(f"model.{name}={getattr(self, name)}" for name in given)
            raise ValueError(f"{told}: only the toolkit's own ViT has these, not {self.trunk}; leave out one of them")
        return self


class SamplingConfig(Schema):
    """How many candidates each stage looks at."""

    rpn_anchors: Count = Field(256, description="anchors per image in the loss of the proposal network")
    pre_nms_train: Count = Field(2000, description="proposals per level before suppression")
    pre_nms_test: Count = Field(1000, description="the same, when measuring")
    proposals: Count = Field(1000, description="proposals per image after suppression")
    rois: Count = Field(512, description="proposals per image in the loss of the heads, a quarter of them positive")


class InferenceConfig(Schema):
    """From the heads' outputs to detections."""

    score_threshold: Fraction = Field(0.05, description="detections with a lower score are dropped")
    nms_threshold: Fraction = Field(0.5, description="IoU above which of two boxes of a class the better one stays")
    detections: Count = Field(100, description="maximum detections per image")
    test_batch: Count = Field(1, description="images at once")
    picture_score: Fraction = Field(
        0.5, description="detections with a lower score are not drawn, but count in the metrics"
    )
    num_pictures: Annotated[int, Field(ge=0)] = Field(8, description="validation images drawn at the end")


class DetectionData(ImagesConfig):
    """COCO instances: ``path`` with train/, val/ and annotations/instances_{train,val}.json, or the four by name.

    Augmentation is large-scale jitter: resize to a random share of the canvas, crop or pad to the canvas, flip.
    """

    image_size: Size = Field(1024, description="side, or (height, width), of the canvas every image is put on")
    train_images: Path | None = Field(None, description="folder of the training images, if not path/train")
    train_annotations: Path | None = Field(None, description="their COCO json")
    val_images: Path | None = Field(None, description="folder of the validation images, if not path/val")
    val_annotations: Path | None = Field(None, description="their COCO json")
    val_share: Share | None = Field(
        None,
        description="share of the training images that validates in place of a val set, by file name and seed; "
        "path may then hold a single json",
    )
    resize_scale: tuple[Positive, Positive] = Field((0.1, 2.0), description="range of the jitter; (1, 1) for none")
    filter_empty: bool = Field(True, description="train without the images that have no object, as detectron2 does")
    hflip: Fraction = Field(0.5, description="probability of a horizontal flip")
    vflip: Fraction = Field(0.0, description="for images without an up, such as microscopy")

    @model_validator(mode="after")
    def _range_ascends(self) -> DetectionData:
        if self.resize_scale[0] > self.resize_scale[1]:
            raise ValueError(f"resize_scale {self.resize_scale} must ascend")
        return self

    @model_validator(mode="after")
    def _one_val_set(self) -> DetectionData:
        if self.val_share is not None and (self.val_images or self.val_annotations):
            raise ValueError("val_share takes validation images from the training set; leave data.val_... out")
        return self


class DetectionOptim(OptimConfig):
    """The published recipe for pre-trained ViTs: lr 8e-5 at 64 images, which is 3.2e-4 per 256.

    ``batch_size`` holds on any number of devices: each takes its share, in rounds of ``micro_batch``.
    """

    epochs: Positive = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.25
    batch_size: Count = 64
    base_lr: Positive = 3.2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="per block; 1 is none")
    milestones: tuple[Share, ...] = Field(
        (), description="shares of the run after which the learning rate drops to a tenth (ViTDet); empty: half-cosine"
    )
    decayed: Literal["weights", "vitdet", "all"] = Field(
        "weights",
        description="what the weight decay is for: weights alone (no bias, norm or position); as in ViTDet's code for "
        "ViT-B and ViT-L, by accident biases, relative positions and channel norms too; all, as in its code for ViT-H",
    )

    @model_validator(mode="before")
    @classmethod
    def _replaced(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("images_per_device") is not None:
            raise ValueError(
                "images_per_device is replaced by batch_size, the images per step over all devices: on N "
                "devices set "
                f"batch_size to N x {given['images_per_device']}; the learning rate follows it, as before"
            )
        return given

    @model_validator(mode="after")
    def _milestones_ascend(self) -> DetectionOptim:
        if any(late <= early for early, late in pairwise(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must ascend")
        return self


class DetectionConfig(TransferConfig):
    """``transfer/detection/train_net.py``."""

    recipes: ClassVar[str] = "detection"
    output: Path = Path("runs/detection")
    engine: Annotated[str, row_of(DETECTION)] = Field("torchvision", description="torchvision, or detectron2")
    weights: Path | None = Field(None, description="an encoder, or a run that has one; with --eval-only a detector")
    ema: Share | None = Field(
        None, description="decay of a moving average of the weights; when set, the average is scored and written"
    )
    model: DetectorConfig = DetectorConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DetectionData = DetectionData()
    optim: DetectionOptim = DetectionOptim()
    test: InferenceConfig = InferenceConfig()

    @model_validator(mode="after")
    def _frozen_blocks_come_from_weights(self) -> DetectionConfig:
        if self.from_scratch and self.model.trainable_blocks is not None:
            raise ValueError(
                "model.trainable_blocks freezes the other blocks, and with from_scratch=true they would stay "
                "random; set weights=FILE, or leave model.trainable_blocks out"
            )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> DetectionConfig:
        engine = DETECTION[self.engine]
        for option in sorted({option for row in DETECTION.values() for option in row.can} - {*engine.can}):
            value: Any = self
            for name in option.split("."):
                value = getattr(value, name)
            if value:
                able = " or ".join(name for name, row in DETECTION.items() if option in row.can)
                raise ValueError(f"{option} needs engine={able}, not {self.engine}")
        return self
