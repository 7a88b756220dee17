"""How much of an object's class can be read at its true box: from raw pixels, a random trunk, and a pre-trained one?

    python benchmarks/roi_probe.py runs/demo/data/detection runs/demo/pretrain

Detection gains from pre-training only where the trunk is what a detector lacks. This takes the boxes of a COCO set as
given, reads features there with RoIAlign, and trains the same small classifier on each: its validation accuracy is what
a box head could know. Trunks are frozen; nothing is written.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision.ops import roi_align

from mae_core.data.images import statistics_of
from mae_core.errors import user_errors
from mae_core.training.loop import seed_everything
from mae_core.weights.load import read_encoder
from transfer.backbone import DenseViT
from transfer.detection.coco import CocoSet
from transfer.detection.config import DetectionConfig, DetectionData, DetectorConfig
from transfer.detection.data_sets import read_data
from transfer.detection.engine import trunk_of
from transfer.detection.samples import WholeImages, collate

PIXEL_CELLS, PATCH_CELLS = 14, 5
LABEL_BUDGETS = (100, 300, 1000, None)


def read_boxes(coco: CocoSet, images: WholeImages) -> tuple[Tensor, Tensor, np.ndarray]:
    """A COCO set -> pixels (n, C, H, W), RoIs (m, 5) as image index and x1 y1 x2 y2 of the canvas, labels (m,)."""
    pixels = collate([images[index] for index in range(len(images))]).pixels
    rois, labels = [], []
    for index, record in enumerate(coco.images):
        placement = images.placement(index)
        down, across = placement.height / record.height, placement.width / record.width
        for instance in record.instances:
            x, y, width, height = instance.box
            rois.append([index, x * across, y * down, (x + width) * across, (y + height) * down])
            labels.append(instance.label)
    return pixels, torch.tensor(rois), np.array(labels)


@torch.inference_mode()
def trunk_features(vit: DenseViT, pixels: Tensor, rois: Tensor) -> list[np.ndarray]:
    """Per tap of the trunk, what RoIAlign reads at each box: (m, channels * cells * cells)."""
    batches = [vit(batch) for batch in pixels.split(64)]
    maps = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    scale = 1 / vit.grid.patch
    return [roi_align(x, rois, PATCH_CELLS, scale, aligned=True).flatten(1).numpy() for x in maps]


def accuracies(train: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> list[str]:
    """Validation accuracy in % of a small MLP on the first n boxes, per label budget."""
    found = []
    for budget in LABEL_BUDGETS:
        model = make_pipeline(StandardScaler(), MLPClassifier((192,), alpha=1e-2, max_iter=60, random_state=0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # all get the same number of passes
            model.fit(train[:budget], labels[:budget])
        found.append(f"{100 * model.score(val, val_labels):.1f}")
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="a COCO folder: train/, val/, annotations/instances_{train,val}.json")
    parser.add_argument("weights", type=Path, help="an encoder, or a run that has one")
    given = parser.parse_args()
    with user_errors():
        source = read_encoder(given.weights)
        data = DetectionData(path=given.data, image_size=source.image_size, channels=source.in_chans)
        config = DetectionConfig(weights=given.weights, data=data, model=DetectorConfig(window=None))
        sets = read_data(config)
        pretrained, statistics = trunk_of(config, source).vit, statistics_of(config.data, source.metadata)
        seed_everything(config.seed)
        size = DetectorConfig(size=source.size, patch_size=source.patch_size, window=None)
        scratch = DetectionConfig(from_scratch=True, data=data, model=size)
        trunks = {"random": trunk_of(scratch, None).vit.eval(), "pre-trained": pretrained.eval()}
        train, val = (read_boxes(coco, WholeImages(coco, data, statistics)) for coco in sets)

        totals = [str(min(budget or len(train[2]), len(train[2]))) for budget in LABEL_BUDGETS]
        table = Table(title="accuracy (%) at true boxes, by number of labelled boxes", title_justify="left")
        for column in ("features", *totals):
            table.add_column(column, justify="left" if column == "features" else "right")
        pixels = [
            roi_align(part[0], part[1], PIXEL_CELLS, 1.0, aligned=True).flatten(1).numpy() for part in (train, val)
        ]
        table.add_row("pixels", *accuracies(pixels[0], train[2], pixels[1], val[2]))
        for name, vit in trunks.items():
            taps = zip(vit.taps, trunk_features(vit, *train[:2]), trunk_features(vit, *val[:2]), strict=True)
            for tap, known, asked in taps:
                table.add_row(f"{name}, block {tap}", *accuracies(known, train[2], asked, val[2]))
        Console().print(table)


if __name__ == "__main__":
    main()
