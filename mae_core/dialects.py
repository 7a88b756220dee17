"""The words of three command lines for the same things, so that a word of another one is answered with the right one.

``mae`` and the YAML recipes write ``key=value``; the detection script has detectron2's flags, the segmentation script
mmseg's.
"""

from __future__ import annotations

import argparse
import re
from typing import Any, Literal, NoReturn

Dialect = Literal["mae", "detectron2", "mmseg"]
DETECTION_SCRIPT: Dialect = "detectron2"
SPELLINGS: dict[str, dict[Dialect, str]] = {
    "config": {"mae": "RECIPE or FILE.yaml", "detectron2": "--config-file FILE.yaml", "mmseg": "RECIPE or FILE.py"},
    "weights": {"mae": "weights=FILE", "detectron2": "weights=FILE", "mmseg": "--weights FILE"},
    "branch": {"mae": "branch=NAME", "detectron2": "branch=NAME", "mmseg": "--branch NAME"},
    "output": {"mae": "output=DIR", "detectron2": "output=DIR", "mmseg": "--work-dir DIR"},
    "data": {"mae": "data.path=DIR", "detectron2": "data.path=DIR", "mmseg": "--cfg-options data_root=DIR"},
    "option": {"mae": "key=value", "detectron2": "key=value", "mmseg": "--cfg-options key=value"},
    "seed": {"mae": "seed=N", "detectron2": "seed=N", "mmseg": "--cfg-options randomness.seed=N"},
    "device": {"mae": "device=cpu", "detectron2": "device=cpu", "mmseg": "CUDA_VISIBLE_DEVICES= before the command"},
    "scratch": {"mae": "from_scratch=true", "detectron2": "from_scratch=true", "mmseg": "no --weights"},
}
"""A thing -> how each command line writes it."""
_WORDS = {
    "config": ("--config-file", "--config", "--cfg"),
    "weights": ("--weights", "weights", "--checkpoint", "--pretrained"),
    "branch": ("--branch", "branch"),
    "output": ("--work-dir", "--output", "--output-dir", "--out", "output", "OUTPUT_DIR"),
    "data": ("--data", "--data-path", "--data-root", "--data_path", "data.path", "data_root"),
    "option": ("--cfg-options", "--opts", "--options"),
    "seed": ("--seed", "seed"),
    "device": ("--device", "device"),
    "scratch": ("--from-scratch", "from_scratch"),
}


def other_word(word: str, dialect: Dialect) -> str | None:
    """How ``dialect`` writes what ``word`` (``--weights``, ``weights=FILE``) says in another command line, as a
    sentence; None for a word of none of them."""
    name = word.partition("=")[0]
    thing = next((thing for thing, words in _WORDS.items() if name in words), None)
    return None if thing is None else f"{name} is written {SPELLINGS[thing][dialect]} here"


class DialectParser(argparse.ArgumentParser):
    """A parser of one dialect, which answers an unknown word that another dialect knows."""

    def __init__(self, *arguments: Any, dialect: Dialect, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.dialect = dialect

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with code 2."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        super().error((unknown and other_word(unknown[1], self.dialect)) or message)
