"""What mae reconstruct draws: any channels, ratios and maskings, with true labels and the pixels of the input."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from mae_core import build_mae, load_mae
from mae_core.cli.main import app
from mae_core.config.load import load_config
from mae_core.data.images import Statistics
from mae_core.errors import UserError
from mae_core.masking import MASKERS
from mae_core.training.pictures import Display, describe_mask, draw_mask, notes_of, reconstruction_rows
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.viewer import all_rows, reconstruct_files

NANO = {"image_size": 32, "patch_size": 8, "decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}


def write_bands(folder: Path, count: int, channels: int, suffix: str) -> list[Path]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    coarse = rng.integers(200, 3000, (count, 4, 4, channels))
    paths = []
    for number, array in enumerate(coarse.repeat(10, axis=1).repeat(10, axis=2).astype(np.uint16)):
        paths.append(folder / f"{number:03d}{suffix}")
        np.save(paths[-1], array) if suffix == ".npy" else tifffile.imwrite(paths[-1], array, photometric="minisblack")
    return paths


@pytest.mark.parametrize("channels, suffix", [(13, ".npy"), (13, ".tif"), (1, ".tif"), (4, ".npy")])
def test_any_number_of_channels_trains_and_reconstructs(tmp_path, pretrain_options, channels, suffix):
    write_bands(tmp_path / "images", 6, channels, suffix)
    runner = CliRunner()
    found = runner.invoke(app, ["data-stats", str(tmp_path / "images")]).output.splitlines()[-1]
    (tmp_path / "config.yaml").write_text(found)
    options = [*pretrain_options, f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}", "optim.epochs=2"]
    run = load_config(PretrainConfig, tmp_path / "config.yaml", [*options, "watch.share=0.2"])
    assert pretrain(run).loss > 0
    assert load_mae(tmp_path / "run").encoder.in_channels == channels
    picture = tmp_path / "x.png"
    arguments = ["reconstruct", str(tmp_path / "run"), str(tmp_path / "images"), "--out", str(picture), "--most", "2"]
    bands = ["--bands", "3,1,0"] if channels > 3 else []
    result = runner.invoke(app, [*arguments, *bands])
    assert result.exit_code == 0, result.output
    values = np.asarray(Image.open(picture)).astype(int)
    if channels == 1:
        assert (values.max(axis=2) - values.min(axis=2)).max() == 0  # grey stays grey
    else:
        assert (values.max(axis=2) - values.min(axis=2)).max() > 50
    refused = runner.invoke(app, [*arguments[:-3], str(tmp_path / "y.png"), "--bands", "0,99,1"])
    assert refused.exit_code == 2 and f"from 0 to {channels - 1}" in refused.output


def test_a_grey_photo_run_reconstructs_grey(tmp_path, pretrain_options, write_images):
    write_images(tmp_path / "images", 4)
    options = [*pretrain_options, "data.channels=1", f"data.path={tmp_path / 'images'}", f"output={tmp_path / 'run'}"]
    pretrain(load_config(PretrainConfig, None, [*options, "optim.epochs=1"]))
    reconstruct_files(tmp_path / "run", [tmp_path / "images"], tmp_path / "x.png")
    values = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    assert (values.max(axis=2) - values.min(axis=2)).max() == 0


def test_every_image_has_a_row_for_each_masking_ratio_and_mask():
    model = build_mae("nano", **NANO).eval()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    statistics = Statistics((0.5,) * 3, (0.25,) * 3)
    maskers = [MASKERS[name](ratio) for name in MASKERS for ratio in (0.1, 0.5, 0.9)]
    rows = all_rows(model, pixels, maskers, statistics, Display.of(statistics), masks=2, seed=0)
    labels = [row.label for row in rows]
    assert len(rows) == 2 * 9 * 2 and labels[:18] == labels[18:] and len(set(labels)) == 18
    assert labels[0] == "random\n2 of 16 hidden\n(12%)\nmask 1"
    assert labels[17] == "grid\n15 of 16 hidden\n(94%)\nmask 2"


@pytest.mark.parametrize("target", ["pixels", "normalized_pixels"])
def test_visible_pixels_are_the_inputs_and_hidden_ones_are_grey(target):
    model = build_mae("nano", **NANO, target=target).eval()
    statistics = Statistics((0.45, 0.5, 0.4), (0.2, 0.25, 0.3))
    values = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float() / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in statistics)
    mask = draw_mask(model, MASKERS["random"](0.5), 1, seed=0)
    (row,) = reconstruction_rows(model, (values - mean) / std, mask, statistics, Display.of(statistics))
    given, masked, _, pasted = (np.asarray(panel).astype(int) for panel in row.panels)
    hidden = mask.hidden[0].reshape(4, 4).numpy().repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(given, (values[0] * 255).round().int().permute(1, 2, 0).numpy())
    assert np.array_equal(masked[~hidden], given[~hidden]) and (masked[hidden] == 128).all()
    assert np.abs(pasted[~hidden] - given[~hidden]).max() <= 1 and not np.array_equal(pasted, given)
    assert ("* shown with" in " ".join(notes_of(model, Display.of(statistics)))) == (target == "normalized_pixels")


def test_the_label_says_what_the_mask_hides():
    model = build_mae("nano", **NANO).eval()
    for name, make in MASKERS.items():
        mask = draw_mask(model, make(0.75), 1, seed=0)
        assert describe_mask(make(0.75), mask) == f"{name}\n12 of 16 hidden\n(75%)"


def test_bands_are_stretched_where_numbers_are_no_picture():
    photo, satellite = Statistics((0.45,) * 3, (0.2,) * 3), Statistics((0.01,) * 13, (0.002,) * 13)
    assert Display.of(photo) == Display((0, 1, 2)) and not Display.of(photo).note(3)
    shown = Display.of(satellite, [3, 2, 1])
    assert shown.stretched and shown.note(13).startswith("bands 3, 2, 1 as red, green and blue; each row from the 2nd")
    values = torch.linspace(0.005, 0.015, 400).reshape(1, 20, 20).repeat(13, 1, 1)
    assert shown.picture(values, shown.limits(values)).getextrema() == ((0, 255),) * 3
    assert Display.of(Statistics((0.01,), (0.002,))).note(1).startswith("each row")
    for bands in ([0, 1], [13], [-1]):
        with pytest.raises(UserError, match="name one, or three for red, green and blue, from 0 to 12"):
            Display.of(satellite, bands)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"maskings": ["blok"]}, "did you mean 'block'?"),
        ({"target": "pixel"}, "did you mean 'pixels'?"),
        ({"ratios": [0.5, 1.2]}, r"mask ratio 1.2 is outside (0, 1)"),
    ],
)
def test_wrong_names_are_refused(tmp_path, pretrained, write_images, options, message):
    write_images(tmp_path / "images", 1)
    with pytest.raises(UserError) as caught:
        reconstruct_files(pretrained, [tmp_path / "images"], tmp_path / "x.png", **options)
    assert message in str(caught.value) and not (tmp_path / "x.png").exists()
