"""Find what is wrong with images and label maps, in seconds: nothing is trained, nothing is written.

    python transfer/segmentation/check_data.py configs/segmentation/own_data.py --cfg-options data_root=PATH
    python transfer/segmentation/check_data.py --images PATH --label-maps PATH --num-classes 11 --reduce-zero-label yes

Finds names without a partner, unreadable files, different sizes, values that are no class, and reduce_zero_label set
the wrong way round. Ends with exit code 2 where it finds something.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.errors import UserError, user_errors
from transfer.engines import require
from transfer.segmentation.config import check_config_exists
from transfer.segmentation.label_check import (
    KINDS,
    MOST_CHECKED,
    MOST_NAMED,
    Problem,
    Survey,
    stray_maps,
    survey,
)
from transfer.segmentation.label_coding import LabelCoding, Names
from transfer.segmentation.label_maps import possible_pairs, read_classes
from transfer.segmentation.quiet import quietly


class LabelledFolders(NamedTuple):
    """What is to be checked: two folders, and what the values in the label maps mean.

    classes   a name for each class, None where nobody has named them
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


def check_folders(folders: LabelledFolders, *, most: int = MOST_CHECKED, seed: int = 0) -> tuple[Survey, int]:
    """Everything that is wrong with ``folders``, names first; pixels are read of ``most`` pairs, names of all.

    Also returns how many images there are. Raises ``UserError`` for a missing or empty folder.
    """
    pairs = possible_pairs(folders.images, folders.label_maps, map_suffix=folders.map_suffix)
    strays = list(stray_maps(pairs, folders.images, folders.label_maps, folders.map_suffix))
    whole = [pair for pair in pairs if pair.label_map.is_file()]
    found = survey(whole, folders.coding, channels=folders.channels, names=folders.origin, most=most, seed=seed)
    return found._replace(problems=[*strays, *found.problems]), len(pairs)


def folders_of_config(config: Path, options: Sequence[str] | Mapping[str, Any]) -> list[LabelledFolders]:
    """The training and the validation folders of an mmseg config."""
    require("mmseg")
    check_config_exists(config)
    with quietly():
        from transfer.segmentation import engine_mmseg

        given = options if isinstance(options, Mapping) else engine_mmseg.parse_options(options)
        return [LabelledFolders(**facts) for facts in engine_mmseg.folders_to_check(config, given)]


def describe(folders: LabelledFolders, found: Survey, total: int) -> str:
    """What was read, the share of each class, and the problems by kind, at most ``MOST_NAMED`` of each."""
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
    for kind in KINDS:
        problems = [problem for problem in found.problems if problem.kind == kind]
        if problems:
            lines.append(f"  {kind}: {len(problems)}")
            lines += [f"    {_sentence(problem)}" for problem in problems[:MOST_NAMED]]
            lines += ["    ..."] if len(problems) > MOST_NAMED else []
    return "\n".join(lines)


def _sentence(problem: Problem) -> str:
    return problem.sentence if problem.path in problem.sentence else f"{problem.path}: {problem.sentence}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with code 2 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="check_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=Path, nargs="?", metavar="CONFIG", help="an mmseg config, such as one of configs/segmentation")
    add("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as for train_net.py")
    add("--images", type=Path, metavar="DIR", help="folder of images, in place of a config")
    add("--label-maps", type=Path, metavar="DIR", help="folder of label maps of the same names")
    add("--num-classes", type=int, metavar="N", help="how many classes; left out where --classes names them")
    add("--classes", type=Path, metavar="FILE", help="their names: a line value<TAB>name for each")
    add("--reduce-zero-label", choices=("yes", "no"), help="yes: 0 is void, classes count from 1; no: 0 is a class")
    add("--map-suffix", default=".png", metavar="SUFFIX", help="what label maps have in place of the image's suffix")
    add("--most", type=int, default=MOST_CHECKED, metavar="N", help="read the pixels of at most this many pairs")
    given = parser.parse_args(arguments)
    with user_errors():
        if given.most < 1:
            raise UserError(f"--most is {given.most}; read at least 1 pair")
        if given.num_classes is not None and given.num_classes < 1:
            raise UserError(f"--num-classes is {given.num_classes}; give how many classes there are, 1 or more")
        typed = (given.images, given.label_maps, given.num_classes, given.classes, given.reduce_zero_label)
        if given.config and any(value is not None for value in typed):
            raise UserError("CONFIG names folders and classes; leave out CONFIG, or what describes a pair of folders")
        count = 0
        for folders in folders_of_config(given.config, given.cfg_options) if given.config else [_as_typed(given)]:
            found, total = check_folders(folders, most=given.most)
            print(describe(folders, found, total), flush=True)
            count += len(found.problems)
        if count:
            raise UserError(f"{count} problem{'s' * (count > 1)} found, listed above")
    print("nothing is wrong")


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
        raise UserError(f"without a CONFIG, {', '.join(missing)} must be given too")
    reduced = given.reduce_zero_label == "yes"
    names = read_classes(given.classes, reduce_zero_label=reduced) if given.classes else None
    if names is not None and given.num_classes not in (None, len(names)):
        raise UserError(f"--num-classes is {given.num_classes}, but {given.classes} names {len(names)}; leave it out")
    origin: Names = "written" if names else "unknown"
    coding = LabelCoding.of(len(names or ()) or given.num_classes, reduce_zero_label=reduced)
    return LabelledFolders("data", given.images, given.label_maps, coding, names, given.map_suffix, origin)


if __name__ == "__main__":
    main()
