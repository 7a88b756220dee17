"""Mask R-CNN, Faster R-CNN and their cascades of detectron2's parts, with the numbers of a recipe."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.structures import ImageList

from mae_core.data.images import IMAGENET_MEAN, IMAGENET_STD, Statistics
from transfer.detection.config import DetectorConfig, InferenceConfig, SamplingConfig
from transfer.detection.engine_detectron2.backbone import MAECoreBackbone
from transfer.detection.heads import BOX_CELLS, BOX_WEIGHTS, MASK_CELLS
from transfer.pyramid import CANONICAL_SIDE, CANONICAL_STRIDE, NORMS
from transfer.timm_backbone import Dense

CASCADE = {0.5: BOX_WEIGHTS, 0.6: (20.0, 20.0, 10.0, 10.0), 0.7: (30.0, 30.0, 15.0, 15.0)}
"""Least overlap of a positive box in each stage -> weights of its box deltas (Cascade R-CNN, 4.1)."""
BRIGHTEST = 255.0
"""detectron2 takes pixels in 0..255."""


class CanvasRCNN(GeneralizedRCNN):
    """detectron2's, with the images of a batch padded to the canvas of the recipe, which need not be square."""

    canvas = (0, 0)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Records -> standardised images on (height, width) of the canvas, in whole cells of the coarsest map."""
        images = super().preprocess_image(batched_inputs)
        (rows, cols), stride = images.tensor.shape[-2:], self.backbone.size_divisibility
        height, width = (-(-side // stride) * stride for side in self.canvas)
        images.tensor = F.pad(images.tensor, (0, max(width - cols, 0), 0, max(height - rows, 0)))
        return images


def build_backbone(vit: Dense, config: DetectorConfig) -> MAECoreBackbone:
    """The pyramid of the configuration."""
    return MAECoreBackbone(vit, kind=config.pyramid, channels=config.fpn_channels, norm=NORMS[config.norm])


def faster_rcnn(
    backbone: MAECoreBackbone, num_classes: int, config: DetectorConfig, sampling: SamplingConfig, test: InferenceConfig
) -> CanvasRCNN:
    """Boxes alone; with ``config.cascade`` from three box heads."""
    return _rcnn(backbone, config, sampling, roi_heads(backbone, num_classes, config, sampling, test))


def mask_rcnn(
    backbone: MAECoreBackbone, num_classes: int, config: DetectorConfig, sampling: SamplingConfig, test: InferenceConfig
) -> CanvasRCNN:
    """Boxes and masks; with ``config.cascade`` boxes from three heads."""
    masks = mask_parts(backbone, num_classes, config)
    return _rcnn(backbone, config, sampling, roi_heads(backbone, num_classes, config, sampling, test, **masks))


def _rcnn(
    backbone: MAECoreBackbone, config: DetectorConfig, sampling: SamplingConfig, heads: StandardROIHeads
) -> CanvasRCNN:
    return CanvasRCNN(
        backbone=backbone,
        proposal_generator=proposal_network(backbone, config, sampling),
        roi_heads=heads,
        pixel_mean=[BRIGHTEST * value for value in IMAGENET_MEAN],
        pixel_std=[BRIGHTEST * value for value in IMAGENET_STD],
        input_format="RGB",
    )


def adapt_to_images(network: CanvasRCNN, statistics: Statistics, canvas: tuple[int, int]) -> None:
    """Standardise images with ``statistics``, and pad them to ``canvas``."""
    for name, values in zip(("pixel_mean", "pixel_std"), statistics, strict=True):
        setattr(network, name, BRIGHTEST * torch.tensor(values).view(-1, 1, 1))
    network.canvas = canvas


def proposal_network(backbone: MAECoreBackbone, config: DetectorConfig, sampling: SamplingConfig) -> RPN:
    """The region proposal network; its convolutions have no norm, as in ViTDet's code."""
    sizes = [[config.anchor_scale * stride for stride in level] for level in backbone.anchor_strides]
    anchors = DefaultAnchorGenerator(
        sizes=sizes,
        aspect_ratios=[list(config.anchor_ratios)],
        strides=[level.stride for level in backbone.levels],
        offset=0.0,
    )
    return RPN(
        in_features=[level.name for level in backbone.levels],
        head=StandardRPNHead(
            in_channels=config.fpn_channels,
            num_anchors=anchors.num_anchors[0],
            conv_dims=[-1] * config.rpn_convs,
        ),
        anchor_generator=anchors,
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=sampling.rpn_anchors,
        positive_fraction=0.5,
        pre_nms_topk=(sampling.pre_nms_train, sampling.pre_nms_test),
        post_nms_topk=(sampling.proposals, sampling.proposals),
        nms_thresh=0.7,
    )


