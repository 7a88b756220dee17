"""The whole chain on the embedded data set: does one MAE-pre-trained encoder help a classifier, a detector and a
segmenter?

``python -m transfer.demo`` writes scenes of handwritten digits, pre-trains on the unlabelled ones, trains each task
from
scratch and from the encoder with the same budget and seeds, and writes ``report.html``. Every stage is the command a
user
would type, run as its own process, so that the report's commands are the ones that were run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mae_core.errors import UserError, user_errors
from mae_core.layout import ENVIRONMENT, LOADING, LOG, METRICS, PICTURES
from mae_core.training.progress import clock
from transfer.report import Curve, Picture, Report, TaskResult, write_report

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1)
ARMS = SCRATCH, PRETRAINED = ("scratch", "pre-trained")
MOST_ABREAST = 4
SECONDS_BETWEEN_LINES = 15
QUIET = {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "120"}


DATA_SIZES = ("--unlabelled", "6000", "--train", "400", "--test", "200")
DETECT = "transfer/detection/train_net.py --config-file configs/detection/digits.yaml"
SEGMENT = "transfer/segmentation/train_net.py configs/segmentation/digits.py"


@dataclass(frozen=True)
class Task:
    """One downstream task: the command that trains it, and where its headline metric (in per cent) is in
    metrics.json."""

    name: str
    metric: str
    metric_path: tuple[str, ...]
    command: str
    from_scratch: str
    from_encoder: str

    def command_line(self, *, encoder: Path | None, data: Path, output: Path, seed: int) -> list[str]:
        """The command of one run; ``encoder=None`` trains from scratch."""
        start = self.from_scratch if encoder is None else self.from_encoder
        parts = f"{self.command} {start}".split()
        return [part.format(encoder=encoder, data=data / self.name, output=output, seed=seed) for part in parts]


TASKS = (
    Task(
        name="classification",
        metric="top-1 accuracy (%)",
        metric_path=("top1",),
        command="mae finetune configs/finetune/digits.yaml data.path={data} output={output} seed={seed}",
        from_scratch="from_scratch=true",
        from_encoder="weights={encoder}",
    ),
    Task(
        name="detection",
        metric="COCO box AP (%)",
        metric_path=("bbox", "AP"),
        command=f"python {DETECT} data.path={{data}} output={{output}} seed={{seed}}",
        from_scratch="from_scratch=true",
        from_encoder="weights={encoder}",
    ),
    Task(
        name="segmentation",
        metric="mIoU (%)",
        metric_path=("mIoU",),
        command=f"python {SEGMENT} --work-dir {{output}} --cfg-options data_root={{data}} randomness.seed={{seed}}",
        from_scratch="",
        from_encoder="--weights {encoder}",
    ),
)


class Job(NamedTuple):
    """A command, as a user would type it."""

    name: str
    command: list[str]


class Stage:
    """Runs jobs as processes of ``threads`` threads, ``parallel`` at a time, and tells now and then what each is
    doing."""

    def __init__(self, folder: Path, *, parallel: int, threads: int) -> None:
        self.folder, self.parallel, self.threads = folder, parallel, threads
        self._status: dict[str, str] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs. Raises ``UserError`` naming the log of one that failed."""
        finished = threading.Event()
        teller = threading.Thread(target=self._tell, args=(finished,), daemon=True)
        teller.start()
        try:
            with ThreadPoolExecutor(self.parallel) as pool:
                list(pool.map(self._run_one, jobs))
        finally:
            finished.set()
            teller.join()

    def _run_one(self, job: Job) -> None:
        log = self.folder / "logs" / f"{job.name.replace(' ', '_')}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": path}
        started, last = time.perf_counter(), ""
        with (
            log.open("w", encoding="utf-8") as file,
            subprocess.Popen(
                executable(job.command),
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            file.write(f"$ {shlex.join(job.command)}\n")
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                if line.strip():
                    self._status[job.name] = last = line.strip()
        self._status.pop(job.name, None)
        if process.returncode:
            raise UserError(f"{job.name} failed ({last}); {log} holds all it said")
        print(f"  {job.name}: done in {clock(time.perf_counter() - started)}", flush=True)

    def _tell(self, finished: threading.Event) -> None:
        while not finished.wait(SECONDS_BETWEEN_LINES):
            for name, status in sorted(self._status.copy().items()):
                print(f"  {name}: {status[:120]}", flush=True)


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


def keep_previous(folder: Path) -> None:
    """Move a former demo out of the way; nothing is overwritten."""
    if folder.exists() and any(folder.iterdir()):
        number = 1
        while (previous := folder.with_name(f"{folder.name}.previous-{number}")).exists():
            number += 1
        folder.rename(previous)
        print(f"kept the former {folder} as {previous}", flush=True)


def pretraining_pictures(run: Path) -> list[Picture]:
    """The first and the last reconstruction strip."""
    strips = sorted((run / PICTURES).glob("step_*.png"))
    caption = (
        "Fixed scenes and masks. The decoder predicts each patch up to its mean and contrast; to show the prediction "
        "as pixels, those two numbers are taken from the true patch."
    )
    names = [f"Reconstructions after {int(strip.stem.removeprefix('step_'))} steps" for strip in strips]
    return [Picture(names[i], caption, strips[i]) for i in sorted({0, len(strips) - 1})]


def prediction_pictures(task: Task, runs: dict[str, Path]) -> list[Picture]:
    """What each arm predicts on test scenes, beside the truth."""
    found = []
    for arm, run in runs.items():
        drawn = sorted((run / PICTURES).glob("*.png"))
        if drawn:
            found.append(
                Picture(f"{task.name.capitalize()}, {arm}", f"Test scenes; the run with seed {SEEDS[0]}.", drawn[-1])
            )
    return found


def run_demo(folder: Path, seeds: Sequence[int] = SEEDS) -> Path:
    """Run the chain into ``folder`` -> path of the report. Raises ``UserError`` where a stage fails."""
    if not (ROOT / "configs").is_dir():
        raise UserError(f"the demo runs from a clone of the repository; {ROOT} has no configs folder")
    folder = folder.resolve()
    keep_previous(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    alone = Stage(folder, parallel=1, threads=cores)
    abreast = Stage(folder, parallel=min(cores, MOST_ABREAST), threads=1)
    started = time.perf_counter()
    timings: dict[str, float] = {}
    data, encoder = folder / "data", folder / "pretrain"

    def timed(stage: Stage, name: str, jobs: Sequence[Job]) -> None:
        before = time.perf_counter()
        stage.run(jobs)
        timings[name] = time.perf_counter() - before

    print(f"1/5 composing scenes of handwritten digits in {data}", flush=True)
    compose = ["mae", "digits", str(data), *DATA_SIZES, "--workers", str(cores)]
    timed(alone, "data", [Job("data", compose)])
    print("2/5 pre-training on the unlabelled scenes", flush=True)
    pretrain = f"mae pretrain configs/pretrain/digits.yaml data.path={data / 'unlabelled'} output={encoder}".split()
    timed(alone, "pre-training", [Job("pre-training", pretrain)])

    results: dict[str, TaskResult] = {}
    curves = [Curve("Pre-training", "loss on hidden patches", {"pre-training": read_log(encoder, "loss")})]
    pictures = pretraining_pictures(encoder)
    commands = [("Pre-train", shlex.join(pretrain))]
    reports = []
    for number, task in enumerate(TASKS, start=3):
        print(
            f"{number}/5 {task.name}: from scratch and from the encoder, seeds {', '.join(map(str, seeds))}", flush=True
        )
        runs = {(arm, seed): folder / task.name / f"{arm}_{seed}" for seed in seeds for arm in ARMS}
        jobs = [
            Job(
                f"{task.name} {arm} {seed}",
                task.command_line(encoder=encoder if arm == PRETRAINED else None, data=data, output=run, seed=seed),
            )
            for (arm, seed), run in runs.items()
        ]
        timed(abreast, task.name, jobs)
        scratch, pretrained = ([read_metric(runs[arm, seed], task.metric_path) for seed in seeds] for arm in ARMS)
        print(f"  {task.metric}: from scratch {_numbers(scratch)}, pre-trained {_numbers(pretrained)}", flush=True)
        results[task.name] = TaskResult(task.metric, scratch, pretrained)
        losses = {f"{arm}, seed {seed}": read_log(run, "loss") for (arm, seed), run in runs.items()}
        curves.append(Curve(task.name.capitalize(), "training loss", losses))
        pictures += prediction_pictures(task, {arm: runs[arm, seeds[0]] for arm in ARMS})
        commands += [(job.name, shlex.join(job.command)) for job in jobs[:2]]
        reports.append(loading_line(task.name, runs[PRETRAINED, seeds[0]] / LOADING))
    seconds = time.perf_counter() - started
    environment = json.loads((encoder / ENVIRONMENT).read_text(encoding="utf-8"))
    report = Report(
        title="MAE transfer demo",
        seconds=seconds,
        tasks=results,
        curves=curves,
        pictures=pictures,
        timings=timings,
        environment={**environment, "cores": str(cores)},
        commands=[*own_data_commands(), *commands],
        loading_reports="\n".join(reports),
    )
    path = write_report(report, folder)
    print(f"done in {clock(seconds)}; open {path}", flush=True)
    return path


def loading_line(task: str, path: Path) -> str:
    """A hand-over of the encoder in a line."""
    report = json.loads(path.read_text(encoding="utf-8"))
    counts = ", ".join(
        f"{len(report[part])} {part}" for part in ("loaded", "renamed", "resized", "new", "unused", "refused")
    )
    return f"{task}: {counts}; {report['share']:.1%} of the model's parameters come from the encoder"


def own_data_commands() -> list[tuple[str, str]]:
    """The same chain on images of one's own."""
    return [
        (
            "Own data: pre-train on a folder of images",
            "mae pretrain configs/pretrain/tiny_96.yaml data.path=IMAGES output=runs/mine",
        ),
        (
            "Own data: classify, from train/<class>/* and val/<class>/*",
            "mae finetune configs/finetune/tiny_96.yaml weights=runs/mine data.path=LABELLED output=runs/classes",
        ),
        (
            "Own data: detect, from train/, val/ and annotations/instances_{train,val}.json",
            "python transfer/detection/train_net.py --config-file configs/detection/small_data.yaml "
            "weights=runs/mine data.path=COCO output=runs/detector",
        ),
        (
            "Own data: segment, from images/{training,validation} and annotations/{training,validation}",
            "python transfer/segmentation/train_net.py configs/segmentation/small_data.py "
            "--weights runs/mine --work-dir runs/segmenter --cfg-options data_root=LABELMAPS",
        ),
    ]


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m transfer.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs and the report")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="runs of each arm of each task")
    given = parser.parse_args(arguments)
    with user_errors():
        run_demo(given.out, range(given.seeds))


if __name__ == "__main__":
    main()
