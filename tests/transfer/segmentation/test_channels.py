# ruff: noqa: E402 (most imports need mmseg, which may be absent)
"""Images of 1 to 16 channels and of more than 8 bits: read, trained on, labelled and exported as in the core."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from mae_core.data.decoding import read_image, to_tensor
from mae_core.data.images import Statistics
from mae_core.data.statistics import Measured
from mae_core.errors import UserError
from transfer.segmentation.pixels import WrongChannels, as_mmseg_reads, picture_of, read_pixels

mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
engine = pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from mmengine.dataset import Compose
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from transfer.segmentation.export import export
from transfer.segmentation.predict import predict
from transfer.segmentation.segmenter_file import read_segmenter
from transfer.segmentation.train_net import evaluate_segmenter, train_segmenter

DIGITS = Path(__file__).parents[3] / "configs" / "segmentation" / "digits.py"
CHANNELS = (1, 2, 3, 4, 5, 13, 16)


def write_bands(path: Path, channels: int, kind: type = np.uint16, side: tuple[int, int] = (24, 40)) -> np.ndarray:
    """A picture of bands (C, H, W) -> what was written."""
    most = np.iinfo(kind).max if np.issubdtype(kind, np.integer) else 1
    bands = (np.random.default_rng(channels).random((channels, *side)) * most).astype(kind)
    pixels = bands[0] if channels == 1 else bands.transpose(1, 2, 0)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        contiguous = {"planarconfig": "contig"} if channels > 1 else {}
        tifffile.imwrite(path, pixels, photometric="rgb" if channels == 3 else "minisblack", **contiguous)
    return bands


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", CHANNELS)
def test_what_reaches_the_encoder_is_what_pre_training_sees(tmp_path, channels, kind, suffix):
    path = tmp_path / f"image{suffix}"
    bands = write_bands(path, channels, kind)
    full = np.iinfo(kind).max if np.issubdtype(kind, np.integer) else 1
    mean, std = (torch.linspace(start, start + 0.2, channels).view(-1, 1, 1) for start in (0.3, 0.2))
    expected = (torch.from_numpy(bands / full).float() - mean) / std
    core = to_tensor(read_image(path, channels))
    torch.testing.assert_close(((core / 255 if core.dtype == torch.uint8 else core) - mean) / std, expected)
    register_all_modules()
    packed = Compose([{"type": "NamedImage", "channels": channels}, {"type": "PackSegInputs"}])({"img_path": str(path)})
    statistics = {name: (255 * value).flatten().tolist() for name, value in (("mean", mean), ("std", std))}
    kind_of = "SegDataPreProcessor" if channels in (1, 3) else "ManyChannelPreProcessor"
    preprocessor = MODELS.build({"type": kind_of, "bgr_to_rgb": True, **statistics})
    samples = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
    torch.testing.assert_close(preprocessor(samples)["inputs"][0], expected, rtol=1e-4, atol=1e-4)
    assert picture_of(path).size == (40, 24)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_pictures_are_those_of_opencv(tmp_path, mode):
    import cv2

    path, channels = tmp_path / "image.png", 1 if mode == "L" else 3
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).convert(mode).save(path)
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    assert np.array_equal(as_mmseg_reads(read_pixels(path, channels)), cv2.imread(str(path), flag))


@pytest.mark.parametrize(("found", "taken"), [(4, 3), (3, 4), (4, 1), (2, 3), (5, 4), (1, 4), (13, 3)])
@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_another_number_of_channels_is_one_sentence(tmp_path, found, taken, suffix):
    path = tmp_path / f"image{suffix}"
    write_bands(path, found, np.uint8)
    with pytest.raises(WrongChannels) as refusal:
        read_pixels(path, taken)
    plural = "s" if found > 1 else ""
    assert f"image {path} has {found} channel{plural}, and the encoder takes {taken}; use weights for" in str(
        refusal.value
    )


def test_a_fourth_band_that_says_alpha_is_data_unless_it_is_opaque(tmp_path):
    path = tmp_path / "image.tif"
    bands = write_bands(path, 4, np.uint8).transpose(1, 2, 0).copy()
    tifffile.imwrite(path, bands, photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(WrongChannels, match="has 4 channels, and the encoder takes 3"):
        read_pixels(path, 3)
    bands[..., 3] = 255
    tifffile.imwrite(path, bands, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(as_mmseg_reads(read_pixels(path, 3)), bands[..., 2::-1])


def write_set(root: Path, channels: int, kind: type) -> Path:
    """Four scenes of bands, whose first is bright where the class is 1; training and validation are the same."""
    labels = np.zeros((24, 40), np.uint8)
    labels[4:18, 6:30] = 1
    for part in ("training", "validation"):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True)
        for index in range(4):
            bands = write_bands(root / "images" / part / f"{index}.tif", channels, kind)
            assert bands.shape == (channels, 24, 40)
            Image.fromarray(np.roll(labels, index)).save(root / "annotations" / part / f"{index}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "kind"), [(2, np.uint16), (4, np.uint8), (16, np.float32)])
def test_other_channels_train_and_export(tmp_path, capsys, tiny_options, write_encoder, channels, kind):
    root = write_set(tmp_path / "set", channels, kind)
    statistics = {"mean": [0.5] * channels, "std": [0.25] * channels}
    weights = write_encoder(tmp_path / "e.safetensors", in_chans=channels, **statistics)
    options = {**tiny_options, "data_root": str(root), "num_classes": 2, "iterations": 3, "batch_size": 2}
    run = tmp_path / "run"
    results = train_segmenter(DIGITS, weights=weights, work_dir=run, cfg_options=options)
    assert f"images are read in {channels} channels, as many as the encoder takes" in capsys.readouterr().out
    found = evaluate_segmenter(DIGITS, run, work_dir=tmp_path / "eval", cfg_options=options)
    assert found["per_class"] == results["per_class"]
    assert list((run / "pictures").iterdir())
    (label_map,) = predict(run, [root / "images/validation/1.tif"], tmp_path / "out")
    assert Image.open(label_map).size == (40, 24)
    if channels == 4:
        assert "mmseg's logits differ from ours by" in export(run, "mmseg", tmp_path / "s.pth")
        from mmseg.apis import inference_model, init_model

        theirs = init_model(str(tmp_path / "s.py"), str(tmp_path / "s.pth"), device="cpu")
        assert theirs.backbone.patch_embed.projection.in_channels == 4
        inference_model(theirs, str(root / "images/validation/1.tif"))
        assert "its logits differ from torch's by" in export(run, "onnx", tmp_path / "s.onnx", size=(24, 40))


def test_a_wrong_number_of_channels_is_refused_before_the_training(tmp_path, refused, write_encoder, scenes):
    weights = write_encoder(tmp_path / "e.safetensors", in_chans=4, mean=[0.5] * 4, std=[0.2] * 4)
    assert "has 3 channels, and the encoder takes 4; use weights for 3" in refused("--weights", str(weights))
    bare = write_encoder(tmp_path / "bare.safetensors", in_chans=4)
    four = write_set(tmp_path / "four", 4, np.uint8)
    error = refused("--weights", str(bare), data_root=four, num_classes=2)
    assert "mean has 3 numbers, but the encoder takes 4 channels; give 4, 255 times what mae data-stats finds" in error
    silent = {"model.data_preprocessor.mean": None, "model.data_preprocessor.std": None}
    error = refused("--weights", str(bare), data_root=four, num_classes=2, **silent)
    assert "there is no default mean and std for 4 channels, and the weights file states none" in error
    error = refused(data_root=four, num_classes=2)
    assert "has 4 channels, and the encoder takes 3; use weights for 4, or set model.backbone.in_chans=4" in error


def open_config(channels=3, mean=None, std=None):
    backbone = {"type": "MAECoreViT", "in_chans": channels}
    return {"model": {"backbone": backbone, "data_preprocessor": {"mean": mean, "std": std}}}


@pytest.mark.parametrize(
    ("given", "weights", "mean", "said"),
    [
        ({}, None, [25.5] * 3, "mean 0.1; std 0.2 (measured on 4 training images)"),
        ({"mean": [51.0]}, None, [51.0] * 3, "mean 0.2; std 0.2 (measured on 4"),
        ({"mean": [51.0], "std": [25.5]}, None, [51.0] * 3, "mean 0.2; std 0.1 (as configured)"),
        ({}, {}, [123.675, 116.28, 103.53], "std 0.229, 0.224, 0.225 (ImageNet's: the weights file does not state"),
        ({"mean": [1, 2, 3], "std": [4, 5, 6]}, {"mean": [0.1]}, [1, 2, 3], "(those of the weights)"),
    ],
)
def test_which_statistics_a_config_gets(given, weights, mean, said):
    from transfer.segmentation import config as configs

    config = open_config(**given)
    notes = configs.fit_statistics(config, weights, lambda: Measured(Statistics((0.1,) * 3, (0.2,) * 3), 4, ["x"]))
    assert config["model"]["data_preprocessor"]["mean"] == mean and len(mean) == 3
    assert said in notes[0] and notes[1:] == ["note: x"] * ("measured" in said)


def _options(step, on_error):
    return {**{key: value for key, value in step.items() if key != "type"}, "on_error": on_error}


def test_values_that_mean_and_std_make_too_large_are_named(tmp_path, capsys):
    from transfer.segmentation import config as configs

    path = tmp_path / "big.tif"
    tifffile.imwrite(path, np.full((8, 8, 3), 1e15, np.float32), photometric="rgb")
    config = {**open_config(mean=[1.0] * 3, std=[2.0] * 3), "pipeline": [{"type": "LoadImageFromFile"}]}
    configs.fit_channels(config)
    (step,) = config["pipeline"]
    assert engine.NamedImage(**_options(step, "skip"))({"img_path": path}) is None
    with pytest.raises(
        UserError, match=r"image .*big.tif cannot be read \(its pixels reach 1.3e\+17 after standardising"
    ):
        engine.NamedImage(**_options(step, "raise"))({"img_path": path})
    assert to_tensor(read_image(path, 3)).isfinite().all()


def darken(root: Path, times: int) -> None:
    for path in (root / "images" / "training").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // times).save(path)


@pytest.mark.parametrize(
    "weights", [None, {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}], ids=["scratch", "weights"]
)
def test_a_run_keeps_its_statistics_when_it_is_resumed(tmp_path, tiny, scenes, capsys, write_encoder, weights):
    darken(scenes, 4)
    pixels = np.concatenate([np.asarray(Image.open(path)) for path in (scenes / "images/training").iterdir()]) / 255.0
    expected = weights or {"mean": pixels.mean((0, 1)), "std": pixels.std((0, 1))}
    file = weights and write_encoder(tmp_path / "encoder.safetensors", **weights)
    options = {**tiny, "iterations": 3, "default_hooks.checkpoint.interval": 3}
    options |= {"model.data_preprocessor.mean": None, "model.data_preprocessor.std": None}
    train_segmenter(DIGITS, weights=file, work_dir=tmp_path / "run", cfg_options=options)
    assert ("those of the weights" if weights else "measured on 8 training images") in capsys.readouterr().out
    darken(scenes, 2)
    (tmp_path / "run" / "data.json").unlink()  # as of an older version: else other images are refused
    longer = {**options, "iterations": 4}
    train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=longer, resume=True)
    used = read_segmenter(tmp_path / "run").config["model"]["data_preprocessor"]
    for key, values in expected.items():
        np.testing.assert_allclose(np.divide(used[key], 255), values, rtol=1e-3)
    with pytest.raises(UserError, match="was asked for, but"):
        asked = {**longer, "iterations": 5, "model.data_preprocessor.mean": [1, 2, 3]}
        train_segmenter(DIGITS, work_dir=tmp_path / "run", cfg_options=asked, resume=True)


def test_colours_are_distorted_in_rgb_of_8_bits_alone(tmp_path, capsys):
    from transfer.segmentation import config as configs

    step = engine.EightBitDistortion()
    image = np.full((4, 4, 3), 300.5, np.float32)
    assert step({"img": image, "img_path": "a.tif"})["img"] is image
    assert "left out for images of more than 8 bits, such as a.tif" in capsys.readouterr().out
    assert step({"img": image.astype(np.uint8), "img_path": "a.png"})["img"].dtype == np.uint8
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "PhotoMetricDistortion"}, {"type": "PackSegInputs"}]
    config = {
        "model": {
            "backbone": {"in_chans": 5},
            "data_preprocessor": {"type": "SegDataPreProcessor", "mean": [1] * 5, "std": [1] * 5},
        },
        "train_dataloader": {"dataset": {"pipeline": pipeline}},
    }
    assert configs.fit_channels(config) == [
        "images are read in 5 channels, as many as the encoder takes; colour distortion is left out"
    ]
    kept = config["train_dataloader"]["dataset"]["pipeline"]
    reader = {"type": "NamedImage", "channels": 5, "no_data": [1] * 5, "largest": 1e9}
    assert kept == [reader, {"type": "PackSegInputs"}]
