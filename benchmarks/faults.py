"""What trainings do when they are killed and their files are damaged: counts, and whether anything was lost.

    python benchmarks/faults.py FOLDER                  the whole table, about an hour on two cores
    python benchmarks/faults.py FOLDER --share 0.1      a tenth of the kills and of the mutations

Kills: a tiny training is ended by SIGKILL, with its workers, at random moments (in steps, saves, pictures), resumed
each time by the same command, and compared with an uninterrupted one. Mutations: bits, bytes and lengths of the files
of a run and of configurations are changed at random; what reads them has to refuse them in a sentence or read what
was written. FOLDER gets everything, and faults.md; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mae_core.atomic import write_json
from mae_core.config.load import dump_config, load_config
from mae_core.data.digits import write_digits
from mae_core.errors import UserError
from mae_core.layout import CLASSIFIER, ENCODER, checkpoint_folders
from mae_core.training.checkpoints import load_checkpoint
from mae_core.training.finetune import finetune
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.pretrain import build_pretrain_model, pretrain, pretrain_optimizer
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.resuming_proof import differences, kill_and_resume
from mae_core.training.run import commit, environment
from mae_core.weights.files import read_weights
from transfer.detection.config import DetectionConfig
from transfer.detection.detector_file import DETECTOR
from transfer.detection.run import train_detector
from transfer.segmentation.segmenter_file import SEGMENTER
from transfer.segmentation.train_net import train_segmenter

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).resolve().parents[1]
TINY = {
    **{"model.size": "nano", "model.patch_size": 8, "data.image_size": 32, "optim.batch_size": 4, "device": "cpu"},
    **{"optim.warmup_epochs": 0, "log.every": 1, "log.checkpoint_every": 3},
}
PRETRAIN = {**TINY, "decoder.width": 32, "decoder.depth": 1, "decoder.heads": 2, "log.pictures_every": 5}
FINETUNE = {**TINY, "from_scratch": "true", "model.patch_size": 16}
DETECTION = {
    **TINY,
    **{"from_scratch": "true", "log.pictures_every": 5, "optim.base_lr": 0.06, "model.window": "null"},
    **{"model.norm": "gn", "model.fpn_channels": 32, "model.rpn_convs": 1, "model.head_channels": 32},
    **{"model.box_convs": 0, "model.box_features": 64, "model.mask_convs": 1, "sampling.rpn_anchors": 32},
    **{"sampling.pre_nms_train": 40, "sampling.pre_nms_test": 40, "sampling.proposals": 20, "sampling.rois": 12},
}
LIMIT = 20.0
"""Seconds in which a damaged file has to be refused or read."""


class Forked:
    """A training in a process of its own, forked from this one, which has everything imported; see ``Started``."""

    def __init__(self, work: Callable[[], Any], said: Path) -> None:
        self.process = FORK.Process(target=self._work, args=(work, said))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @staticmethod
    def _work(work: Callable[[], Any], said: Path) -> None:
        os.setsid()
        with said.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(torch.get_num_threads())  # makes torch's pool anew: threads of a fork would race for it
        work()
        sys.stdout.flush()
        os._exit(0)  # multiprocessing's own end stops loading processes in a way that torch takes for a fault

    def ended(self) -> int | None:
        """See ``Started``."""
        return self.process.exitcode


def options_of(options: dict[str, Any]) -> list[str]:
    """``key=value`` texts."""
    return [f"{key}={value}" for key, value in options.items()]


def pretraining(data: Path, run: Path, workers: int) -> None:
    """60 steps on 20 images."""
    places = {"data.path": data / "images", "output": run, "data.workers": workers, "optim.epochs": 12}
    pretrain(load_config(PretrainConfig, None, options_of({**PRETRAIN, **places})), resume="auto")


def finetuning(data: Path, run: Path) -> None:
    """30 steps, evaluated on the way."""
    places = {"data.path": data / "classification", "output": run, "data.workers": 1, "optim.epochs": 3}
    finetune(load_config(FinetuneConfig, None, options_of({**FINETUNE, **places})), resume="auto")


def detection(data: Path, run: Path) -> None:
    """30 steps on torchvision."""
    places = {"data.path": data / "detection", "output": run, "data.workers": 1, "optim.epochs": 3}
    train_detector(load_config(DetectionConfig, None, options_of({**DETECTION, **places})), resume="auto")


def segmentation(data: Path, run: Path) -> None:
    """30 steps on mmseg."""
    options = {
        "data_root": str(data / "segmentation"),
        "crop_size": 32,
        "head_width": 16,
        "batch_size": 4,
        "workers": 1,
    }
    options |= {"iterations": 30, "custom_hooks.0.interval": 1, "default_hooks.checkpoint.interval": 3}
    options |= {"model.backbone.drop_path": 0.1, "visualizer.vis_backends": []}
    train_segmenter(ROOT / "configs" / "segmentation" / "digits.py", work_dir=run, cfg_options=options, resume="auto")


TASKS: dict[str, tuple[Callable[[Path, Path], None], str, int, int]] = {
    "pre-training, 0 workers": (lambda data, run: pretraining(data, run, 0), ENCODER, 60, 30),
    "pre-training, 2 workers": (lambda data, run: pretraining(data, run, 2), ENCODER, 60, 30),
    "fine-tuning": (finetuning, CLASSIFIER, 30, 10),
    "detection (torchvision)": (detection, DETECTOR, 30, 10),
    "segmentation (mmseg)": (segmentation, SEGMENTER, 30, 10),
}
"""Name -> (training, its file, its steps, kills of the whole table)."""


class Rows:
    """The rows of the table that are measured, kept in a file: a stopped benchmark goes on. The last cell of each is
    the commit it was measured at."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        self.commit = commit()

    def row(self, name: str, measure: Callable[[], str]) -> str:
        """The row ``name``, measured unless it is known."""
        if name not in self.known:
            self.known[name] = f"{measure()} {self.commit} |"
            write_json(self.file, self.known)
            print(self.known[name], flush=True)
        return self.known[name]


