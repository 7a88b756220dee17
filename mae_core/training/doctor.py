"""``mae doctor``: what this machine has, and whether a training would run on it."""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image, features

from mae_core.errors import UserError, first_line
from mae_core.training.distributed import device_of, meet
from mae_core.training.precision import choose_precision
from mae_core.training.run import environment

OPTIONAL = ("torchvision", "mae-transfer", "pydantic", "safetensors", "webdataset", "datasets", "imagecodecs", "peft")
"""Packages whose versions say something about a report, besides those of environment.json."""
ENGINES = "transfer.engines:states"
"""Where the engines of detection and segmentation are, which this package knows nothing of: () -> (name, packages that
are missing, the line that installs them)."""
LITTLE_DISK, LITTLE_SHM = 5 << 30, 512 << 20
"""Bytes: a ViT-B's two checkpoints are 2.6 GB, and a batch of 256 pictures of 224x224 is 154 MB in shared memory."""
STEPS = 5


class Finding(NamedTuple):
    """state: "ok", "note" (works, but see) or "broken"."""

    name: str
    state: str
    text: str


def examine(folder: Path) -> Iterator[Finding]:
    """Look at everything in turn; ``folder`` is where runs would be written."""
    device = device_of()
    facts = environment(device)
    kept = ("mae_core", "python", "torch", "torchvision", "timm", "numpy")
    others = {name: found for name in OPTIONAL if name not in kept and (found := _version(name))}
    yield Finding("versions", "ok", _listed({**{name: facts[name] for name in kept}, **others}))
    yield Finding("platform", "ok", facts["platform"])
    yield Finding("processor", "ok", f"{facts['processor']}, {os.cpu_count()} cores, {facts['threads']} threads")
    yield _gpus()
    yield Finding("precision", "ok", str(choose_precision("auto", device)))
    yield _decoder()
    yield from _engines()
    yield from _disk(folder)
    yield _attempt("processes", _processes)
    yield _attempt("training", lambda: _training(folder))


def report(folder: Path, say: Callable[[str], None] = print) -> bool:
    """Print what ``examine`` finds; whether nothing is broken."""
    broken = 0
    for name, state, text in examine(folder):
        say(f"{state:>6}  {name}: {text}")
        broken += state == "broken"
    say("everything works" if not broken else f"{broken} of these do not work; a training would fail or hang")
    return not broken


def _attempt(name: str, work: Callable[[], Finding]) -> Finding:
    """``work``, or what it failed with: whatever it is, that is the finding."""
    try:
        return work()
    except Exception as error:
        return Finding(name, "broken", f"{type(error).__name__}: {first_line(error)}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _listed(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _gpus() -> Finding:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        seen = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists()
        if seen:
            why = "this torch was built without CUDA" if built is None else f"torch for CUDA {built} cannot use it"
            return Finding("devices", "broken", f"there is an NVIDIA driver, but {why}; install the torch that fits it")
        return Finding("devices", "ok", "CPU alone: torch sees no GPU")
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    return Finding("devices", "ok", f"CUDA {torch.version.cuda}: {'; '.join(found)}")


def _decoder() -> Finding:
    turbo = features.check_feature("libjpeg_turbo")
    text = f"Pillow {Image.__version__}, JPEG by {'libjpeg-turbo' if turbo else 'libjpeg, which is slower'}"
    codecs = _version("imagecodecs")
    more = f"; imagecodecs {codecs}" if codecs else "; some TIFF codecs need pip install 'mae-transfer[tiff]'"
    return Finding("decoder", "ok" if turbo else "note", text + more)


def _engines() -> Iterator[Finding]:
    try:
        states = resolve_name(ENGINES)()
    except ImportError:
        return
    for engine, missing, install in states:
        text = f"not installed ({', '.join(missing)} missing); {install}" if missing else "installed"
        yield Finding(f"engine {engine}", "note" if missing else "ok", text)


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    state = "broken" if not writable or free < 64 << 20 else "note" if free < LITTLE_DISK else "ok"
    yield Finding(
        "disk", state, f"{free / 2**30:.1f} GiB free in {there}{'' if writable else ', which is not writable'}"
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        state = "broken" if usage.free < 16 << 20 else "note" if usage.free < LITTLE_SHM else "ok"
        advice = (
            "" if state == "ok" else "; workers pass batches through it: docker run --shm-size=8g, or data.workers=0"
        )
        yield Finding("/dev/shm", state, f"{usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free{advice}")


def _processes() -> Finding:
    """Two processes, or one for each of several GPUs, add a number up."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    world = gpus if gpus > 1 else 2
    backends = ["gloo", *(["nccl"] if gpus > 1 else [])]
    for backend in backends:
        with tempfile.TemporaryDirectory() as place:
            context = multiprocessing.spawn(
                _add_up, args=(backend, world, f"file://{place}/meeting"), nprocs=world, join=False
            )
            if not context.join(timeout=120) and not context.join(timeout=1):
                for process in context.processes:
                    process.kill()
                return Finding("processes", "broken", f"{world} processes did not meet in 120 s by {backend}")
    alone = "" if gpus != 1 else "; NCCL is not tried with one GPU"
    return Finding("processes", "ok", f"{world} processes met and added up by {' and '.join(backends)}{alone}")


def _add_up(rank: int, backend: str, world: int, place: str) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    with meet(backend, rank, world, place):
        total = torch.tensor([float(rank + 1)], device=device)
        torch.distributed.all_reduce(total)
        assert float(total) == world * (world + 1) / 2, f"the sum is {float(total)}"


def _training(folder: Path) -> Finding:
    """Five steps of a tiny pre-training on random pictures, with a worker process."""
    from mae_core.config.load import load_config
    from mae_core.training.pretrain import pretrain
    from mae_core.training.pretrain_config import PretrainConfig

    with tempfile.TemporaryDirectory(prefix="mae-doctor-") as place:
        images, chance = Path(place, "images"), np.random.default_rng(0)
        images.mkdir()
        for number in range(8):
            Image.fromarray(chance.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(images / f"{number}.png")
        options: dict[str, Any] = {
            **{"model.size": "nano", "model.patch_size": 8, "decoder.width": 32, "decoder.depth": 1},
            **{"decoder.heads": 2, "data.image_size": 32, "data.workers": 1, "data.path": images},
            **{"optim.batch_size": 4, "optim.epochs": STEPS / 2, "optim.warmup_epochs": 0, "log.every": STEPS},
            "output": Path(place, "run"),
        }
        with redirect_stdout(io.StringIO()):
            result = pretrain(load_config(PretrainConfig, None, [f"{key}={value}" for key, value in options.items()]))
    if not math.isfinite(result.loss):
        raise UserError(f"the loss of a tiny pre-training is {result.loss}")
    return Finding(
        "training", "ok", f"{STEPS} steps of a tiny pre-training in {result.seconds:.1f} s, saved and finished"
    )
