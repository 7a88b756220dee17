"""The ranks that ``--launcher`` names: torchrun's, Slurm's, or this process alone."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from mae_core.errors import UserError
from mae_core.training.distributed import Place, join, world_size

LAUNCHERS = ("pytorch", "slurm", "none")
SLURM = {"SLURM_PROCID": "RANK", "SLURM_NTASKS": "WORLD_SIZE", "SLURM_LOCALID": "LOCAL_RANK"}
"""What Slurm calls the things that torch reads."""
PORT = "29500"
"""Where the ranks meet unless MASTER_PORT says otherwise; mmengine's default."""


def join_launched(launcher: str | None) -> Place:
    """Join the other ranks; None: those of torchrun, if it started this process.

    Raises ``UserError`` where the processes were started in another way than ``launcher`` says.
    """
    if launcher == "none" and world_size() > 1:
        raise UserError(
            f"--launcher none was asked for, but torchrun started {world_size()} processes, each of which would train "
            "alone; leave --launcher out, or start one process"
        )
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError(
            "--launcher pytorch was asked for, but torchrun did not start this process; "
            "use torchrun --nproc_per_node N train_net.py ..., or leave --launcher out"
        )
    if launcher == "slurm":
        translate_slurm(os.environ)
    return join("auto")


def translate_slurm(environment: MutableMapping[str, str]) -> None:
    """Set in ``environment`` what torch reads, from what Slurm says of this task; the ranks meet on the first node.

    Raises ``UserError`` outside of a Slurm step.
    """
    missing = [name for name in (*SLURM, "SLURM_NODELIST") if name not in environment]
    if missing:
        raise UserError(
            f"--launcher slurm was asked for, but {', '.join(missing)} is not set: Slurm did not start this process; "
            "use srun python train_net.py ..., or leave --launcher out"
        )
    for theirs, ours in SLURM.items():
        environment[ours] = environment[theirs]
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_NODELIST"]))
    environment.setdefault("MASTER_PORT", PORT)


def first_host(nodes: str) -> str:
    """``gpu[03-05,9],login1`` -> ``gpu03``."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part for part in found.groups() if part) if found else nodes
