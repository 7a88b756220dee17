"""Own images are standardised with their own mean and std, measured once, and kept for resumes and evaluation."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from mae_core.config.load import load_config
from mae_core.data.config import ImagesConfig
from mae_core.data.images import IMAGENET_MEAN, ImageFiles, Statistics, list_images, statistics_of
from mae_core.data.reading import Reading
from mae_core.data.statistics import describe_statistics, distance, measure_statistics, must_be_measured
from mae_core.errors import UserError
from mae_core.layout import CONFIG, ENCODER
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.training.statistics import with_statistics
from mae_core.weights.files import read_file


def write(folder: Path, count: int = 8, channels: int = 3, top: int = 60) -> list[np.ndarray]:
    """Dark images, as a microscope takes them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [rng.integers(0, top, (16 + n, 18, channels), dtype=np.uint8) for n in range(count)]
    for number, array in enumerate(arrays):
        Image.fromarray(array.squeeze()).save(folder / f"{number}.png")
    return arrays


def source_of(folder: Path, read_as: Reading | int | None = 3) -> ImageFiles:
    return ImageFiles(list_images(folder), read_as, folder)


def test_the_numbers_are_numpys(tmp_path):
    pixels = np.concatenate([array.reshape(-1, 3) for array in write(tmp_path)]) / 255
    found = measure_statistics(source_of(tmp_path))
    np.testing.assert_allclose(found.statistics.mean, pixels.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.statistics.std, pixels.std(axis=0), rtol=1e-4)
    assert found.images == 8 and found.notes == []


def test_missing_data_are_left_out_and_said(tmp_path):
    array = np.random.default_rng(1).normal(20, 3, (12, 12)).astype("float32")
    array[:3] = -9999
    tifffile.imwrite(tmp_path / "x.tif", array, extratags=[(42113, "s", 0, "-9999", True)])
    found = measure_statistics(source_of(tmp_path, 1))
    np.testing.assert_allclose(found.statistics, ([array[3:].mean()], [array[3:].std()]), rtol=1e-4)
    assert found.notes[0].startswith("1 of 1 images have pixels without data (25 % of all pixels)")


def test_grey_stored_as_rgb_has_one_value_and_a_constant_channel_a_spread(tmp_path):
    write(tmp_path / "grey", channels=1)
    statistics = measure_statistics(source_of(tmp_path / "grey")).statistics
    assert len(set(statistics.mean)) == 1 and describe_statistics(statistics).count(",") == 0
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "flat" / "0.png")
    found = measure_statistics(source_of(tmp_path / "flat"))
    assert found.statistics.std == (1.0, 1.0, 1.0) and "channel 0, 1, 2 never changes" in found.notes[0]


def test_a_large_set_is_sampled_and_unreadable_images_are_left_out(tmp_path, monkeypatch):
    write(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"")
    monkeypatch.setattr("mae_core.data.statistics.MOST_IMAGES", 3)
    one, other = measure_statistics(source_of(tmp_path)), measure_statistics(source_of(tmp_path))
    assert one.images == 3 and one == other
    monkeypatch.setattr("mae_core.data.statistics.MOST_PIXELS", 1)
    assert measure_statistics(source_of(tmp_path)).images == 1
    with pytest.raises(UserError, match="none of 1 images can be read"):
        measure_statistics(ImageFiles([tmp_path / "bad.png"], 3))


GIVEN = {"mean": (0.5,) * 3, "std": (0.2,) * 3}


@pytest.mark.parametrize(
    "options, weights, measured",
    [
        ({}, None, True),
        ({"statistics": "own"}, None, True),
        ({"statistics": "imagenet"}, None, False),
        (GIVEN, None, False),
        ({"mean": GIVEN["mean"]}, None, True),
        ({}, GIVEN, False),
        ({"statistics": "own"}, GIVEN, False),
        ({}, {}, False),
        ({"statistics": "own"}, {}, True),
        ({"statistics": "imagenet"}, {}, False),
    ],
)
def test_what_is_measured(options, weights, measured):
    assert must_be_measured(ImagesConfig(**options), weights) == measured


