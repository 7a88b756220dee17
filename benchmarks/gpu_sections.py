"""What ``benchmarks.gpu`` measures, a function and a row of ``SECTIONS`` each. An entry is a flat dict of numbers and
texts, in the JSON as soon as it is known; what is missing, such as a package, is an entry too."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import dense
from benchmarks.pretrain_step import CONTESTANTS, Case, train_step
from benchmarks.side_by_side import counted, matmul, wait_for
from mae_core import build_mae
from mae_core.atomic import write_json
from mae_core.config.load import load_config
from mae_core.data.loading import make_loader
from mae_core.data.sources import open_source
from mae_core.data.unlabelled import UnlabelledImages, collate
from mae_core.errors import UserError, first_line
from mae_core.layout import LOG, METRICS
from mae_core.masking import PatchMask, SampleMasks
from mae_core.models.mae import MaskedAutoencoder
from mae_core.models.sizes import AnySize
from mae_core.training.precision import choose_precision
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.run import environment
from transfer.engines import installed
from transfer.pyramid import sync_batch_norm

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("transformers", "mmseg", "mmcv", "detectron2", "pycocotools", "webdataset", "simplejpeg")
NO_CHECKOUTS = Namespace(official=None, mmpretrain=None)
GIB = 2**30
KEPT_GIB = 24
"""The memory that the dense recipes for one GPU promise to keep to."""


@dataclass(frozen=True)
class Scale:
    """How large each measurement is. ``steps``: size of the trunk, patch, batches; ``dense``: case, images at once."""

    image: int
    decoder: tuple[int, int, int]
    steps: tuple[tuple[str, int, tuple[int, ...]], ...]
    checked: tuple[AnySize, int]
    matmul_sides: tuple[int, ...]
    timed: int
    loader_seconds: float
    dense: dict[str, tuple[dense.Case, tuple[int, ...]]]
    training: tuple[str, ...]
    epochs: float
    probe_epochs: float
    photos: int


SCALES = {
    "full": Scale(
        image=224,
        decoder=(512, 8, 16),
        steps=(
            ("small", 16, (1024, 256)),
            ("large", 16, (256, 64)),
            ("base", 16, (512, 128)),
            ("huge", 14, (128, 32)),
        ),
        checked=("small", 8),
        matmul_sides=(4096, 8192),
        timed=7,
        loader_seconds=4.0,
        dense={"detector": (dense.Case("base", 1024), (1, 2)), "segmenter": (dense.Case("base", 512), (2, 4))},
        training=(
            "model.size=small model.patch_size=8 decoder.width=256 decoder.depth=4 decoder.heads=8 data.image_size=128 "
            "model.compile=true data.repeats=4 optim.batch_size=512 optim.base_lr=3.5e-4 optim.warmup_epochs=10 "
            "log.every=20 log.pictures_every=100000 log.checkpoint_every=100000"
        ).split(),  # type: ignore[arg-type]
        epochs=200,
        probe_epochs=90,
        photos=512,
    ),
    "tiny": Scale(
        image=32,
        decoder=(32, 1, 2),
        steps=(("nano", 8, (2,)),),
        checked=({"width": 32, "depth": 1, "heads": 2}, 2),
        matmul_sides=(64,),
        timed=2,
        loader_seconds=0.2,
        dense={"detector": (dense.CASES["nano64"], (1,)), "segmenter": (dense.CASES["nano64"], (2,))},
        training=(
            "model.size=nano model.patch_size=8 decoder.width=32 decoder.depth=1 decoder.heads=2 data.image_size=32 "
            "optim.batch_size=8 optim.warmup_epochs=0 log.every=1"
        ).split(),  # type: ignore[arg-type]
        epochs=2,
        probe_epochs=2,
        photos=24,
    ),
}


@dataclass(frozen=True)
class Setting:
    """Where and on what is measured. ``deadline`` is that of the section, on the monotonic clock."""

    out: Path
    device: torch.device
    scale: str
    data: Path | None
    validation: Path | None
    deadline: float = field(default=float("inf"))

    @classmethod
    def of(cls, out: Path, device: str, scale: str, data: Path | None, validation: Path | None) -> Setting:
        """From the command line. Raises ``UserError`` for folders that do not exist."""
        if validation is None and data is not None:
            beside = data.resolve().parent / "imagenette" / "val"
            validation = beside if beside.is_dir() else None
        for name, folder in (("data", data), ("validation", validation)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"--{name} {folder}: there is no such folder")
        return cls(out.resolve(), torch.device(device), scale, data, validation)

    def arguments(self) -> list[str]:
        """The same on the command line of a section's process."""
        found = ["--out", str(self.out), "--device", str(self.device), "--scale", self.scale]
        for name in ("data", "validation"):
            if (folder := getattr(self, name)) is not None:
                found += [f"--{name}", str(folder)]
        return found

    @property
    def size(self) -> Scale:
        """The row of the scale."""
        return SCALES[self.scale]

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class Record:
    """Entries of a section, in its file as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._lock = Lock()

    def add(self, **entry: Any) -> None:
        """One more entry; threads may add at once."""
        with self._lock:
            self.entries.append(entry)
            write_json(self.path, {"measured": self.entries})


def attempt(record: Record, what: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> None:
    """Add an entry of ``what`` and its measurement, or the reason why there is none: out of memory, no package."""
    try:
        record.add(**what, **measured())
    except Exception as error:  # whatever it is, the next measurement is worth its time
        record.add(**what, failed=first_line(error)[:160])
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def timed(step: Callable[[], Any], count: int, device: torch.device) -> dict[str, float]:
    """Seconds of a step, the median of ``count`` after two that are not counted, and the peak of memory in GiB."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    taken = []
    for number in range(count + 2):
        began = time.perf_counter()
        step()
        wait_for(device)
        if number > 1:
            taken.append(time.perf_counter() - began)
    found = {"seconds": statistics.median(taken), "slowest": max(taken)}
    if on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return found


