"""``mae compare-runs``: where two runs first differ, in configuration, data, logged numbers and weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from mae_core.training.recorded import CLOCK, Recorded, changed, read_recorded
from mae_core.training.resuming_proof import differences
from mae_core.training.run import MAY_CHANGE

PLACES = tuple(name for name in MAY_CHANGE if name not in ("data.statistics", "data.max_pixels", "data.on_error"))
"""Options that say where and how fast, not what is computed."""
PLACES_OF_ENGINES = ("work_dir", "experiment_name", "visualizer", "vis_backends", "launcher", "resume", "load_from")
"""The same of mmengine's configs, with what it draws anew for each run."""
SHOWN, LONGEST = 5, 80
"""Options that are named; characters of a value."""


class Difference(NamedTuple):
    """One part of two runs: whether it is the same in both, and a sentence."""

    part: str
    same: bool
    text: str


def compare_runs(one: Path, other: Path, *, tolerance: float = 0.0) -> list[Difference]:
    """Compare the runs in two folders, finished or not; ``tolerance`` is the relative difference of logged numbers, and
    of weights, that counts as none.

    Raises ``UserError`` for a folder that holds no run.
    """
    left, right = read_recorded(one), read_recorded(other)
    return [
        _options(left, right),
        _data(left, right),
        _losses(left, right, tolerance),
        *_weights(left, right, tolerance),
    ]


def _options(left: Recorded, right: Recorded) -> Difference:
    keys = changed(left.config, right.config)
    matter = [key for key in keys if not key.startswith((*PLACES, *PLACES_OF_ENGINES))]
    others = len(keys) - len(matter)
    rest = f"; options of place and speed differ, such as {keys[0]}" if others and not matter else ""
    if not left.config or not right.config:
        missing = left.folder if not left.config else right.folder
        return Difference("config", not (left.config or right.config), f"{missing} holds no configuration")
    if not matter:
        return Difference("config", True, f"equal{rest}")
    shown = [f"{key}: {_short(left.config.get(key))} -> {_short(right.config.get(key))}" for key in matter[:SHOWN]]
    more = f"; and {len(matter) - SHOWN} more" if len(matter) > SHOWN else ""
    return Difference("config", False, f"{'; '.join(shown)}{more}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _data(left: Recorded, right: Recorded) -> Difference:
    keys = changed(left.data, right.data)
    if not left.data and not right.data:
        return Difference("data", True, "neither run has a fingerprint of its data")
    if keys == ["images"] or "images" in keys:
        return Difference("data", False, f"{left.data.get('images')} -> {right.data.get('images')} images")
    if keys:
        return Difference("data", False, f"the same number of images, with another {keys[0]}")
    return Difference("data", True, f"the same {left.data.get('images')} images")


def _losses(left: Recorded, right: Recorded, tolerance: float) -> Difference:
    """The first number of the first step, of those that both logs have, in which they differ."""
    lines = [{(line["step"], name): line[name] for line in run.steps for name in line} for run in (left, right)]
    shared = [key for key in lines[0] if key in lines[1] and key[1] not in (*CLOCK, "step")]
    for step, name in shared:
        one, other = lines[0][step, name], lines[1][step, name]
        if not _close(one, other, tolerance):
            return Difference("loss", False, f"equal until step {step}, where {name} is {one} -> {other}")
    if not shared:
        empty = not left.steps and not right.steps
        return Difference("loss", empty, "neither has a log" if empty else "the logs have no step in common")
    last = max(step for step, _ in shared)
    if left.last_step != right.last_step:
        ends = f"{left.last_step} -> {right.last_step}"
        return Difference("loss", False, f"equal until step {last}; the logs end at {ends}")
    return Difference("loss", True, f"equal in all {len({step for step, _ in shared})} logged steps until {last}")


def _close(one: object, other: object, tolerance: float) -> bool:
    if isinstance(one, float | int) and isinstance(other, float | int):
        return one == other or math.isclose(one, other, rel_tol=tolerance) or (one != one and other != other)
    return one == other


def _weights(left: Recorded, right: Recorded, tolerance: float) -> list[Difference]:
    names = [path.name for path in left.results if path.name in {path.name for path in right.results}]
    found = []
    for name in names:
        number, differing = differences(left.folder / name, right.folder / name)
        far = {tensor: how for tensor, how in differing.items() if not how <= tolerance}
        if not far:
            found.append(Difference(name, True, f"all {number} tensors are equal"))
            continue
        first = next(iter(far))
        text = f"{len(far)} of {number} tensors differ, the first {first} by {far[first]:.3g} of its size"
        found.append(Difference(name, False, text))
    return found
