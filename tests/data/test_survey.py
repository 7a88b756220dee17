"""What mae data-stats finds in a set of images, against NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.data.sources import open_places
from mae_core.data.survey import describe, survey
from mae_core.errors import UserError
from mae_core.training.pretrain_config import PretrainConfig


def arrays(count: int, channels: int, dtype: str = "uint8") -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    top = np.iinfo(dtype).max
    return [rng.integers(0, top // (n + 1), (20 + n, 31, channels), dtype=dtype) for n in range(count)]


@pytest.mark.parametrize(
    "channels, dtype, suffix", [(3, "uint8", ".png"), (1, "uint16", ".png"), (13, "uint16", ".tif")]
)
def test_mean_and_std_are_numpys_over_all_pixels(tmp_path, channels, dtype, suffix):
    images = arrays(5, channels, dtype)
    for number, array in enumerate(images):
        if suffix == ".png":
            Image.fromarray(array.squeeze()).save(tmp_path / f"{number}.png")
        else:
            tifffile.imwrite(tmp_path / f"{number}.tif", array, photometric="minisblack", planarconfig="contig")
    found = survey(open_places([tmp_path], None))
    mean, std = found.by_channels[channels].statistics()
    pixels = np.concatenate([array.reshape(-1, channels) for array in images]) / np.iinfo(dtype).max
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-5)
    assert found.channels == {channels: 5} and found.sizes[(24, 31)] == 1 and not found.unreadable


def test_grey_and_colour_are_measured_apart_or_as_a_training_reads_them(tmp_path):
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    for number in range(2):
        Image.new("RGB", (8, 8), (255, 0, 102)).save(tmp_path / f"{number}.png")
    found = survey(open_places([tmp_path], None))
    assert found.channels == {1: 1, 3: 2} and found.usual_channels == 3
    assert found.by_channels[3].statistics().mean == pytest.approx((1, 0, 0.4))
    assert "1 images have another number of channels; add --channels 3" in describe(found)
    asked = survey(open_places([tmp_path], None), channels=3)
    assert asked.by_channels[3].statistics().mean == pytest.approx((0.7333333, 0.0666667, 0.3333333))
    with pytest.raises(UserError, match=r"none of 3 images can be read; the first, .*it has"):
        survey(open_places([tmp_path], None), channels=4)


def test_the_command_prints_what_a_configuration_takes(tmp_path):
    for number, array in enumerate(arrays(4, 5, "uint16")):
        np.save(tmp_path / f"{number}.npy", array)
    (tmp_path / "broken.tif").write_bytes(b"II*\0broken")
    (tmp_path / "words.png").write_text("hello")
    result = CliRunner().invoke(app, ["data-stats", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "6 images, 4 readable, 2 not" in result.output and "words.png (not an image)" in result.output
    last = next(line for line in result.output.splitlines() if line.startswith("data: {"))
    (tmp_path / "config.yaml").write_text(last)
    data = load_config(PretrainConfig, tmp_path / "config.yaml").data
    assert data.channels == 5 and len(data.mean) == len(data.std) == 5
    stored = json.loads((tmp_path / "out.json").read_text())
    assert len(stored["unreadable"]) == 2 and stored["channels"] == {"5": 4}
    again = CliRunner().invoke(app, ["data-stats", str(tmp_path), "--json", str(tmp_path / "out.json")])
    assert again.exit_code == 2 and "exists" in again.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{root}/none"], "image folder {root}/none does not exist"),
        (["{root}"], "none of 1 images can be read; the first, {root}/x.png: not an image"),
        (["{root}", "--source", "file"], "did you mean 'files'?"),
    ],
)
def test_what_cannot_be_surveyed_is_a_sentence(tmp_path: Path, arguments, message):
    (tmp_path / "x.png").write_text("hello")
    result = CliRunner().invoke(app, ["data-stats", *(argument.format(root=tmp_path) for argument in arguments)])
    assert result.exit_code == 2 and message.format(root=tmp_path) in result.output.replace("\n", " ")
