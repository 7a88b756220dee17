"""Mask R-CNN of torchvision's parts on a pyramid backbone. The only file that imports ``torchvision.models.detection``.

Where torchvision's own assembly differs from the published detectors, the published form is used: RoIAlign with
half-pixel offsets, L1 box losses, masks in continuous coordinates (detectron2's Mask R-CNN FPN).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from mae_core.data.images import Statistics
from transfer.backbone import DenseViT
from transfer.detection.config import DetectorConfig, InferenceConfig, SamplingConfig
from transfer.detection.core_loop import detect, fit_in_core_loop, score_by_detecting
from transfer.detection.job import DetectorEngine
from transfer.detection.rois import LevelPool, mask_targets
from transfer.detection.samples import Target
from transfer.pyramid import NORMS, PyramidBackbone

BOX_CELLS, MASK_CELLS = 7, 14
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class ProposalHead(RPNHead):
    """torchvision's, with outputs in float32: bfloat16 cannot tell neighbouring pixels apart."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps -> objectness logits and box deltas, per level."""
        logits, deltas = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, with an L1 box loss, normalised by the number of sampled anchors."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses (class, box) over a sample of all images' anchors."""
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        sampled = positive | negative
        number = sampled.sum().clamp(min=1)
        classes = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        boxes = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return classes / number, boxes / number


class MaskRCNNRoIs(RoIHeads):
    """torchvision's sampling and suppression around the published losses; ``forward`` as torchvision's."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Training: ([], losses). Evaluation: per image boxes (n, 4), scores, labels, masks (n, 28, 28); no losses."""
        if targets is not None:
            return [], self.losses(features, proposals, targets)
        logits, deltas = self._classify(features, proposals)
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        boxes, _, labels = found
        counts = [len(b) for b in boxes]
        masks = self._segment(features, boxes)
        chosen = masks[torch.arange(len(masks), device=masks.device), torch.cat(labels)].sigmoid()
        parts = zip(*found, chosen.split(counts), strict=True)
        return [dict(zip(("boxes", "scores", "labels", "masks"), part, strict=True)) for part in parts], {}

    def losses(self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Losses of classes, boxes and masks over a sample of all images' proposals."""
        proposals, matched, label_parts, delta_parts = self.select_training_samples(proposals, targets)
        logits, deltas = self._classify(features, proposals)
        labels = torch.cat(label_parts)
        positive = torch.where(labels > 0)[0]
        of_class = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
        box_loss = F.l1_loss(of_class, torch.cat(delta_parts)[positive], reduction="sum") / max(len(labels), 1)
        losses = {"class_loss": F.cross_entropy(logits, labels), "box_loss": box_loss}

        inside = [part > 0 for part in label_parts]
        boxes = [b[kept] for b, kept in zip(proposals, inside, strict=True)]
        if not len(positive):
            unused = [*self.mask_head.parameters(), *self.mask_predictor.parameters()]
            losses["mask_loss"] = 0.0 * torch.stack([parameter.sum() for parameter in unused]).sum()
            return losses
        predicted = self._segment(features, boxes)
        truth = torch.cat(
            [
                mask_targets(target["masks"], b, index[kept], predicted.shape[-1])
                for target, b, index, kept in zip(targets, boxes, matched, inside, strict=True)
            ]
        )
        chosen = predicted[torch.arange(len(positive), device=labels.device), labels[positive]]
        losses["mask_loss"] = F.binary_cross_entropy_with_logits(chosen, truth)
        return losses

    def _classify(self, features: dict[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))
        return logits.float(), deltas.float()

    def _segment(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()


class MaskRCNN(nn.Module):
    """Backbone, proposals, heads. Images come standardised and on their canvas; nothing is resized here."""

    def __init__(self, backbone: PyramidBackbone, rpn: RegionProposalNetwork, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    def forward(self, pixels: Tensor, sizes: list[tuple[int, int]], targets: list[Target] | None = None) -> Any:
        """(B, C, H, W) and the (height, width) of each without padding -> losses by name, where ``targets`` are given.

        Else, per image, {boxes (n, 4), scores (n,), labels (n,), masks (n, 28, 28)}, best first, in canvas pixels.
        """
        whole = self.backbone.levels[-1].stride
        H, W = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -W % whole, 0, -H % whole))
        features = {name: x.float() for name, x in self.backbone(pixels).items()}
        proposals, losses = self.rpn(ImageList(pixels, sizes), features, targets)
        found, more = self.roi_heads(features, proposals, sizes, targets)
        if targets is None:
            return found
        proposal_losses = {
            "proposal_class_loss": losses["loss_objectness"],
            "proposal_box_loss": losses["loss_rpn_box_reg"],
        }
        return {**proposal_losses, **more}


def build_mask_rcnn(
    vit: DenseViT, num_classes: int, config: DetectorConfig, sampling: SamplingConfig, test: InferenceConfig
) -> MaskRCNN:
    """A Mask R-CNN on ``vit`` for ``num_classes`` classes, background not counted."""
    norm = NORMS[config.norm]
    channels = config.fpn_channels
    backbone = PyramidBackbone(vit, kind=config.pyramid, channels=channels, norm=norm)
    sides = tuple(tuple(config.anchor_scale * stride for stride in level) for level in backbone.anchor_strides)
    anchors = AnchorGenerator(sides, (tuple(config.anchor_ratios),) * len(sides))
    rpn = ProposalNetwork(
        anchors,
        ProposalHead(channels, anchors.num_anchors_per_location()[0], conv_depth=config.rpn_convs),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=sampling.rpn_anchors,
        positive_fraction=0.5,
        pre_nms_top_n={"training": sampling.pre_nms_train, "testing": sampling.pre_nms_test},
        post_nms_top_n={"training": sampling.proposals, "testing": sampling.proposals},
        nms_thresh=0.7,
    )
    width = config.head_channels
    box_head = FastRCNNConvFCHead(
        (channels, BOX_CELLS, BOX_CELLS), [width] * config.box_convs, [config.box_features], norm_layer=norm
    )
    box_predictor = FastRCNNPredictor(config.box_features, num_classes + 1)
    nn.init.normal_(box_predictor.cls_score.weight, std=0.01)
    nn.init.normal_(box_predictor.bbox_pred.weight, std=0.001)
    nn.init.zeros_(box_predictor.cls_score.bias)
    nn.init.zeros_(box_predictor.bbox_pred.bias)
    mask_head = MaskRCNNHeads(channels, [width] * config.mask_convs, dilation=1, norm_layer=norm)
    rois = MaskRCNNRoIs(
        LevelPool(backbone.box_levels, BOX_CELLS),
        box_head,
        box_predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=sampling.rois,
        positive_fraction=0.25,
        bbox_reg_weights=BOX_WEIGHTS,
        score_thresh=test.score_threshold,
        nms_thresh=test.nms_threshold,
        detections_per_img=test.detections,
        mask_roi_pool=LevelPool(backbone.box_levels, MASK_CELLS),
        mask_head=mask_head,
        mask_predictor=MaskRCNNPredictor(width if config.mask_convs else channels, width, num_classes + 1),
    )
    return MaskRCNN(backbone, rpn, rois)


def knows_its_images(network: nn.Module, statistics: Statistics, canvas: tuple[int, int]) -> None:
    """Images come standardised and on their canvas: there is nothing to know."""


ENGINE = DetectorEngine(build_mask_rcnn, knows_its_images, fit_in_core_loop, detect, score_by_detecting)
