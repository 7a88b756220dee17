"""Find objects in images with a trained detector: pictures, and a json in COCO's results format.

    python transfer/detection/predict.py --weights runs/detector photos/ one_more.png --out found
    python transfer/detection/predict.py --weights runs/detector photos/ --out more test.detections=500 device=cpu

--weights is a run directory or its detector.safetensors, of either engine; IMAGES are files or folders. The new folder
gets pictures/*.png, predictions.json (everything with a score from test.score_threshold on, as COCO's scores want it)
and images.json: the images and categories that predictions.json means, as a COCO file without annotations.

    python transfer/detection/predict.py --weights runs/detector slide.tif --out found --tile 1024 --overlap 0.2

searches images of any size in tiles, in bounded memory where the file is a TIFF or an array on disk; objects that
seams cut are joined.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.atomic import atomic_folder, check_new_folder, write_text
from mae_core.counting import Counter as ProgressCounter
from mae_core.data.decoding import Unreadable, UnreadableImage
from mae_core.data.given import named_images
from mae_core.data.reading import Reading
from mae_core.data.windows import open_windows, tiles_of
from mae_core.errors import UserError, user_errors
from mae_core.layout import PICTURES
from mae_core.training import distributed
from transfer.detection.annotations import Instance, categories_of, instance_of, read_json, typed_image
from transfer.detection.coco import CocoImage, CocoSet, check_same_categories
from transfer.detection.config import InferenceConfig
from transfer.detection.detector import OVERLAP, Detector, load_detector
from transfer.detection.headers import header_of
from transfer.detection.heads import Detections
from transfer.detection.results import PREDICTIONS, coco_results, truth_and_prediction
from transfer.detection.samples import WholeImages

SCRIPT = "predict.py"
IMAGES = "images.json"
OPTION = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
"""A word among the images that is no file: an option, such as test.detections=500."""


class Predicted(NamedTuple):
    """The images that could be read, what was found in each, and the images that could not."""

    coco: CocoSet
    found: list[Detections]
    unreadable: list[Unreadable]


def predict(
    weights: Path | str,
    images: Sequence[Path | str],
    out: Path | str,
    *,
    score: float | None = None,
    truth: Path | str | None = None,
    config_file: Path | str | None = None,
    overrides: Sequence[str] = (),
    tile: int | None = None,
    overlap: float = OVERLAP,
    on_error: str = "skip",
    say: Callable[[str], None] = print,
) -> Predicted:
    """Detect in ``images`` (files or folders) and write pictures and jsons into the new folder ``out``.

    score        minimum score of the objects drawn and counted; ``test.picture_score`` when None
    truth        a COCO json with these images: its ids are used, its objects are drawn beside what was found
    config_file  the recipe of a file that does not say how its network is built: a detector of detectron2's model zoo
    tile         side of the square tiles in which large images are searched, and which share ``overlap``
    overrides    options as for training, such as ``device=cpu`` and ``test.detections=500``
    on_error     ``skip`` names an unreadable image and goes on, ``raise`` stops

    Everything is checked before ``out`` is made. Raises ``UserError``, also where no image could be read.
    """
    out = Path(out)
    _check_request(out, score, tile, overlap)
    files = dict(named_images(images))
    known = () if truth is None else categories_of(Path(truth), read_json(Path(truth))["categories"])
    detector = load_detector(weights, overrides=overrides, config_file=config_file, categories=known)
    config, categories = detector.config, detector.categories
    if detector.note:
        say(detector.note)
    readable, unreadable = _sizes(files, config.data.reading, in_windows=tile is not None)
    refuse = on_error == "raise" or len(files) == 1
    _tell_unreadable(unreadable, refuse, say)
    coco = CocoSet(Path(IMAGES), tuple(readable.values()), categories)
    if truth is not None:
        coco = annotated(coco, list(readable), Path(truth), Path(weights), masks=detector.head.learns_masks)
    least = config.test.picture_score if score is None else score
    whole, names, found = WholeImages(coco, config.data, detector.statistics), list(readable), list[Detections]()
    title = "image" if truth is None else "truth"
    with atomic_folder(out) as folder:
        results = detector.detect(whole) if tile is None else _in_tiles(detector, coco, tile, overlap)
        for part, cut in results:
            _tell_unreadable(cut, refuse, say)
            for detections in part:
                name = names[detections.image_index]
                say(f"{name}: {counted(coco, detections, least)}")
                if tile is None:
                    picture = truth_and_prediction(coco, detections, config, least=least, title=title)
                else:
                    source = open_windows(coco.images[detections.image_index].path, config.data.reading, name)
                    picture = detector.result(detections, coco, source).draw(least)
                if picture is not None:
                    drawn = folder / PICTURES / f"{name}.png"
                    drawn.parent.mkdir(parents=True, exist_ok=True)
                    picture.save(drawn)
            found += part
            unreadable += cut
        if not found:
            path, reason = unreadable[0]
            raise UserError(
                f"none of the {len(files)} images could be read, the first is {path} ({reason}); "
                "give image files or folders of them"
            )
        write_text(folder / PREDICTIONS, json.dumps(coco_results(coco, found)))
        write_text(folder / IMAGES, json.dumps(_as_coco(coco, found, names)))
    if not any((detections.scores >= least).any() for detections in found):
        best = max((float(detections.scores.max()) for detections in found if len(detections.scores)), default=0.0)
        say(f"no object has a score of {least:g} or more, the best has {best:.3f}; lower --score to draw more")
    return Predicted(coco, found, unreadable)


def _in_tiles(
    detector: Detector, coco: CocoSet, tile: int, overlap: float
) -> Iterator[tuple[list[Detections], list[Unreadable]]]:
    """What is found in each image, and those that could not be decoded, as ``Detector.detect`` gives them."""
    for index, image in enumerate(coco.images):
        try:
            source = open_windows(image.path, detector.config.data.reading, str(image.path))
            counter = ProgressCounter("searching tiles")
            yield [detector.detect_in_tiles(source, tile, overlap, index, on_progress=counter)], []
        except UnreadableImage as error:
            yield [], [error.unreadable._replace(path=str(image.path))]


def _check_request(out: Path, score: float | None, tile: int | None, overlap: float) -> None:
    """Raise ``UserError`` where ``out`` is not empty or cannot be made, for numbers out of range, under torchrun."""
    if tile is not None:
        tiles_of(1, 1, tile, overlap)
    if score is not None and not 0 <= score <= 1:
        raise UserError(f"--score is {score}; give a number from 0 to 1")
    if distributed.world_size() > 1:
        raise UserError("predict.py runs in one process; start it without torchrun")
    check_new_folder(out)


def _tell_unreadable(unreadable: Iterable[Unreadable], refuse: bool, say: Callable[[str], None]) -> None:
    for path, reason in unreadable:
        if refuse:
            raise UserError(f"image {path} cannot be read ({reason}); repair or remove it, or give another")
        say(f"skipped {path}: {reason}")


def _sizes(
    files: Mapping[str, Path], reading: Reading, *, in_windows: bool
) -> tuple[dict[str, CocoImage], list[Unreadable]]:
    """The images by name, numbered from 1, and those of which not even the size can be read."""
    readable: dict[str, CocoImage] = {}
    unreadable: list[Unreadable] = []
    for number, (name, path) in enumerate(files.items(), start=1):
        try:
            opened = open_windows(path, reading, name) if in_windows else header_of(path, reading.channels)
        except UnreadableImage as error:
            unreadable.append(error.unreadable)
        else:
            readable[name] = CocoImage(number, path, opened.height, opened.width, ())
    return readable, unreadable


def annotated(coco: CocoSet, names: Sequence[str], truth: Path, weights: Path, *, masks: bool = True) -> CocoSet:
    """``coco`` with the ids and objects that ``truth`` has for its images, found by their file names; without ``masks``
    an annotation may lack its segmentation.

    Raises ``UserError`` where the json lacks an image, has two of its name, or has other categories than the detector.
    """
    content = read_json(truth)
    categories = categories_of(truth, content["categories"])
    check_same_categories(coco.categories, weights, categories, truth)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in (typed_image(truth, given) for given in content["images"]):
        for key in {record["file_name"], Path(record["file_name"]).name}:
            by_name.setdefault(key, []).append(record)
    records: dict[Any, dict[str, Any]] = {}
    for name, image in zip(names, coco.images, strict=True):
        file = f"{name}{image.path.suffix}"
        matches = by_name.get(file) or by_name.get(image.path.name, [])
        if len(matches) != 1:
            found = f"{len(matches)} images of that name" if matches else "no such image"
            raise UserError(f"{truth} has {found} as {image.path}; leave --truth out, or give the json of these images")
        identity = matches[0]["id"]
        if identity in records:
            raise UserError(
                f"{records[identity]['path']} and {image.path} are the same image of {truth}; give one of them"
            )
        records[identity] = {**matches[0], "path": image.path}
    label_of = {category.id: label for label, category in enumerate(categories, start=1)}
    instances: dict[Any, list[Instance]] = {identity: [] for identity in records}
    for number, annotation in enumerate(content["annotations"], start=1):
        identity = annotation.get("image_id")
        if isinstance(identity, int | float | str) and identity in records:
            instances[identity].append(instance_of(truth, annotation, number, records, label_of, masks=masks))
    found_images = (
        CocoImage(identity, record["path"], record["height"], record["width"], tuple(instances[identity]))
        for identity, record in records.items()
    )
    return CocoSet(truth, tuple(found_images), categories)


def counted(coco: CocoSet, detections: Detections, least: float) -> str:
    """How many objects of each class have a score of ``least`` or more."""
    kept = detections.labels[detections.scores >= least].tolist()
    counts = Counter(coco.names[label - 1] for label in kept)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"


def _as_coco(coco: CocoSet, found: Iterable[Detections], names: Sequence[str]) -> dict[str, Any]:
    """A COCO file of the images that were searched: what the ids in predictions.json stand for."""
    images = []
    for detections in found:
        record = coco.images[detections.image_index]
        file = f"{names[detections.image_index]}{record.path.suffix}"
        images.append({"id": record.id, "file_name": file, "height": record.height, "width": record.width})
    categories = [category._asdict() for category in coco.categories]
    return {"info": {}, "images": images, "annotations": [], "categories": categories}


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> None:
    """The command; exits with code 2 on a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = InferenceConfig().picture_score
    add = parser.add_argument
    a_run = "a run directory, or its detector.safetensors"
    if prog == SCRIPT:
        add("--weights", type=Path, required=True, metavar="RUN", help=a_run)
    else:
        add("weights", type=Path, metavar="RUN", help=a_run)
    add(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="image files, or folders of them; then key=value as for train_net.py",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for pictures/ and the jsons")
    add("--score", type=float, metavar="X", help=f"minimum score of the objects drawn and counted; {default:g}")
    add(
        "--truth",
        type=Path,
        metavar="JSON",
        help="a COCO json with these images: its objects are drawn beside, its ids are used",
    )
    add("--config-file", type=Path, metavar="YAML", help="recipe for a detector of detectron2's model zoo")
    add("--tile", type=int, metavar="N", help="search large images in square tiles of N pixels, joined at their seams")
    add("--overlap", type=float, default=OVERLAP, metavar="X", help="share of a tile that its neighbours see too")
    add("--on-error", choices=("skip", "raise"), default="skip", help="what to do about an image that cannot be read")
    given = vars(parser.parse_intermixed_args(arguments))
    options = [word for word in given["images"] if OPTION.match(word) and not Path(word).exists()]
    given |= {"images": [word for word in given["images"] if word not in options], "overrides": options}
    if not given["images"]:
        parser.error("the following arguments are required: IMAGES")
    with user_errors():
        predicted = predict(**given)
        number = sum(len(detections.scores) for detections in predicted.found)
        print(f"wrote {given['out']}/: {len(predicted.found)} pictures, {number} objects in {PREDICTIONS}, {IMAGES}")


if __name__ == "__main__":
    main()
