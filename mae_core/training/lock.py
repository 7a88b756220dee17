"""One process at a time writes a run folder: a file that says which, and what to do about one that is no more."""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mae_core.errors import UserError
from mae_core.training.slurm import incarnation

LOCK = "run.lock"


def claim(folder: Path) -> None:
    """Write this process into ``run.lock``; it is removed by ``release``, or when the process ends.

    A lock whose process has ended on this machine is taken over. Raises ``UserError`` where another process is alive,
    or is on another machine, where nobody can see whether it is.
    """
    file = folder / LOCK
    with _opened(file) as stream:
        held = _read(stream)
        if held is not None and not _is_gone(held):
            where = f"process {held.get('pid')} on {held.get('host')}"
            if held.get("host") == socket.gethostname():
                raise UserError(
                    f"{folder} is being written by {where}; wait for it, or choose another with output=FOLDER"
                )
            raise UserError(
                f"{folder} was being written by {where}, and this machine cannot check whether that process "
                f"still runs; if it has ended, remove {file} and start again"
            )
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps(_myself()).encode())
        stream.flush()
    atexit.register(release, folder)


def release(folder: Path) -> None:
    """Remove the lock, if it is this process's."""
    file = folder / LOCK
    if not file.is_file():
        return
    try:
        with _opened(file) as stream:
            if _read(stream) == _myself():
                file.unlink()
    except OSError:
        return  # the folder is gone, or cannot be written any more


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The lock's file, for one process at a time: who waited for one that was removed meanwhile opens the next."""
    while True:
        with file.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if file.exists() and os.fstat(stream.fileno()).st_ino == file.stat().st_ino:
                stream.seek(0)
                yield stream
                return


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    try:
        held = json.loads(stream.read())
    except (ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


def _myself() -> dict[str, Any]:
    job = incarnation(os.environ)
    slurm = {} if job is None else {"job": list(job)}
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid()), **slurm}


def _is_gone(held: dict[str, Any]) -> bool:
    """Whether the process of a lock has ended, or is this one: its number may have gone to another since. A Slurm job
    that was queued again has ended before, on whatever node it was."""
    job, mine = held.get("job"), incarnation(os.environ)
    if mine is not None and isinstance(job, list) and job[:1] == [mine[0]] and job != list(mine):
        return True
    if held.get("host") != socket.gethostname() or not isinstance(held.get("pid"), int):
        return "pid" not in held
    return held == _myself() or _start_of(held["pid"]) != held.get("started")


def _start_of(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the start of the machine; None for one that has ended, and
    elsewhere than on Linux "alive" for one that has not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