def killed(folder: Path, share: float, seed: int, name: str) -> str:
    """A row of the first table."""
    work, result, steps, count = TASKS[name]
    count = max(1, round(count * share))
    place = folder / name.split(" (")[0].replace(", ", "_").replace(" ", "_")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)

    def start(run: Path) -> Callable[[], Forked]:
        return lambda: Forked(lambda: work(folder / "data", run), run.with_suffix(".txt"))

    began = time.monotonic()
    kill_and_resume(start(place / "whole"), place / "whole", steps, 0, random.Random(seed), 0.0)
    pause = 2 * (time.monotonic() - began) / steps
    moments, early = kill_and_resume(
        start(place / "killed"), place / "killed", steps, count, random.Random(seed), pause
    )
    tensors, differing = differences(place / "whole" / result, place / "killed" / result)
    verdict = f"all {tensors} tensors bitwise equal" if not differing else f"{len(differing)} of {tensors} differ"
    return f"| {name} | {steps} | {len(moments)} | {early} | {verdict} |"


def mutated(content: bytes, chance: random.Random) -> bytes:
    """``content`` with one thing changed: a bit, a few bytes, a block, the length."""
    data = bytearray(content)
    place = chance.randrange(len(data))
    length = chance.choice([1, 4, 16, 64, 512])
    kind = chance.choice(["bit", "bytes", "zeros", "cut", "remove", "insert", "swap", "append"])
    if kind == "bit":
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "bytes":
        data[place : place + length] = chance.randbytes(len(data[place : place + length]))
    elif kind == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == "cut":
        del data[place:]
    elif kind == "remove":
        del data[place : place + length]
    elif kind == "insert":
        data[place:place] = chance.randbytes(length)
    elif kind == "append":
        data += chance.randbytes(length)
    else:
        other = chance.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    return bytes(data)


def outcome(read: Callable[[], str]) -> str:
    """What ``read`` does in a process of its own: "refused", what it returns, or how it failed."""
    theirs, ours = FORK.Pipe()

    def work() -> None:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            ours.send(read())
        except UserError as error:
            ours.send("refused" if "\n" not in str(error) or "problems:" in str(error) else "many lines")
        except BaseException as error:
            ours.send(f"{type(error).__name__}")

    process = FORK.Process(target=work)
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return "too slow"
    return theirs.recv() if theirs.poll() else f"died ({process.exitcode})"


def mutated_checkpoints(folder: Path, count: int, seed: int) -> Counter[str]:
    """Files of the last checkpoint of a pre-training, read as a resume does; the one before may be taken instead."""
    run = folder / "mutated_run"
    places = {"data.path": folder / "data" / "images", "output": run, "data.workers": 0, "optim.epochs": 1.2}
    config = load_config(PretrainConfig, None, options_of({**PRETRAIN, **places}))
    shutil.rmtree(run, ignore_errors=True)
    process = Forked(lambda: pretrain(config), folder / "mutated_run.txt")
    process.process.join()
    model = build_pretrain_model(config)
    optimizer = pretrain_optimizer(model, config)
    last = checkpoint_folders(run)[-1]
    right = {f.name: read_weights(f / "model.safetensors")[0] for f in checkpoint_folders(run)}

    def read() -> str:
        found = load_checkpoint(run, model, optimizer, say=lambda text: None)
        name = f"step_{found.step:08d}"
        same = all(torch.equal(found.model[key], tensor) for key, tensor in right[name].items())
        return ("as written" if name == last.name else "the one before") if same else "WRONG"

    found: Counter[str] = Counter()
    chance = random.Random(seed)
    for number in range(count):
        file = last / ["model.safetensors", "training.pt", "training.pt", "COMPLETE"][number % 4]
        kept = file.read_bytes()
        file.write_bytes(mutated(kept, chance))
        found[outcome(read)] += 1
        file.write_bytes(kept)
    return found


