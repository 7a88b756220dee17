"""detectron2's flags for many processes: ``--num-gpus``, ``--num-machines``, ``--machine-rank``, ``--dist-url``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from mae_core.errors import EXIT_USER_ERROR, UserError, user_errors
from mae_core.training.distributed import join, world_size


def launch_processes(
    work: Callable[..., Any],
    *,
    num_gpus: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    args: tuple[Any, ...],
) -> None:
    """Call ``work(*args)`` in ``num_gpus`` processes of this machine, which meet those of the others at ``dist_url``;
    or in this process alone, where ``torchrun`` or ``srun`` has started all of them.

    Raises ``UserError`` for more processes than GPUs (on a machine without any, they are processes of the CPU). A
    user's mistake in a process ends all of them with its exit code.
    """
    if world_size() > 1:
        join("auto")
        comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        work(*args)
        return
    seen = torch.cuda.device_count()
    if torch.cuda.is_available() and num_gpus > seen:
        raise UserError(
            f"--num-gpus {num_gpus} was asked for, but torch sees {seen} GPUs; lower it, or use more machines"
        )
    if num_machines > 1 and dist_url == "auto":
        raise UserError("--num-machines needs --dist-url tcp://HOST:PORT, where all machines can reach the first")
    try:
        launch(
            _work_as_rank,
            num_gpus,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url,
            args=(work, *args),
        )
    except ProcessExitedException as error:
        if error.exit_code == EXIT_USER_ERROR:
            raise SystemExit(EXIT_USER_ERROR) from None
        raise


def _work_as_rank(work: Callable[..., Any], *args: Any) -> None:
    """``work``, with the ranks told to the core, which reads them where ``torchrun`` puts them."""
    if comm.get_world_size() == 1:
        work(*args)
        return
    os.environ["WORLD_SIZE"] = str(comm.get_world_size())
    os.environ["RANK"], os.environ["LOCAL_RANK"] = str(comm.get_rank()), str(comm.get_local_rank())
    with user_errors():
        work(*args)
