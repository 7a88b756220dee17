"""Find what is wrong with a COCO data set, in seconds: nothing is trained, nothing is written.

    mae check coco DATA                                (train/, val/ and annotations/instances_{train,val}.json)
    mae check coco DATA/annotations/instances_train.json [DATA/train]

Reads the json with the function that training reads it with, and goes on where training would stop at the first fault.
Exit code 2 where training would refuse to start, leave images out, or learn or score the wrong thing. Gaps in the
category ids, classes without objects and photos with an orientation tag are notes: training accepts them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from mae_core.data.check import Compared, Problem, Report, Tell, compare, conclude, turned_photos
from mae_core.data.decoding import UnreadableImage, read_image
from mae_core.data.near_copies import fingerprints_of
from mae_core.errors import UserError, user_errors
from transfer.detection.annotations import Instance
from transfer.detection.check_picture import cells_of
from transfer.detection.coco import CocoImage, CocoSet, Part, check_same_categories, read_coco
from transfer.detection.config import InferenceConfig
from transfer.detection.data_sets import HALVES, half_in, images_beside
from transfer.detection.headers import Header, header_of, header_of_pixels
from transfer.detection.masks import encode_shape, mask_coder
from transfer.detection.samples import check_size

Box = tuple[float, float, float, float]

MOST_DECODED = 1000
"""Files of a set are decoded up to so many; of a larger set the headers are read, and a cut file is not found."""
MOST_HEADERS = 20_000
"""Files that are looked into; of a larger set every n-th."""
SLACK = 2.0
"""Pixels by which a box may reach over the edge, or a mask out of its box: tools round differently."""
TIMES_THE_MASK = 2.0
"""A box of more than so many times the area of its mask's box, widened by ``SLACK``, was not drawn around the mask."""
TIMES_THE_AREA = 2.0
"""An ``area`` further than this factor from the mask's pixels is another quantity."""
MOST_OF_IMAGE = 0.7
"""Share of an image from which on its own size is believed as that of an object."""
COLOURS = {1, 2, 3, 4}
"""Channels of which a reader makes grey or RGB."""
SMALL, MEDIUM = 32**2, 96**2
"""COCO's limits of areas, in pixels."""


def check_part(part: Part, *, masks: bool = True) -> tuple[Report, CocoSet]:
    """Everything that a check finds in one half of a data set, and what of it is sound.

    Without ``masks`` annotations may lack their segmentation, as for a detector of boxes. Raises ``UserError`` where
    the json cannot be read at all, or has no images' folder.
    """
    problems: list[Problem] = []
    tell = problems.append
    coco = read_coco(part, masks=masks, tell=tell)
    headers = _headers(coco, tell)
    for image in coco.images:
        _check_shapes(coco.path, image, tell)
    _check_whole_boxes(coco, tell)
    problems += _notes(coco, headers)
    report = Report(str(coco.path), _facts(part, coco, headers), problems)
    report.cells = partial(cells_of, coco)
    report.data = {"images": len(coco.images), "objects": len(_objects(coco)), "classes": coco.names}
    return report, coco


def check_parts(parts: Sequence[Part], *, masks: bool = True) -> Iterator[Report]:
    """A report for each half, and in the second what is wrong between them."""
    first: CocoSet | None = None
    train: Compared | None = None
    for part in parts:
        if len(parts) > 1 and not part.annotations.is_file():
            sentence = f"{part.annotations} does not exist; training needs both halves"
            yield Report(str(part.annotations), [], [Problem("missing halves", sentence, str(part.annotations))])
            continue
        report, coco = check_part(part, masks=masks)
        if first is None:
            first = coco
        else:
            try:
                check_same_categories(first.categories, first.path, coco.categories, coco.path)
            except UserError as error:
                report.problems.append(Problem("different categories", str(error), str(coco.path)))
        files = [image.path for image in coco.images]
        train = compare(report, files, fingerprints_of(files), train)
        yield report


def _objects(coco: CocoSet) -> list[Instance]:
    return [instance for image in coco.images for instance in image.instances]


