"""The data set and the readers that are registered with mmseg: folders of label maps, bad files named."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS

from mae_core.errors import UserError, first_line
from transfer.segmentation.config import LABEL_READERS, READERS, sections
from transfer.segmentation.drawing import palette
from transfer.segmentation.label_maps import IGNORED, pair_files, read_classes


@DATASETS.register_module()
class LabelledFolder(BaseSegDataset):
    """Images of any format with label maps of the same relative name; class names from a file.

    classes_file  ``value<TAB>name`` a line, relative to ``data_root``; or give ``metainfo=dict(classes=...)``
    num_classes   names the classes after their values ("class 1") where there is no such file
    on_error      what `train` does about unreadable images: skip or raise
    """

    def __init__(
        self,
        *,
        classes_file: str | None = "classes.txt",
        num_classes: int | None = None,
        on_error: str = "skip",
        metainfo: dict | None = None,
        **options: Any,
    ) -> None:
        self.on_error = on_error
        if classes_file is not None and not (metainfo or {}).get("classes"):
            path = Path(options.get("data_root") or "", classes_file)
            reduce_zero_label = options.get("reduce_zero_label", False)
            if num_classes is None or path.is_file():
                classes = read_classes(path, reduce_zero_label=reduce_zero_label)
            else:
                first = 1 if reduce_zero_label else 0
                classes = [f"class {value}" for value in range(first, first + num_classes)]
            metainfo = {**(metainfo or {}), "classes": classes, "palette": palette(len(classes))}
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
    """mmcv's image reader; a file that it cannot read is named and left out (``on_error="skip"``, in training), or
    raises a ``UserError``."""

    def __init__(self, *, on_error: str = "raise", **options: Any) -> None:
        super().__init__(**options)
        self.on_error = on_error
        self.skipped: set[str] = set()

    def transform(self, results: dict) -> dict | None:
        """As mmcv's; None makes the data set draw another image."""
        path = results["img_path"]
        try:
            return super().transform(results)
        except Exception as error:
            if self.on_error == "raise":
                raise UserError(f"image {path} cannot be read ({first_line(error)}); mend or remove it") from None
            if path not in self.skipped:
                self.skipped.add(path)
                number = len(self.skipped)
                print(f"image {path} cannot be read and is skipped; {number} so far in this process", flush=True)
            return None


@TRANSFORMS.register_module()
class NamedLabels(LoadAnnotations):
    """mmseg's label map reader; a map that would break the training raises a ``UserError`` with its name."""

    def __init__(self, *, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = num_classes

    def _load_seg_map(self, results: dict) -> None:
        path = results["seg_map_path"]
        try:
            super()._load_seg_map(results)
        except Exception as error:
            raise UserError(
                f"label map {path} cannot be read ({first_line(error)}); replace it or take it out"
            ) from None
        labels = results["gt_seg_map"]
        size = tuple(results.get("ori_shape", labels.shape))
        if labels.shape != size:
            raise UserError(f"label map {path} has the shape {labels.shape}, and its image {size}; correct the map")
        wrong = labels[(labels >= self.num_classes) & (labels != IGNORED)]
        if wrong.size:
            value = int(wrong[0]) + bool(results.get("reduce_zero_label"))
            raise UserError(
                f"label map {path} holds the value {value}, which is none of the {self.num_classes} classes; "
                "correct the map, num_classes or reduce_zero_label"
            )


def name_bad_files(section: MutableMapping[str, Any], num_classes: int, on_error: str) -> None:
    """Put readers that name a bad file into a pipeline: the check before the training is a sample of large folders."""
    for step in sections(section.get("pipeline", [])):
        if step.get("type") in READERS:
            step.update(type="NamedImage", on_error=on_error)
        elif step.get("type") in LABEL_READERS:
            step.update(type="NamedLabels", num_classes=num_classes)
