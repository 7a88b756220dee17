"""What a contact sheet shows of a COCO data set: images with their boxes and masks."""

from __future__ import annotations

from functools import partial

from PIL import Image

from mae_core.data.contact_sheet import Cell
from mae_core.data.decoding import UnreadableImage, read_image, size_of, to_picture
from mae_core.data.orientation import as_stored, orientation_of
from transfer.detection.coco import CocoImage, CocoSet
from transfer.detection.draw import draw_truth


def cells_of(coco: CocoSet) -> list[Cell]:
    """Every image with its objects, above its name and their number."""
    return [
        Cell((str(image.path),), f"{image.path.name}\n{len(image.instances)} objects", partial(_draw, coco, image))
        for image in coco.images
    ]


def _draw(coco: CocoSet, image: CocoImage) -> Image.Image:
    """An image with its objects. Raises ``UnreadableImage`` where it cannot be read or has another size."""
    pixels = read_image(image.path, None)
    if size_of(pixels) != (image.height, image.width):
        pixels = as_stored(pixels, orientation_of(image.path))
    if size_of(pixels) != (image.height, image.width):
        raise UnreadableImage(image.path, "another size than the json says")
    shapes = all(instance.shape is not None for instance in image.instances)
    return draw_truth(coco.names, image, to_picture(pixels), ("masks", "boxes") if shapes else ("boxes",))
