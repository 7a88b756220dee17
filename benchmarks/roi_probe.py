"""What can be read of the objects of a COCO set from raw pixels, a random trunk, and a pre-trained one?

    python benchmarks/roi_probe.py runs/demo/data/detection runs/demo/pretrain
    python benchmarks/roi_probe.py nuclei weights/tiny_photos.safetensors --masks --images 24

Detection gains from pre-training only where the trunk is what a detector lacks. Without ``--masks`` the boxes are
given: features are read there with RoIAlign, and the validation accuracy of the same small classifier on each is what a
box head could know of the class. With it a ridge regression reads from each patch which of its pixels are an object's,
and which its edge: what a mask head could know. Trunks are frozen; nothing is written.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.ops import roi_align

from mae_core.data.images import ImageFiles, Statistics, statistics_of
from mae_core.data.statistics import measure_statistics
from mae_core.errors import user_errors
from mae_core.patches import patchify
from mae_core.training.loop import seed_everything
from mae_core.weights.load import read_encoder
from transfer.backbone import DenseViT
from transfer.detection.config import DetectionConfig, DetectionData, DetectorConfig
from transfer.detection.data_sets import read_data
from transfer.detection.engine import trunk_of
from transfer.detection.samples import WholeImages, collate, target_on

PIXEL_CELLS, PATCH_CELLS = 14, 5
LABEL_BUDGETS = (100, 300, 1000, None)
CELL = 4
"""Pixels of the side of a cell of a patch, of which the share that is an object's is read."""


def pixels_of(images: WholeImages) -> Tensor:
    """All of them, (n, C, H, W)."""
    return collate([images[index] for index in range(len(images))]).pixels


def read_boxes(images: WholeImages) -> tuple[Tensor, np.ndarray]:
    """RoIs (m, 5) as image index and x1 y1 x2 y2 of the canvas, and labels (m,), of a COCO set."""
    rois, labels = [], []
    coco = images.coco
    for index, record in enumerate(coco.images):
        placement = images.placement(index)
        down, across = placement.height / record.height, placement.width / record.width
        for instance in record.instances:
            x, y, width, height = instance.box
            rois.append([index, x * across, y * down, (x + width) * across, (y + height) * down])
            labels.append(instance.label)
    return torch.tensor(rois), np.array(labels)


def read_masks(images: WholeImages, patch: int) -> np.ndarray:
    """For each patch of each image, the shares of its cells that are objects, and that are their edges: (n * patches,
    2 * cells)."""
    shares = []
    for index, record in enumerate(images.coco.images):
        masks = target_on(record, images.placement(index))["masks"].float()
        inside = -torch.nn.functional.max_pool2d(-masks, 3, stride=1, padding=1)  # eroded by a pixel
        maps = torch.stack([masks.amax(dim=0), (masks - inside).amax(dim=0)])
        shares.append(patchify(avg_pool2d(maps, CELL)[None], patch // CELL)[0])
    return torch.cat(shares).numpy()


@torch.inference_mode()
def trunk_maps(vit: DenseViT, images: WholeImages, statistics: Statistics) -> list[Tensor]:
    """Per tap of the trunk its map of every image, (n, D, rows, cols)."""
    batches = [vit(batch) for batch in pixels_of(images.with_statistics(statistics)).split(64)]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def at_boxes(rois: Tensor, cells: int, scale: float, maps: Tensor) -> np.ndarray:
    """What RoIAlign reads at each box: (m, channels * cells * cells)."""
    return roi_align(maps, rois, cells, scale, aligned=True).flatten(1).numpy()


def at_patches(maps: Tensor) -> np.ndarray:
    """(n, D, rows, cols) -> (n * rows * cols, D)."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1).numpy()


def shares_read(train: np.ndarray, truth: np.ndarray, val: np.ndarray, val_truth: np.ndarray) -> list[str]:
    """The share of the variance on the validation set that a ridge regression explains, in %: of objects, of edges."""
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13))).fit(train, truth)
    halves = (np.split(values, 2, axis=1) for values in (val_truth, model.predict(val)))
    return [f"{100 * r2_score(true, found):.1f}" for true, found in zip(*halves, strict=True)]


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
    parser.add_argument("--masks", action="store_true", help="read masks from patches, not classes at true boxes")
    parser.add_argument("--images", type=int, help="of the training set, drawn from seed 0; all when left out")
    parser.add_argument("--image-size", type=int, help="side of the images; the encoder's when left out")
    given = parser.parse_args()
    with user_errors():
        source = read_encoder(given.weights)
        size = source.image_size if given.image_size is None else given.image_size
        data = DetectionData(path=given.data, image_size=size, channels=source.in_chans)
        config = DetectionConfig(weights=given.weights, data=data, model=DetectorConfig(window=None))
        train_set, val_set = read_data(config)
        if given.images is not None:
            order = torch.randperm(len(train_set.images), generator=torch.Generator().manual_seed(0)).tolist()
            train_set = replace(train_set, images=tuple(train_set.images[index] for index in order[: given.images]))
        own = measure_statistics(ImageFiles([image.path for image in train_set.images], data.reading)).statistics
        vit, stated = trunk_of(config, source).vit.eval(), statistics_of(config.data, source.metadata)
        seed_everything(config.seed)
        model = DetectorConfig(size=source.size, patch_size=source.patch_size, window=None)
        scratch = DetectionConfig(from_scratch=True, data=data, model=model)
        trunks = {"random": (trunk_of(scratch, None).vit.eval(), own), "pre-trained": (vit, stated)}
        sets = [WholeImages(coco, data, own) for coco in (train_set, val_set)]
        if given.masks:
            truths = [read_masks(images, source.patch_size) for images in sets]
            title, columns, score = "variance explained (%)", ["objects", "edges"], shares_read
            features: list[Callable[[Tensor], np.ndarray]] = [at_patches, at_patches]
            pixels = [patchify(pixels_of(images), source.patch_size).flatten(0, 1).numpy() for images in sets]
        else:
            boxes = [read_boxes(images) for images in sets]
            truths = [labels for _, labels in boxes]
            title, score = "accuracy (%) at true boxes, by number of labelled boxes", accuracies
            columns = [str(min(budget or len(truths[0]), len(truths[0]))) for budget in LABEL_BUDGETS]
            features = [partial(at_boxes, rois, PATCH_CELLS, 1 / source.patch_size) for rois, _ in boxes]
            pixels = [
                at_boxes(rois, PIXEL_CELLS, 1.0, pixels_of(images))
                for (rois, _), images in zip(boxes, sets, strict=True)
            ]

        table = Table(title=title, title_justify="left")
        for column in ("features", *columns):
            table.add_column(column, justify="left" if column == "features" else "right")
        table.add_row("pixels", *score(pixels[0], truths[0], pixels[1], truths[1]))
        for name, (trunk, statistics) in trunks.items():
            known, asked = (trunk_maps(trunk, images, statistics) for images in sets)
            for tap, one, other in zip(trunk.taps, known, asked, strict=True):
                row = score(features[0](one), truths[0], features[1](other), truths[1])
                table.add_row(f"{name}, block {tap}", *row)
        Console().print(table)


if __name__ == "__main__":
    main()
