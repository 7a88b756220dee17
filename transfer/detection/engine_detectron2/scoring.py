"""detectron2's inference and its COCO evaluator, and the toolkit's own scores of the same detections."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from detectron2.structures import Instances
from torch import nn

from mae_core.atomic import write_text
from mae_core.data.config import Workers
from mae_core.data.images import Unreadable
from mae_core.training import distributed
from mae_core.training.run import Run
from transfer.detection.config import DetectionConfig
from transfer.detection.engine_detectron2.network import BRIGHTEST
from transfer.detection.engine_detectron2.training import plain_pixels
from transfer.detection.heads import HEADS, Detections
from transfer.detection.masks import encode_masks
from transfer.detection.results import write_results
from transfer.detection.samples import WholeImages, collate_readable

EVALUATION = "evaluation"
"""Folder of a run for the files of detectron2's evaluator."""


class WholeRecords:
    """Batches of records of whole images, this rank's share, for inference; unreadable images are left out."""

    def __init__(
        self, images: WholeImages, run: Run, indices: Sequence[int], batch_size: int, workers: Workers
    ) -> None:
        plain = images.with_statistics(plain_pixels(len(images.statistics.mean)))
        self.loader = run.loader(plain, collate_readable, batch_size, workers=workers, indices=indices)
        self.coco = images.coco
        self.unreadable: list[Unreadable] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            self.unreadable += batch.unreadable
            found = []
            for pixels, (rows, cols), index in zip(batch.pixels, batch.sizes, batch.indices, strict=True):
                record = self.coco.images[index]
                found.append(
                    {
                        "image": BRIGHTEST * pixels[:, :rows, :cols],
                        "height": record.height,
                        "width": record.width,
                        "image_id": record.id,
                        "index": index,
                    }
                )
            if found:
                yield found


class Collector(DatasetEvaluator):
    """Keeps the detections of all images as the toolkit's own."""

    def __init__(self) -> None:
        self.found: list[Detections] = []

    def reset(self) -> None:
        """Forget everything."""
        self.found = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the outputs of a batch."""
        self.found += [
            detections_of(output["instances"], record["index"]) for record, output in zip(inputs, outputs, strict=True)
        ]


def detections_of(instances: Instances, index: int) -> Detections:
    """detectron2's instances, in original pixels, as ours; labels count from 1."""
    instances = instances.to("cpu")
    codes = None
    if instances.has("pred_masks"):
        masks = instances.pred_masks
        codes = encode_masks(masks.numpy()) if len(masks) else []
    return Detections(index, instances.pred_boxes.tensor, instances.scores, instances.pred_classes + 1, codes)


def detect(
    model: nn.Module, images: WholeImages, run: Run, indices: Sequence[int], *, batch_size: int, workers: Workers
) -> tuple[list[Detections], list[Unreadable]]:
    """What ``model`` finds in the images of ``indices``, in original pixels, and the images that could not be read."""
    return _infer(model, WholeRecords(images, run, indices, batch_size, workers), run, [])[:2]


def _infer(
    model: nn.Module, loader: WholeRecords, run: Run, more: list[DatasetEvaluator]
) -> tuple[list[Detections], list[Unreadable], dict[str, Any]]:
    """detectron2's inference -> detections of all ranks in order, unreadable images, what the evaluators found."""
    collector = Collector()
    with run.autocast():
        results = inference_on_dataset(model, loader, DatasetEvaluators([collector, *more]))
    parts = distributed.gather((collector.found, loader.unreadable))
    found = sorted((entry for part in parts for entry in part[0]), key=lambda detections: detections.image_index)
    return found, [entry for part in parts for entry in part[1]], results or {}


def score(
    model: nn.Module, images: WholeImages, run: Run, config: DetectionConfig, more: dict[str, Any]
) -> dict[str, Any]:
    """Score with detectron2's evaluator and with the toolkit's; metrics.json, on rank 0, holds both."""
    run.say(f"evaluating on {len(images)} images")
    folder = run.folder / EVALUATION
    if run.is_main:
        folder.mkdir(exist_ok=True)
        write_text(folder / "truth.json", json.dumps(images.coco.truth(), default=bytes.decode))
    distributed.barrier()
    name = f"mae_core_{uuid.uuid4().hex}"
    categories = images.coco.categories
    MetadataCatalog.get(name).set(
        json_file=str(folder / "truth.json"),
        thing_classes=[category.name for category in categories],
        thing_dataset_id_to_contiguous_id={category.id: number for number, category in enumerate(categories)},
    )
    most, kinds = config.test.detections, tuple(HEADS[config.model.head].metrics)
    evaluator = COCOEvaluator(name, kinds, output_dir=str(folder), max_dets_per_image=most, use_fast_impl=False)
    loader = WholeRecords(images, run, range(len(images)), config.test.test_batch, config.data.workers)
    found, unreadable, results = _infer(model, loader, run, [evaluator])
    MetadataCatalog.remove(name)
    return write_results(images, found, unreadable, run, config, {**more, "detectron2": as_json(results)})


def as_json(results: dict[str, Any]) -> dict[str, Any]:
    """detectron2's results, in percent, with None for what is not a number."""
    return {
        kind: {name: value if value == value else None for name, value in values.items()}
        for kind, values in results.items()
    }
