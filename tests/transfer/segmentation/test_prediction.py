"""A trained segmenter's file: read, evaluated, asked to label images."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import transfer
from mae_core.data.windows import open_windows
from mae_core.errors import UserError
from mae_core.weights.files import read_weights, write_weights
from transfer.segmentation.config import inference_mode, inference_pipeline
from transfer.segmentation.export import main as export_main
from transfer.segmentation.predict import main, predict
from transfer.segmentation.segmenter_file import literal_config, read_segmenter
from transfer.segmentation.tiles import layout_of, seamless

pytest.importorskip("mmseg", reason="mmseg is not installed; pip install mae-transfer[segmentation]")
pytest.importorskip("transfer.segmentation.engine_mmseg", reason="mmseg is here without mmcv or mmengine")

from mmengine.config import Config
from mmseg.apis import inference_model, init_model

from transfer.segmentation import train_net
from transfer.segmentation.engine_mmseg import exporting
from transfer.segmentation.engine_mmseg.prediction import Predictor
from transfer.segmentation.engine_mmseg.segmenter import build_segmenter

DIGITS = Path(__file__).parents[3] / "configs" / "segmentation" / "digits.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_scenes, tiny_options):
    """A run of a few steps on scenes of three classes, whose images are not square; and their folder."""
    root = tmp_path_factory.mktemp("trained")
    scenes = write_scenes(root / "scenes", side=(24, 40))
    options = {**tiny_options, "data_root": str(scenes), "iterations": 12, "lr": 2e-3}
    options |= {"model.backbone.relative_positions": "table", "model.backbone.layer_scale": 0.5}
    train_net.train_segmenter(DIGITS, work_dir=root / "run", cfg_options=options)
    return root / "run", scenes


def mean_iou(truth: Path, found: Path) -> float:
    confusion = np.zeros((3, 3))
    for path in truth.glob("*.png"):
        np.add.at(confusion, (np.asarray(Image.open(path)), np.asarray(Image.open(found / path.name))), 1)
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    return 100 * float(np.mean((right / union)[confusion.sum(1) > 0]))


def test_label_maps_are_those_of_the_evaluation(trained, tmp_path, capsys):
    run, scenes = trained
    main([str(run), str(scenes / "images" / "validation"), "--out", str(tmp_path / "out")])
    assert "labelled 8 images" in capsys.readouterr().out
    stated = json.loads((run / "metrics.json").read_text())
    assert mean_iou(scenes / "annotations" / "validation", tmp_path / "out" / "labels") == pytest.approx(
        stated["mIoU"], abs=0.011
    )
    label_map = Image.open(tmp_path / "out" / "labels" / "3.png")
    assert label_map.mode == "L" and label_map.size == (40, 24)
    assert (tmp_path / "out" / "classes.txt").read_text() == (scenes / "classes.txt").read_text()
    overlay = Image.open(tmp_path / "out" / "overlays" / "3.png")
    assert overlay.mode == "RGB" and overlay.width >= 40 and overlay.height > 24
    file = read_segmenter(run)
    labels = np.asarray(label_map)
    colour, pixel = (
        np.array(file.palette[labels[5, 7]]),
        np.asarray(Image.open(scenes / "images/validation/3.png"))[5, 7],
    )
    assert np.abs(np.asarray(overlay)[5, 7] - (colour + pixel) / 2).max() <= 1


def test_evaluation_of_a_file_repeats_the_training_s(trained, tmp_path, capsys):
    run, scenes = trained
    stated = json.loads((run / "metrics.json").read_text())
    options = {"data_root": str(scenes), "visualizer.vis_backends": []}
    for name, checkpoint in (("file", run / "segmenter.safetensors"), ("folder", run)):
        found = train_net.evaluate_segmenter(DIGITS, checkpoint, work_dir=tmp_path / name, cfg_options=options)
        assert found["per_class"] == stated["per_class"] and found["mIoU"] == stated["mIoU"]
    assert (tmp_path / "file" / "metrics.json").is_file() and list((tmp_path / "file" / "pictures").iterdir())
    assert not (tmp_path / "file" / "segmenter.safetensors").exists()


MULTI_SCALE = """
_base_ = [{base!r}]
scales = [0.5, 1.0]
tta_model = dict(type="SegTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=scale, keep_ratio=True) for scale in scales],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
"""


def test_evaluation_on_several_views_equals_their_predictions(trained, tmp_path, capsys):
    run, scenes = trained
    config = tmp_path / "several.py"
    config.write_text(MULTI_SCALE.format(base=str(DIGITS)))
    options = {"data_root": str(scenes), "visualizer.vis_backends": []}
    found = train_net.evaluate_segmenter(config, run, work_dir=tmp_path / "eval", cfg_options=options)
    assert "the average over 4 scaled and mirrored views" in capsys.readouterr().out
    images = scenes / "images" / "validation"
    predict(run, [images], tmp_path / "out", scales=(0.5, 1.0), flip=True)
    expected = mean_iou(scenes / "annotations" / "validation", tmp_path / "out" / "labels")
    assert found["mIoU"] == pytest.approx(expected, abs=0.011)
    assert found["mIoU"] != json.loads((run / "metrics.json").read_text())["mIoU"]


def test_evaluation_of_a_checkpoint_of_mmengine(trained, tmp_path, tiny_options, capsys):
    run, scenes = trained
    settings = {**tiny_options, "data_root": scenes, "model.backbone.layer_scale": 0.5}
    settings["model.backbone.relative_positions"] = "table"
    settings.pop("visualizer.vis_backends")
    options = [f"{key}={value}".replace(" ", "") for key, value in settings.items()]
    checkpoint = str(run / "iter_12.pth")
    command = [str(DIGITS), "--eval-only", checkpoint, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options]
    train_net.main(command)
    stated = json.loads((run / "metrics.json").read_text())
    assert f"mIoU {stated['mIoU']:.2f}" in capsys.readouterr().out
    wider = [*command[:4], str(tmp_path / "other"), *command[5:], "head_width=24"]
    with pytest.raises(SystemExit):
        train_net.main(wider)
    told = capsys.readouterr().err
    assert "iter_12.pth does not fit this model" in told and "use the config it was trained with" in told
    assert not (tmp_path / "other").exists()
    for name, content in (("cut.pth", (run / "iter_12.pth").read_bytes()[:-100]), ("photo.jpg", b"no checkpoint")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is truncated or not a checkpoint; give one"):
            train_net.evaluate_segmenter(DIGITS, tmp_path / name, work_dir=tmp_path / "other", cfg_options=options)


def test_views_of_other_scales_and_mirrored_ones_are_averaged(trained):
    run, scenes = trained
    file = read_segmenter(run)
    path = scenes / "images" / "validation" / "2.png"
    several = Predictor(file, scales=(0.5, 1.0, 2.0), flip=True)
    assert len(several.pipeline.transforms[1].subroutines) == 6
    assert several(path).shape == (24, 40)
    plain, single = Predictor(file), Predictor(file, scales=(1.0,), flip=True)
    mirrored = scenes / "mirrored.png"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    both = single(path)
    assert np.array_equal(both, single(mirrored)[:, ::-1])  # an average over both does not see which was given
    assert not np.array_equal(plain(path), plain(mirrored)[:, ::-1])


def test_sliding_windows(trained):
    run, scenes = trained
    file = read_segmenter(run)
    path = scenes / "images" / "validation" / "2.png"
    whole, slide = Predictor(file, mode="whole"), Predictor(file, mode="slide", crop_size=16, stride=8)
    covering = Predictor(file, mode="slide", crop_size=64)
    assert np.array_equal(covering(path), whole(path))
    assert slide(path).shape == (24, 40) and not np.array_equal(slide(path), whole(path))
    seen = []
    slide.model.backbone.register_forward_hook(lambda module, given, result: seen.append(given[0].shape[-2:]))
    slide(path)
    assert len(seen) == 3 * 7 and set(seen) == {(16, 16)}  # 32 x 64 after padding to whole windows of the pyramid


def test_windows_of_an_inference():
    config = {"model": {"data_preprocessor": {"size": (48, 48)}, "test_cfg": {"mode": "whole"}}}
    assert inference_mode(config) == {"mode": "whole"}
    assert inference_mode(config, mode="slide") == {"mode": "slide", "crop_size": (48, 48), "stride": (32, 32)}
    assert inference_mode(config, stride=10)["stride"] == (10, 10)
    with pytest.raises(UserError, match="leave gaps"):
        inference_mode(config, mode="slide", stride=49)
    with pytest.raises(UserError, match="apply only to --mode slide"):
        inference_mode(config, mode="whole", stride=4)
    with pytest.raises(UserError, match="must be positive"):
        inference_pipeline(config, [0.0], flip=False)


def test_a_file_s_config_is_data():
    text = "a = dict(b=(1, 2), c=[None, dict(d=-1.5)])\ne = {'f': True}\n"
    assert literal_config(text) == {"a": {"b": (1, 2), "c": [None, {"d": -1.5}]}, "e": {"f": True}}
    for code in ("import os", "a = open('x')", "a = dict(b=__import__('os'))", "a = [x for x in 'ab']"):
        with pytest.raises(ValueError):
            literal_config(code)


def test_code_in_a_file_is_not_run(trained, tmp_path):
    state, metadata = read_weights(trained[0] / "segmenter.safetensors")
    metadata["config"] += f"\nx = open({str(tmp_path / 'trace')!r}, 'w')\n"
    write_weights(tmp_path / "s.safetensors", state, metadata)
    with pytest.raises(UserError, match=r"the metadata of .* is damaged"):
        read_segmenter(tmp_path / "s.safetensors")
    assert not (tmp_path / "trace").exists()


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_predict_refuses_in_one_sentence(trained, tmp_path, capsys, write_encoder):
    run, scenes = trained
    images, out = scenes / "images" / "validation", tmp_path / "out"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((run / "segmenter.safetensors").read_bytes()[:-500])
    encoder = write_encoder(tmp_path / "encoder.safetensors")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    for message, *arguments in (
        ("is not a segmenter (it holds mae_core)", encoder, images, "--out", out),
        ("is truncated", broken, images, "--out", out),
        ("holds no segmenter.safetensors", scenes, images, "--out", out),
        ("does not exist", tmp_path / "none.safetensors", images, "--out", out),
        ("does not exist; give image files or folders", run, tmp_path / "nowhere", "--out", out),
        ("cannot be read", run, tmp_path / "text.png", "--out", out),
        ("is not empty; give another --out", run, images, "--out", tmp_path / "taken"),
        ("text.png is a file; give a folder with --out", run, images, "--out", tmp_path / "text.png"),
        ("cannot write to /proc: ", run, images, "--out", "/proc/mae"),
        ("would both be written as 1.png", run, images / "1.png", scenes / "images/training/1.png", "--out", out),
        ("--opacity is 3.0", run, images, "--out", out, "--opacity", "3"),
        ("leave gaps", run, images, "--out", out, "--mode", "slide", "--stride", "999"),
    ):
        assert message in refusal(capsys, *arguments)
        assert not out.exists()


def test_unreadable_images_are_named_and_the_rest_is_labelled(trained, tmp_path, capsys):
    run, scenes = trained
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    Image.open(scenes / "images/training/0.png").save(folder / "deep" / "a.jpg")
    (folder / "b.jpg").write_bytes(b"no picture")
    written = predict(run, [folder], tmp_path / "out")
    assert written == [tmp_path / "out" / "labels" / "deep" / "a.png"]
    assert f"skipped: image {folder / 'b.jpg'} cannot be read" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"b\.jpg cannot be read"):
        predict(run, [folder], tmp_path / "other", on_error="raise")


def test_values_are_those_of_the_label_maps_it_was_trained_on(trained, tmp_path):
    state, metadata = read_weights(trained[0] / "segmenter.safetensors")
    write_weights(tmp_path / "s.safetensors", state, {**metadata, "reduce_zero_label": True})
    image = trained[1] / "images" / "training" / "0.png"
    (plain,) = predict(trained[0], [image], tmp_path / "plain")
    (reduced,) = predict(tmp_path / "s.safetensors", [image], tmp_path / "reduced")
    assert np.array_equal(np.asarray(Image.open(plain)) + 1, np.asarray(Image.open(reduced)))
    assert (tmp_path / "reduced" / "classes.txt").read_text() == "1\tground\n2\tbox\n3\tdisc\n"


def test_evaluation_refuses(trained, tmp_path, capsys):
    run, scenes = trained
    options = {"data_root": str(scenes), "visualizer.vis_backends": []}

    def refused(checkpoint, match, **more):
        with pytest.raises(UserError, match=match):
            train_net.evaluate_segmenter(DIGITS, checkpoint, work_dir=tmp_path / "run", cfg_options={**options, **more})
        assert not (tmp_path / "run").exists()

    refused(tmp_path / "none.pth", r"none\.pth does not exist")
    torch.save({"weights": 1}, tmp_path / "odd.pth")
    refused(tmp_path / "odd.pth", "holds no state_dict")
    (scenes / "other.txt").write_text("0\tsky\n1\tbox\n2\tdisc\n")
    other = {f"{part}_dataloader.dataset.classes_file": "other.txt" for part in ("train", "val")}
    refused(run, r"was trained on other classes than the data has \('ground' against 'sky'\)", **other)
    (scenes / "four.txt").write_text("0\tground\n1\tbox\n2\tdisc\n3\tmore\n")
    more = {f"{part}_dataloader.dataset.classes_file": "four.txt" for part in ("train", "val")}
    refused(run, r"was trained on other classes than the data has \(3 against 4\)", num_classes=4, **more)
    refused(run, r"num_classes=2 was asked for, but .* have 3 classes; set num_classes=3", num_classes=2)
    (tmp_path / "file").touch()
    for place, message in (("file", r"file is a file; give a folder with --work-dir"), ("file/x", "cannot write to")):
        with pytest.raises(UserError, match=message):
            train_net.evaluate_segmenter(DIGITS, run, work_dir=tmp_path / place, cfg_options=options)
    for flag in ("--resume", "--amp", "--weights=x"):
        with pytest.raises(SystemExit):
            train_net.main([str(DIGITS), "--eval-only", str(run), flag])
        assert "--eval-only trains nothing" in capsys.readouterr().err


# ---------------------------------------------------------------- for other programs


@pytest.mark.slow
def test_onnx_gives_the_labels_of_the_evaluation(trained, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install mae-transfer[onnx]")
    pytest.importorskip("onnxscript", reason="pip install mae-transfer[onnx]")
    run, scenes = trained
    path, out = scenes / "images" / "validation" / "4.png", tmp_path / "s.onnx"
    export_main([str(run), "--to", "onnx", "--size", "24", "40", "--out", str(out)])
    assert "for images of 24x40; its logits differ from torch's by" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1)[None]
    logits, labels = session.run(["logits", "labels"], {"images": pixels})
    assert logits.shape == (1, 3, 24, 40) and np.array_equal(labels, logits.argmax(1))
    assert np.array_equal(labels[0], Predictor(read_segmenter(run))(path))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["ground", "box", "disc"]


@pytest.mark.slow
def test_a_program_of_torch_export_gives_the_segmenters_logits(trained, tmp_path):
    """In 16 bits here: those of the rounded weights, from a file that needs neither mmseg nor this package."""
    run, scenes = trained
    path, out = scenes / "images" / "validation" / "4.png", tmp_path / "s.pt2"
    export_main([str(run), "--to", "torch-export", "--size", "24", "40", "--half", "--out", str(out)])
    extra = {"facts.json": ""}
    program = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra["facts.json"])["classes"] == ["ground", "box", "disc"]
    model = exporting.WholeImage(read_segmenter(run)).eval()
    pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1)[None])
    with torch.no_grad():
        (expected, _), (logits, labels) = model(pixels), program(pixels)
    assert 0 < (logits - expected).abs().max() < 0.05 and torch.equal(labels, logits.argmax(1))


def test_mmseg_runs_the_export_with_its_own_backbone(trained, tmp_path, capsys):
    run, scenes = trained
    out = tmp_path / "s.pth"
    export_main([str(run), "--to", "mmseg", "--out", str(out)])
    assert "mmseg's logits differ from ours by" in capsys.readouterr().out
    config = Config.fromfile(out.with_suffix(".py"))
    assert config.model.backbone.type == "MAE" and "custom_imports" not in config
    theirs = init_model(config, str(out), device="cpu")
    assert list(theirs.dataset_meta["classes"]) == ["ground", "box", "disc"]
    ours = build_segmenter(read_segmenter(run))
    tables = [name for name in theirs.state_dict() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 6 and any(theirs.state_dict()[name].abs().max() > 0 for name in tables)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, other = (model.decode_head.forward(model.extract_feat(images)) for model in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    labels = inference_model(theirs, str(scenes / "images/validation/4.png")).pred_sem_seg.data[0].numpy()
    assert np.array_equal(labels, Predictor(read_segmenter(run), crop_size=32)(scenes / "images/validation/4.png"))


def test_an_export_that_differs_is_not_written(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit):
        export_main([str(trained[0]), "--to", "mmseg", "--out", str(tmp_path / "s.pth")])
    assert "logits differ by" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_export_refuses_in_one_sentence(trained, tmp_path, capsys):
    run = str(trained[0])
    (tmp_path / "taken.py").touch()
    for message, *arguments in (
        ("has to end in .onnx for onnx", "--to", "onnx", "--size", "24", "40", "--out", tmp_path / "s.pth"),
        ("--to onnx needs --size HEIGHT WIDTH", "--to", "onnx", "--out", tmp_path / "s.onnx"),
        (
            "--to mmseg takes neither --size nor --half",
            "--to",
            "mmseg",
            "--size",
            "8",
            "8",
            "--out",
            tmp_path / "s.pth",
        ),
        ("taken.py exists", "--to", "mmseg", "--out", tmp_path / "taken.pth"),
        ("give two positive numbers", "--to", "onnx", "--size", "0", "8", "--out", tmp_path / "s.onnx"),
    ):
        with pytest.raises(SystemExit) as stopped:
            export_main([run, *map(str, arguments)])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------- from Python


def test_label_maps_from_python_are_those_that_predict_writes(trained, tmp_path):
    run, scenes = trained
    paths = sorted((scenes / "images" / "validation").glob("*.png"))[:3]
    Image.open(paths[0]).resize((56, 32)).save(tmp_path / "larger.png")
    paths.append(tmp_path / "larger.png")
    written = [np.asarray(Image.open(path)) for path in predict(run, paths, tmp_path / "out", device="cpu")]
    segmenter = transfer.load_segmenter(run, device="cpu")
    found = segmenter.predict(paths)
    for one, other in zip(found, written, strict=True):
        assert np.array_equal(one.labels, other) and one.labels.dtype == np.uint8
    assert found[0].classes == ["ground", "box", "disc"] and found[0].values == [0, 1, 2]
    drawn = Image.open(tmp_path / "out" / "overlays" / f"{paths[0].stem}.png")
    assert np.array_equal(np.asarray(found[0].draw(0.5)), np.asarray(drawn))


def test_pictures_and_arrays_are_labelled_as_files(trained):
    run, scenes = trained
    path = scenes / "images" / "validation" / "2.png"
    array = np.asarray(Image.open(path))
    segmenter = transfer.load_segmenter(run, device="cpu")
    found = segmenter.predict([path, Image.open(path), array, array.astype(np.uint16) * 257])
    for other in found[1:3]:
        assert np.array_equal(other.indices, found[0].indices)
    assert (found[3].indices == found[0].indices).mean() > 0.99
    assert segmenter.predict(array[..., 0]).labels.shape == (24, 40)
    with pytest.raises(UserError, match=r"image number 0 \(ndarray\) cannot be read \(it has 5 channels"):
        segmenter.predict([np.zeros((9, 9, 5), np.float32)])


# ---------------------------------------------------------------- large images


@pytest.fixture
def mosaic(trained, tmp_path):
    """A TIFF of 4 x 3 scenes, 96 x 120 pixels, in compressed tiles."""
    images = [np.asarray(Image.open(path)) for path in sorted((trained[1] / "images" / "validation").glob("*.png"))]
    rows = [np.concatenate([images[(row + col) % 8] for col in range(3)], axis=1) for row in range(4)]
    path = tmp_path / "mosaic.tif"
    tifffile.imwrite(path, np.concatenate(rows), tile=(32, 48), compression="zlib", photometric="rgb")
    return path


@pytest.mark.parametrize("most", [2**29, 2**14])
@pytest.mark.parametrize("crop, stride", [(32, 20), (40, 40)])
def test_windows_of_a_large_image_average_to_the_sliding_inference_on_the_whole(trained, mosaic, crop, stride, most):
    """The class scores, everywhere: the same windows, summed a stripe at a time."""
    predictor = Predictor(read_segmenter(trained[0]), mode="slide", crop_size=crop, stride=stride)
    whole = predictor._answer(mosaic, "whole").seg_logits.data.numpy()
    layout = layout_of(read_segmenter(trained[0]).config, predictor.section, 999, 0.5)
    assert layout.window == (crop, crop) and layout.stride == (stride, stride) and not layout.own
    found, covered = np.zeros_like(whole), np.zeros(whole.shape[1:], int)
    source = open_windows(mosaic, 3, "mosaic")
    scores_of, classes = predictor.scores_in(layout.window_in(source)), len(whole)
    told: list[tuple[int, int]] = []
    counted = {"most": most, "on_progress": lambda *done: told.append(done)}
    for window, scores in seamless(source, scores_of, layout, classes, **counted):
        part = (slice(window.top, window.bottom), slice(window.left, window.right))
        found[(slice(None), *part)] = scores
        covered[part] += 1
    assert (covered == 1).all()
    assert told == [(number, len(told)) for number in range(1, len(told) + 1)] and len(told) >= 4
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_tiles_are_labelled_as_images_of_their_own(trained, mosaic):
    """A segmenter that sees images whole: tiles in place of windows, with the same average."""
    whole = transfer.load_segmenter(trained[0], device="cpu")
    slide = transfer.load_segmenter(trained[0], device="cpu", mode="slide", crop_size=48, stride=36)
    tiled = whole.predict(mosaic, tile=48, overlap=0.25)
    assert np.array_equal(tiled.indices, slide.predict(mosaic).indices)
    small = whole.predict(mosaic, tile=500)  # one tile: the image
    assert np.array_equal(small.indices, whole.predict(mosaic).indices)


def test_one_score_a_pixel_is_decided_once(trained, monkeypatch):
    """Of a segmenter with one channel mmseg keeps the sigmoid of the scores: tiles decide as the whole image does."""
    predictor = Predictor(read_segmenter(trained[0]))
    logits = torch.tensor([[[-2.0, -0.5, 0.1, 3.0]]])
    answer = SimpleNamespace(seg_logits=SimpleNamespace(data=logits.sigmoid()))
    monkeypatch.setattr(predictor, "_answer", lambda *given: answer)
    scores = predictor.scores_of_own(np.zeros((1, 4, 3), np.uint8))
    np.testing.assert_allclose(scores, logits.numpy(), atol=1e-4)
    monkeypatch.setattr(predictor.model.decode_head, "threshold", 0.3, raising=False)
    assert predictor.decide(scores).tolist() == [[0, 1, 1, 1]]


def test_an_image_that_breaks_off_leaves_no_file_of_its_labels(trained, mosaic, tmp_path):
    cut = tmp_path / "cut.tif"
    cut.write_bytes(mosaic.read_bytes())
    with tifffile.TiffFile(mosaic) as file:
        page = file.pages[0]
        place, count = page.dataoffsets[-1], page.databytecounts[-1]
    with cut.open("r+b") as stream:
        stream.seek(place)
        stream.write(bytes(count))
    written = predict(trained[0], [cut, mosaic], tmp_path / "out", tile=48, device="cpu")
    assert [path.name for path in written] == ["mosaic.tif"]
    assert [entry.name for entry in (tmp_path / "out" / "labels").iterdir()] == ["mosaic.tif"]


def test_large_label_maps_are_tiled_tiffs_read_by_windows(trained, mosaic, tmp_path, monkeypatch):
    monkeypatch.setattr("mae_core.data.windows.read_image", lambda *given: pytest.fail("the file is read whole"))
    main([str(trained[0]), str(mosaic), "--out", str(tmp_path / "out"), "--tile", "48", "--device", "cpu"])
    path = tmp_path / "out" / "labels" / "mosaic.tif"
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].is_tiled and file.pages[0].compression == 8
        labels = file.asarray()
    expected = transfer.load_segmenter(trained[0], device="cpu").predict(str(mosaic), tile=48)
    assert labels.dtype == np.uint8 and np.array_equal(labels, expected.labels)
    assert [entry.name for entry in path.parent.iterdir()] == ["mosaic.tif"]
    with Image.open(tmp_path / "out" / "overlays" / "mosaic.png") as drawn:
        assert drawn.width >= 120
    with pytest.raises(UserError, match="leave --scales and --flip out"):
        predict(trained[0], [mosaic], tmp_path / "other", tile=48, flip=True)
    with pytest.raises(UserError, match="leave scales and flip out"):
        transfer.load_segmenter(trained[0], device="cpu", flip=True).predict(mosaic, tile=48)


def test_a_segmenter_of_resized_images_sees_resized_tiles(trained):
    config = {"model": {}, "val_dataloader": {"dataset": {"pipeline": [{"type": "Resize"}]}}}
    layout = layout_of(config, {"mode": "slide", "crop_size": (32, 32), "stride": (20, 20)}, 100, 0.25)
    assert layout == ((100, 100), (75, 75), 1, True)
