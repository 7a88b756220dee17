"""A COCO set in a few lines: how many, how large, and what a run should know of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from transfer.detection.annotations import Category, Instance
from transfer.detection.config import InferenceConfig
from transfer.detection.headers import Header

MOST_DECODED = 1000
"""Files of a set are decoded up to so many; of a larger set the headers are read, and a cut file is not found."""
SMALL, MEDIUM = 32**2, 96**2
"""COCO's limits of areas, in pixels."""


def facts_of(
    path: Path,
    folder: Path,
    images: Mapping[Any, Any],
    instances: Sequence[tuple[Any, Instance]],
    categories: Sequence[Category],
    headers: Sequence[Header],
) -> list[str]:
    """Numbers of images and objects, sizes, and what a run should know."""
    per_image = Counter(image_id for image_id, _ in instances)
    objects = [per_image[identity] for identity in images]
    per_class = Counter(instance.label for _, instance in instances)
    images_of: dict[int, set[Any]] = {}
    for image_id, instance in instances:
        images_of.setdefault(instance.label, set()).add(image_id)
    plural = "" if len(categories) == 1 else "es"
    lines = [
        f"{path}: {len(images)} images, {len(instances)} objects of {len(categories)} class{plural}; files in {folder}"
    ]
    for label, category in enumerate(categories, start=1):
        share = f"{per_class[label]:>8} objects in {len(images_of.get(label, ()))} images"
        lines.append(f"  {category.id:>6}  {category.name:<24}{share if per_class[label] else '   never annotated'}")
    if objects:
        lines.append(
            f"  objects of an image: {min(objects)} to {max(objects)}, median {median(objects):g}; "
            f"{objects.count(0)} images without any; {sum(i.crowd for _, i in instances)} objects are crowds"
        )
    if instances:
        areas = [w * h for _, _, w, h in (instance.box for _, instance in instances)]
        shares = [
            sum(a < SMALL for a in areas),
            sum(SMALL <= a < MEDIUM for a in areas),
            sum(a >= MEDIUM for a in areas),
        ]
        small, medium, large = (f"{share / len(areas):.0%}" for share in shares)
        lines.append(f"  boxes: {small} below 32x32 pixels, {medium} up to 96x96, {large} larger")
    if headers:
        sides = sorted({(header.width, header.height) for header in headers}, key=lambda size: size[0] * size[1])
        (w1, h1), (w2, h2) = sides[0], sides[-1]
        channels = ", ".join(f"{c} in {n} files" for c, n in Counter(h.channels for h in headers).most_common())
        which = f"; {len(headers)} files read, by their headers alone" if len(images) > MOST_DECODED else ""
        lines.append(f"  images: {w1}x{h1} to {w2}x{h2} pixels, channels {channels}{which}")
    return lines + [f"  note: {note}" for note in _notes(objects, per_class, categories, headers)]


def _notes(
    objects: Sequence[int], per_class: Mapping[int, int], categories: Sequence[Category], headers: Sequence[Header]
) -> list[str]:
    """What is no fault, but good to know."""
    notes = []
    ids = [category.id for category in categories]
    gaps = sorted(set(range(min(ids[0], 1), ids[-1] + 1)) - set(ids)) if ids[-1] - ids[0] < 10_000 else []
    if ids != list(range(1, len(ids) + 1)):
        shown = ", ".join(map(str, gaps[:10])) + (", ..." if len(gaps) > 10 else "")
        lacking = f", without {shown}" if gaps else ""
        notes.append(
            f"category ids run from {ids[0]} to {ids[-1]}{lacking}; labels 1 to {len(ids)} follow their order, "
            "predictions carry the ids of the json"
        )
    most = max(objects, default=0)
    kept = InferenceConfig().detections
    if most > kept:
        notes.append(
            f"an image has {most} objects, test.detections={kept} would keep {kept}; set test.detections={most}"
        )
    channels = {header.channels for header in headers}
    if len(channels) == 1 and not channels <= {1, 3, 4}:
        notes.append(f"set data.channels={min(channels)}")
    rare = [category.name for label, category in enumerate(categories, start=1) if not per_class.get(label)]
    if rare:
        notes.append(f"{len(rare)} of {len(categories)} classes are never annotated: {', '.join(rare[:5])}")
    return notes
