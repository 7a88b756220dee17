"""The robustness sets of the paper (Table 13): which classes count, where their images lie, and how they are scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.errors import UserError

SEVERITIES = range(1, 6)

ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's mean error over the five severities of each corruption of ImageNet-C, as its authors publish it (Hendrycks
and Dietterich, arXiv 1903.12261; github.com/hendrycks/robustness): what corruption errors are divided by."""


class Kind(NamedTuple):
    """A set of images to be measured on."""

    about: str
    has_splits: bool = False
    own_classes_only: bool = False
    corrupted: bool = False
    classes: int | None = None
    test_crop: float | None = None


KINDS = {
    "folder": Kind("class folders, all of the model's classes compete", has_splits=True),
    "imagenet-a": Kind("ImageNet-A: natural adversarial photos, 200 classes", own_classes_only=True, classes=200),
    "imagenet-r": Kind("ImageNet-R: renditions, 200 classes", own_classes_only=True, classes=200),
    "imagenet-sketch": Kind("ImageNet-Sketch: drawings, all 1000 classes", classes=1000),
    "imagenet-c": Kind("ImageNet-C: 15 corruptions at 5 severities", corrupted=True, classes=1000, test_crop=1.0),
}
"""has_splits: val/ is looked at where there is one. own_classes_only: the model chooses among the classes whose folders
are there (the sets of 200 are scored so by their authors), which makes the folders the list of the subset. corrupted:
below <corruption>/<severity>/. classes: how many a complete copy has. test_crop: of images that are cropped already."""


def find_corruptions(root: Path) -> dict[str, Path]:
    """Corruption -> its folder with the severities, directly below ``root`` or in its groups (noise/, blur/, ...).

    Raises ``UserError`` where there is none.
    """
    found: dict[str, Path] = {}
    for name in ALEXNET_ERROR:
        places = [place for place in (root / name, *sorted(root.glob(f"*/{name}"))) if place.is_dir()]
        if places:
            found[name] = places[0]
    if not found:
        there = sorted(path.name for path in root.iterdir())[:5] if root.is_dir() else []
        raise UserError(
            f"{root} holds no corruption of ImageNet-C, such as gaussian_noise/1/<class>/* (it holds "
            f"{', '.join(there) or 'nothing'}); set data.path to the folder of the corruptions"
        )
    return found


def severities_of(corruption: Path) -> list[tuple[int, Path]]:
    """(severity, folder) of those that are there. Raises ``UserError`` where none is."""
    found = [(severity, corruption / str(severity)) for severity in SEVERITIES]
    there = [(severity, folder) for severity, folder in found if folder.is_dir()]
    if not there:
        raise UserError(f"{corruption} has no folder of a severity, 1 to 5; it needs <severity>/<class>/*")
    return there


def corruption_errors(errors: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Error rates (0..1) by corruption and severity -> for metrics.json, in per cent: ``corruption_error`` is the mean
    error over AlexNet's where all five severities are there, ``mCE`` its mean where all fifteen corruptions are;
    ``mCE_of_found`` is the mean over those that are complete."""
    each: dict[str, Any] = {}
    for name, found in errors.items():
        mean = sum(found.values()) / len(found)
        whole = set(found) == set(SEVERITIES)
        each[name] = {
            "error": {str(severity): round(100 * error, 3) for severity, error in sorted(found.items())},
            "mean_error": round(100 * mean, 3),
            "corruption_error": round(100 * mean / ALEXNET_ERROR[name], 3) if whole else None,
        }
    complete = [sum(e.values()) / len(SEVERITIES) / ALEXNET_ERROR[n] for n, e in errors.items() if len(e) == 5]
    of_found = round(100 * sum(complete) / len(complete), 3) if complete else None
    missing = sorted(name for name in ALEXNET_ERROR if len(errors.get(name, {})) < len(SEVERITIES))
    return {
        "mCE": of_found if not missing else None,
        "mCE_of_found": of_found,
        "incomplete_corruptions": missing,
        "corruptions": each,
    }