@pytest.mark.parametrize(
    "given, weights, mean, said",
    [
        (["from_scratch=true"], None, None, "measured on 8 of 8 training images"),
        (["from_scratch=true", "data.statistics=imagenet"], None, IMAGENET_MEAN, "ImageNet's, as asked for"),
        (["weights=x"], {"mean": [0.1] * 3, "std": [0.2] * 3}, (0.1, 0.1, 0.1), "those of the weights"),
        (["weights=x"], {}, IMAGENET_MEAN, "ImageNet's: the weights file does not state them"),
        (["from_scratch=true", "data.mean=[0.3,0.3,0.3]", "data.std=[1,1,1]"], None, (0.3, 0.3, 0.3), "as configured"),
        (["from_scratch=true", "data.mean=[0.3]", "data.std=[1]"], None, (0.3, 0.3, 0.3), "as configured"),
    ],
)
def test_every_training_says_what_it_uses(tmp_path, capsys, given, weights, mean, said):
    write(tmp_path / "images")
    (tmp_path / "images" / "notes.xyz").write_text("")
    source = ImageFiles(list_images(tmp_path / "images"), 3, passed_over={".xyz": 1})
    config = load_config(FinetuneConfig, None, [f"output={tmp_path / 'run'}", *given])
    config = with_statistics(config, source, resume=False, weights=weights)
    found = statistics_of(config.data, weights)
    assert found.mean == (mean or measure_statistics(source).statistics.mean)
    told = capsys.readouterr().out
    assert said in told and describe_statistics(found) in told and "1 file passed over, by ending: 1 x .xyz" in told


def configured(tmp_path: Path, *more: str) -> PretrainConfig:
    options = ["model.size=nano", "model.patch_size=8", "data.image_size=16", "data.workers=0", "device=cpu"]
    options += ["decoder.width=16", "decoder.depth=1", "decoder.heads=2", "optim.batch_size=4", "optim.warmup_epochs=0"]
    options += [
        "optim.epochs=2",
        "log.checkpoint_every=1",
        "log.pictures_every=100",
        f"data.path={tmp_path / 'images'}",
    ]
    return load_config(PretrainConfig, None, [*options, *more])


def forget_last_checkpoint(run: Path) -> None:
    """As if the run had been broken off after the checkpoint before."""
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    (run / ENCODER).unlink()


def test_a_run_keeps_its_numbers_in_config_and_weights_and_resumes_with_them(tmp_path, monkeypatch):
    write(tmp_path / "images")
    measured = measure_statistics(source_of(tmp_path / "images")).statistics
    pretrain(configured(tmp_path, f"output={tmp_path / 'whole'}", "seed=3"))
    stored = load_config(PretrainConfig, tmp_path / "whole" / CONFIG)
    assert (stored.data.mean, stored.data.std) == measured
    metadata = read_file(tmp_path / "whole" / ENCODER).metadata
    assert Statistics(tuple(metadata["mean"]), tuple(metadata["std"])) == measured
    whole = (tmp_path / "whole" / ENCODER).read_bytes()

    part = configured(tmp_path, f"output={tmp_path / 'part'}", "seed=3")
    pretrain(part)
    forget_last_checkpoint(tmp_path / "part")
    monkeypatch.setattr("mae_core.training.statistics.measure_statistics", None)
    pretrain(part, resume=True)
    assert (tmp_path / "part" / ENCODER).read_bytes() == whole


def test_a_run_from_before_resumes_with_imagenets(tmp_path, capsys):
    write(tmp_path / "images")
    config = configured(tmp_path, f"output={tmp_path / 'run'}", "data.statistics=imagenet")
    pretrain(config)
    forget_last_checkpoint(tmp_path / "run")
    capsys.readouterr()
    pretrain(configured(tmp_path, f"output={tmp_path / 'run'}"), resume=True)
    assert "mean 0.485, 0.456, 0.406" in capsys.readouterr().out
    assert tuple(read_file(tmp_path / "run" / ENCODER).metadata["mean"]) == IMAGENET_MEAN


def test_more_channels_need_no_numbers(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        np.save(
            tmp_path / "images" / f"{number}.npy", np.random.default_rng(number).integers(0, 99, (16, 16, 5), "uint16")
        )
    pretrain(configured(tmp_path, f"output={tmp_path / 'run'}", "data.channels=5", "optim.epochs=1"))
    assert len(read_file(tmp_path / "run" / ENCODER).metadata["mean"]) == 5


def test_the_distance_of_images_from_what_a_model_expects():
    away, spread = distance(Statistics((0.1, 0.5), (0.1, 0.2)), Statistics((0.5, 0.5), (0.2, 0.2)))
    assert away == pytest.approx(2.0) and spread == pytest.approx(2.0)
