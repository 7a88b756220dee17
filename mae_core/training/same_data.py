"""Whether a resumed run reads the data that it was started on: names, sizes and contents, of large sets by a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.atomic import read_json
from mae_core.data.decoding import UnreadableImage
from mae_core.data.images import spread_indices
from mae_core.errors import UserError
from mae_core.layout import DATA

SAMPLED = 64
"""Images, spread over the set, whose content is compared: of data of which a tenth was replaced, one set of a thousand
passes."""


class Data(NamedTuple):
    """What a run reads.

    names    of its images, the same wherever they lie
    content  index of an image -> its file; None where files are no matter
    labels   files of labels, such as a COCO json
    """

    names: Sequence[str]
    content: Callable[[int], bytes] | None = None
    labels: Sequence[Path] = ()


def fingerprint(data: Data) -> dict[str, Any]:
    """The content of data.json: number of images, hash of their names, bytes and hashes of a sample and of the labels.
    An image of the sample that cannot be read is left out."""
    text = "\n".join(data.names)
    found: dict[str, Any] = {
        "images": len(data.names),
        "sha256": hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest(),
    }
    if data.content is not None:
        found["sample"] = {}
        for index in spread_indices(len(data.names), SAMPLED):
            try:
                found["sample"][data.names[index]] = _summary(data.content(index))
            except UnreadableImage:
                continue
    if data.labels:
        found["labels"] = {path.name: _summary(path.read_bytes()) for path in data.labels if path.is_file()}
    return found


def _compared(entries: object) -> dict[str, Any]:
    return entries if isinstance(entries, dict) else {}


def _summary(content: bytes) -> list[Any]:
    """Bytes and hash."""
    return [len(content), hashlib.sha256(content).hexdigest()[:16]]


def check_data(
    folder: Path,
    found: Mapping[str, Any],
    remedy: str = "set data.path to the same files, or start a new run with output=FOLDER",
) -> None:
    """Refuse a resume on other data than the run in ``folder`` started on, as its data.json describes it. What an older
    version of that file does not have is not compared."""
    file = folder / DATA
    started = read_json(file)
    if started is None or not {"images", "sha256"} <= started.keys():
        print(f"{file} is missing or damaged: the run may have started on other images, which cannot be checked")
        return
    if any(started[key] != found[key] for key in ("images", "sha256")):
        counts = f"{started['images']} images then, {found['images']} now"
        raise UserError(f"{folder} was started on other images ({counts}, or other names); {remedy}")
    for key, what in (("sample", "images"), ("labels", "labels")):
        before, now = (_compared(each.get(key)) for each in (started, found))
        replaced = [name for name in before if name in now and before[name] != now[name]]
        if replaced:
            number = f"{len(replaced)} of {len(before)} compared files have another content, such as {replaced[0]}"
            raise UserError(f"{folder} was started on other {what} of the same names: {number}; {remedy}")
