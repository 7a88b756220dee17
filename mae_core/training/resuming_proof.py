"""Proof that a training which is killed and resumed ends where an uninterrupted one does, on the user's own machine."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mae_core.config.load import dump_config
from mae_core.errors import UserError
from mae_core.layout import ENCODER, ENVIRONMENT, LOG
from mae_core.training.distributed import device_of
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.weights.files import read_weights

PATIENCE = 600.0
"""Seconds in which a training must write its next line; past them it hangs."""
TOLERANCE = {"cpu": 0.0, "cuda": 1e-2}
"""Largest relative difference of a tensor: none on a CPU; a GPU adds numbers in another order from run to run."""
DETERMINISTIC = (
    "import os, torch; os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'; torch.use_deterministic_algorithms(True); "
)
COMMAND = "import sys; from mae_core.cli.main import main; sys.argv = ['mae', *sys.argv[1:]]; main()"


class Started(Protocol):
    """A training in a process group of its own, whose number is its own."""

    pid: int

    def ended(self) -> int | None:
        """The exit code, None while it runs."""
        ...


class Proof(NamedTuple):
    """What a run that was killed shows: moments of the kills as (step in the log, seconds after), and the tensors that
    differ from the uninterrupted run's, with their relative difference."""

    kills: list[tuple[int, float]]
    before_first_checkpoint: int
    tensors: int
    differing: dict[str, float]


class Command:
    """A subprocess, in a process group of its own; what it says goes to a file."""

    def __init__(self, arguments: list[str], said: Path) -> None:
        self.file = said.open("ab")
        self.process = subprocess.Popen(arguments, stdout=self.file, stderr=self.file, start_new_session=True)
        self.pid = self.process.pid

    def ended(self) -> int | None:
        """See ``Started``."""
        return self.process.poll()


def kill_and_resume(
    start: Callable[[], Started], run: Path, steps: int, kills: int, chance: random.Random, pause: float
) -> tuple[list[tuple[int, float]], int]:
    """Start a training of ``steps`` steps in ``run`` again and again, SIGKILL it with its workers ``kills`` times, and
    let it end -> the moments, and how many were before the first checkpoint.

    start  starts it, or continues it; it logs every step
    pause  seconds: a kill comes up to so long after the line of a random step, in the next step, a save or a picture
    Raises ``UserError`` where the training ends with an error or hangs.
    """
    moments, early = [], 0
    for step in [*sorted(chance.randrange(steps) for _ in range(kills)), None]:
        before = _stamp(run)
        process = start()
        wait = chance.uniform(0.0, pause)
        deadline, last = time.monotonic() + PATIENCE, -1
        while process.ended() is None and (step is None or _stamp(run) == before or logged_steps(run) < step):
            if (now := logged_steps(run)) != last:
                deadline, last = time.monotonic() + PATIENCE, now
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise UserError(f"{run} did not get past step {last} in {PATIENCE:.0f} s")
            time.sleep(0.002)
        if step is None:
            if process.ended():
                raise UserError(f"the training in {run} ended with exit code {process.ended()}")
            break
        time.sleep(wait)
        if process.ended() is None:
            os.killpg(process.pid, signal.SIGKILL)
            while process.ended() is None:
                time.sleep(0.002)
            moments.append((step, round(wait, 4)))
            early += not any((run / "checkpoints").glob("step_*")) and not any(run.glob("iter_*.pth"))
        elif process.ended():
            raise UserError(f"the training in {run} ended with exit code {process.ended()}")
    return moments, early


def logged_steps(run: Path) -> int:
    """The last step with a loss in a run's log, 0 where there is none."""
    try:
        lines = (run / LOG).read_bytes().splitlines()[-3:]
    except OSError:
        return 0
    found = [0]
    for line in lines:
        try:
            entry = json.loads(line)
            found.append(entry["step"] if "loss" in entry else 0)
        except (ValueError, KeyError, TypeError):
            continue  # half a line
    return max(found)


def _stamp(run: Path) -> int | None:
    """What changes when a training begins to write its folder."""
    try:
        return (run / ENVIRONMENT).stat().st_mtime_ns
    except OSError:
        return None


