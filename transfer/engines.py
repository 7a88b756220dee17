"""The frameworks that provide heads, losses and loops: what each can do, where it is, how to install it.

To add one: its package ``transfer/<task>/engine_<name>/``, and a row here.
"""

from __future__ import annotations

from collections import ChainMap
from importlib.util import find_spec
from typing import NamedTuple

from mae_core.errors import UserError


class Engine(NamedTuple):
    """A framework behind one door, its package.

    packages   what it imports
    install    the line that installs them, or where to read how
    module     the package that alone imports it
    can        options of a configuration that not every engine has, and this one has
    launch     "module:function" that starts the processes of ``--num-gpus``; empty where ``torchrun`` does
    own_config "module:function" that runs a Python config of the framework's own; empty where it has none
    zoo        whether whole detectors of the framework's model zoo can be read
    """

    packages: tuple[str, ...]
    install: str
    module: str
    can: tuple[str, ...] = ()
    launch: str = ""
    own_config: str = ""
    zoo: bool = False


DETECTRON2 = "transfer.detection.engine_detectron2"
DETECTION = {
    "torchvision": Engine(
        packages=("torchvision", "pycocotools"),
        install='pip install "mae-transfer[detection]"',
        module="transfer.detection.engine_torchvision",
        can=("ema", "optim.micro_batch"),
    ),
    "detectron2": Engine(
        packages=("detectron2", "pycocotools"),
        install="its page says how to install it: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
        module=DETECTRON2,
        can=("model.cascade",),
        launch=f"{DETECTRON2}:launch_processes",
        own_config=f"{DETECTRON2}:run_lazy_config",
        zoo=True,
    ),
}
"""Name in a configuration -> engine of detectors."""

SEGMENTATION = {
    "mmseg": Engine(
        packages=("mmcv", "mmengine", "mmseg"),
        install='pip install "mae-transfer[segmentation]"',
        module="transfer.segmentation.engine_mmseg",
    ),
}
"""Name -> engine of segmenters."""

ENGINES = ChainMap(DETECTION, SEGMENTATION)


def installed(package: str) -> bool:
    """Whether ``package`` can be imported; a bare folder of that name is not an install."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def states() -> list[tuple[str, list[str], str]]:
    """(name, packages of it that are missing, the line that installs them) of every engine, for ``mae doctor``."""
    return [
        (name, [package for package in engine.packages if not installed(package)], engine.install)
        for name, engine in ENGINES.items()
    ]


def require(name: str) -> None:
    """Raise ``UserError`` with the install command, unless engine ``name`` can be imported."""
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}; known: {', '.join((*DETECTION, *SEGMENTATION))}")
    engine = ENGINES[name]
    missing = [package for package in engine.packages if not installed(package)]
    if missing:
        task = "detection" if name in DETECTION else "segmentation"
        raise UserError(f"the {task} engine {name} needs {' and '.join(missing)}, not installed here; {engine.install}")
