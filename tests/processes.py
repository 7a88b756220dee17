"""Processes that start in milliseconds: forked from one that has imported torch and timm already.

A program of its own (exit code, output, signals, ranks) needs a process, and not the seconds that imports take. What a
fresh interpreter imports, and how ``torchrun`` starts ranks, is tested with ``run_python``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import timm.models.vision_transformer  # noqa: F401
import torch
import torchvision  # noqa: F401

torch.set_num_threads(1)


@contextlib.contextmanager
def started(
    arguments: Sequence[str | Path], output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[BaseProcess]:
    """A process that runs ``python ARGUMENTS`` (a script, ``-m module`` or ``-c program``) and writes
    ``<output>.out`` and ``<output>.err``; it is killed at the end of the block, should it still run."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    surroundings = {**os.environ, **(environment or {})}
    process = server.Process(target=_run, args=([*map(str, arguments)], str(output), surroundings, Path.cwd()))
    process.start()
    try:
        yield process
    finally:
        kill(process)
        process.join()


def kill(process: BaseProcess) -> None:
    """Send SIGKILL to a process that was started here and to those that it started."""
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def run(arguments: Sequence[str | Path], *, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``, finished: its exit code and output; with ``ranks`` as many processes, as ``torchrun`` sets
    their environment, whose outputs follow one another. One that fails ends the others."""
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        outputs = [Path(folder, str(rank)) for rank in range(ranks)]
        port = free_port()
        processes = [
            stack.enter_context(started(arguments, output, announced(rank, ranks, port) if ranks > 1 else None))
            for rank, output in enumerate(outputs)
        ]
        running = list(processes)
        while running and not any(process.exitcode for process in processes):
            if not wait([process.sentinel for process in running], max(deadline - time.monotonic(), 0)):
                raise subprocess.TimeoutExpired([*map(str, arguments)], timeout)
            running = [process for process in running if process.exitcode is None]
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        stack.close()
        texts = ["".join(output.with_suffix(end).read_text() for output in outputs) for end in (".out", ".err")]
    return subprocess.CompletedProcess([*map(str, arguments)], code, *texts)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def announced(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment of a rank, as ``torchrun`` sets it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def _run(arguments: list[str], output: str, environment: dict[str, str], folder: Path) -> None:
    """Be ``python ARGUMENTS``, in a process group of its own."""
    os.setsid()
    os.chdir(folder)
    for number, end in ((1, ".out"), (2, ".err")):
        file = os.open(output + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(torch.get_num_threads())  # makes torch's pool anew: threads of a fork would race for it
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<program>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
