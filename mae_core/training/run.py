"""The run directory: claimed once, written by rank 0, never overwritten."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

import mae_core
from mae_core.atomic import atomic_path, said_plainly, write_json, write_text
from mae_core.config.load import config_differences, dump_config, flattened, load_config
from mae_core.config.sections import JobConfig, RunConfig
from mae_core.data.config import Workers
from mae_core.data.images import Unreadable, refuse_unreadable
from mae_core.data.loading import StepSampler, make_loader
from mae_core.data.rates import AT_ONCE, SECONDS, best_number, candidates, cores, loader_rate, processes
from mae_core.errors import UserError, first_line
from mae_core.layout import (
    ATTENTIVE,
    CHECKPOINTS,
    CLASSIFIER,
    CONFIG,
    DATA,
    ENCODER,
    ENVIRONMENT,
    LOG,
    METRICS,
    PICTURES,
    best_checkpoint,
    checkpoint_folders,
    cost_of,
)
from mae_core.resuming import Resume
from mae_core.training import distributed
from mae_core.training.boards import Boards, Logged, check_boards
from mae_core.training.checkpoints import Keep, load_checkpoint, save_checkpoint
from mae_core.training.finite import refuse_non_finite
from mae_core.training.lock import claim, release
from mae_core.training.precision import choose_precision, prepare_process
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.same_data import Data, check_data, fingerprint
from mae_core.training.saving import Beside, copied, copy_fits
from mae_core.training.sharding import load_model, load_optimizer, whole
from mae_core.training.statistics import with_stored_statistics
from mae_core.weights.files import write_weights

AUTO = "auto"
ROOM = (
    "free disk space or restore write permission; earlier checkpoints are complete, and --resume continues from the "
    "last one"
)
RESULTS = (ENCODER, CLASSIFIER, ATTENTIVE)
MAY_CHANGE = (
    "data.workers",
    "data.on_error",
    "data.timeout",
    "log.",
    "device",
    "distributed",
    "rank_timeout",
    "output",
    "data.path",
    "data.cache",
    "data.cache_gb",
    "data.max_pixels",
    "data.statistics",
    "model.checkpointing",
)
"""Options a resumed run may change: they say where and how fast, not what is computed. Data may move, see
``check_data``."""
PRETRAIN_MAY_CHANGE = (
    "optim.micro_batch",
    *(
        f"watch.{name}"
        for name in ("every_epochs", "path", "labelled", "neighbours", "most_images", "batch", "keep_best")
    ),
)
"""Of a pre-training these too: its samples do not depend on their neighbours, and to watch it changes nothing."""
MAY_FALL = ("optim.base_lr", "optim.min_lr", "optim.clip_grad")
"""Numbers that a resumed run may lower, or set where there was none: what helps against losses that are not finite."""


def will_resume(folder: Path, resume: Resume) -> bool:
    """Whether a run with this ``--resume`` continues what is in its folder."""
    return (folder / CONFIG).is_file() and bool(checkpoint_folders(folder)) if resume == "auto" else resume


def check_output(config: JobConfig, *, resume: Resume) -> bool:
    """Refuse, before any work, a folder that holds a run, or a resume that has nothing to resume or another
    configuration -> whether the run is one to resume.

    ``resume="auto"`` resumes where there is a checkpoint, and else starts, in a folder of a run that was killed before
    its first checkpoint too, whose few lines are removed.
    """
    check_boards(_boards_of(config))
    folder = config.output
    marks = [name for name in (CONFIG, LOG, CHECKPOINTS, *RESULTS) if (folder / name).exists()]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file; choose a folder with output=FOLDER")
    resumable = will_resume(folder, "auto")
    if resume == "auto":
        if not resumable and marks and not any(folder.glob("*.safetensors")):
            check_configuration(config)
            _clear_unstarted(folder)
            marks = []
        resume = resumable
    if not resume:
        if marks:
            add = "--resume" if resumable else "--resume auto"
            way = f"add {add} to continue it, or " if isinstance(config, RunConfig) else ""
            raise UserError(
                f"output folder {folder} already holds a run ({', '.join(marks)}); "
                f"{way}choose another with output=FOLDER"
            )
        _check_apart(folder, getattr(config, "data", None))
        return False
    if not resumable:
        raise UserError(
            f"nothing to resume: {folder} has no complete checkpoint; --resume auto starts a run there, and "
            "continues it where there is one"
        )
    check_configuration(config)
    return True


def _check_apart(folder: Path, data: Any) -> None:
    """Refuse an output ``folder`` that is the data set's, or lies where its pictures would be read as images."""
    own, place = getattr(data, "path", None), folder.resolve()
    if isinstance(own, Path) and own.is_dir() and own.resolve() == place:
        raise UserError(f"output folder {folder} is that of the data (data.path); choose another with output=FOLDER")
    for searched in getattr(data, "searched", ()):
        if place.is_relative_to(searched.resolve()):
            raise UserError(
                f"output folder {folder} lies in {searched}, of which every image is read: the pictures of this run "
                "would be images of the next; choose a folder outside with output=FOLDER"
            )


