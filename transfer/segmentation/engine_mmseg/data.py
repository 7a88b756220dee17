"""The data set and the readers that are registered with mmseg: folders of label maps, bad files named."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations, PhotoMetricDistortion
from mmseg.models import SegDataPreProcessor
from mmseg.registry import DATASETS, MODELS, TRANSFORMS

from mae_core.data.decoding import LARGEST_PIXEL, TOO_LARGE, UnreadableImage
from mae_core.errors import UserError
from transfer.segmentation.config import LABEL_READERS, READERS, sections
from transfer.segmentation.drawing import palette
from transfer.segmentation.label_coding import LabelCoding
from transfer.segmentation.label_maps import pair_files, read_classes, read_label_map
from transfer.segmentation.pixels import as_mmseg_reads, read_pixels


@DATASETS.register_module()
class LabelledFolder(BaseSegDataset):
    """Images of any format with label maps of the same relative name; class names from a file.

    classes_file    ``value<TAB>name`` a line, relative to ``data_root``; or give ``metainfo=dict(classes=...)``
    num_classes     names the classes after their values ("class 1") where there is no such file
    on_error        what `train` does about unreadable images: skip or raise
    label_values, ignored_values  what the values of the maps mean, see ``LabelCoding.of``
    """

    def __init__(
        self,
        *,
        classes_file: str | None = "classes.txt",
        num_classes: int | None = None,
        on_error: str = "skip",
        label_values: Sequence[int | Sequence[int]] | None = None,
        ignored_values: int | Sequence[int] | None = None,
        metainfo: dict | None = None,
        **options: Any,
    ) -> None:
        self.on_error = on_error
        meaning: dict[str, Any] = {"label_values": label_values, "ignored_values": ignored_values}
        reduced = bool(options.get("reduce_zero_label", False))
        classes = (metainfo or {}).get("classes")
        path = Path(options.get("data_root") or "", classes_file or "")
        if classes_file is not None and not classes and (num_classes is None or path.is_file()):
            values = None
            if label_values is not None:
                values = LabelCoding.of(num_classes or len(label_values), reduce_zero_label=reduced, **meaning).values
            classes = read_classes(path, values, reduce_zero_label=reduced)
        if classes or num_classes:
            number = len(classes) if classes else num_classes or 0
            self.coding = LabelCoding.of(number, reduce_zero_label=reduced, **meaning)
            classes = classes or [f"class {value}" for value in self.coding.values]
            metainfo = {"palette": palette(number), **(metainfo or {}), "classes": classes}
            read_by_name(options.get("pipeline", []), self.coding)
        super().__init__(metainfo=metainfo, **options)

    def load_data_list(self) -> list[dict]:
        """A record per image, as mmseg's pipelines expect it."""
        folders = self.data_prefix["img_path"], self.data_prefix["seg_map_path"]
        shared = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        return [
            {"img_path": str(image), "seg_map_path": str(label_map), "seg_fields": [], **shared}
            for image, label_map in pair_files(*folders, map_suffix=self.seg_map_suffix)
        ]