def mutated_weights(folder: Path, count: int, seed: int) -> Counter[str]:
    """``encoder.safetensors`` and a torch file of the same tensors, read as ``--weights`` does."""
    ours = folder / "mutated_run" / ENCODER
    right = read_weights(ours)[0]
    official = folder / "mutated.pth"
    torch.save({"model": right}, official)

    def read(path: Path) -> str:
        state, _ = read_weights(path)
        same = state.keys() == right.keys() and all(torch.equal(state[name], right[name]) for name in right)
        return "as written" if same else "WRONG"

    found: Counter[str] = Counter()
    chance = random.Random(seed)
    for number in range(count):
        file = (ours, official)[number % 2]
        kept = file.read_bytes()
        file.write_bytes(mutated(kept, chance))
        found[outcome(lambda file=file: read(file))] += 1  # type: ignore[misc]
        file.write_bytes(kept)
    return found


def mutated_configs(folder: Path, count: int, seed: int) -> Counter[str]:
    """Configurations of the repository, mutated as bytes."""
    files = [*sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))]
    texts = [dump_config(load_config(PretrainConfig, file, ["data.path=images"])).encode() for file in files]
    chance, found = random.Random(seed), Counter[str]()
    path = folder / "mutated.yaml"

    def read() -> str:
        config = load_config(PretrainConfig, path)
        again = folder / "again.yaml"
        again.write_text(dump_config(config))
        return "read" if load_config(PretrainConfig, again) == config else "WRONG"

    for number in range(count):
        path.write_bytes(mutated(texts[number % len(texts)], chance))
        found[outcome(read)] += 1
    return found


def write_data(folder: Path) -> None:
    """Images without labels, and small labelled sets of the embedded digits."""
    (folder / "images").mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(20):
        coarse = Image.fromarray(chance.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(folder / "images" / f"{number:02d}.png")
    digits = folder / "digits"
    write_digits(digits, seed=0, image_size=32, num_unlabelled=1, num_train=40, num_test=40, clutter=1.0, workers=1)
    for task in ("classification", "detection", "segmentation"):
        (digits / task).rename(folder / task)


def damaged(what: str, mutate: Callable[[Path, int, int], Counter[str]], folder: Path, count: int, seed: int) -> str:
    """A row of the second table."""
    found = mutate(folder, count, seed)
    return f"| {what} | {count} | {', '.join(f'{n} {name}' for name, n in found.most_common())} |"


def table(folder: Path, share: float, seed: int, names: list[str]) -> str:
    """Everything, as Markdown."""
    if not (folder / "data").exists():
        write_data(folder / "unfinished")
        (folder / "unfinished").rename(folder / "data")
    rows = Rows(folder / "rows.json")
    about = environment(torch.device("cpu"))
    lines = [
        "# Faults",
        "",
        f"`python benchmarks/faults.py FOLDER{f' --share {share:g}' if share != 1 else ''}`",
        "",
        f"{about['processor']}, {about['threads']} thread, torch {about['torch']}",
        "",
        "## Killed and resumed",
        "",
        "| training | steps | SIGKILLs | before the first checkpoint | final weights | commit |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    lines += [rows.row(name, lambda name=name: killed(folder, share, seed, name)) for name in names]  # type: ignore[misc]
    count = max(8, round(500 * share))
    lines += ["", "## Damaged files", "", "| files | mutations | outcome | commit |", "|---|---|---|---|"]
    for what, mutate in (
        ("checkpoints of a pre-training", mutated_checkpoints),
        ("weights (ours, and a torch file)", mutated_weights),
        ("configurations", mutated_configs),
    ):
        lines.append(rows.row(what, lambda what=what, mutate=mutate: damaged(what, mutate, folder, count, seed)))  # type: ignore[misc]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the kills and mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), help="which are killed")
    given = parser.parse_args()
    if given.folder.exists() and any(given.folder.iterdir()) and not (given.folder / "data").exists():
        parser.error(f"{given.folder} is not empty; choose another folder")
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    found = table(given.folder, given.share, given.seed, given.tasks)
    (given.folder / "faults.md").write_text(found)
    print(f"wrote {given.folder / 'faults.md'}")
    bad = [word for word in ("differ", "WRONG", "Error", "died", "too slow", "many lines") if word in found]
    if bad:
        sys.exit(f"not as promised: {', '.join(bad)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
