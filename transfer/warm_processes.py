"""``mae`` commands as processes that start in milliseconds: forked from one that has imported torch and timm already.

A comparison is dozens of short trainings, of which the imports would take more time than the steps.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package", category=RuntimeWarning)
"""Said where the command was ``python -m``, whose module the process that is forked has imported too."""
AVAILABLE = "forkserver" in multiprocessing.get_all_start_methods()
PRELOADED = [
    *("torch", "torchvision", "timm", "mae_core.cli.main", "mae_core.training.finetune", "mae_core.training.linprobe"),
    *("mae_core.training.embedding", "mae_core.training.pretrain", "transfer.warm_processes"),
    *("transfer.detection.train_net", "transfer.detection.engine_torchvision"),
]
"""What the process that is forked has imported, where it is installed; no large framework of a task is among it."""


def run_warm(words: Sequence[str], place: Path, surroundings: Mapping[str, str], read: Callable[[str], None]) -> int:
    """Run ``mae WORDS`` in the folder ``place`` -> its exit code. ``read`` gets its lines, ``surroundings`` is added to
    its environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_be_command, args=(list(words), str(place), dict(surroundings), theirs))
    process.start()
    theirs.close()
    with os.fdopen(os.dup(ours.fileno()), encoding="utf-8", errors="replace") as lines:
        ours.close()
        for line in lines:
            read(line)
    process.join()
    return process.exitcode or 0


def _be_command(words: list[str], place: str, surroundings: dict[str, str], output: Connection) -> None:
    import torch

    from mae_core.cli.main import app

    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(place)
    os.environ.update(surroundings)
    torch.set_num_threads(int(surroundings.get("OMP_NUM_THREADS", torch.get_num_threads())))  # makes torch's pool anew
    warnings.simplefilter("ignore")
    sys.argv = ["mae", *words]
    app()