def pooler(backbone: MAECoreBackbone, cells: int) -> ROIPooler:
    """RoIAlign with half-pixel offsets on the levels that boxes are read from.

    detectron2 wants strides that are powers of 2. Here it counts levels in multiples of the finest stride, so that a
    patch size such as 12 is as good as 16, and each level reads at its own scale.
    """
    levels = backbone.box_levels
    finest = levels[0].stride
    made = ROIPooler(
        output_size=cells,
        scales=[finest / level.stride for level in levels],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
        canonical_box_size=CANONICAL_SIDE * finest / CANONICAL_STRIDE,
        canonical_level=0,
    )
    for level, align in zip(levels, made.level_poolers, strict=True):
        align.spatial_scale = 1.0 / level.stride
    return made


def mask_parts(backbone: MAECoreBackbone, num_classes: int, config: DetectorConfig) -> dict[str, Any]:
    """What ``roi_heads`` takes for a mask head."""
    shape = ShapeSpec(channels=config.fpn_channels, height=MASK_CELLS, width=MASK_CELLS)
    widths = [config.head_channels] * (config.mask_convs + 1)  # the last is the transposed convolution
    norm = NORMS[config.norm] or ""
    return {
        "mask_in_features": [level.name for level in backbone.box_levels],
        "mask_pooler": pooler(backbone, MASK_CELLS),
        "mask_head": MaskRCNNConvUpsampleHead(shape, num_classes=num_classes, conv_dims=widths, conv_norm=norm),
    }


def box_parts(config: DetectorConfig) -> FastRCNNConvFCHead:
    """The hidden layers of a box head."""
    shape = ShapeSpec(channels=config.fpn_channels, height=BOX_CELLS, width=BOX_CELLS)
    convolutions, norm = [config.head_channels] * config.box_convs, NORMS[config.norm] or ""
    return FastRCNNConvFCHead(shape, conv_dims=convolutions, fc_dims=[config.box_features], conv_norm=norm)


def roi_heads(
    backbone: MAECoreBackbone,
    num_classes: int,
    config: DetectorConfig,
    sampling: SamplingConfig,
    test: InferenceConfig,
    **masks: Any,
) -> StandardROIHeads:
    """The box head, or three in a cascade with boxes of no class, and ``masks`` of ``mask_parts``."""

    def predictor(weights: tuple[float, ...], shared: bool) -> FastRCNNOutputLayers:
        return FastRCNNOutputLayers(
            ShapeSpec(channels=config.box_features),
            box2box_transform=Box2BoxTransform(weights=weights),
            num_classes=num_classes,
            cls_agnostic_bbox_reg=shared,
            test_score_thresh=test.score_threshold,
            test_nms_thresh=test.nms_threshold,
            test_topk_per_image=test.detections,
        )

    def matcher(overlap: float) -> Matcher:
        return Matcher([overlap], [0, 1], allow_low_quality_matches=False)

    common = {
        "num_classes": num_classes,
        "batch_size_per_image": sampling.rois,
        "positive_fraction": 0.25,
        "box_in_features": [level.name for level in backbone.box_levels],
        "box_pooler": pooler(backbone, BOX_CELLS),
        **masks,
    }
    if config.cascade:
        return CascadeROIHeads(
            box_heads=[box_parts(config) for _ in CASCADE],
            box_predictors=[predictor(weights, shared=True) for weights in CASCADE.values()],
            proposal_matchers=[matcher(overlap) for overlap in CASCADE],
            **common,
        )
    return StandardROIHeads(
        box_head=box_parts(config),
        box_predictor=predictor(BOX_WEIGHTS, shared=False),
        proposal_matcher=matcher(next(iter(CASCADE))),
        **common,
    )