def device_section(setting: Setting, record: Record) -> None:
    """Versions, memory, cores, and the peak of a product of two square matrices by number format."""
    device = setting.device
    for name, value in environment(device).items():
        record.add(fact=name, value=value)
    record.add(fact="cores", value=len(os.sched_getaffinity(0)))
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        record.add(fact="memory, GiB", value=facts.total_memory / GIB)
        record.add(fact="multiprocessors", value=facts.multi_processor_count)
        record.add(fact="cuda, cudnn", value=f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    for package in OPTIONAL:
        name = {"mmseg": "onedl-mmsegmentation", "mmcv": "onedl-mmcv"}.get(package, package)
        try:
            record.add(fact=package, value=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            record.add(fact=package, value="here" if installed(package) else "not installed")
    kinds = {"bf16": (torch.bfloat16, "highest")}  # first: shares of the peak need it
    kinds |= {"fp16": (torch.float16, "highest")} if device.type == "cuda" else {}
    kinds |= {"tf32": (torch.float32, "high"), "fp32": (torch.float32, "highest")}
    for kind, (dtype, precision) in kinds.items():
        for side in setting.size.matmul_sides:
            torch.set_float32_matmul_precision(precision)
            prepared = matmul(dtype, device, side)
            seconds = timed(prepared.step, 3 * setting.size.timed, device)["seconds"]
            record.add(matmul=kind, side=side, tflops=2 * side**3 / seconds / 1e12)


def peak_of(setting: Setting) -> float | None:
    """Operations a second of the best bf16 product that the section of the device found; None without it."""
    file = setting.out / "device.json"
    entries = json.loads(file.read_text())["measured"] if file.is_file() else []
    return max((1e12 * e["tflops"] for e in entries if e.get("matmul") == "bf16"), default=None)


def checked_model(setting: Setting) -> tuple[MaskedAutoencoder, Tensor, PatchMask]:
    """A masked autoencoder, images of noise and their masks, the same each time."""
    size, batch = setting.size.checked
    width, depth, heads = setting.size.decoder
    torch.manual_seed(0)
    side, shape = setting.size.image, {"decoder_width": width, "decoder_depth": depth, "decoder_heads": heads}
    model = build_mae(size, image_size=side, patch_size=setting.size.steps[0][1], **shape)
    images = torch.randn(batch, 3, side, side)
    return model, images, model.masker(batch, model.encoder.grid, torch.Generator().manual_seed(0))


def numerics(setting: Setting, record: Record) -> None:
    """Loss and gradients of one batch by number format, eager and compiled, against float32 on the CPU."""
    model, images, mask = checked_model(setting)

    def loss_and_gradients(device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[float, Tensor]:
        net = copy.deepcopy(model).to(device)
        pixels, there = images.to(device), mask.to(device)
        loss_of: Callable[[], Tensor] = lambda: net(pixels, mask=there, predict_visible=False).loss  # noqa: E731
        if compiled:
            loss_of = torch.compile(loss_of, backend="inductor" if device.type == "cuda" else "eager")
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of()
        loss.backward()
        gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(gradients).float().cpu()

    expected, right = loss_and_gradients(torch.device("cpu"), torch.float32, False)
    record.add(precision="fp32 on the CPU", loss=expected, loss_error=0.0, gradient_error=0.0, seconds=0.0)

    def measure(dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
        began = time.perf_counter()
        loss, gradients = loss_and_gradients(setting.device, dtype, compiled)
        error = float((gradients - right).norm() / right.norm())
        errors = {"loss": loss, "loss_error": abs(loss / expected - 1), "gradient_error": error}
        return {**errors, "seconds": time.perf_counter() - began}

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for compiled in (False, True):
            attempt(
                record, {"precision": f"{name}{', compiled' if compiled else ''}"}, partial(measure, dtype, compiled)
            )


def steps(setting: Setting, record: Record) -> None:
    """Pre-training steps in bf16: images a second, share of the measured bf16 peak, peak memory; ours, transformers'
    ViTMAE and a MAE of timm's blocks, the first batch of all sizes first, with it ours compiled."""
    peak, scale, device = peak_of(setting), setting.size, setting.device
    flops: dict[tuple[str, str], float] = {}

    def case_of(size: str, patch: int, batch: int) -> Case:
        return Case(size, scale.image, patch, scale.decoder, batch)

    def step_of(name: str, case: Case, compiled: bool = False) -> Callable[[], Tensor]:
        return train_step(name, case, torch.bfloat16, device, NO_CHECKOUTS, compiled=compiled)

    def measure(name: str, case: Case, compiled: bool) -> dict[str, Any]:
        if (name, case.size) not in flops:
            flops[name, case.size] = counted(step_of(name, replace(case, batch=2))) / 2
        found = timed(step_of(name, case, compiled), scale.timed, device)
        rate = case.batch / found["seconds"]
        share = {"share_of_peak": rate * flops[name, case.size] / peak} if peak else {}
        return {"images_per_second": rate, **share, **found}

    contestants = [(name, False) for name in CONTESTANTS if name not in vars(NO_CHECKOUTS)]
    jobs = []
    for number in range(max(len(batches) for _, _, batches in scale.steps)):
        compiled = [("ours", True)] if device.type == "cuda" and number == 0 else []
        for size, patch, batches in scale.steps:
            if number < len(batches):
                case = case_of(size, patch, batches[number])
                jobs += [(name, case, whether) for name, whether in (*contestants, *compiled)]
    for name, case, compiled in jobs:
        what = {"size": case.size, "batch": case.batch, "contestant": f"{name}{', compiled' if compiled else ''}"}
        attempt(record, what, partial(measure, name, case, compiled))


def noise_photos(folder: Path, count: int, side: tuple[int, int] = (160, 120), classes: int = 2) -> Path:
    """An ImageFolder of JPEGs of smooth noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        place = folder / f"class{number % classes}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC).save(place, quality=80)
    return folder


def photos_of(setting: Setting) -> Path:
    """``train/<class>/*`` and, where there are any, ``val/<class>/*``: the data that was given, unpacked where it is in
    shards, or noise; made once."""
    folder = setting.out / "photos"
    if folder.is_dir():
        return folder
    making = folder.with_name("photos.making")
    train, val, validation = making / "train", making / "val", setting.validation
    if setting.data is None:
        noise_photos(train, setting.size.photos)
        validation = noise_photos(val, max(8, setting.size.photos // 8))
    elif shards := sorted(setting.data.glob("*.tar")):
        train.mkdir(parents=True)
        for shard in shards:
            with tarfile.open(shard) as archive:
                archive.extractall(train, filter="data")
    else:
        making.mkdir(parents=True)
        inner = setting.data / "train"
        train.symlink_to((inner if inner.is_dir() else setting.data).resolve(), target_is_directory=True)
    if validation is not None and not val.exists():
        val.symlink_to(validation.resolve(), target_is_directory=True)
    making.rename(folder)
    return folder


def loader(setting: Setting, record: Record) -> None:
    """Images a second of the loader of a pre-training, by worker processes: decoding, crop, flip, mask, batch."""
    model = build_mae("nano", image_size=setting.size.image, patch_size=setting.size.steps[0][1])
    data = PretrainConfig().data.model_copy(
        update={
            "path": photos_of(setting) / "train",
            "image_size": setting.size.image,
            "mean": (0.5,) * 3,
            "std": (0.25,) * 3,
        }
    )
    images = UnlabelledImages(open_source(data), data, 0, SampleMasks(model.masker, model.encoder.grid))
    cores = len(os.sched_getaffinity(0))
    for workers in sorted({0, 1, cores // 2, cores} if setting.scale == "full" else {0, 1}, reverse=True):
        order = random.Random(0).choices(range(len(images)), k=1_000_000)
        batches = [[(0, index) for index in order[first : first + 64]] for first in range(0, len(order), 64)]
        stream = iter(make_loader(images, batches, collate, workers=workers, pin=False))  # type: ignore[arg-type]
        for _ in range(1 if workers == 0 else 2 * workers):
            next(stream)
        began, seen = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < setting.size.loader_seconds:
            seen += len(next(stream))
        record.add(workers=workers, images_per_second=seen / passed, pixels=setting.size.image)
        del stream


def distributed(setting: Setting, record: Record) -> None:
    """One rank of DistributedDataParallel: the same gradients, and its cost; SyncBN against BatchNorm."""
    device = setting.device
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = torch.distributed.FileStore(str(setting.out / f"store_{time.time_ns()}"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    model, images, mask = checked_model(setting)
    model, images, mask = model.to(device), images.to(device), mask.to(device)
    parallel = nn.parallel.DistributedDataParallel(model)
    gradients = {}
    for name, net in (("alone", model), ("parallel", parallel)):

        def step(net: nn.Module = net) -> None:
            model.zero_grad(set_to_none=True)
            net(images, mask=mask, predict_visible=False).loss.backward()

        found = timed(step, setting.size.timed, device)
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        record.add(what=f"{name}, {backend}", seconds=found["seconds"])
    error = float((gradients["parallel"] - gradients["alone"]).norm() / gradients["alone"].norm())
    record.add(check="gradients of one rank against none", relative_error=error)

    def synchronised() -> dict[str, float]:
        plain, x = nn.BatchNorm2d(8).to(device), torch.randn(4, 8, 5, 5, device=device)
        sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
        return {"relative_error": float((sync(x) - plain(x)).norm() / plain(x).norm())}

    if device.type == "cuda":
        attempt(record, {"check": "SyncBN against BatchNorm"}, synchronised)
    else:
        record.add(check="SyncBN against BatchNorm", failed=f"on a CPU there is {type(sync_batch_norm(8)).__name__}")
    torch.distributed.destroy_process_group()


def dense_section(setting: Setting, record: Record) -> None:
    """A detector's step (ViTDet) and a segmenter's (UperNet, beside mmseg's MAE), in bf16 where the device has it, with
    their memory."""
    device, dtype = setting.device, choose_precision("auto", setting.device).dtype

    def measure(build: Callable[[], dense.Step]) -> dict[str, Any]:
        found: dict[str, Any] = timed(build(), setting.size.timed, device)
        return {**found, "kept_to_24_gib": found["peak_gib"] < KEPT_GIB} if "peak_gib" in found else found

    case, batches = setting.size.dense["detector"]
    for images, checkpointing in itertools.product(batches, ("false", "true")):
        config = dense.detector_config(case, "torchvision", f"model.checkpointing={checkpointing}")
        what = {"task": "detector", "pixels": case.image, "images": images}
        build = partial(dense.detector, config, dtype, device, images)
        attempt(record, {**what, "trunk": f"ours, checkpointing {checkpointing}"}, partial(measure, build))
    if not installed("mmseg"):
        record.add(task="segmenter", failed="mmseg is not installed")
        return
    case, batches = setting.size.dense["segmenter"]
    for images, (name, theirs) in itertools.product(batches, (("ours", False), ("mmseg's MAE", True))):
        what = {"task": "segmenter", "pixels": case.image, "images": images, "trunk": name}
        build = partial(dense.segmenter, case, dtype, device, images, theirs=theirs)
        attempt(record, what, partial(measure, build))


def waits(setting: Setting, record: Record) -> None:
    """Where a pre-training's loop makes the processor wait for the GPU, by torch's own count: lines of code, and how
    often in a step. Waiting in every step leaves the GPU idle between steps."""
    if setting.device.type != "cuda":
        record.add(failed="a CPU does not wait for itself")
        return
    photos, steps, batch = photos_of(setting) / "train", 40, 16
    count = sum(1 for path in photos.rglob("*") if path.is_file())
    words = ["model.size=nano", "model.patch_size=16", "data.workers=0", f"data.path={photos}", "data.image_size=64"]
    words += [f"optim.batch_size={batch}", f"optim.epochs={steps * batch / count!r}", "optim.warmup_epochs=0"]
    words += [f"output={setting.out / 'waits'}", "log.every=1000000", "log.pictures_every=1000000"]
    torch.zeros(1, device=setting.device)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretrain(load_config(PretrainConfig, None, words))
    torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(entry.filename).name}:{entry.lineno}" for entry in caught if "synchronizing" in str(entry.message)
    )
    record.add(steps=steps, waits_in_all=places.total(), in_every_step=sum(n >= steps for n in places.values()))
    for place, times in places.most_common(8):
        record.add(place=place, times_a_step=times / steps)


def run_command(setting: Setting, name: str, *arguments: str) -> Path:
    """``mae NAME ...`` into a folder of that name. Raises ``RuntimeError`` with its last line where it fails."""
    output = setting.out / name
    command = [sys.executable, "-m", "mae_core.cli.main", *arguments, f"output={output}", f"device={setting.device}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(ended.stdout, ended.stderr, sep="\n", flush=True)
    if ended.returncode:
        raise RuntimeError((ended.stderr or ended.stdout).strip().splitlines()[-1])
    return output


def training(setting: Setting, record: Record) -> None:
    """A real pre-training, and what its encoder knows: k-NN, a linear and an attentive probe on validation photos. The
    epochs are those that the time allows, found by a first training of two; the schedule is that of the epochs."""
    photos = photos_of(setting)
    count = sum(1 for path in (photos / "train").rglob("*") if path.is_file())
    workers = len(os.sched_getaffinity(0)) if setting.scale == "full" else 0
    common = ["pretrain", *setting.size.training, f"data.path={photos / 'train'}", f"data.workers={workers}"]

    def rate_of(run: Path) -> float:
        entries = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
        return statistics.median(e["images_per_second"] for e in entries if "images_per_second" in e)

    began = time.monotonic()
    rate = rate_of(run_command(setting, "trial", *common, "optim.epochs=2", "optim.warmup_epochs=0", "log.every=4"))
    overhead = max(0.0, time.monotonic() - began - 2 * count / rate)
    fitting = 0.9 * (setting.left - 2 * overhead - 10) * rate / count
    epochs = max(1.0, min(setting.size.epochs, float(int(fitting))))
    record.add(photos=count, trial_images_per_second=rate, epochs_asked=setting.size.epochs, epochs_that_fit=epochs)
    began = time.monotonic()
    run = run_command(setting, "pretrain", *common, f"optim.epochs={epochs:g}")
    record.add(trained_epochs=epochs, seconds=time.monotonic() - began, images_per_second=rate_of(run))
    if not (photos / "val").is_dir():
        record.add(measure="k-NN and probes", failed="no validation photos; give --validation FOLDER")
        return
    on_photos = [f"weights={run}", f"data.path={photos}", f"data.workers={workers}"]
    probe = ["linprobe", "configs/linprobe/one_gpu.yaml", f"optim.epochs={setting.size.probe_epochs:g}"]
    probe += ["optim.warmup_epochs=0", f"cache={setting.out / 'cache'}"]
    mean = ["knn", "model.pooling=mean"]
    tasks = {"knn": ["knn"], "knn_mean": mean, "linear": probe, "attentive": [*probe, "probe.kind=attentive"]}

    def measure(name: str) -> dict[str, Any]:
        folder = run_command(setting, name, *tasks[name], *on_photos)
        return {"metrics": json.dumps(json.loads((folder / METRICS).read_text()))[:200]}

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: attempt(record, {"measure": name}, partial(measure, name)), tasks))


class Section(NamedTuple):
    """What is measured, and its share of the time that is left."""

    measure: Callable[[Setting, Record], None]
    weight: float

    @property
    def about(self) -> str:
        """What it measures, in a sentence."""
        return " ".join((self.measure.__doc__ or "").split())


SECTIONS = {
    "device": Section(device_section, 8),
    "numerics": Section(numerics, 14),
    "steps": Section(steps, 34),
    "loader": Section(loader, 10),
    "waits": Section(waits, 7),
    "distributed": Section(distributed, 7),
    "dense": Section(dense_section, 15),
    "training": Section(training, 60),
}
"""In the order in which they run."""
