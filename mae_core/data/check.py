"""What a check of data finds, in one form for every task: problems, reports, their text and JSON, and the exit code.

A reader of data takes ``tell`` and calls it with every problem it meets. Training passes ``refuse``, which raises the
first one that it cannot start with; a check passes the ``append`` of a list. Both run the same code.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from PIL import Image

from mae_core.atomic import write_json
from mae_core.data.contact_sheet import Cell, check_new_picture, draw_checked
from mae_core.data.images import describe_passed_over
from mae_core.data.near_copies import Copy, Fingerprints, copies_across, copies_within
from mae_core.data.orientation import UPRIGHT
from mae_core.errors import UserError

Severity = Literal["refused", "wrong", "note"]
CONSEQUENCES: dict[Severity, str] = {
    "note": "training accepts them",
    "refused": "training refuses to start",
    "wrong": "training would start, but leave them out or learn from wrong data",
}
MOST_NAMED = 5
"""Problems of one kind that are named; the rest are counted."""


class Problem(NamedTuple):
    """One thing that a check found.

    kind      a few words that it shares with others like it
    sentence  what was found, where, and what to do
    path      the file, where it is about one
    severity  a key of ``CONSEQUENCES``; a note leaves the exit code at 0
    """

    kind: str
    sentence: str
    path: str = ""
    severity: Severity = "refused"


Tell: TypeAlias = Callable[[Problem], None]


def refuse(problem: Problem) -> None:
    """What a training does with a problem: raises ``UserError`` where it cannot start with it."""
    if problem.severity == "refused":
        raise UserError(problem.sentence)


@dataclass
class Report:
    """What is in one set of data: facts, line by line, and what was found; ``data`` holds the facts for the JSON,
    ``copies`` the images that are copies or near-copies of others. ``cells`` gives what a contact sheet shows of it,
    ``legend`` what its colours mean, for a width in pixels."""

    name: str
    facts: list[str]
    problems: list[Problem] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    legend: Callable[[int], Image.Image] | None = None
    cells: Callable[[], Sequence[Cell]] = list

    def describe(self, most: int = MOST_NAMED) -> str:
        """The facts, the notes, then the problems by kind, at most ``most`` of each."""
        lines = list(self.facts)
        for severity, consequence in CONSEQUENCES.items():
            of_this = [problem for problem in self.problems if problem.severity == severity]
            for kind, count in Counter(problem.kind for problem in of_this).items():
                sentences = [p.sentence.removeprefix(f"{self.name}: ") for p in of_this if p.kind == kind]
                if severity == "note":
                    lines += [f"  note: {sentence}" for sentence in sentences[:most]]
                else:
                    lines += [f"  {kind}: {count} ({consequence})"]
                    lines += [f"    {sentence}" for sentence in sentences[:most]]
                lines += [f"    ... and {count - most} more"] if count > most else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file: all problems, not only those that ``describe`` names."""
        copies, problems = ([entry._asdict() for entry in found] for found in (self.copies, self.problems))
        return {"name": self.name, **self.data, "near_copies": copies, "problems": problems}


def conclude(
    reports: Iterable[Report],
    json_file: Path | None = None,
    say: Callable[[str], None] = partial(print, flush=True),
    *,
    picture: Path | None = None,
) -> None:
    """Print every report as it comes, write all of them to ``json_file``, draw their images into ``picture``, and print
    the outcome.

    Raises ``UserError`` (exit code 2 of a command) where anything is more than a note, and where a file exists.
    """
    if json_file is not None and json_file.exists():
        raise UserError(f"{json_file} exists; choose another file with --json")
    check_new_picture(picture)
    done = []
    for report in reports:
        say(report.describe())
        done.append(report)
    wrong = [problem for report in done for problem in report.problems if problem.severity != "note"]
    if json_file is not None:
        write_json(json_file, {"sets": [report.as_dict() for report in done], "wrong": len(wrong)})
    if picture is not None:
        cells = [cell for report in done for cell in report.cells()]
        copies = [copy for report in reversed(done) for copy in report.copies]  # leaks into validation first
        legend = next((report.legend for report in done if report.legend is not None), None)
        say(draw_checked(picture, cells, {problem.path for problem in wrong}, copies, legend))
    if wrong:
        raise UserError(
            f"{len(wrong)} problem{'s' * (len(wrong) > 1)} found, listed above; correct the data and check it again"
        )
    say("nothing is wrong")


