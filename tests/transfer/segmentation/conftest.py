"""Tiny scenes with label maps, encoders to start from, and the command that refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_core.models.encoder import ViTEncoder
from mae_core.weights.encoder_file import describe_encoder
from mae_core.weights.files import write_weights
from transfer.engines import installed

DIGITS = Path(__file__).parents[3] / "configs" / "segmentation" / "digits.py"
NAMES = ("ground", "box", "disc")
TINY = {
    "num_classes": 3,
    "crop_size": 32,
    "head_width": 16,
    "batch_size": 4,
    "model.neck.rescales": [4, 2, 1, 0.5],
    "visualizer.vis_backends": [],
}


@pytest.fixture(autouse=True)
def one_thread():
    """The engine sets threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def plain_config_texts():
    """mmengine lays out the config's text four times a run, which takes twice as long as a training of this size."""
    with pytest.MonkeyPatch.context() as patch:
        if installed("mmengine"):
            patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, False))
        yield


@pytest.fixture(scope="session")
def tiny_options() -> dict[str, Any]:
    """Options that make configs/segmentation/digits.py fit small scenes: a step takes some hundredths of a second."""
    return dict(TINY)


@pytest.fixture
def tiny(scenes: Path) -> dict[str, Any]:
    """``tiny_options`` with the scenes as data."""
    return {**TINY, "data_root": str(scenes)}


@pytest.fixture
def scenes(tmp_path: Path, write_scenes: Callable[..., Path]) -> Path:
    """Eight scenes of three classes."""
    return write_scenes(tmp_path / "scenes")


@pytest.fixture(scope="session")
def write_encoder() -> Callable[..., Path]:
    """(path, size, in_chans, image_size, **metadata) -> the path of an encoder of random weights."""

    def write(path: Path, size: str = "nano", in_chans: int = 3, image_size: int = 32, **metadata: Any) -> Path:
        torch.manual_seed(7)
        encoder = ViTEncoder(size, image_size=image_size, patch_size=8, in_chans=in_chans)
        write_weights(path, encoder.state_dict(), {**describe_encoder(encoder), **metadata})
        return path

    return write


@pytest.fixture
def refused(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """(arguments, **options) -> the one sentence that training answers with; nothing may have been written."""
    from transfer.segmentation.train_net import main

    def call(*arguments: str, **options: Any) -> str:
        work_dir = tmp_path / "refused"
        settings = {**tiny, "iterations": 3, **options}
        settings.pop("visualizer.vis_backends")
        command = [str(DIGITS), "--work-dir", str(work_dir), *arguments, "--cfg-options"]
        with pytest.raises(SystemExit) as stopped:
            main([*command, *(f"{key}={value}".replace(" ", "") for key, value in settings.items())])
        assert stopped.value.code == 2
        assert not work_dir.exists()
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error
        return error

    return call