def _clear_unstarted(folder: Path) -> None:
    """Remove what a run has left that was killed before its first checkpoint, on the rank that will write."""
    if distributed.announced_rank() != 0:
        return
    claim(folder)
    for name in (CHECKPOINTS, PICTURES, "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (LOG, DATA, CONFIG):
        (folder / name).unlink(missing_ok=True)
    release(folder)


def check_configuration(config: JobConfig) -> None:
    """Refuse a resume with another configuration than the one in the folder's config.yaml, where there is one."""
    folder = config.output
    if not (folder / CONFIG).is_file():
        return
    stored = load_config(type(config), folder / CONFIG)
    if hasattr(config, "data"):
        config, stored = with_stored_statistics(config, stored), with_stored_statistics(stored, stored)
    optim: Any = getattr(config, "optim", None)
    if getattr(optim, "micro_batch", None) == "auto":  # found once, and in the stored one
        found = stored.optim.micro_batch  # type: ignore[attr-defined]
        config = config.model_copy(update={"optim": optim.model_copy(update={"micro_batch": found})})
    may_change = (*MAY_CHANGE, *PRETRAIN_MAY_CHANGE) if isinstance(config, PretrainConfig) else MAY_CHANGE
    changed = [line for line in config_differences(stored, config) if not line.startswith(may_change)]
    changed = [line for line in changed if line not in lowered(stored, config)]
    if changed:
        raise UserError(
            f"{folder} was started with another configuration ({'; '.join(changed[:5])}); "
            "resume with the one in its config.yaml, or start a new run with output=FOLDER; on a resume "
            f"{', '.join(may_change)} may change, and {', '.join(MAY_FALL)} may be lowered"
        )


def lowered(stored: JobConfig, config: JobConfig) -> list[str]:
    """The lines of ``config_differences`` that lower an option of ``MAY_FALL``."""
    found = []
    for line in config_differences(stored, config):
        key, _, change = line.partition(": ")
        before, _, after = change.partition(" -> ")
        falls = after != "None" and (before == "None" or float(after) < float(before)) if key in MAY_FALL else False
        found += [line] if falls else []
    return found


Collate = Callable[[list[Any]], Any]


class Run:
    """A run directory and this process's place in the world; on ranks other than 0 every write is a no-op."""

    def __init__(self, config: JobConfig, place: distributed.Place) -> None:
        self.config: Any = config
        self.folder: Path = config.output
        self.rank, self.world, self.device = place
        self.is_main = place.is_main
        self.computes_in = choose_precision(config.precision, self.device)
        prepare_process(self.device, config.precision)
        self.unreadable: dict[str, str] = {}
        self._untold: list[Unreadable] = []
        self._board: Boards | None = None
        self.saving = Beside()
        self.held_out: float | None = None
        """The last loss on images kept out that was recorded."""
        self._measured: dict[int, dict[str, float]] = {}
        self._best_at: int | None = None
        self._restored: int | None = None
        self.resumed = False

    @property
    def precision(self) -> torch.dtype:
        """What the forward pass computes in."""
        return self.computes_in.dtype

    def autocast(self) -> torch.autocast:
        """A context for a forward pass in ``precision``."""
        return self.computes_in.autocast(self.device)

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append a line to log.jsonl, and numbers that have a step to the boards of ``log.to``."""
        self.held_out = entry.get("held_out_loss", self.held_out)
        if not self.is_main:
            return
        with said_plainly(self.folder, ROOM):
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**entry, "time": round(time.time(), 3)}) + "\n")
            if "step" in entry:
                for name, value in entry.items():
                    if name != "step" and isinstance(value, int | float):
                        self.board.add_scalar(name, value, entry["step"])

    @property
    def board(self) -> Boards:
        """What shows the run, opened at first use."""
        if self._board is None:
            shown = Logged(self.folder, flattened(self.config.model_dump(mode="json")), self._restored)
            self._board = Boards(_boards_of(self.config), shown, self.say)
        return self._board

    def picture(self, name: str, image: Image.Image, step: int | None = None) -> Path:
        """Write ``pictures/<name>.png``, and show it on the boards where it has a step."""
        path = self.folder / PICTURES / f"{name}.png"
        if self.is_main:
            with said_plainly(self.folder, ROOM), atomic_path(path) as temporary:
                image.save(temporary)
            if step is not None:
                import numpy as np

                self.board.add_image(name.rpartition("_")[0] or name, np.asarray(image), step, dataformats="HWC")
        return path

    def note_unreadable(self, found: list[Unreadable]) -> None:
        """Name each unreadable file once, in the log and on the screen; with ``data.on_error=raise``, stop the run.

        Those of other ranks are named at the next ``share_unreadable``.
        """
        if found and self.config.data.on_error == "raise":
            refuse_unreadable(found)
        for path, reason in found:
            if path not in self.unreadable:
                self.unreadable[path] = reason
                self._untold.append(Unreadable(path, reason))
                self.record({"event": "unreadable", "path": path, "reason": reason})
                self.say(f"skipped unreadable image {path} ({reason})")

    def share_unreadable(self) -> None:
        """Tell rank 0 of the unreadable files that other ranks met; all ranks must call it."""
        for found in distributed.gather(self._untold):
            if self.is_main:
                self.note_unreadable([entry for entry in found if entry.path not in self.unreadable])
        self._untold = []

    def training_loader(
        self,
        images: Any,
        collate: Collate,
        *,
        total_steps: int,
        start_step: int = 0,
        repeats: int = 1,
        workers: Workers | None = None,
    ) -> DataLoader[Any]:
        """Batches of this rank's share of ``images``, by (epoch, index), ``optim.batch_size`` a step over all ranks.
        ``workers``: those of the configuration when None."""
        workers = self.config.data.workers if workers is None else workers
        if workers == AUTO:
            workers = self._measured_workers(images, collate)
        steps = {"total_steps": total_steps, "start_step": start_step, "repeats": repeats}
        place = {"rank": self.rank, "world": self.world}
        sampler = StepSampler(len(images), self.config.optim.batch_size, self.config.seed, **steps, **place)
        return self._loader(images, sampler, collate, workers)

    def loader(
        self,
        images: Any,
        collate: Collate,
        batch: int,
        *,
        workers: Workers | None = None,
        indices: Sequence[int] | None = None,
    ) -> DataLoader[Any]:
        """Batches of this rank's share of ``images``, or of those of ``indices``: each on one rank, once, in order.
        ``workers``: those of the configuration when None."""
        mine = (range(len(images)) if indices is None else indices)[self.rank :: self.world]
        return self._loader(images, BatchSampler(mine, batch, drop_last=False), collate, workers)

    def _measured_workers(self, images: Any, collate: Collate) -> int:
        """The number of processes for ``data.workers=auto``, the same on all ranks, which all measure at once; it is
        put into the configuration of the run and its config.yaml."""
        most = cores() - 1 if self.device.type == "cuda" else min(2, cores())  # a CPU has more to do than to read
        found: dict[int, float] = {}
        for number in candidates(most):
            rates = distributed.gather(loader_rate(images, collate, number, batch=AT_ONCE, seconds=SECONDS))
            found[number] = min(rates)
        chosen = best_number(found)
        data = self.config.data.model_copy(update={"workers": chosen})
        self.config = self.config.model_copy(update={"data": data})
        if self.is_main:
            write_text(self.folder / CONFIG, dump_config(self.config))
        measured = ", ".join(f"{number}: {rate:.0f}" for number, rate in found.items())
        self.say(f"data.workers: {chosen} (images/s a rank by number of processes: {measured})")
        return chosen

    def _loader(self, images: Any, sampler: Any, collate: Collate, workers: Workers | None) -> DataLoader[Any]:
        asked: Workers = self.config.data.workers if workers is None or workers == AUTO else workers
        return make_loader(
            images,
            sampler,
            collate,
            workers=processes(asked),
            pin=self.device.type == "cuda",
            timeout=self.config.data.timeout,
        )

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the last whole checkpoint -> steps done, 0 where the run is not a resumed one; the log forgets what came
        after it."""
        if not self.resumed:
            return 0
        checkpoint = load_checkpoint(self.folder, model, optimizer, say=self.say)
        load_model(model, checkpoint.model)
        load_optimizer(optimizer, checkpoint.optimizer)
        if self.is_main and (self.folder / LOG).is_file():
            lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(self.folder / LOG, "".join(line for line in lines if logged_by(line, checkpoint.step)))
        self._restored = checkpoint.step
        distributed.barrier()
        self.say(f"resuming {self.folder} after step {checkpoint.step}")
        return checkpoint.step

    def checkpoint(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        metadata: Mapping[str, Any],
        *,
        wait: bool = True,
    ) -> None:
        """Save what a resume needs; all ranks wait until it is on disk. Without ``wait`` only until it is copied, where
        there is memory for that: it is written meanwhile, and where that fails, the next call waits and raises."""
        state, moments = whole(model.state_dict()), whole(optimizer.state_dict())
        keep = Keep(self.config.log.keep_checkpoints, self.config.log.keep_every, self._kept_by)
        measured = self._measured.get(step)

        def write(weights: Any, rest: Any) -> None:
            with said_plainly(self.folder, ROOM):
                save_checkpoint(self.folder, step, weights, rest, metadata, keep=keep, measured=measured)

        def save() -> None:
            refuse_non_finite(state, f"the checkpoint of step {step}")
            failed = self.saving.take_error()
            if failed is not None:
                self.say(f"the last checkpoint was not written ({first_line(failed)}); trying again")
            if wait or failed is not None or not copy_fits(state, moments):
                write(state, moments)
                return
            copies = copied(state), copied(moments)
            self.saving.start(lambda: write(*copies))

        distributed.on_main(save, is_main=self.is_main)

    @property
    def _kept_by(self) -> str | None:
        """The measure by which the best checkpoint is kept."""
        found: str | None = getattr(getattr(self.config, "watch", None), "keep_best", None)
        return found

    def note_measured(self, step: int, values: Mapping[str, float | None]) -> None:
        """Remember what was measured at ``step``, for its checkpoint. All ranks must call it."""
        self._measured = {step: {name: value for name, value in values.items() if value is not None}}
        name, value = self._kept_by, values.get(self._kept_by or "")
        better = False
        if self.is_main and name is not None and value is not None:
            best = best_checkpoint(self.folder, name)
            better = best is None or cost_of(name, value) < cost_of(name, best[1])
        if distributed.gather(better)[0]:
            self._best_at = step

    def best_so_far(self, step: int) -> bool:
        """Whether the measure by which a checkpoint is kept was the best at ``step``."""
        return self._best_at == step

    def write_weights(self, name: str, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write a file of trained weights into the folder, on rank 0; refused where they are not finite. All ranks must
        call it."""
        state = whole(state)

        def write() -> None:
            refuse_non_finite(state, name)
            with said_plainly(self.folder, ROOM):
                write_weights(self.folder / name, state, metadata)

        distributed.on_main(write, is_main=self.is_main)

    def close(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Write ``metrics`` to metrics.json, say how many files were skipped on all ranks, all of which must call it,
        flush the writers, and leave the other ranks."""
        if self.is_main and metrics is not None:
            write_json(self.folder / METRICS, metrics)
        self.share_unreadable()
        if self.unreadable:
            self.say(f"{len(self.unreadable)} unreadable images were skipped; {self.folder / LOG} names them")
        if self._board is not None:
            with said_plainly(self.folder, ROOM):
                self._board.close()
        if self.is_main:
            release(self.folder)
        distributed.leave()


def open_run(config: JobConfig, *, resume: bool, data: Data | None = None) -> Run:
    """Claim the run directory and write its config.yaml, environment.json and, of its ``data``, data.json;
    see ``check_output`` and ``check_data`` for what is refused."""
    config = with_stored_workers(config) if resume else config
    known = None if data is None else fingerprint(data)
    if resume and known is not None:
        check_data(config.output, known)
    place = distributed.join(config.device, config.rank_timeout)
    run = Run(config, place)
    run.resumed = resume
    distributed.on_main(lambda: _claim_folder(run, known), is_main=place.is_main)
    run.say(f"precision: {run.computes_in}")
    return run


def with_stored_workers(config: JobConfig) -> JobConfig:
    """``config`` with the number that a run has found for ``data.workers=auto``, where its config.yaml has one."""
    data: Any = getattr(config, "data", None)
    if getattr(data, "workers", None) != AUTO or not (config.output / CONFIG).is_file():
        return config
    stored: Any = load_config(type(config), config.output / CONFIG)
    data = data.model_copy(update={"workers": stored.data.workers})
    return config.model_copy(update={"data": data})


def _boards_of(config: JobConfig) -> tuple[str, ...]:
    return config.log.to if isinstance(config, RunConfig) else ("tensorboard",)


def _claim_folder(run: Run, data: Mapping[str, Any] | None) -> None:
    """Make the folder, lock it, and write what the run is."""
    folder = run.folder
    check_output(run.config, resume=run.resumed)
    with said_plainly(folder, "choose another with output=FOLDER, or free disk space"):
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder)
        try:
            check_output(run.config, resume=run.resumed)  # another process may have been faster
        except UserError:
            release(folder)
            raise
        write_text(folder / CONFIG, dump_config(run.config))
        if data is not None:
            write_text(folder / DATA, json.dumps(data, indent=2) + "\n")
        surroundings = {**environment(run.device), "precision": str(run.computes_in)}
        write_text(folder / ENVIRONMENT, json.dumps(surroundings, indent=2) + "\n")


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for the record."""
    import numpy
    import timm
    import torchvision

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "mae_core": mae_core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
    }


def commit() -> str:
    """The commit of the code that runs, marked where it was changed; "unknown" outside a checkout."""
    root = Path(mae_core.__file__).parents[1]
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if not (root / ".git").exists():  # an installed package may lie in a checkout of something else
        return "unknown"
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor_name() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def logged_by(line: str, step: int) -> bool:
    """Whether a line of a log was written by the end of ``step``, as far as it is one at all."""
    try:
        return json.loads(line).get("step", 0) <= step
    except (ValueError, AttributeError, TypeError, RecursionError):
        return False  # the line of a run that was killed while it wrote, or damage
