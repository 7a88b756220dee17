"""The encoder that comes with the repository: what its card says of it, and that it is whole and of use."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mae_core import embed, load_encoder
from mae_core.cli.main import app

ROOT = Path(__file__).parents[2]
FILE = ROOT / "weights" / "tiny_photos.safetensors"
CARD = (ROOT / "weights" / "README.md").read_text()


def test_the_card_is_of_this_file():
    content = FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() in CARD
    assert f"{len(content) / 1e6:.1f} MB" in CARD and len(content) < 12e6


def test_its_features_are_finite_and_tell_images_apart():
    encoder = load_encoder(FILE)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (side, 80, 3), dtype=np.uint8)) for side in (60, 120)]
    images.append(images[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    first, second, mirrored = embed(encoder, images)
    assert first.shape == (192,) and torch.isfinite(first).all()
    assert (first - mirrored).norm() < (first - second).norm()


@pytest.mark.parametrize("command", re.findall(r"^\$ (mae .*?)(?: +#.*)?$", CARD, re.MULTILINE))
def test_a_command_of_the_card_takes_the_file(command, tmp_path):
    """Its data are missing, which is the only thing that is said."""
    words = command.replace("weights=weights/", f"weights={FILE.parent}/")
    words = words.replace("data.path=", f"data.path={tmp_path}/")
    ended = CliRunner().invoke(app, words.replace("=runs/", f"={tmp_path}/").split()[1:])
    said = " ".join(ended.output.split())
    assert ended.exit_code == 2 and "does not exist" in said and FILE.name not in said, said
