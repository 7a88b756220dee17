"""What a run directory has recorded, of whatever task: configuration, data, log, events, pictures; nothing in it is
run."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_core.config.load import flattened, read_layers
from mae_core.errors import UserError
from mae_core.layout import (
    CLASSIFIER,
    CONFIG,
    DATA,
    ENCODER,
    ENVIRONMENT,
    EVENTS,
    LOADING,
    LOG,
    METRICS,
    PICTURES,
)

CLOCK = ("time", "data_time", "data_wait", "images_per_second")
"""Numbers of a log that say how fast a machine was."""
RESULTS = (ENCODER, CLASSIFIER, "detector.safetensors", "segmenter.safetensors")


@dataclass(frozen=True)
class Recorded:
    """A run directory.

    config       dotted key -> value, of every option
    steps        lines of the log with a step and numbers, in its order
    events       lines of the log with an event, and the dumps of events/
    results      weights files of a finished run
    """

    folder: Path
    config: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    loading: dict[str, Any]
    metrics: dict[str, Any]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    pictures: list[Path]
    results: list[Path]

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a number of the log, wherever it is finite."""
        return [(line["step"], line[name]) for line in self.steps if is_number(line.get(name))]

    @property
    def numbers(self) -> list[str]:
        """Names of the numbers of the log, in the order in which they appear."""
        found: dict[str, None] = {}
        for line in self.steps:
            found |= dict.fromkeys(name for name, value in line.items() if is_number(value))
        return [name for name in found if name != "step"]

    @property
    def last_step(self) -> int:
        """The last step that the log has; 0 where it has none."""
        return max((int(line["step"]) for line in self.steps), default=0)


def is_number(value: Any) -> bool:
    """Whether a value of a log is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_recorded(folder: Path | str) -> Recorded:
    """Read a run directory, finished or not. Raises ``UserError`` for a folder that is none; a line of the log or a
    file that is damaged counts as missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run directory; give the folder that a training wrote with output=FOLDER")
    if not any((folder / name).is_file() for name in (CONFIG, LOG, METRICS)):
        raise UserError(f"{folder} holds no run: neither {CONFIG}, {LOG} nor {METRICS} is in it")
    lines = log_lines(folder / LOG)
    dumps = [{"event": "dump", "file": str(path.relative_to(folder))} for path in sorted((folder / EVENTS).glob("*"))]
    return Recorded(
        folder=folder,
        config=read_options(folder),
        **{name: _read(folder / file) for name, file in _FILES.items()},
        steps=[line for line in lines if is_number(line.get("step")) and "event" not in line],
        events=[line for line in lines if "event" in line] + dumps,
        pictures=sorted((folder / PICTURES).glob("*.png")),
        results=[folder / name for name in RESULTS if (folder / name).is_file()],
    )


_FILES = {"data": DATA, "environment": ENVIRONMENT, "loading": LOADING, "metrics": METRICS}


def log_lines(log: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl that can be read."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in map(_object, text.splitlines()) if line]


def _read(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError):
        return {}


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_options(folder: Path) -> dict[str, Any]:
    """Dotted key -> value of a run's configuration: config.yaml, or the config that mmengine wrote, whose values are
    read as text. Empty where there is none."""
    if (folder / CONFIG).is_file():
        return flattened(read_layers(folder / CONFIG)[folder / CONFIG])
    for path in sorted(folder.glob("*.py")):
        return flattened(_assigned(path))
    return {}


def _assigned(path: Path) -> dict[str, Any]:
    """Names and values of a Python file of assignments; a value that is more than data is left out."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return {}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = _value(node.value)
            except ValueError:
                continue
    return found


def _value(node: ast.expr) -> Any:
    """A literal, with ``dict(a=1)`` as one. Raises ``ValueError`` for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(word.arg): _value(word.value) for word in node.keywords}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part) for part in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {str(key.value): _value(value) for key, value in zip(node.keys, node.values, strict=True)}  # type: ignore[union-attr]
    return ast.literal_eval(node)


def changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, or that one side lacks; those of ``one`` first."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]
