"""A chain of commands and its report: pre-train once, then train each task from scratch and from the encoder.

Every stage is the command a user would type, run as its own process, so that the report's commands are the ones that
ran.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_core.counting import clock
from mae_core.errors import UserError
from mae_core.layout import ENCODER, ENVIRONMENT, LOADING, LOG, METRICS, PICTURES, complete_checkpoints
from transfer.report import Curve, Picture, Report, TaskResult, write_report
from transfer.segmentation.segmenter_file import LAST_CHECKPOINT
from transfer.warm_processes import AVAILABLE, run_warm

ROOT = Path(__file__).resolve().parents[1]
ARMS = SCRATCH, PRETRAINED = ("scratch", "pre-trained")
MOST_ABREAST = 4
SECONDS_BETWEEN_LINES = 15
RESUME = "--resume"
LAST_LINES = 20
QUIET = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "120"}


@dataclass(frozen=True)
class Task:
    """One downstream task: the command that trains it, and where its headline metric is in metrics.json."""

    name: str
    metric: str
    metric_path: tuple[str, ...]
    data: Path
    command: str
    from_scratch: str = "from_scratch=true"
    from_encoder: str = "weights={encoder}"
    note: str = ""

    def command_line(self, *, encoder: Path | None, output: Path, seed: int) -> list[str]:
        """The command of one run; ``encoder=None`` trains from scratch."""
        start = self.from_scratch if encoder is None else self.from_encoder
        parts = f"{self.command} {start}".split()
        places = {"encoder": encoder, "data": self.data, "output": output, "seed": seed}
        return [part.format(**places) for part in parts]


@dataclass(frozen=True)
class Job:
    """A command, as a user would type it; ``run`` is the run directory it fills, finished when ``result`` is in it.

    ``after`` names the job that it waits for; ``threads`` are its own, the stage's when None.
    """

    name: str
    command: list[str]
    run: Path | None = None
    result: str = METRICS
    after: str | None = None
    threads: int | None = None

    def remaining(self) -> list[str] | None:
        """What is left to be done: nothing of a finished run, the rest of one that has a checkpoint, else all of it."""
        if self.run is None:
            return self.command
        if (self.run / self.result).is_file():
            return None
        if complete_checkpoints(self.run) or (self.run / LAST_CHECKPOINT).is_file():
            return [*self.command, RESUME]
        set_aside(self.run)
        return self.command


def set_aside(folder: Path) -> None:
    """Move a former folder out of the way of a new one; nothing is overwritten."""
    if folder.exists() and any(folder.iterdir()):
        number = 1
        while (previous := folder.with_name(f"{folder.name}.previous-{number}")).exists():
            number += 1
        folder.rename(previous)
        print(f"kept the previous {folder} as {previous}", flush=True)


class Stage:
    """Runs jobs as processes of ``threads`` threads, ``parallel`` at a time, and tells now and then what each is doing.

    Finished runs in the folder are used again, interrupted ones continue. ``seconds`` holds what each job took.

    place      the folder that the commands run in
    tolerated  words in the last lines of a job that may fail; empty: none may
    on_finish  is called with a finished job and, of one that may fail and did, its last line
    """

    def __init__(self, folder: Path, *, parallel: int, threads: int, place: Path = ROOT, tolerated: str = "") -> None:
        self.folder, self.parallel, self.threads = folder, parallel, threads
        self.place, self.tolerated = place, tolerated
        self.on_finish: Callable[[Job, str], None] = lambda job, failure: None
        self.seconds: dict[str, float] = {}
        self._status: dict[str, str] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Run what is left of all jobs, in their order where they need not wait. Raises ``UserError`` naming the log of
        one that failed, or a run that another command filled."""
        finished = threading.Event()
        teller = threading.Thread(target=self._tell, args=(finished,), daemon=True)
        teller.start()
        try:
            with ThreadPoolExecutor(self.parallel) as pool:
                running: dict[Future[None], Job] = {}
                waiting = [*jobs]
                finished_jobs: set[str | None] = {None}
                while waiting or running:
                    for job in [job for job in waiting if job.after in finished_jobs]:
                        waiting.remove(job)
                        running[pool.submit(self._run_one, job)] = job
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        finished_jobs.add(running.pop(future).name)
                        if future.exception() is not None:
                            pool.shutdown(wait=False, cancel_futures=True)
                        future.result()
        finally:
            finished.set()
            teller.join()

    def _run_one(self, job: Job) -> None:
        log = self.folder / "logs" / f"{job.name.replace(' ', '_')}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        first_line = f"$ {shlex.join(job.command)}\n"
        command = job.remaining()
        if command is None or command[-1] == RESUME:
            check_same_command(log, first_line, job)
        if command is None:
            print(f"  {job.name}: already finished, reused", flush=True)
            self.on_finish(job, "")
            return
        threads = str(job.threads or self.threads)
        started = time.perf_counter()
        lines: deque[str] = deque(maxlen=LAST_LINES)
        with log.open("a" if command[-1] == RESUME else "w", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")

            def read(line: str) -> None:
                file.write(line)
                file.flush()
                if line.strip():
                    self._status[job.name] = line.strip()
                    lines.append(line.strip())

            code = execute(command, self.place, {**QUIET, "OMP_NUM_THREADS": threads}, read)
        self._status.pop(job.name, None)
        last = lines[-1] if lines else ""
        tolerable = bool(self.tolerated) and self.tolerated in " ".join(lines)
        if code and not tolerable:
            raise UserError(f"{job.name} failed ({last}); {log} holds its full output")
        self.seconds[job.name] = time.perf_counter() - started
        print(f"  {job.name}: {'did not end' if code else 'done'} in {clock(self.seconds[job.name])}", flush=True)
        self.on_finish(job, last if code else "")

    def _tell(self, finished: threading.Event) -> None:
        while not finished.wait(SECONDS_BETWEEN_LINES):
            for name, status in sorted(self._status.copy().items()):
                print(f"  {name}: {status[:120]}", flush=True)


def execute(command: Sequence[str], place: Path, surroundings: Mapping[str, str], read: Callable[[str], None]) -> int:
    """Run a command as a process in the folder ``place`` -> its exit code. ``read`` gets its lines, ``surroundings`` is
    added to its environment."""
    if command[0] == "mae" and AVAILABLE:
        return run_warm(command[1:], place, surroundings, read)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        executable(command),
        cwd=place,
        env={**os.environ, **surroundings, "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        for line in process.stdout or ():
            read(line)
    return process.returncode


def check_same_command(log: Path, first_line: str, job: Job) -> None:
    """Refuse a run that another command filled; one without a log was put there by the user, who knows."""
    if log.is_file():
        with log.open(encoding="utf-8") as file:
            before = file.readline()
        if before != first_line:
            raise UserError(
                f"{job.run} was made by another command ({before.strip()}); move it away, or choose another folder"
            )


def executable(command: Sequence[str]) -> list[str]:
    """A command as a user types it -> one that runs in this environment."""
    runners = {"mae": [sys.executable, "-m", "mae_core.cli.main"], "python": [sys.executable]}
    return [*runners[command[0]], *command[1:]]


def read_log(run: Path, key: str) -> list[tuple[float, float]]:
    """(step, value) pairs of a run's log.jsonl."""
    entries = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    return [(entry["step"], entry[key]) for entry in entries if key in entry and "step" in entry]


def read_metric(run: Path, path: Sequence[str]) -> float:
    """One number of a finished run's metrics.json."""
    value: Any = json.loads((run / METRICS).read_text(encoding="utf-8"))
    for key in path:
        value = value[key]
    return float(value)


def pretraining_pictures(run: Path) -> list[Picture]:
    """The first and the last reconstruction strip."""
    strips = sorted((run / PICTURES).glob("step_*.png"))
    caption = (
        "Fixed scenes and masks. The decoder predicts each patch up to its mean and contrast; to show the prediction "
        "as pixels, those two numbers are taken from the true patch."
    )
    names = [f"Reconstructions after {int(strip.stem.removeprefix('step_'))} steps" for strip in strips]
    return [Picture(names[i], caption, strips[i]) for i in sorted({0, len(strips) - 1})]


def prediction_pictures(task: Task, scratch: Path, pretrained: Path) -> list[Picture]:
    """What each arm predicts on validation images, beside the truth; runs that draw nothing show nothing."""
    found = []
    for arm, run in zip(ARMS, (scratch, pretrained), strict=True):
        drawn = sorted((run / PICTURES).glob("step_*.png"))
        if drawn:
            found.append(
                Picture(f"{task.name.capitalize()}, {arm}", "Validation images, the first seed's run.", drawn[-1])
            )
    return found


def run_chain(
    folder: Path,
    *,
    title: str,
    pretrain: Sequence[str],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    data: Job | None = None,
    commands: Sequence[tuple[str, str]] = (),
    cores: int | None = None,
) -> Path:
    """Run ``data`` (if any), ``pretrain`` (``{output}`` is its run directory) and every arm of every task -> the
    report.

    Finished runs in ``folder`` are used again, interrupted ones continue. Raises ``UserError`` where a stage fails.
    """
    if not (ROOT / "configs").is_dir():
        raise UserError(f"this runs from a clone of the repository; {ROOT} has no configs folder")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    started = time.perf_counter()
    timings: dict[str, float] = {}
    if data is not None:
        print(data.name, flush=True)
        alone = Stage(folder, parallel=1, threads=cores)
        alone.run([data])
        timings[data.name] = alone.seconds.get(data.name, 0.0)
    encoder = folder / "pretrain"
    command = [part.replace("{output}", str(encoder)) for part in pretrain]
    pretraining = Job("pre-training", command, encoder, ENCODER, threads=max(1, cores // 2))
    plans = {task.name: arms_of(task, folder, seeds, encoder, pretraining.name) for task in tasks}
    jobs = [job for plan in plans.values() for job in plan.values()]
    print(f"{pretraining.name}, and {len(jobs)} trainings; those from scratch need not wait for it", flush=True)
    abreast = Stage(folder, parallel=min(cores, MOST_ABREAST), threads=1)
    abreast.run([pretraining, *sorted(jobs, key=lambda job: job.after is not None)])
    timings[pretraining.name] = abreast.seconds.get(pretraining.name, 0.0)

    results: dict[str, TaskResult] = {}
    curves = [Curve("Pre-training", "loss on hidden patches", {"pre-training": read_log(encoder, "loss")})]
    pictures = pretraining_pictures(encoder)
    shown = [*commands, (pretraining.name, shlex.join(pretraining.command))]
    reports = []
    for task in tasks:
        plan = plans[task.name]
        runs = {place: job.run for place, job in plan.items() if job.run is not None}
        timings[f"{task.name}, {len(plan)} runs"] = sum(abreast.seconds.get(job.name, 0.0) for job in plan.values())
        scratch, pretrained = ([read_metric(runs[arm, seed], task.metric_path) for seed in seeds] for arm in ARMS)
        print(
            f"{task.name}, {task.metric}: scratch {_numbers(scratch)}, pre-trained {_numbers(pretrained)}", flush=True
        )
        results[task.name] = TaskResult(task.metric, scratch, pretrained, note=task.note)
        losses = {f"{arm}, seed {seed}": read_log(run, "loss") for (arm, seed), run in runs.items()}
        curves.append(Curve(task.name.capitalize(), "training loss", losses))
        pictures += prediction_pictures(task, runs[SCRATCH, seeds[0]], runs[PRETRAINED, seeds[0]])
        shown += [(job.name, shlex.join(job.command)) for job in [*plan.values()][:2]]
        reports.append(loading_line(task.name, runs[PRETRAINED, seeds[0]] / LOADING))
    seconds = time.perf_counter() - started
    environment = json.loads((encoder / ENVIRONMENT).read_text(encoding="utf-8"))
    report = Report(
        title=title,
        seconds=seconds,
        tasks=results,
        curves=curves,
        pictures=pictures,
        timings=timings,
        environment={**environment, "cores": str(cores), "seeds": ", ".join(map(str, seeds))},
        commands=shown,
        loading_reports="\n".join(reports),
    )
    path = write_report(report, folder)
    print(f"done in {clock(seconds)}; open {path}", flush=True)
    return path


def arms_of(
    task: Task, folder: Path, seeds: Sequence[int], encoder: Path, pretraining: str
) -> dict[tuple[str, int], Job]:
    """The runs of a task by arm and seed; those that start from ``encoder`` wait for the job ``pretraining``."""
    return {
        (arm, seed): Job(
            f"{task.name} {arm} {seed}",
            task.command_line(
                encoder=encoder if arm == PRETRAINED else None, output=folder / task.name / f"{arm}_{seed}", seed=seed
            ),
            folder / task.name / f"{arm}_{seed}",
            after=pretraining if arm == PRETRAINED else None,
        )
        for seed in seeds
        for arm in ARMS
    }


def loading_line(task: str, path: Path) -> str:
    """A hand-over of the encoder in a line."""
    report = json.loads(path.read_text(encoding="utf-8"))
    counts = ", ".join(
        f"{len(report[part])} {part}" for part in ("loaded", "renamed", "resized", "new", "unused", "refused")
    )
    return f"{task}: {counts}; {report['share']:.1%} of the model's parameters come from the encoder"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
