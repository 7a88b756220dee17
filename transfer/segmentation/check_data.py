"""Find what is wrong with images and label maps, in seconds: nothing is trained, nothing is written.

    mae check labels configs/segmentation/own_data.py data_root=PATH       (a config, and its options)
    mae check labels PATH num_classes=11 reduce_zero_label=True seg_map_suffix=_L.png
    mae check labels --images PATH --label-maps PATH --num-classes 11 --reduce-zero-label yes

PATH holds images/{training,validation} and annotations/{training,validation}, and classes.txt where classes have names.
Images and label maps are read and judged by the functions that training reads and refuses with. Exit code 2 where
training would refuse to start, leave images out, or learn the wrong thing.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mae_core.config.recipes import find_recipe
from mae_core.data.check import Compared, Report, compare, conclude, files_passed_over, turned_photos
from mae_core.data.contact_sheet import MISSING, Cell
from mae_core.data.decoding import UnreadableImage, read_image, to_picture
from mae_core.data.images import list_images
from mae_core.data.near_copies import fingerprints_of
from mae_core.data.orientation import orientation_of
from mae_core.errors import UserError, user_errors
from transfer.engines import require
from transfer.segmentation.config import RECIPES, check_config_exists
from transfer.segmentation.drawing import IGNORED_COLOUR, draw_legend, palette
from transfer.segmentation.label_check import MOST_CHECKED, Survey, stray_maps, survey
from transfer.segmentation.label_coding import LabelCoding, Names
from transfer.segmentation.label_maps import LabelledImage, files_below, possible_pairs, read_classes, read_label_map
from transfer.segmentation.quiet import quietly

OPACITY = 0.5
"""Of the labels over an image in the contact sheet."""


class LabelledFolders(NamedTuple):
    """What is to be checked: two folders, and what the values in the label maps mean.

    classes   a name for each class, None if they are not named
    origin    where the names come from
    channels  of the encoder
    """

    part: str
    images: Path
    label_maps: Path
    coding: LabelCoding
    classes: list[str] | None = None
    map_suffix: str = ".png"
    origin: Names = "unknown"
    channels: int = 3

    @property
    def names(self) -> list[str]:
        """Names of the classes, in the order of their values."""
        return self.classes or [f"class {value}" for value in self.coding.values]


def check_folders(folders: LabelledFolders, *, most: int = MOST_CHECKED, seed: int = 0) -> Report:
    """Everything that a check finds in ``folders``, names first; pixels are read of ``most`` pairs, names of all.

    Raises ``UserError`` for a missing or empty folder.
    """
    pairs = possible_pairs(folders.images, folders.label_maps, map_suffix=folders.map_suffix)
    problems = list(stray_maps(pairs, folders.images, folders.label_maps))
    whole = [pair for pair in pairs if pair.label_map.is_file()]
    found = survey(whole, folders.coding, channels=folders.channels, names=folders.origin, most=most, seed=seed)
    problems += found.problems
    files = [file for pair in whole[:most] for file in pair]
    problems += turned_photos((file, orientation_of(file)) for file in files)
    others: Counter[str] = Counter()
    list_images(folders.images, others)
    problems += files_passed_over(folders.images, others)
    report = Report(folders.part, _facts(folders, found, len(pairs)), problems)
    report.cells = partial(_cells, pairs, folders)
    present = [place for place, values in enumerate(folders.coding.classes) if any(found.values[v] for v in values)]
    present += [folders.coding.num_classes] * any(found.values[value] for value in folders.coding.ignored)
    if present:
        report.legend = partial(draw_legend, present, folders.names, palette(folders.coding.num_classes))
    report.data = {"images": len(pairs), "checked": found.checked, "pixels": dict(sorted(found.values.items()))}
    return report


def check_parts(parts: Sequence[LabelledFolders], *, most: int = MOST_CHECKED) -> Iterator[Report]:
    """A report for each part, and in the later ones what they share with the first."""
    train: Compared | None = None
    for part in parts:
        report = check_folders(part, most=most)
        if part is parts[0] or part.images != parts[0].images:
            files = files_below(part.images)
            compared = compare(report, files, fingerprints_of(files), train)
            train = train or compared
        yield report


def folders_of_config(config: Path, options: Sequence[str] | Mapping[str, Any]) -> list[LabelledFolders]:
    """The training and the validation folders of an mmseg config."""
    require("mmseg")
    config = find_recipe(config, RECIPES)
    check_config_exists(config)
    with quietly():
        from transfer.segmentation import engine_mmseg

        given = options if isinstance(options, Mapping) else engine_mmseg.parse_options(options)
        return [LabelledFolders(**facts) for facts in engine_mmseg.folders_to_check(config, given)]


def _cells(pairs: Sequence[LabelledImage], folders: LabelledFolders) -> list[Cell]:
    """Every image under the colours of its label map, above its name."""

    def draw(pair: LabelledImage) -> Image.Image:
        try:
            image = to_picture(read_image(pair.image, None)).convert("RGB")
            labels = read_label_map(pair.label_map).values
        except UserError as error:
            raise UnreadableImage(pair.image, str(error)) from None
        if labels.shape != image.size[::-1]:
            raise UnreadableImage(pair.image, "its label map has another size")
        return Image.blend(image, _coloured(labels, folders.coding), OPACITY)

    return [Cell((str(pair.image), str(pair.label_map)), pair.image.name, partial(draw, pair)) for pair in pairs]


def _coloured(labels: np.ndarray, coding: LabelCoding) -> Image.Image:
    """(H, W) values as stored -> a colour per class, black where they are ignored, red where they are no class."""
    values, places = np.unique(labels, return_inverse=True)
    colours = dict.fromkeys(coding.ignored, IGNORED_COLOUR)
    for entry, colour in zip(coding.classes, palette(coding.num_classes), strict=True):
        colours |= dict.fromkeys(entry, colour)
    table = np.array([colours.get(value, MISSING) for value in values.tolist()], dtype=np.uint8)
    return Image.fromarray(table[places.reshape(labels.shape)])


def _facts(folders: LabelledFolders, found: Survey, total: int) -> list[str]:
    """What was read, and the share of each class and of each other value."""
    counted = max(sum(found.values.values()), 1)
    which = "all" if found.checked == total else f"{found.checked} of"
    lines = [f"{folders.part}: {which} {total} images read, {folders.images} beside {folders.label_maps}"]
    inside: set[int] = set()
    for values, name in zip(folders.coding.classes, folders.names, strict=True):
        inside.update(values)
        pixels = sum(found.values[value] for value in values)
        lines.append(f"  {values[0]:>5}  {name:<24} {pixels / counted:>7.2%}{'' if pixels else '  never labelled'}")
    for value in sorted(set(found.values) - inside):
        meaning = "ignored" if value in folders.coding.ignored else "no class"
        lines.append(f"  {value:>5}  ({meaning}){'':<{22 - len(meaning)}} {found.values[value] / counted:>7.2%}")
    return lines


def main(arguments: Sequence[str] | None = None, prog: str = "check_data.py") -> None:
    """The command; exits with code 2 where something is wrong."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("source", nargs="*", metavar="CONFIG|PATH KEY=VALUE", help="an mmseg config or a data folder, and options")
    add("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as for train_net.py")
    add("--images", type=Path, metavar="DIR", help="folder of images, in place of CONFIG or PATH")
    add("--label-maps", type=Path, metavar="DIR", help="folder of label maps of the same names")
    add("--num-classes", type=int, metavar="N", help="number of classes; leave it out with --classes")
    add("--classes", type=Path, metavar="FILE", help="their names: a line value<TAB>name for each")
    add("--reduce-zero-label", choices=("yes", "no"), help="yes: 0 is void, classes count from 1; no: 0 is a class")
    add("--map-suffix", default=".png", metavar="SUFFIX", help="suffix of the label maps, in place of the image's")
    add("--most", type=int, default=MOST_CHECKED, metavar="N", help="read the pixels of at most this many pairs")
    add("--json", type=Path, metavar="FILE", help="write all findings to this file, as JSON")
    add("--picture", type=Path, metavar="FILE", help="draw images under their labels: faulty ones, then near-copies")
    given = parser.parse_intermixed_args(arguments)
    with user_errors():
        conclude(check_parts(_asked(given), most=given.most), given.json, picture=given.picture)


