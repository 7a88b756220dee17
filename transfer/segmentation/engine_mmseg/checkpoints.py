"""mmengine's checkpoints, read without running what is in them."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mae_core.errors import UserError, first_line
from mae_core.weights.files import HARMLESS_BESIDE_TENSORS
from transfer.segmentation.segmenter_file import literal_config


def history_method(owner: Any, name: str) -> Any:
    """What ``getattr`` does in a checkpoint of mmengine's, and nothing else: methods of ``HistoryBuffer``."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r}")
    return getattr(owner, name)


SAFE_GLOBALS: list[Any] = [
    HistoryBuffer,
    (history_method, "builtins.getattr"),
    (history_method, "__builtin__.getattr"),
    *HARMLESS_BESIDE_TENSORS,
]
"""What mmengine's checkpoints hold besides tensors and plain values."""


def load_safely(filename: str, map_location: Any = None) -> dict[str, Any]:
    """``read_checkpoint`` in the place of mmengine's loader; without the stored config, which mmengine executes."""
    checkpoint = read_checkpoint(Path(filename).expanduser(), map_location)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("meta"), dict):
        checkpoint["meta"].pop("cfg", None)
        checkpoint["meta"].pop("config", None)
    return checkpoint


def stored_config(path: Path) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint, as nested dicts; empty where the checkpoint holds none that is
    literal."""
    checkpoint = read_checkpoint(path)
    try:
        return literal_config(checkpoint["meta"]["cfg"])
    except (KeyError, TypeError, ValueError, SyntaxError):
        return {}


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A local checkpoint, read without running code in it.

    Raises ``UserError`` for a file that holds anything else.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not a checkpoint; give one that this toolkit wrote")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        # torch's own message is a page about weights_only=False
        asked = re.search(r"(?:GLOBAL|attribute) (\S+)", str(error))
        raise UserError(
            f"checkpoint {path} is refused: it is broken, or holds more than tensors and plain values "
            f"({asked[0] if asked else first_line(error)[:200]}); use one that this toolkit wrote"
        ) from None
    return checkpoint


CheckpointLoader.register_scheme("", load_safely, force=True)
