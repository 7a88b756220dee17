"""``segmenter.safetensors``: a trained segmenter's tensors, classes and config. Read without running what is in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_core.errors import UserError
from mae_core.weights.files import read_weights

SEGMENTER = "segmenter.safetensors"
LAST_CHECKPOINT = "last_checkpoint"
"""mmengine's file that names the last checkpoint of a run; written after the checkpoint itself."""
FORMAT = "mae_core segmenter"


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint of mmengine's by its name, ``iter_<step>.pth``."""
    found = re.fullmatch(r"iter_(\d+)\.pth", checkpoint.name)
    return int(found[1]) if found else None


def steps_saved(run: Path) -> list[Path]:
    """The checkpoints in a run directory, newest first."""
    return sorted((p for p in run.glob("iter_*.pth") if step_of(p) is not None), key=lambda p: -(step_of(p) or 0))


@dataclass(frozen=True)
class SegmenterFile:
    """What a segmenter file holds.

    classes, palette   a name and an RGB colour per class, in the order of the output channels
    values             the value of each class in a label map
    reduce_zero_label  whether label maps count the classes from 1, with 0 = ignored
    config             the mmseg config it was trained with, as nested dicts and lists
    """

    path: Path
    state: dict[str, Tensor]
    classes: list[str]
    palette: list[tuple[int, int, int]]
    values: list[int]
    reduce_zero_label: bool
    config: dict[str, Any]
    metadata: dict[str, Any]


def read_segmenter(path: Path | str) -> SegmenterFile:
    """Read a segmenter file, or that of a run directory.

    Raises ``UserError`` for a missing, truncated or other file.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / SEGMENTER).is_file():
            raise UserError(f"{path} holds no {SEGMENTER}; give a finished segmentation run, or the file itself")
        path = path / SEGMENTER
    state, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        found = metadata.get("format") or f"tensors such as {next(iter(state))}"
        raise UserError(f"{path} is not a segmenter (it holds {found}); give the {SEGMENTER} of a segmentation run")
    try:
        return SegmenterFile(
            path=path,
            state=state,
            classes=[str(name) for name in metadata["classes"]],
            palette=[(int(red), int(green), int(blue)) for red, green, blue in metadata["palette"]],
            values=values_of(metadata),
            reduce_zero_label=bool(metadata["reduce_zero_label"]),
            config=literal_config(metadata["config"]),
            metadata=metadata,
        )
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise UserError(f"the metadata of {path} is damaged ({error}); copy or train it again") from None


def values_of(metadata: Mapping[str, Any]) -> list[int]:
    """The value of each class; files without ``label_values`` count them from 0 or 1."""
    first = 1 if metadata["reduce_zero_label"] else 0
    counted = range(first, first + len(metadata["classes"]))
    return [int(value) for value in metadata.get("label_values") or counted]


def literal_config(source: str) -> dict[str, Any]:
    """A config's Python text, ``key = value`` with literals and ``dict(...)`` alone -> nested dicts, lists and tuples.

    Raises ``ValueError`` for anything else: a file's text is never executed.
    """
    config = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            raise ValueError(f"line {node.lineno} of its config does not assign a value")
        config[node.targets[0].id] = _literal(node.value)
    return config


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(word.arg): _literal(word.value) for word in node.keywords}
    if isinstance(node, ast.Dict):
        keys = [_literal(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.List):
        return [_literal(entry) for entry in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(entry) for entry in node.elts)
    return ast.literal_eval(node)