def turned_photos(found: Iterable[tuple[Path | str, int]]) -> Iterator[Problem]:
    """A note for each orientation other than upright, with its number and its first file."""
    by_orientation: dict[int, list[Path | str]] = defaultdict(list)
    for path, orientation in found:
        if orientation != UPRIGHT:
            by_orientation[orientation].append(path)
    for orientation, paths in sorted(by_orientation.items()):
        images = "1 image" if len(paths) == 1 else f"{len(paths)} images"
        sentence = (
            f"{images} with the orientation tag {orientation}, the first is {paths[0]}; "
            "every task reads them upright, so labels must be drawn on the upright picture"
        )
        yield Problem("turned photos", sentence, str(paths[0]), "note")


def files_passed_over(place: Path | str, passed_over: Mapping[str, int]) -> Iterator[Problem]:
    """A note with the files of ``place`` that are not taken for images."""
    if passed_over:
        remedy = "give those that are images the ending of their format, or move or convert them"
        sentence = f"{place}: {describe_passed_over(passed_over)}; {remedy}"
        yield Problem("files passed over", sentence, str(place), "note")


class Compared(NamedTuple):
    """A set whose images were compared: its files, and their fingerprints."""

    files: Sequence[Path]
    fingerprints: Fingerprints


def compare(
    report: Report, files: Sequence[Path], fingerprints: Fingerprints, train: Compared | None = None
) -> Compared:
    """Add to the report of a set which of its images are near-copies of one another, and, of a validation set, which
    are in the training set too, the same bytes or near-copies."""
    copies = copies_within(fingerprints)
    report.problems += _near_copies(fingerprints, copies)
    if train is not None:
        equal = _equal_files(train.files, files)
        report.problems += _shared(equal, len(files))
        known = {str(path) for _, path in equal}
        across = [copy for copy in copies_across(fingerprints, train.fingerprints) if copy.name not in known]
        report.copies += [*(Copy(str(path), str(one), 1.0) for one, path in equal), *across]
        report.problems += _near_in_both(across, fingerprints, train.fingerprints)
    report.copies += copies
    return Compared(files, fingerprints)


def shared_images(train: Sequence[Path], val: Sequence[Path]) -> Iterator[Problem]:
    """A note where files of both halves hold the same bytes: scores on them do not hold for new images."""
    yield from _shared(_equal_files(train, val), len(val))


def _shared(equal: Sequence[tuple[Path, Path]], total: int) -> Iterator[Problem]:
    if equal:
        one, other = equal[0]
        sentence = (
            f"{len(equal)} of {total} validation images are in the training set too, the first is {other} ({one}); "
            "scores on them say nothing about new images; remove them from one of the two sets"
        )
        yield Problem("images in both halves", sentence, str(other), "note")


def _near_copies(images: Fingerprints, copies: Sequence[Copy]) -> Iterator[Problem]:
    if copies:
        first = copies[0]
        sentence = (
            f"{len(copies)} of {images.total} images are near-copies of another one{images.extent}, the first is "
            f"{first.name} (of {first.of}, correlation {first.similarity:.3f}); training sees such an image more often "
            "than others, and a split must keep all its copies on one side; remove those that are not wanted"
        )
        yield Problem("near-copies", sentence, first.name, "note")


def _near_in_both(copies: Sequence[Copy], images: Fingerprints, train: Fingerprints) -> Iterator[Problem]:
    if copies:
        first = copies[0]
        sentence = (
            f"{len(copies)} of {images.total} validation images are near-copies of training images"
            f"{images.extent or train.extent}, the first is {first.name} (of {first.of}, correlation "
            f"{first.similarity:.3f}); scores on them say little about new images; keep copies, and neighbouring "
            "frames of a video, in one of the two sets"
        )
        yield Problem("near-copies in both halves", sentence, first.name, "note")


def _equal_files(train: Sequence[Path], val: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(training file, validation file) of the same bytes: compared by size first; only those of equal size are read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in train:
        if path.is_file():
            by_size[path.stat().st_size].append(path)
    pairs = []
    digests: dict[Path, bytes] = {}
    for path in val:
        candidates = by_size.get(path.stat().st_size, []) if path.is_file() else []
        same = next((one for one in candidates if _digest(one, digests) == _digest(path, digests)), None)
        if same is not None:
            pairs.append((same, path))
    return pairs


def _digest(path: Path, known: dict[Path, bytes]) -> bytes:
    if path not in known:
        known[path] = hashlib.blake2b(path.read_bytes()).digest()
    return known[path]