def _headers(coco: CocoSet, tell: Tell) -> list[Header]:
    """What the files say of themselves; those that are no images or have another size than the json says are told."""
    path = coco.path
    present = [image for image in coco.images if image.path.is_file()]  # what is missing was told before
    read = header_of_pixels if len(present) <= MOST_DECODED else header_of
    found: list[tuple[CocoImage, Header]] = []
    usable = 0
    for image in present[:: -(-len(present) // MOST_HEADERS) or 1]:
        where = f"{path}: image id {image.id}, {image.path},"
        try:
            header = read(image.path)
        except UnreadableImage as error:
            sentence = f"{where} cannot be read: {error.unreadable.reason}; repair or remove it"
            tell(Problem("unreadable images", sentence, str(image.path), "wrong"))
            continue
        found.append((image, header))
        try:
            check_size(image, header)
            usable += 1
        except UnreadableImage:
            swapped = (header.width, header.height) == (image.height, image.width)
            hint = "height and width are exchanged" if swapped else "it was resized, or the json is of another file"
            sentence = f"{where} is {header.width}x{header.height}, the json says {image.width}x{image.height}; {hint}"
            tell(Problem("sizes that differ from the json's", sentence, str(image.path), "wrong"))
    if present and not usable:
        tell(
            Problem("no usable image", f"no image of {path} can be used; correct the images or their sizes", str(path))
        )
    for problem in turned_photos((image.path, header.orientation) for image, header in found):
        tell(problem)
    stored = [image for image, header in found if header.annotated_as_stored(image.height, image.width)]
    if stored:
        sentence = (
            f"{len(stored)} of the turned photos have the stored height and width in the json, the first is "
            f"{stored[0].path}: they are read as stored, so that boxes and masks fit"
        )
        tell(Problem("turned photos", sentence, str(stored[0].path), "note"))
    _check_channels(path, found, tell)
    return [header for _, header in found]


def _check_channels(path: Path, found: Sequence[tuple[CocoImage, Header]], tell: Tell) -> None:
    """Tell where not all images can be read with one ``data.channels``."""
    counts = Counter(header.channels for _, header in found)
    if len(counts) > 1 and not counts.keys() <= COLOURS:
        listed = ", ".join(f"{channels} in {count} files" for channels, count in counts.most_common())
        sentence = f"{path}: the numbers of channels differ ({listed}); training reads only data.channels"
        tell(Problem("different channels", sentence, str(path), "wrong"))
        return
    other = [image for image, header in found if header.channels in COLOURS - {1, 3} and not _reads_as_rgb(image.path)]
    if other and len(other) == len(found):
        tell(Problem("settings", f"set data.channels={found[0][1].channels}", str(path), "note"))
        return
    for image in other:
        sentence = f"{path}: image id {image.id}, {image.path}, cannot be read as RGB; store all with the same channels"
        tell(Problem("different channels", sentence, str(image.path), "wrong"))


def _reads_as_rgb(path: Path) -> bool:
    try:
        read_image(path, 3)
    except UnreadableImage:
        return False
    return True


def _check_shapes(path: Path, image: CocoImage, tell: Tell) -> None:
    """Tell what is wrong with the boxes, masks and areas of an image, each with the likely cause."""
    coder = mask_coder()
    seen: dict[tuple[object, ...], object] = {}
    for instance in image.instances:
        where = f"{path}: annotation {instance.id} of image {image.id}"

        def wrong(kind: str, sentence: str, where: str = where) -> None:
            tell(Problem(kind, f"{where} {sentence}", str(image.path), "wrong"))

        counts: object = None
        kind, sentence = _box_outside(instance.box, image)
        if instance.shape is not None:
            code = encode_shape(instance.shape, image.height, image.width)
            counts, area = code["counts"], int(coder.area(code))
            if not area:
                wrong("empty masks", "has an empty mask, which training does not use; remove it")
            else:
                left, top, width, height = map(int, coder.toBbox(code))
                found = _box_and_mask(instance.box, (left, top, width, height), image)
                kind, sentence = found if found[0] else (kind, sentence)
                if instance.area is not None and not instance.crowd:
                    _check_area(instance, area, image, wrong)
        if kind:
            wrong(kind, sentence)
        key = (instance.label, instance.box, counts)
        if key in seen:
            wrong("doubled objects", f"is a copy of annotation {seen[key]}; remove one of them")
        seen[key] = instance.id


def _box_outside(box: Box, image: CocoImage) -> tuple[str, str]:
    """Kind and sentence of a box that leaves the image; two empty texts for another."""
    x, y, w, h = box
    width, height = image.width, image.height
    if min(x, y) >= -SLACK and x + w <= width + SLACK and y + h <= height + SLACK:
        return "", ""
    corners = x <= w <= width and y <= h <= height
    hint = "it looks like corners [x1, y1, x2, y2], COCO wants [x, y, width, height]" if corners else "correct the box"
    return "boxes outside the image", f"has bbox {list(box)}, the image is {width}x{height}; {hint}"


def _box_and_mask(box: Box, drawn: Box, image: CocoImage) -> tuple[str, str]:
    """Kind and sentence of a box that does not lie around its mask, whose own box is ``drawn``; or two empty texts."""
    x, y, w, h = box
    left, top, mask_width, mask_height = drawn
    right, bottom = left + mask_width, top + mask_height
    says = f"has bbox {list(box)}, but its mask spans {list(drawn)} (x, y, width, height)"
    off = max(abs(w - mask_width), abs(h - mask_height)) > SLACK
    if off and max(abs(x - left), abs(y - top), abs(w - right), abs(h - bottom)) <= SLACK:
        return "boxes written as corners", f"{says}: these are corners [x1, y1, x2, y2]; write width and height instead"
    if outside := _box_outside(box, image)[0]:
        return outside, f"{says}, the image is {image.width}x{image.height}; compute the boxes from the masks"
    whole = w >= image.width - SLACK and h >= image.height - SLACK
    if whole and mask_width * mask_height < MOST_OF_IMAGE * image.width * image.height:
        sentence = f"{says}: the box is the whole image; compute the boxes from the masks"
        return "boxes of the whole image", sentence
    if max(x - left, y - top, right - x - w, bottom - y - h) > SLACK:
        return "masks outside their boxes", f"{says}; compute the boxes from the masks"
    if w * h > TIMES_THE_MASK * (mask_width + 2 * SLACK) * (mask_height + 2 * SLACK):
        cause = "one of the two belongs to another object or another image size; correct it"
        return "boxes far larger than their masks", f"{says}: {cause}"
    return "", ""


def _check_area(instance: Instance, pixels: int, image: CocoImage, wrong: Callable[[str, str], None]) -> None:
    """Tell an ``area`` far from the pixels of the mask. The area of the box is what many tools write instead: scores by
    size shift a little, which is no fault of the data."""
    area, (_, _, w, h) = float(instance.area or 0), instance.box
    size, slack = image.width * image.height, (2 * SLACK) ** 2
    if abs(area - size) <= 0.01 * size and pixels < MOST_OF_IMAGE * size:
        cause = "it is the area of the whole image"
    elif area > TIMES_THE_AREA * pixels + slack and abs(area - w * h) > 0.05 * w * h:
        cause = "it may be in another unit, or of another object"
    elif pixels > TIMES_THE_AREA * area + slack:
        cause = "it may be a share of the image, or of another object"
    else:
        return
    sentence = f"has area {area:g}, but its mask has {pixels} pixels: {cause}; leave area out, or correct it"
    wrong("areas far from the mask's", sentence)


def _check_whole_boxes(coco: CocoSet, tell: Tell) -> None:
    """Tell where most boxes of a set without masks are the whole image: then nothing can be located."""
    boxes = [(image, i) for image in coco.images for i in image.instances if i.shape is None and not i.crowd]
    whole = [
        (image, i)
        for image, i in boxes
        if i.box[2] >= image.width - SLACK and i.box[3] >= image.height - SLACK and len(image.instances) > 1
    ]
    if len(whole) > len(boxes) / 2:
        image, one = whole[0]
        sentence = (
            f"{coco.path}: {len(whole)} of {len(boxes)} boxes are the whole image, such as annotation {one.id} of "
            f"image {image.id}; export the boxes of the objects"
        )
        tell(Problem("boxes of the whole image", sentence, str(coco.path), "wrong"))


def _facts(part: Part, coco: CocoSet, headers: Sequence[Header]) -> list[str]:
    """How many images and objects, of which classes and sizes."""
    objects = _objects(coco)
    per_image = [len(image.instances) for image in coco.images]
    per_class = Counter(instance.label for instance in objects)
    images_of = Counter(label for image in coco.images for label in {i.label for i in image.instances})
    plural = "" if len(coco.categories) == 1 else "es"
    counted = f"{len(coco.images)} images, {len(objects)} objects of {len(coco.categories)} class{plural}"
    lines = [f"{coco.path}: {counted}; files in {part.images}"]
    for label, category in enumerate(coco.categories, start=1):
        share = f"{per_class[label]:>8} objects in {images_of[label]} images"
        lines.append(f"  {category.id:>6}  {category.name:<24}{share if per_class[label] else '   never annotated'}")
    if per_image:
        lines.append(
            f"  objects per image: {min(per_image)} to {max(per_image)}, median {median(per_image):g}; "
            f"{per_image.count(0)} images without any; {sum(i.crowd for i in objects)} objects are crowds"
        )
    if objects:
        areas = [i.box[2] * i.box[3] for i in objects]
        small, up_to_medium = (sum(a < limit for a in areas) / len(areas) for limit in (SMALL, MEDIUM))
        lines.append(
            f"  boxes: {small:.0%} below 32x32 pixels, {up_to_medium - small:.0%} up to 96x96, "
            f"{1 - up_to_medium:.0%} larger"
        )
    if headers:
        sides = sorted({(header.width, header.height) for header in headers}, key=lambda size: size[0] * size[1])
        (w1, h1), (w2, h2) = sides[0], sides[-1]
        channels = ", ".join(f"{c} in {n} files" for c, n in Counter(h.channels for h in headers).most_common())
        which = f"; {len(headers)} files read, only their headers" if len(coco.images) > MOST_DECODED else ""
        lines.append(f"  images: {w1}x{h1} to {w2}x{h2} pixels, channels {channels}{which}")
    return lines


def _notes(coco: CocoSet, headers: Sequence[Header]) -> Iterator[Problem]:
    """What is sound, but good to know."""

    def note(sentence: str) -> Problem:
        return Problem("settings", sentence, str(coco.path), "note")

    ids = [category.id for category in coco.categories]
    if ids != list(range(1, len(ids) + 1)):
        gaps = sorted(set(range(min(ids[0], 1), ids[-1] + 1)) - set(ids)) if ids[-1] - ids[0] < 10_000 else []
        shown = ", ".join(map(str, gaps[:10])) + (", ..." if len(gaps) > 10 else "")
        lacking = f", without {shown}" if gaps else ""
        yield note(
            f"category ids run from {ids[0]} to {ids[-1]}{lacking}; labels 1 to {len(ids)} follow their "
            "order, and predictions use the ids of the json"
        )
    most, kept = max((len(image.instances) for image in coco.images), default=0), InferenceConfig().detections
    if most > kept:
        yield note(
            f"an image has {most} objects, but test.detections={kept} keeps only {kept}; set test.detections={most}"
        )
    channels = {header.channels for header in headers}
    if len(channels) == 1 and not channels <= {1, 3, 4}:
        yield note(f"set data.channels={min(channels)}")
    annotated = {instance.label for instance in _objects(coco)}
    rare = [category.name for label, category in enumerate(coco.categories, start=1) if label not in annotated]
    if rare:
        sentence = f"{len(rare)} of {len(coco.categories)} classes are never annotated: {', '.join(rare[:5])}"
        yield Problem("classes", sentence, str(coco.path), "note")


def parts_of(data: Path, images: Path | None) -> list[Part]:
    """The halves of a data folder, or the one json and its images, which lie in ``images``, or where they usually do.

    Raises ``UserError`` where there is no such folder.
    """
    if data.is_dir():
        if images is not None:
            raise UserError(
                f"{data} is a folder with images of its own; leave {images} out, or give a json in place of the folder"
            )
        halves = [half_in(data, name) for name in HALVES]
        if not any(half.annotations.is_file() for half in halves):
            raise UserError(
                f"{data} holds no annotations/instances_train.json; give the json itself, and its images (other "
                "formats: mae labels convert)"
            )
        return halves
    if not data.is_file():
        raise UserError(f"{data} does not exist; give a COCO json, or a folder with annotations/instances_train.json")
    if images is None:
        images = images_beside(data, data.parent.parent)
    return [Part(images, data)]


def main(arguments: Sequence[str] | None = None, prog: str = "check_data.py") -> None:
    """The command; exits with code 2 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a COCO json, or a folder with annotations/")
    parser.add_argument("images", type=Path, nargs="?", metavar="IMAGES", help="the folder of the json's images")
    parser.add_argument(
        "--boxes-only", action="store_true", help="accept annotations without masks, for model.head=faster_rcnn"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file, as JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw images with their objects: faulty ones, then near-copies"
    )
    given = parser.parse_args(arguments)
    with user_errors():
        reports = check_parts(parts_of(given.data, given.images), masks=not given.boxes_only)
        conclude(reports, given.json, picture=given.picture)


if __name__ == "__main__":
    main()