def differences(one: Path, other: Path) -> tuple[int, dict[str, float]]:
    """How many tensors a weights file holds, and of those that are not bitwise the other's the relative difference."""
    left, right = read_weights(one)[0], read_weights(other)[0]
    if left.keys() != right.keys():
        return len(left), {name: float("inf") for name in left.keys() ^ right.keys()}
    return len(left), {n: _difference(left[n], right[n]) for n in left if not torch.equal(left[n], right[n])}


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-30))


def verify_resume(
    config: PretrainConfig, *, steps: int, kills: int, deterministic: bool, seed: int, keep: Path | None = None
) -> Proof:
    """Pre-train ``steps`` steps straight, and again with ``kills`` SIGKILLs, on this machine and these images.

    keep  the folder to work in, left as it is; None: a temporary one
    Raises ``UserError`` where the weights differ by more than ``TOLERANCE``.
    """
    with tempfile.TemporaryDirectory(prefix="mae-verify-resume-") as temporary:
        folder = Path(temporary) if keep is None else keep
        if keep is not None and keep.exists() and any(keep.iterdir()):
            raise UserError(f"{keep} is not empty; choose another folder with --keep")
        folder.mkdir(parents=True, exist_ok=True)
        straight, killed = folder / "straight", folder / "killed"
        config = _shortened(config, steps)
        program = [sys.executable, "-c", (DETERMINISTIC if deterministic else "") + COMMAND, "pretrain"]

        def starter(run: Path) -> Callable[[], Command]:
            file = folder / f"{run.name}.yaml"
            file.write_text(dump_config(config.model_copy(update={"output": run})), encoding="utf-8")
            return lambda: Command([*program, str(file), "--resume=auto"], folder / f"{run.name}.txt")

        print(f"{steps} steps straight, then with {kills} kills; what they say is in {folder}", flush=True)
        try:
            kill_and_resume(starter(straight), straight, steps, 0, random.Random(seed), 0.0)
            pause = _seconds_a_step(straight)
            moments, early = kill_and_resume(starter(killed), killed, steps, kills, random.Random(seed), pause)
        except UserError as error:
            said = sorted(folder.glob("*.txt"), key=lambda path: path.stat().st_mtime)
            lines = said[-1].read_text(errors="replace").splitlines() if said else []
            raise UserError(f"{error}: {lines[-1] if lines else 'it said nothing'}") from None
        tensors, differing = differences(straight / ENCODER, killed / ENCODER)
        proof = Proof(moments, early, tensors, differing)
        allowed = TOLERANCE[device_of(config.device).type]
        _judge(proof, 0.0 if deterministic else allowed)
        return proof


def _shortened(config: PretrainConfig, steps: int) -> PretrainConfig:
    """``config`` with so many steps, a line for each, and a checkpoint and a picture every few."""
    from mae_core.data.sources import open_source
    from mae_core.training.watch import split_images

    images = len(split_images(config, open_source(config.data)).training)
    optim = config.optim.model_copy(update={"epochs": steps * config.optim.batch_size / images, "warmup_epochs": 0})
    often: dict[str, Any] = {"every": 1, "checkpoint_every": max(1, steps // 6), "pictures_every": max(1, steps // 4)}
    return config.model_copy(update={"optim": optim, "log": config.log.model_copy(update=often)})


def _seconds_a_step(run: Path) -> float:
    """The mean time between two lines of a log, saves and pictures included."""
    times = [json.loads(line)["time"] for line in (run / LOG).read_text().splitlines()]
    return max((times[-1] - times[0]) / max(len(times) - 1, 1), 0.01)


def _judge(proof: Proof, allowed: float) -> None:
    """Print the verdict. Raises ``UserError`` where the weights differ by more than is allowed."""
    worst = max(proof.differing.values(), default=0.0)
    told = f"{len(proof.kills)} kills ({proof.before_first_checkpoint} before the first checkpoint)"
    if worst > allowed:
        name = max(proof.differing, key=lambda key: proof.differing[key])
        raise UserError(
            f"{told}: {len(proof.differing)} of {proof.tensors} tensors differ from the uninterrupted run's, {name} by "
            f"{worst:.2g} of its size; a resume is not exact on this machine"
        )
    same = "bitwise equal" if not proof.differing else f"equal to {worst:.1g} of their size ({allowed:g} is allowed)"
    print(f"{told}: all {proof.tensors} tensors are {same} to the uninterrupted run's", flush=True)
