"""Slurm: the ranks of a step that ``srun`` started, in torch's words, and the batch file that starts one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from mae_core.data.loading import check_repeats
from mae_core.errors import EXIT_PREEMPTED, UserError

NAMES = {"SLURM_PROCID": "RANK", "SLURM_NTASKS": "WORLD_SIZE", "SLURM_LOCALID": "LOCAL_RANK"}
"""What Slurm calls the things that torch reads."""
STOP_SECONDS = {"segment": "default_hooks.checkpoint.stop_seconds"}
"""Options of ``mae slurm``'s commands other than ``log.stop_seconds`` that end a save which takes too long."""
MARGIN = 30
"""Seconds before the limit in which a run that could not save is still queued again."""
DEFAULT_WORKERS = 7
"""Loading processes of a training whose configuration does not say how many."""
FIRST_PORT, PORTS = 15000, 10000
"""Where the ranks meet unless MASTER_PORT says otherwise: a port of the job's number, as jobs may share a node."""
KILLED_BY_USR1 = 138
"""Exit code of ``srun`` where SIGUSR1 met a process outside of its steps: while it loads, or evaluates."""


def adopt_step(environment: MutableMapping[str, str]) -> None:
    """Set in ``environment`` what torch reads, where this process is one of several tasks that ``srun`` started and no
    ``torchrun`` stands between."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "WORLD_SIZE" not in environment and "SLURM_STEP_ID" in environment and tasks != "1":
        translate(environment)


def translate(environment: MutableMapping[str, str]) -> None:
    """Set in ``environment`` what torch reads, from what Slurm says of this task; the ranks meet on the first node.

    Raises ``UserError`` outside of a Slurm step.
    """
    missing = [name for name in (*NAMES, "SLURM_NODELIST") if name not in environment]
    if missing:
        raise UserError(
            f"{', '.join(missing)} is not set: Slurm did not start this process; put srun before the command"
        )
    for theirs, ours in NAMES.items():
        environment[ours] = environment[theirs]
    each = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
    environment.setdefault("LOCAL_WORLD_SIZE", each[0] if each else "1")
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % PORTS))


def first_host(nodes: str) -> str:
    """``gpu[03-05,9],login1`` -> ``gpu03``."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part for part in found.groups() if part) if found else nodes


def incarnation(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The number of the Slurm job that this process is of, and how often the job was queued again; None elsewhere."""
    job = environment.get("SLURM_JOB_ID")
    return None if job is None else (job, int(environment.get("SLURM_RESTART_COUNT", "0")))


@dataclass(frozen=True)
class Job:
    """What a batch file asks of Slurm.

    gpus     GPUs of a node, a process each; 0: one process on its CPUs
    cpus     CPU cores of a process
    time     the limit, in Slurm's own form
    grace    seconds before it at which the run is told to save and end
    options  further options of ``sbatch``, such as ("partition", "gpu")
    """

    name: str
    nodes: int
    gpus: int
    cpus: int
    time: str
    grace: int
    options: tuple[tuple[str, str], ...] = ()

    @property
    def tasks(self) -> int:
        """Processes of a node."""
        return max(1, self.gpus)

    @property
    def ranks(self) -> int:
        """Processes of the job."""
        return self.nodes * self.tasks


def job_of(
    name: str,
    config: Any,
    nodes: int,
    gpus: int,
    cpus: int | None,
    time: str,
    grace: int,
    options: Sequence[str],
) -> Job:
    """The job of a training of ``config``; None for a configuration that is an engine's own.

    Raises ``UserError`` where the batch does not divide among its processes, or an option of ``sbatch`` is none.
    """
    for option in options:
        if not re.fullmatch(r"[a-z][a-z-]*=\S+", option):
            raise UserError(f"--option {option} is not key=value; write an option of sbatch, such as partition=gpu")
    if not re.fullmatch(r"[\d:-]+", time):
        raise UserError(f"--time {time} is not a time; write minutes, HH:MM:SS or D-HH:MM:SS")
    pairs = tuple((key, value) for key, _, value in (option.partition("=") for option in options))
    workers = DEFAULT_WORKERS if config is None or config.data.workers == "auto" else config.data.workers
    job = Job(name, nodes, gpus, cpus or workers + 1, time, grace, pairs)
    if config is not None:
        check_repeats(config.optim.batch_size, job.ranks, getattr(config.data, "repeats", 1))
    return job


def stops_in_time(command: str, job: Job, given: Sequence[str], config: Any) -> list[str]:
    """The option that ends a save in time for the job to be queued again, unless it is ``given``, or in ``config``."""
    option = STOP_SECONDS.get(command, "log.stop_seconds")
    if any(word.startswith(f"{option}=") for word in given) or (config is not None and config.log.stop_seconds):
        return []
    return [f"{option}={max(job.grace - MARGIN, job.grace // 2)}"]


def batch_file(job: Job, command: Sequence[str]) -> str:
    """The text of a file for ``sbatch`` that runs ``command`` in a process per GPU of all nodes, and queues itself
    again each time that the run was told to stop and has saved."""
    asked = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks,
        **({"gpus-per-node": job.gpus} if job.gpus else {}),
        "cpus-per-task": job.cpus,
        "time": job.time,
        "signal": f"USR1@{job.grace}",
        "open-mode": "append",
        "output": "slurm-%x-%j.out",
        **dict(job.options),
    }
    requests = "\n".join(f"#SBATCH --{name}={value}" for name, value in asked.items())
    return f"""#!/bin/bash
# {job.nodes} x {job.tasks} processes. {job.grace} s before the limit, and where another job takes the nodes, the run
# saves, ends with code {EXIT_PREEMPTED}, and is queued again; it goes on from its last checkpoint.
{requests}
#SBATCH --requeue

# --wait: when one process has ended, for whatever reason, the others follow within a minute.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task={job.cpus} \\
  {shlex.join(command)}
code=$?
case "$code" in
  {EXIT_PREEMPTED}|{KILLED_BY_USR1}) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
"""
