"""The frameworks that bring heads, losses and loops: which there are, whether one is installed, how to install it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, NamedTuple

from mae_core.errors import UserError


class Engine(NamedTuple):
    """A framework behind one door, the file ``transfer/<task>/engine_<name>.py``.

    packages  what it imports; install: the line that installs them, or where to read how
    """

    task: Literal["detection", "segmentation"]
    packages: tuple[str, ...]
    install: str


ENGINES = {
    "torchvision": Engine("detection", ("torchvision", "pycocotools"), 'pip install "mae-transfer[detection]"'),
    "detectron2": Engine(
        "detection",
        ("detectron2", "pycocotools"),
        "its page says how to install it: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
    ),
    "mmseg": Engine("segmentation", ("mmcv", "mmengine", "mmseg"), 'pip install "mae-transfer[segmentation]"'),
}
"""Name in a configuration -> engine. To add one: its file, and a row."""


def engines_for(task: str) -> dict[str, Engine]:
    """The rows of one task."""
    return {name: engine for name, engine in ENGINES.items() if engine.task == task}


def installed(package: str) -> bool:
    """Whether ``package`` can be imported; a bare folder of that name is not an install."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def require(name: str) -> None:
    """Raise ``UserError`` with the line that installs what is missing, unless engine ``name`` can be imported."""
    if name not in ENGINES:
        raise UserError(f"there is no engine {name!r}; known: {', '.join(ENGINES)}")
    engine = ENGINES[name]
    missing = [package for package in engine.packages if not installed(package)]
    if missing:
        raise UserError(
            f"the {engine.task} engine {name} needs {' and '.join(missing)}, not installed here; {engine.install}"
        )