def _asked(given: argparse.Namespace) -> list[LabelledFolders]:
    """The folders that the words of the command line name. Raises ``UserError`` where they do not say enough."""
    if given.most < 1:
        raise UserError(f"--most is {given.most}; read at least 1 pair")
    if given.num_classes is not None and given.num_classes < 1:
        raise UserError(f"--num-classes is {given.num_classes}; give the number of classes, 1 or more")
    words = [word for word in given.source if OPTION.match(word)]
    places = [Path(word) for word in given.source if word not in words]
    typed = (given.images, given.label_maps, given.num_classes, given.classes, given.reduce_zero_label)
    if len(places) > 1:
        raise UserError(f"give one folder or config, not {places[0]} and {places[1]}; write options as key=value")
    if places and any(value is not None for value in typed):
        raise UserError(
            "CONFIG or PATH already describes the data; leave it out, or leave out the options "
            "that describe a pair of folders"
        )
    rooted = [] if places else [word for word in words if word.startswith("data_root=")]
    if rooted:  # the word of a recipe, where a folder alone is enough
        places, words = [Path(rooted[-1].partition("=")[2])], [word for word in words if word not in rooted]
    if places and places[0].is_dir():
        return folders_of_set(places[0], [*words, *given.cfg_options])
    if places and places[0].suffix != ".py" and (places[0].is_absolute() or len(places[0].parts) > 1 or rooted):
        found = "is a file" if places[0].is_file() else "does not exist"
        raise UserError(f"{places[0]} {found}; give a folder with images/ and annotations/, or a recipe's name")
    return folders_of_config(places[0], [*words, *given.cfg_options]) if places else [_as_typed(given)]


