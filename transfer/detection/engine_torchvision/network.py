"""Mask R-CNN and Faster R-CNN of torchvision's parts on a pyramid backbone.

Where torchvision's own assembly differs from the published detectors, the published form is used: RoIAlign with
half-pixel offsets, L1 box losses, masks in continuous coordinates (detectron2's Mask R-CNN FPN).
"""

from __future__ import annotations

from collections.abc import Sequence
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
from transfer.detection.config import DetectorConfig, InferenceConfig, SamplingConfig
from transfer.detection.engine_torchvision.regions import LevelPool, mask_targets
from transfer.detection.heads import BOX_CELLS, BOX_WEIGHTS, MASK_CELLS
from transfer.detection.samples import Target
from transfer.pyramid import NORMS, PyramidBackbone
from transfer.timm_backbone import Dense


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


class PublishedRoIs(RoIHeads):
    """torchvision's sampling and suppression around the published losses; ``forward`` as torchvision's. Without a mask
    head, boxes alone."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Training: ([], losses). Evaluation: per image boxes (n, 4), scores, labels and, with a mask head, masks
        (n, 28, 28); no losses."""
        if targets is not None:
            return [], self.losses(features, proposals, targets)
        logits, deltas = self._classify(features, proposals)
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        outputs = [dict(zip(("boxes", "scores", "labels"), part, strict=True)) for part in zip(*found, strict=True)]
        if self.has_mask():
            boxes, _, labels = found
            masks = self._segment(features, boxes)
            place = torch.cat(labels)[:, None, None, None].expand(-1, 1, *masks.shape[2:])
            chosen = masks.gather(1, place)[:, 0].sigmoid()
            # A split has its sizes as constants in an exported graph, which is of one image.
            parts = chosen.split([len(b) for b in boxes]) if len(boxes) > 1 else [chosen]
            for output, part in zip(outputs, parts, strict=True):
                output["masks"] = part
        return outputs, {}

    def losses(self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Losses of classes, boxes and, with a mask head, masks over a sample of all images' proposals."""
        proposals, matched, label_parts, delta_parts = self.select_training_samples(proposals, targets)
        logits, deltas = self._classify(features, proposals)
        labels = torch.cat(label_parts)
        positive = torch.where(labels > 0)[0]
        of_class = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
        box_loss = F.l1_loss(of_class, torch.cat(delta_parts)[positive], reduction="sum") / max(len(labels), 1)
        losses = {"class_loss": F.cross_entropy(logits, labels), "box_loss": box_loss}
        if self.has_mask():
            losses["mask_loss"] = self._mask_loss(features, targets, proposals, matched, label_parts)
        return losses

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        targets: list[Target],
        proposals: list[Tensor],
        matched: list[Tensor],
        label_parts: list[Tensor],
    ) -> Tensor:
        """Over the sampled proposals that are objects; zero, with gradients, where none is."""
        inside = [part > 0 for part in label_parts]
        boxes = [b[kept] for b, kept in zip(proposals, inside, strict=True)]
        labels = torch.cat([part[kept] for part, kept in zip(label_parts, inside, strict=True)])
        if not len(labels):
            unused = [*self.mask_head.parameters(), *self.mask_predictor.parameters()]
            return 0.0 * torch.stack([parameter.sum() for parameter in unused]).sum()
        predicted = self._segment(features, boxes)
        truth = torch.cat(
            [
                mask_targets(target["masks"], b, index[kept], predicted.shape[-1])
                for target, b, index, kept in zip(targets, boxes, matched, inside, strict=True)
            ]
        )
        chosen = predicted[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(chosen, truth)

    def _classify(self, features: dict[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))
        return logits.float(), deltas.float()

    def _segment(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()


class CanvasRCNN(nn.Module):
    """Backbone, proposals, heads. Images come standardised and on their canvas; nothing is resized here."""

    def __init__(self, backbone: PyramidBackbone, rpn: RegionProposalNetwork, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    def forward(self, pixels: Tensor, sizes: list[tuple[int, int]], targets: list[Target] | None = None) -> Any:
        """(B, C, H, W) and the (height, width) of each without padding -> losses by name, where ``targets`` are given.

        Else, per image, {boxes (n, 4), scores (n,), labels (n,)}, best first, in canvas pixels, and masks (n, 28, 28)
        where there is a mask head.
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


class ExactAnchors(AnchorGenerator):
    """torchvision's, without its rounding of sides to whole pixels: a ratio stays what it is, as in detectron2."""

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),
    ) -> Tensor:
        """(len(ratios) * len(scales), 4) boxes x1 y1 x2 y2 around the origin, the scales of a ratio together."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half = torch.stack([sides / heights[:, None], sides * heights[:, None]], dim=-1).flatten(0, 1) / 2
        return torch.cat([-half, half], dim=1)


def build_backbone(vit: Dense, config: DetectorConfig) -> PyramidBackbone:
    """The pyramid of the configuration."""
    return PyramidBackbone(vit, kind=config.pyramid, channels=config.fpn_channels, norm=NORMS[config.norm])


def faster_rcnn(
    backbone: PyramidBackbone, num_classes: int, config: DetectorConfig, sampling: SamplingConfig, test: InferenceConfig
) -> CanvasRCNN:
    """Boxes alone."""
    rois = box_heads(backbone, num_classes, config, sampling, test)
    return CanvasRCNN(backbone, proposal_network(backbone, config, sampling), rois)


def mask_rcnn(
    backbone: PyramidBackbone, num_classes: int, config: DetectorConfig, sampling: SamplingConfig, test: InferenceConfig
) -> CanvasRCNN:
    """Boxes and masks, the last layer of masks initialised as detectron2's."""
    network = faster_rcnn(backbone, num_classes, config, sampling, test)
    channels, width, rois = config.fpn_channels, config.head_channels, network.roi_heads
    rois.mask_roi_pool = LevelPool(backbone.box_levels, MASK_CELLS)
    rois.mask_head = MaskRCNNHeads(channels, [width] * config.mask_convs, dilation=1, norm_layer=NORMS[config.norm])
    predictor = MaskRCNNPredictor(width if config.mask_convs else channels, width, num_classes + 1)
    nn.init.normal_(predictor.mask_fcn_logits.weight, std=0.001)
    for layer in (predictor.conv5_mask, predictor.mask_fcn_logits):
        nn.init.zeros_(layer.bias)
    rois.mask_predictor = predictor
    return network


def proposal_network(backbone: PyramidBackbone, config: DetectorConfig, sampling: SamplingConfig) -> ProposalNetwork:
    """The region proposal network on all maps of the pyramid."""
    sides = tuple(tuple(config.anchor_scale * stride for stride in level) for level in backbone.anchor_strides)
    anchors = ExactAnchors(sides, (tuple(config.anchor_ratios),) * len(sides))
    return ProposalNetwork(
        anchors,
        ProposalHead(config.fpn_channels, anchors.num_anchors_per_location()[0], conv_depth=config.rpn_convs),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=sampling.rpn_anchors,
        positive_fraction=0.5,
        pre_nms_top_n={"training": sampling.pre_nms_train, "testing": sampling.pre_nms_test},
        post_nms_top_n={"training": sampling.proposals, "testing": sampling.proposals},
        nms_thresh=0.7,
    )


def box_heads(
    backbone: PyramidBackbone, num_classes: int, config: DetectorConfig, sampling: SamplingConfig, test: InferenceConfig
) -> PublishedRoIs:
    """The box head, initialised as detectron2's: Xavier in its hidden linear layers, 0.01 and 0.001 in its outputs."""
    shape = (config.fpn_channels, BOX_CELLS, BOX_CELLS)
    convolutions = [config.head_channels] * config.box_convs
    head = FastRCNNConvFCHead(shape, convolutions, [config.box_features], norm_layer=NORMS[config.norm])
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    predictor = FastRCNNPredictor(config.box_features, num_classes + 1)
    nn.init.normal_(predictor.cls_score.weight, std=0.01)
    nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    nn.init.zeros_(predictor.cls_score.bias)
    nn.init.zeros_(predictor.bbox_pred.bias)
    return PublishedRoIs(
        LevelPool(backbone.box_levels, BOX_CELLS),
        head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=sampling.rois,
        positive_fraction=0.25,
        bbox_reg_weights=BOX_WEIGHTS,
        score_thresh=test.score_threshold,
        nms_thresh=test.nms_threshold,
        detections_per_img=test.detections,
    )


def adapt_to_images(network: nn.Module, statistics: Statistics, canvas: tuple[int, int]) -> None:
    """Nothing to adapt: images come standardised and on their canvas."""
