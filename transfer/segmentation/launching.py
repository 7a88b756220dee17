"""The ranks that ``--launcher`` names: torchrun's, Slurm's, or this process alone."""

from __future__ import annotations

import os

from mae_core.errors import UserError
from mae_core.training.distributed import Place, join, world_size
from mae_core.training.slurm import translate

LAUNCHERS = ("pytorch", "slurm", "none")


def join_launched(launcher: str | None) -> Place:
    """Join the other ranks; None: those of torchrun or srun, if one of them started this process.

    Raises ``UserError`` where the processes were started in another way than ``launcher`` says.
    """
    if launcher == "none" and world_size() > 1:
        raise UserError(
            f"--launcher none was asked for, but {world_size()} processes were started together, each of which would "
            "train alone; leave --launcher out, or start one process"
        )
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError(
            "--launcher pytorch was asked for, but torchrun did not start this process; "
            "use torchrun --nproc_per_node N train_net.py ..., or leave --launcher out"
        )
    if launcher == "slurm" and "RANK" not in os.environ:
        translate(os.environ)
    return join("auto")
