"""What is in a set of images: ``mae data-stats``, and the checks of images without labels and of class folders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from mae_core.data.check import Compared, Problem, Report, compare, files_passed_over, turned_photos
from mae_core.data.contact_sheet import Cell
from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, size_of, to_picture, to_tensor, with_channels
from mae_core.data.images import (
    DEFAULT_STATISTICS,
    ImageFiles,
    ImageSource,
    Statistics,
    in_threads,
    passed_over_in,
)
from mae_core.data.labelled import LabelledPaths, read_image_folder, read_label_lists
from mae_core.data.near_copies import Fingerprints, fingerprint
from mae_core.data.reading import Notes, Reading, notes_taken
from mae_core.data.sources import JoinedSources, damaged_parts, open_places
from mae_core.data.statistics import Moments, PatchVariances, distance
from mae_core.errors import UserError

EXAMPLES = 10
MOST_CLASSES = 20
"""Classes whose images are counted line by line."""
COLOURS = frozenset({1, 2, 3, 4})
"""Channels of pictures that are read as grey or RGB."""
FAR = 1.0
"""Standard deviations of ImageNet's pixels that the mean of a set may be away, or factors of e between the two spreads,
before the check says so."""

FLAT = 3e-3
"""A patch is near-constant where its variance is below this share of the set's: in 8-bit photos some grey levels, in
dark microscopy one, which is noise."""
MANY_FLAT = 0.25
"""Share of near-constant patches from which the check says what to set."""
DAMPING_EPS = 1e-2
"""target.eps that keeps the target of a patch at ``FLAT`` at half its size (0.48), where 1e-6 gives it the full one."""

AS_STORED, AS_RGB = Reading(), Reading(3)

OnProgress = Callable[[int, int], None]


@dataclass
class Survey:
    """What was found in a set of images.

    sizes     (height, width) -> images
    channels  channels as stored -> images
    numbers   what a channel's values are -> images
    patches   variances of the patches of all images
    by_channels  channels -> moments of the images that have them, or can be brought to them
    stored_as    channels as stored, image by image; 0 where it cannot be read
    orientations images with an orientation tag other than 1, and the tag
    noticed   what else was noticed while they were decoded
    fingerprints  of the images, to compare them with one another
    """

    total: int
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)
    unreadable: list[Unreadable] = field(default_factory=list)
    by_channels: dict[int, Moments] = field(default_factory=dict)
    stored_as: list[int] = field(default_factory=list)
    orientations: list[tuple[Path | str, int]] = field(default_factory=list)
    noticed: Notes = field(default_factory=Notes)
    patches: PatchVariances = field(default_factory=PatchVariances)
    fingerprints: Fingerprints = field(default_factory=lambda: Fingerprints(0))

    @property
    def usual_channels(self) -> int:
        """The number of channels that most images have."""
        return self.channels.most_common(1)[0][0]

    def flat_share(self, channels: int) -> float:
        """The share of near-constant patches, beside the spread of the images with ``channels`` channels."""
        std = self.by_channels[channels].statistics().std
        variance = sum(value * value for value in std) / len(std)
        return self.patches.share_below(FLAT * variance) if variance else 1.0

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        found = {count: moments.statistics() for count, moments in sorted(self.by_channels.items())}
        return {
            "images": self.total,
            "readable": self.sizes.total(),
            "sizes": [[*size, count] for size, count in sorted(self.sizes.items())],
            "channels": dict(sorted(self.channels.items())),
            "numbers": dict(self.numbers),
            "statistics": {count: statistics._asdict() for count, statistics in found.items()},
            "near_constant_patches": {count: round(self.flat_share(count), 4) for count in found},
            "unreadable": [entry._asdict() for entry in self.unreadable],
        }


class Seen(NamedTuple):
    """What one image tells: (height, width), channels as stored, what its values are, what is measured and noticed, and
    its fingerprint."""

    size: tuple[int, int]
    stored: int
    numbers: str
    moments: Moments
    patches: PatchVariances
    noticed: Notes
    row: np.ndarray | None


def survey(source: ImageSource, *, channels: int | None = None, on_progress: OnProgress | None = None) -> Survey:
    """Read every image of a source opened as stored. ``channels``: what to bring all to, as a training would; images
    that cannot be are unreadable. Without it images of each number of channels are measured apart.

    Raises ``UserError`` where no image can be read.
    """
    found = Survey(len(source), unreadable=damaged_parts(source), fingerprints=Fingerprints(len(source)))
    names: Sequence[Path | str] = [path or name for path, name in zip(paths_of(source), source.names, strict=True)]

    def look(index: int) -> Seen | Unreadable:
        try:
            with notes_taken() as noticed:
                pixels = source.read(index)
            stored = len(to_tensor(pixels))
            try:
                brought = to_tensor(with_channels(pixels, channels))
                moments, patches = Moments.of(brought), PatchVariances.of(brought)
            except ValueError as error:
                raise UnreadableImage(names[index], str(error)) from None
        except UnreadableImage as error:
            return error.unreadable
        row = fingerprint(pixels) if index in found.fingerprints.chosen else None
        return Seen(size_of(pixels), stored, kind_of_numbers(pixels), moments, patches, noticed, row)

    for done, result in enumerate(in_threads(look, len(source)), start=1):
        if isinstance(result, Unreadable):
            found.unreadable.append(result)
            found.stored_as.append(0)
        else:
            found.sizes[result.size] += 1
            found.channels[result.stored] += 1
            found.numbers[result.numbers] += 1
            found.by_channels.setdefault(channels or result.stored, Moments()).add(result.moments)
            found.patches.add(result.patches)
            found.stored_as.append(result.stored)
            found.noticed.update(result.noticed)
            found.fingerprints.add(names[done - 1], result.row)
            if result.noticed.orientation is not None:
                found.orientations.append((names[done - 1], result.noticed.orientation))
        if on_progress is not None:
            on_progress(done, len(source))
    if not found.sizes:
        path_, reason = found.unreadable[0]
        raise UserError(f"none of {len(source)} images can be read; the first, {path_}: {reason}")
    return found


def cells_of(source: ImageSource) -> list[Cell]:
    """The images of a source for a contact sheet, each above its folder and its name."""

    def draw(index: int) -> Image.Image:
        return to_picture(source.read(index))

    called = zip(paths_of(source), source.names, strict=True)
    return [
        Cell((str(path or name),), "\n".join((Path(name).name, Path(name).parent.as_posix())), partial(draw, index))
        for index, (path, name) in enumerate(called)
    ]


def paths_of(source: ImageSource) -> list[Path | None]:
    """The file of every image; None where it lies inside another file."""
    if isinstance(source, JoinedSources):
        return [path for one in source.sources for path in paths_of(one)]
    return list(source.paths) if isinstance(source, ImageFiles) else [None] * len(source)


def kind_of_numbers(pixels: Pixels) -> str:
    """8 bits, or more."""
    deep = isinstance(pixels, Tensor) and pixels.is_floating_point()
    return "more than 8 bits, or not whole numbers" if deep else "8 bits"


def describe(found: Survey, channels: int | None = None) -> str:
    """The survey as text; the last line is what to write into a configuration."""
    readable = found.sizes.total()
    lines = [f"{found.total} images, {readable} readable, {len(found.unreadable)} not"]
    for axis, name in enumerate(("height", "width")):
        values = sorted(found.sizes.elements(), key=lambda size: size[axis])
        smallest, middle, largest = (values[place][axis] for place in (0, readable // 2, -1))
        lines.append(f"{name}: {smallest} to {largest} pixels, median {middle}")
    common, count = found.sizes.most_common(1)[0]
    lines.append(f"sizes: {len(found.sizes)}, the most common {common[0]}x{common[1]} ({count} images)")
    lines.append("channels: " + ", ".join(f"{n} in {count} images" for n, count in found.channels.most_common()))
    lines.append("values: " + ", ".join(f"{kind} in {count} images" for kind, count in found.numbers.most_common()))
    chosen = channels or found.usual_channels
    mean, std = found.by_channels[chosen].statistics()
    for number, (one_mean, one_std) in enumerate(zip(mean, std, strict=True)):
        lines.append(f"  channel {number}: mean {one_mean:.6g}, std {one_std:.6g}")
    if 0.0 in std:
        lines.append(
            f"channel {std.index(0.0)} is constant: its std is 0, and pixels cannot be divided by "
            "it; leave the channel out"
        )
    if channels is None and len(found.channels) > 1:
        others = found.sizes.total() - found.channels[chosen]
        lines.append(
            f"these are of the images with {chosen} channels; {others} images have another number of "
            f"channels; add --channels {chosen} to read them as training does"
        )
    if found.patches.counts.any():
        lines.append(f"near-constant: {found.flat_share(chosen):.0%} of the patches of {PatchVariances.SIDE} pixels")
    numbers = [", ".join(f"{value:.6g}" for value in values) for values in (mean, std)]
    lines.append(f"data: {{channels: {chosen}, mean: [{numbers[0]}], std: [{numbers[1]}]}}")
    return "\n".join(lines)


def describe_unreadable(found: Survey) -> list[str]:
    """A line for each of the first images that cannot be read, and how many more there are."""
    lines = [f"  unreadable: {path} ({reason})" for path, reason in found.unreadable[:EXAMPLES]]
    more = len(found.unreadable) - EXAMPLES
    return [*lines, f"  and {more} more; --json names all"] if more > 0 else lines


def check_images(
    paths: Sequence[Path],
    reading: Reading = AS_STORED,
    *,
    source: str = "auto",
    split: str | None = None,
    expected: Statistics | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Report]:
    """The check of images without labels: ``describe``, and what a pre-training would leave out or misread.

    ``reading`` is that of the training; where it leaves the channels open, they are 3 for pictures and else what most
    images have. ``expected`` are the statistics that the weights of the training state, which the images are compared
    with; else ImageNet's. Raises ``UserError`` where no image can be read.
    """
    channels = reading.channels
    images = open_places(paths, reading._replace(channels=None), kind=source, split=split)
    found = survey(images, channels=channels, on_progress=on_progress)
    chosen = channels or (3 if found.usual_channels in COLOURS else found.usual_channels)
    problems = list(_unreadable(found))
    if others := [index for index, stored in enumerate(found.stored_as) if not _brought_to(stored, chosen)]:
        as_trained = open_places(paths, reading._replace(channels=chosen), kind=source, split=split)
        problems += _other_channels(as_trained, others)
    problems += turned_photos(found.orientations)
    problems += _noticed(found)
    problems += files_passed_over(", ".join(map(str, paths)), passed_over_in(images))
    problems += _settings(found, chosen, expected)
    report = Report(", ".join(map(str, paths)), describe(found, channels).splitlines(), problems, found.as_dict())
    report.cells = partial(cells_of, images)
    compare(report, [], found.fingerprints)
    yield report


def check_folders(
    root: Path,
    reading: Reading = AS_RGB,
    *,
    expected: Statistics | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Report]:
    """The check of images with labels: ``root/{train,val}/<class>/*``, or ``root/{train,val}.csv``, a report each;
    ``reading`` and ``expected`` as in ``check_images``.

    Raises ``UserError`` where they cannot be found at all.
    """
    problems: list[Problem] = []
    channels = reading.channels or 3
    lists = (root / "train.csv").is_file() and not (root / "train").is_dir()
    halves = read_label_lists(root) if lists else read_image_folder(root, problems.append)
    reports = []
    train: Compared | None = None
    for name, half in zip(("train", "val"), halves, strict=True):
        place = root / (f"{name}.csv" if lists else name)
        counts = Counter(label for one in half.labels for label in ([one] if isinstance(one, int) else one))
        facts = [f"{place}: {len(half.paths)} images of {len(half.classes)} classes"]
        facts += [f"  {name_:<24} {counts[label]:>7} images" for label, name_ in enumerate(half.classes[:MOST_CLASSES])]
        facts += [f"  ... and {len(half.classes) - MOST_CLASSES} more"] if len(half.classes) > MOST_CLASSES else []
        reports.append(Report(str(place), facts, [p for p in problems if p.path.startswith(str(place))]))
        reports[-1].data = {"images": len(half.paths), "classes": half.classes}
        if half.paths:
            images = ImageFiles(half.paths, reading, root)
            found = survey(images, channels=channels, on_progress=on_progress)
            reports[-1].cells = partial(cells_of, images)
            reports[-1].data |= found.as_dict()
            reports[-1].problems += [*_unreadable(found), *turned_photos(found.orientations)]
            reports[-1].problems += [*_noticed(found), *_settings(found, channels, expected)]
            train = compare(reports[-1], half.paths, found.fingerprints, train)
        reports[-1].problems += _labels_without_images(half, counts, name)
        reports[-1].problems += files_passed_over(place, half.passed_over)
    yield from reports


def _noticed(found: Survey) -> Iterator[Problem]:
    for sentence in found.noticed.sentences(found.sizes.total()):
        yield Problem("pixels", sentence, "", "note")


def _unreadable(found: Survey) -> Iterator[Problem]:
    for path, reason in found.unreadable:
        yield Problem("unreadable images", f"{path}: {reason}; repair or remove it", path, "wrong")


def _brought_to(stored: int, channels: int) -> bool:
    """Whether a training with ``channels`` reads an image that has ``stored``; 0 is unreadable, and told already."""
    return stored in (0, channels) or (stored in (1, 3) and channels in (1, 3))


def _other_channels(images: ImageSource, indices: Sequence[int]) -> Iterator[Problem]:
    """Those of the images that a training cannot read though they are sound; ``images`` reads as it does."""
    for index in indices:
        try:
            images.read(index)
        except UnreadableImage as error:
            path, reason = error.unreadable
            sentence = f"{path}: {reason}; remove it, or store all with the same channels"
            yield Problem("images with other channels", sentence, path, "wrong")


def _settings(found: Survey, channels: int, expected: Statistics | None) -> Iterator[Problem]:
    """What a configuration should say of these images."""
    if channels in found.by_channels and (share := found.flat_share(channels)) >= MANY_FLAT:
        sentence = (
            f"{share:.0%} of the patches are near-constant; the normalised target makes as much of their noise as of "
            f"any other patch: pre-train with target.eps={DAMPING_EPS:g}, or target.kind=pixels"
        )
        yield Problem("settings", sentence, "", "note")
    if channels not in COLOURS:
        yield Problem("settings", f"set data.channels={channels}; training reads 3 channels otherwise", "", "note")
    usual = Statistics(*DEFAULT_STATISTICS[channels]) if channels in DEFAULT_STATISTICS else None
    model = expected or usual
    if channels not in found.by_channels or model is None or len(model.mean) != channels:
        return
    away, spread = distance(found.by_channels[channels].statistics(), model)
    if away > FAR or math.log(spread) > FAR:
        whose = "those of the weights" if expected else "ImageNet's"
        used = (
            "the weights expect their own, which training uses: images like these look new to them"
            if expected
            else "training from scratch measures and uses those of the images, except with data.statistics=imagenet, "
            "which the published recipes set: set data.statistics=own there"
        )
        sentence = (
            f"mean and std are far from {whose} (the mean by {away:.1f} of its standard deviations, the std by a "
            f"factor of {spread:.1f}); {used}"
        )
        yield Problem("settings", sentence, "", "note")


def _labels_without_images(half: LabelledPaths, counts: Counter[int], name: str) -> Iterator[Problem]:
    absent = [class_name for label, class_name in enumerate(half.classes) if not counts[label]]
    if absent and name == "val":
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        yield Problem("classes", f"{len(absent)} classes have no validation image: {shown}", "", "note")
