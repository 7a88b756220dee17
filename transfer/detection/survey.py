"""Find what is wrong with a COCO data set, in seconds: nothing is trained, nothing is written.

    python transfer/detection/coco.py DATA/annotations/instances_train.json [DATA/train]
    python transfer/detection/coco.py DATA          (train/, val/ and annotations/instances_{train,val}.json)

Finds broken records, doubled ids, missing files, images of another size than the json says, boxes outside the image,
empty masks, masks outside their boxes, and objects that are there twice. Exit code 2 where it finds something. Gaps in
the category ids and classes without objects are no fault: they are told, and training takes them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.data.decoding import UnreadableImage
from mae_core.errors import UserError, user_errors
from transfer.detection.annotations import Category, Instance, categories_of, instance_of, read_json, typed_image
from transfer.detection.coco import Part, check_same_categories, file_of, missing_files
from transfer.detection.facts import MOST_DECODED, facts_of
from transfer.detection.headers import Header, header_of, header_of_pixels
from transfer.detection.masks import encode_shape, mask_coder

KINDS = (
    "broken records", "doubled ids", "missing files", "unreadable images", "sizes that differ from the json's",
    "different channels", "boxes outside the image", "empty masks", "masks outside their boxes", "doubled objects",
)  # fmt: skip
MOST_NAMED = 5
"""Problems of one kind that are named; the rest are counted."""
MOST_HEADERS = 20_000
"""Files that are looked into; of a larger set every n-th."""
SLACK = 2.0
"""Pixels by which a box may reach over the edge, or a mask out of its box: tools round differently."""
COLOURS = {1, 2, 3, 4}
"""Channels of which a reader makes grey or RGB."""


class Problem(NamedTuple):
    """``kind`` is one of ``KINDS``; the sentence names file and id."""

    kind: str
    sentence: str


class Survey(NamedTuple):
    """What was found: the facts of the set, line by line, what is wrong with it, and its categories."""

    facts: list[str]
    problems: list[Problem]
    categories: tuple[Category, ...]


def survey(part: Part) -> Survey:
    """All that is wrong with a data set. Raises ``UserError`` where the json cannot be read at all, or has no images'
    folder."""
    folder, path = part
    content = read_json(path)
    if not folder.is_dir():
        raise UserError(f"image folder {folder} of {path} does not exist; give it after the json")
    problems: list[Problem] = []
    try:
        categories = categories_of(path, content["categories"])
    except UserError as error:  # no class can be told from another: what follows would blame every annotation
        raise UserError(f"{error}; nothing else was checked") from None
    label_of = {category.id: label for label, category in enumerate(categories, start=1)}
    images = _images(path, content["images"], problems)
    headers = _headers(folder, path, images, problems)
    instances = _instances(path, content["annotations"], images, label_of, problems)
    _masks(path, instances, images, problems)
    facts = facts_of(path, folder, images, instances, categories, headers)
    return Survey(facts, sorted(problems, key=lambda problem: KINDS.index(problem.kind)), categories)


def _images(path: Path, records: list[dict[str, Any]], problems: list[Problem]) -> dict[Any, dict[str, Any]]:
    """The sound records of images by id."""
    images: dict[Any, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for given in records:
        try:
            record = typed_image(path, given)
        except UserError as error:
            problems.append(Problem("broken records", str(error)))
            continue
        identity, name = record["id"], record["file_name"]
        if identity in images:
            first = images[identity]["file_name"]
            problems.append(Problem("doubled ids", f"{path}: image id {identity} appears twice, {first} and {name}"))
            continue
        if name in files:
            sentence = f"{path}: images {files[name]} and {identity} are both {name}; annotate a file once"
            problems.append(Problem("doubled objects", sentence))
        files[name] = identity
        images[identity] = record
    return images


def _headers(
    folder: Path, path: Path, images: Mapping[Any, Mapping[str, Any]], problems: list[Problem]
) -> list[Header]:
    """What the files say of themselves; those that are missing, no images, or of another size become problems."""
    missing = missing_files(folder, images.values())
    for record in missing:
        sentence = f"{path}: image id {record['id']} is {folder / record['file_name']}, which does not exist"
        problems.append(Problem("missing files", sentence))
    absent = {record["id"] for record in missing}
    present = [record for identity, record in images.items() if identity not in absent]
    headers: list[Header] = []
    read = header_of_pixels if len(present) <= MOST_DECODED else header_of
    for record in present[:: -(-len(present) // MOST_HEADERS) or 1]:
        file = file_of(folder, record)
        where = f"{path}: image id {record['id']}, {file},"
        try:
            header = read(file)
        except UnreadableImage as error:
            problems.append(Problem("unreadable images", f"{where} cannot be read: {error.unreadable.reason}"))
            continue
        headers.append(header)
        if (header.height, header.width) != (record["height"], record["width"]):
            if header.annotated_as_stored(record["height"], record["width"]):
                continue
            turned = (header.width, header.height) == (record["height"], record["width"])
            sentence = f"{where} is {header.width}x{header.height}, the json says {record['width']}x{record['height']}"
            hint = "; its pixels lie on their side (EXIF orientation): save it upright" if turned else ""
            problems.append(Problem("sizes that differ from the json's", sentence + hint))
    counts = Counter(header.channels for header in headers)
    if len(counts) > 1 and not counts.keys() <= COLOURS:
        found = ", ".join(f"{channels} in {count} files" for channels, count in counts.most_common())
        problems.append(Problem("different channels", f"{path}: images have {found}; a run takes one number"))
    return headers


def _instances(
    path: Path,
    annotations: list[dict[str, Any]],
    images: Mapping[Any, Mapping[str, Any]],
    label_of: Mapping[int, int],
    problems: list[Problem],
) -> list[tuple[Any, Instance]]:
    """The sound annotations, each with the id of its image."""
    found: list[tuple[Any, Instance]] = []
    identities: set[Any] = set()
    for number, annotation in enumerate(annotations, start=1):
        try:
            instance = instance_of(path, annotation, number, images, label_of)
        except UserError as error:
            kind = "empty masks" if "has no segmentation" in str(error) else "broken records"
            problems.append(Problem(kind, str(error)))
            continue
        if instance.id in identities:
            problems.append(Problem("doubled ids", f"{path}: annotation id {instance.id} appears twice"))
        identities.add(instance.id)
        found.append((annotation["image_id"], instance))
    return found


def _masks(
    path: Path,
    instances: Iterable[tuple[Any, Instance]],
    images: Mapping[Any, Mapping[str, Any]],
    problems: list[Problem],
) -> None:
    """Add what is wrong with boxes and masks."""
    coder = mask_coder()
    seen: dict[tuple[Any, ...], Any] = {}
    for image_id, instance in instances:
        record = images[image_id]
        height, width = record["height"], record["width"]
        where = f"{path}: annotation {instance.id} of image {image_id}"
        x, y, w, h = instance.box
        if min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
            sentence = f"{where} has bbox {list(instance.box)}, the image is {width}x{height}"
            swapped = x <= w <= width and y <= h <= height
            hint = "; it looks like corners, COCO wants [x, y, width, height]" if swapped else ""
            problems.append(Problem("boxes outside the image", sentence + hint))
        code = encode_shape(instance.shape or (), height, width)
        if not coder.area(code):
            problems.append(Problem("empty masks", f"{where} has a mask without a pixel; it is never learned from"))
            continue
        left, top, mask_width, mask_height = coder.toBbox(code).tolist()
        over = max(x - left, y - top, left + mask_width - x - w, top + mask_height - y - h)
        if over > SLACK:
            drawn = [left, top, mask_width, mask_height]
            sentence = f"{where} has bbox {list(instance.box)}, its mask lies in {drawn}"
            problems.append(Problem("masks outside their boxes", sentence))
        key = (image_id, instance.label, instance.box, code["counts"])
        if key in seen:
            problems.append(Problem("doubled objects", f"{where} is annotation {seen[key]} once more"))
        seen[key] = instance.id


def parts_of(data: Path, images: Path | None) -> list[Part]:
    """The halves of a data folder, or the one json and its images, which lie in ``images``, or where they usually do.

    Raises ``UserError`` where there is no such folder.
    """
    if data.is_dir():
        if images is not None:
            raise UserError(f"{data} is a folder, which brings its own images; give a json with {images}")
        jsons = {name: data / "annotations" / f"instances_{name}.json" for name in ("train", "val")}
        found = [Part(data / name, json) for name, json in jsons.items() if json.is_file()]
        if not found:
            raise UserError(f"{data} holds no annotations/instances_train.json; give the json itself, and its images")
        return found
    if not data.is_file():
        raise UserError(f"{data} does not exist; give a COCO json, or a folder with annotations/instances_train.json")
    if images is None:
        name = data.stem.removeprefix("instances_")
        usual = (data.parent.parent / name, data.parent / name, data.parent / "images", data.parent.parent / "images")
        images = next((folder for folder in usual if folder.is_dir()), data.parent)
    return [Part(images, data)]


def describe(found: Survey) -> str:
    """Facts, then problems by kind, at most ``MOST_NAMED`` of each."""
    lines = list(found.facts)
    for kind, count in Counter(problem.kind for problem in found.problems).items():
        sentences = [problem.sentence for problem in found.problems if problem.kind == kind]
        lines += [f"  {kind}: {count}", *(f"    {sentence}" for sentence in sentences[:MOST_NAMED])]
        lines += [f"    ... and {count - MOST_NAMED} more"] if count > MOST_NAMED else []
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    """The command; exits with code 2 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="coco.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a COCO json, or a folder with annotations/")
    parser.add_argument("images", type=Path, nargs="?", metavar="IMAGES", help="the folder of the json's images")
    given = parser.parse_args(arguments)
    with user_errors():
        parts = parts_of(given.data, given.images)
        surveys = []
        for part in parts:
            surveys.append(survey(part))
            say(describe(surveys[-1]))
        for part, found in zip(parts[1:], surveys[1:], strict=True):
            check_same_categories(surveys[0].categories, parts[0].annotations, found.categories, part.annotations)
        count = sum(len(found.problems) for found in surveys)
        if count:
            raise UserError(f"{count} problem{'s' * (count > 1)} found, listed above; mend the json or the files")
        say("nothing is wrong")
