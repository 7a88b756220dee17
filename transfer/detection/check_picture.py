"""The contact sheet of a check: images with their boxes and masks, those with faults first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mae_core.atomic import atomic_path
from mae_core.data.check import Problem
from mae_core.data.contact_sheet import MOST, SIDE, contact_sheet, thumbnail
from mae_core.data.decoding import UnreadableImage, read_image, size_of, to_picture
from mae_core.data.images import spread_indices
from mae_core.data.orientation import as_stored, orientation_of
from mae_core.errors import UserError
from transfer.detection.coco import CocoImage, CocoSet
from transfer.detection.draw import draw_truth

MISSING = (200, 60, 60)


def draw_sheet(path: Path, checked: Sequence[tuple[CocoSet, Sequence[Problem]]]) -> str:
    """Write up to ``MOST`` images of the sets of a check into the picture ``path``: first those that a problem names,
    then others spread over the set -> a sentence about it. Raises ``UserError`` where the file exists."""
    if path.exists():
        raise UserError(f"{path} exists; choose another file with --picture")
    odd: list[tuple[CocoSet, CocoImage]] = []
    sound: list[tuple[CocoSet, CocoImage]] = []
    for coco, problems in checked:
        wrong = [problem for problem in problems if problem.severity != "note"]
        for image in coco.images:
            named = any(_is_about(problem, image) for problem in wrong)
            (odd if named else sound).append((coco, image))
    shown = odd[:MOST]
    shown += [sound[place] for place in spread_indices(len(sound), MOST - len(shown))]
    if not shown:
        raise UserError(f"there is no image to draw into {path}; leave --picture out")
    pictures, captions = zip(*(_cell(coco, image, (coco, image) in odd[:MOST]) for coco, image in shown), strict=True)
    with atomic_path(path) as temporary:
        contact_sheet(pictures, captions).save(temporary, format="PNG")
    total = len(odd) + len(sound)
    return f"drew {len(shown)} of {total} images into {path}, {min(len(odd), MOST)} with faults first"


def _is_about(problem: Problem, image: CocoImage) -> bool:
    """Whether a problem names an image: its file, or its id."""
    if problem.path == str(image.path):
        return True
    return f"of image {image.id} " in problem.sentence or f"image id {image.id}," in problem.sentence


def _cell(coco: CocoSet, image: CocoImage, odd: bool) -> tuple[Image.Image, str]:
    """An image with its objects, and its name below; a plain colour where it cannot be read or has another size."""
    caption = f"{'! ' * odd}{image.path.name}\n{len(image.instances)} objects"
    try:
        pixels = read_image(image.path, None)
        if size_of(pixels) != (image.height, image.width):
            pixels = as_stored(pixels, orientation_of(image.path))
        if size_of(pixels) != (image.height, image.width):
            raise UnreadableImage(image.path, "another size than the json says")
    except UnreadableImage as error:
        return Image.new("RGB", (SIDE, SIDE), MISSING), f"! {image.path.name}\n{error.unreadable.reason}"
    shapes = all(instance.shape is not None for instance in image.instances)
    drawn = draw_truth(coco.names, image, to_picture(pixels), ("masks", "boxes") if shapes else ("boxes",))
    return thumbnail(drawn), caption