@TRANSFORMS.register_module()
class NamedImage(LoadImageFromFile):
    """The image reader in the place of mmcv's: that of the pre-training, in the encoder's ``channels``.

    A file that it cannot read is named and left out (``on_error="skip"``, in training), or raises a ``UserError``; one
    with other channels raises it in any case. ``no_data``: the value per channel of pixels without data; ``largest``:
    the size of a value from which on it is too large to compute with.
    """

    def __init__(
        self,
        *,
        on_error: str = "raise",
        channels: int = 3,
        no_data: Sequence[float] | None = None,
        largest: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.no_data, self.largest = no_data, largest
        self.on_error = on_error
        self.channels = channels
        self.skipped: set[str] = set()

    def transform(self, results: dict) -> dict | None:
        """As mmcv's; None makes the data set draw another image."""
        path = results["img_path"]
        try:
            pixels = results.get("pixels")  # of an image in memory
            pixels = read_pixels(path, self.channels) if pixels is None else pixels
            image = as_mmseg_reads(pixels, self.no_data)
            if self.largest and (found := np.abs(image).max()) > self.largest:
                raise UnreadableImage(path, TOO_LARGE.format(LARGEST_PIXEL * found / self.largest))
        except UnreadableImage as error:
            reason = error.unreadable.reason
            if self.on_error == "raise":
                raise UserError(f"image {path} cannot be read ({reason}); repair or remove it") from None
            if path not in self.skipped:
                self.skipped.add(path)
                number = len(self.skipped)
                print(f"image {path} cannot be read and is skipped; {number} so far in this process", flush=True)
            return None
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


@TRANSFORMS.register_module()
class NamedLabels(LoadAnnotations):
    """The label map reader in the place of mmseg's, which cuts every value to 8 bits. A map that would break the
    training raises a ``UserError`` with its name.

    num_classes, label_values, ignored_values  see ``LabelCoding.of``
    """

    def __init__(
        self,
        *,
        num_classes: int,
        label_values: Sequence[int | Sequence[int]] | None = None,
        ignored_values: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.meaning: dict[str, Any] = {
            "num_classes": num_classes,
            "label_values": label_values,
            "ignored_values": ignored_values,
        }
        self.coding: LabelCoding | None = None

    def _load_seg_map(self, results: dict) -> None:
        path = Path(results["seg_map_path"])
        if self.coding is None:
            reduced = self.reduce_zero_label
            reduced = results.get("reduce_zero_label", False) if reduced is None else reduced
            self.coding = LabelCoding.of(**self.meaning, reduce_zero_label=bool(reduced))
        classes = self.coding.encode(read_label_map(path).values, path)
        size = tuple(results.get("ori_shape", classes.shape))
        if classes.shape != size:
            raise UserError(f"label map {path} has the shape {classes.shape}, but its image {size}; correct the map")
        if results.get("label_map"):  # mmseg's: classes of the data set -> those of the configuration
            renumbered = classes.copy()
            for old, new in results["label_map"].items():
                renumbered[classes == old] = self.coding.ignore_index if new == 255 else new
            classes = renumbered
        results["gt_seg_map"] = classes
        results["seg_fields"].append("gt_seg_map")


@TRANSFORMS.register_module()
class EightBitDistortion(PhotoMetricDistortion):
    """mmseg's colour distortion, which rounds to 8 bits, for images of 8 bits alone; others pass unchanged."""

    told = False

    def transform(self, results: dict) -> dict:
        """As mmseg's."""
        if results["img"].dtype == np.uint8:
            return super().transform(results)
        if not self.told:
            self.told = True
            print(f"colour distortion is left out for images of more than 8 bits, such as {results['img_path']}")
        return results


@MODELS.register_module()
class ManyChannelPreProcessor(SegDataPreProcessor):
    """mmseg's preprocessor for images that are neither grey nor RGB, whose mean and std mmengine refuses."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], **options: Any) -> None:
        super().__init__(**options)
        self._enable_normalize = True
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)


def read_by_name(pipeline: Any, coding: LabelCoding, on_error: str | None = None, channels: int | None = None) -> None:
    """Put the readers above into a pipeline, in the place of mmseg's; what is None stays as it is."""
    image = {"on_error": on_error, "channels": channels}
    for step in sections(pipeline):
        if step.get("type") in READERS:
            step.update({"type": "NamedImage", **{key: value for key, value in image.items() if value is not None}})
        elif step.get("type") in LABEL_READERS:
            step.update({"type": "NamedLabels", "num_classes": coding.num_classes})
            if coding.written:
                classes = [list(values) if len(values) > 1 else values[0] for values in coding.classes]
                step.update(label_values=None if coding.reduced else classes, ignored_values=sorted(coding.ignored))
        elif step.get("type") == "PhotoMetricDistortion":
            step["type"] = "EightBitDistortion"


def name_bad_files(section: MutableMapping[str, Any], coding: LabelCoding, on_error: str, channels: int) -> None:
    """Put readers that name a bad file into the pipeline of a data set: the check before the training is a sample of
    large folders."""
    read_by_name(section.get("pipeline", []), coding, on_error, channels)