OPTION = re.compile(r"[A-Za-z_][\w.]*=")
SETTINGS = ("num_classes", "reduce_zero_label", "label_values", "ignored_values", "seg_map_suffix", "classes_file")
"""Options of a data folder, as mmseg's configs call them."""


def folders_of_set(root: Path, options: Sequence[str]) -> list[LabelledFolders]:
    """The parts of a folder with images/ and annotations/. Raises ``UserError`` where its classes are not described."""
    settings = dict(_setting(option) for option in options)
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise UserError(f"a data folder has no option {unknown[0]!r}; known: {', '.join(SETTINGS)}")
    parts = ("training", "validation")
    if not (root / "images").is_dir():
        raise UserError(f"{root} has no folder images; give a folder with images/ and annotations/, or --images")
    suffix = settings.get("seg_map_suffix", ".png")
    meaning: dict[str, Any] = {name: settings.get(name) for name in ("label_values", "ignored_values")}
    if "reduce_zero_label" not in settings and meaning["label_values"] is None:
        maps = files_below(root / "annotations" / parts[0])[:20]
        values = sorted({value for path in maps for value in np.unique(read_label_map(path).values).tolist()})
        shown = ", ".join(map(str, values[:30])) + (", ..." if len(values) > 30 else "")
        raise UserError(
            f"{root} does not say what the values in its label maps mean; the first {len(maps)} hold {shown}: add "
            "reduce_zero_label=True where 0 is void and classes count from 1, or reduce_zero_label=False, and "
            "num_classes=N where there is no classes.txt"
        )
    reduced = bool(settings.get("reduce_zero_label", False))
    file, names = root / settings.get("classes_file", "classes.txt"), None
    number = settings.get("num_classes") or len(meaning["label_values"] or ())
    if file.is_file():
        given = meaning["label_values"]
        coded = LabelCoding.of(len(given), **meaning).values if given is not None else None
        names = read_classes(file, coded, reduce_zero_label=reduced)
        if number and number != len(names):
            raise UserError(f"num_classes is {number}, but {file} names {len(names)} classes; leave one of them out")
    if not (names or number):
        raise UserError(f"there is no {file}; add num_classes=N")
    coding = LabelCoding.of(len(names or ()) or number, reduce_zero_label=reduced, **meaning)
    origin: Names = "written" if names else "unknown"
    return [
        LabelledFolders(part, root / "images" / part, root / "annotations" / part, coding, names, suffix, origin)
        for part in parts
    ]


def _setting(option: str) -> tuple[str, Any]:
    name, _, text = option.partition("=")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text


def _as_typed(given: argparse.Namespace) -> LabelledFolders:
    needed = {
        "--images": given.images,
        "--label-maps": given.label_maps,
        "--reduce-zero-label": given.reduce_zero_label,
    }
    missing = [name for name, value in needed.items() if value is None]
    if not (given.num_classes or given.classes):
        missing.append("--num-classes (or --classes)")
    if missing:
        raise UserError(
            "give a folder with images/ and annotations/, or a recipe; for a pair of folders give "
            f"{', '.join(missing)} too"
        )
    reduced = given.reduce_zero_label == "yes"
    names = read_classes(given.classes, reduce_zero_label=reduced) if given.classes else None
    if names is not None and given.num_classes not in (None, len(names)):
        raise UserError(f"--num-classes is {given.num_classes}, but {given.classes} names {len(names)}; leave it out")
    origin: Names = "written" if names else "unknown"
    coding = LabelCoding.of(len(names or ()) or given.num_classes, reduce_zero_label=reduced)
    return LabelledFolders("data", given.images, given.label_maps, coding, names, given.map_suffix, origin)


if __name__ == "__main__":
    main()
