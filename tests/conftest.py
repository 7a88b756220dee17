"""What the tests share: one thread, quiet property tests, generated images, and a small pre-training run."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes the tests start

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

if TYPE_CHECKING:
    from mae_core.models.sizes import ViTSize

torch.set_num_threads(1)
settings.register_profile(
    "project", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")

PRETRAIN_OPTIONS = (
    "model.size=nano",
    "model.patch_size=8",
    "decoder.width=32",
    "decoder.depth=1",
    "decoder.heads=2",
    "data.image_size=32",
    "data.workers=0",
    "optim.warmup_epochs=0",
    "optim.batch_size=4",
    "log.every=1",
    "device=cpu",
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``extra("package", ...)`` or ``detectron2`` where one of them is not installed."""
    if item.get_closest_marker("detectron2"):
        pytest.importorskip("detectron2", reason="detectron2 is not installed; its page says how")
    for marker in item.iter_markers("extra"):
        for package in marker.args:
            pytest.importorskip(package, reason=f"{package} comes with an extra of setup.py")


def _picture(rng: np.random.Generator, side: tuple[int, int]) -> Image.Image:
    """Smooth random colours: something an autoencoder could learn, and every file another."""
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: no worker is left with a long one at the end."""
    count, slow = Counter(item.path for item in items), {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -count[item.path], item.path))


def pytest_collection_finish() -> None:
    """What collection has imported stays: garbage collections need not go through a million objects of it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that look for leaks as the interpreter ends find none."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def every_machine_computes_in_float32() -> Iterator[None]:
    """Expected values are those of float32: a test of ``precision=auto`` says what the CPU has, see ``cpu_flag``."""
    from mae_core.training import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_flag", lambda info=None: None)
        yield


@pytest.fixture(scope="session")
def write_images() -> Callable[..., list[Path]]:
    """(folder, count, size=(width, height), seed, suffix) -> paths of generated images."""

    def write(
        folder: Path, count: int = 8, *, size: tuple[int, int] = (48, 40), seed: int = 0, suffix: str = ".png"
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        paths = [folder / f"{number:03d}{suffix}" for number in range(count)]
        for path in paths:
            _picture(rng, size).save(path)
        return paths

    return write


@pytest.fixture(scope="session")
def write_classes(write_images: Callable[..., list[Path]]) -> Callable[..., Path]:
    """(root, train images a class, val images a class) -> an ImageFolder of three classes."""

    def write(root: Path, train: int = 4, val: int = 3) -> Path:
        for number, name in enumerate(("ash", "birch", "cedar")):
            write_images(root / "train" / name, train, seed=number)
            write_images(root / "val" / name, val, seed=100 + number)
        return root

    return write


@pytest.fixture(scope="session")
def pretrain_options() -> tuple[str, ...]:
    """Overrides of a pre-training that takes milliseconds a step: ViT-nano, 16 patches of 8 pixels, batches of 4."""
    return PRETRAIN_OPTIONS


@pytest.fixture(scope="session")
def run_forked() -> Callable[..., subprocess.CompletedProcess[str]]:
    """(arguments of the interpreter, ranks=1) -> a finished process, its output as text: see ``processes.py``."""
    from tests.processes import run

    return run


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """(arguments of the interpreter) -> a finished process, its output as text. A fresh interpreter takes seconds to
    import torch: ``run_forked`` unless that is what a test is about."""

    def run(arguments: Sequence[str | Path], *, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def pretrained(
    tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., list[Path]], pretrain_options: tuple[str, ...]
) -> Path:
    """The folder of a finished pre-training run of four steps; tests must not write to it."""
    from mae_core.config.load import load_config
    from mae_core.training.pretrain import pretrain
    from mae_core.training.pretrain_config import PretrainConfig

    root = tmp_path_factory.mktemp("pretrained")
    write_images(root / "images", 8)
    options = [*pretrain_options, f"data.path={root / 'images'}", f"output={root / 'run'}", "optim.epochs=2"]
    pretrain(load_config(PretrainConfig, None, options))
    return root / "run"


@pytest.fixture(scope="session")
def write_mae(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ViTSize], Path]:
    """(trunk) -> the file of a masked autoencoder on it, random, with a small decoder."""
    from mae_core.models.mae import build_mae
    from mae_core.weights.encoder_file import EncoderInfo
    from mae_core.weights.files import write_weights

    def write(trunk: ViTSize) -> Path:
        torch.manual_seed(0)
        model = build_mae(trunk, image_size=32, patch_size=8, decoder_width=32, decoder_depth=1, decoder_heads=2)
        path = tmp_path_factory.mktemp("mae") / "unnamed.safetensors"
        facts = EncoderInfo.of(model, **model.describe(), mean=[0.5] * 3, std=[0.2] * 3)
        write_weights(path, model.state_dict(), facts.to_metadata())
        return path

    return write


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened for its tensors, by its name."""
    from tests.opens import count_opens

    return count_opens(monkeypatch.setattr)
