"""predict.py: pictures and COCO results from a trained detector, whatever the images are."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from mae_core.config.load import load_config
from mae_core.training.pretrain import pretrain
from mae_core.training.pretrain_config import PretrainConfig
from mae_core.weights.files import read_weights, write_weights
from transfer.detection.coco import Part, read_coco
from transfer.detection.config import DetectionConfig
from transfer.detection.predict import main, predict
from transfer.detection.results import average_precision
from transfer.detection.run import evaluate_detector, train_detector
from transfer.engines import installed

SCORES = ("test.score_threshold=0.001", "test.detections=20", "test.picture_score=0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, detection_root, tiny_detector):
    """A run of a tiny detector, and its metrics; tests must not write to it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    own = (f"data.path={detection_root}", f"output={run}", "optim.epochs=10", "optim.base_lr=0.06", *SCORES)
    return run, train_detector(load_config(DetectionConfig, None, [*tiny_detector, *own]))


@pytest.fixture
def run(trained):
    return trained[0]


def read(folder):
    return json.loads((folder / "predictions.json").read_text()), json.loads((folder / "images.json").read_text())


def test_the_predictions_with_the_truths_ids_score_as_the_evaluation_did(trained, detection_root, tmp_path, capsys):
    run, metrics = trained
    truth = detection_root / "annotations" / "instances_val.json"
    main(["--weights", str(run), str(detection_root / "val"), "--out", str(tmp_path / "out"), "--truth", str(truth)])
    results, images = read(tmp_path / "out")
    scores = average_precision(read_coco(Part(detection_root / "val", truth)), results, detections=20)
    assert scores["bbox"]["AP"] == pytest.approx(metrics["bbox"]["AP"]) and scores["bbox"]["AP"] > 0
    assert scores["segm"]["AP"] == pytest.approx(metrics["segm"]["AP"])
    assert [image["id"] for image in images["images"]] == [5, 15, 25]
    assert {p.name for p in (tmp_path / "out" / "pictures").iterdir()} == {"000.png", "001.png", "002.png"}
    said = capsys.readouterr().out
    assert re.search(r"^000: \d+ (bar|frame|disc)", said, re.M) and "3 pictures, " in said


def test_a_detector_is_asked_as_in_its_training_but_for_what_is_given(trained, detection_root, tmp_path):
    run, metrics = trained
    asked = [f"weights={run}", f"data.path={detection_root}", "device=cpu", "data.workers=0"]
    again = evaluate_detector(load_config(DetectionConfig, None, [*asked, f"output={tmp_path / 'a'}"]))
    assert [again[kind] for kind in ("bbox", "segm")] == [metrics[kind] for kind in ("bbox", "segm")]
    few = [*asked, f"output={tmp_path / 'b'}", "test.detections=1"]
    evaluate_detector(load_config(DetectionConfig, None, few))
    counts = [len(json.loads((tmp_path / name / "predictions.json").read_text())) for name in ("a", "b")]
    assert counts[0] > 20 and counts[1] == 3  # three images


def test_predictions_are_cocos_results_for_the_images_json_beside_them(run, detection_root, tmp_path):
    from pycocotools.coco import COCO

    nested = tmp_path / "given" / "nested"
    nested.mkdir(parents=True)
    for name in ("a", "b"):
        Image.open(detection_root / "val" / "001.png").save(nested / f"{name}.png")
    single = tmp_path / "single.png"
    Image.open(detection_root / "val" / "000.png").save(single)
    predicted = predict(run, [tmp_path / "given", single], tmp_path / "out", overrides=["device=cpu"])
    out = tmp_path / "out"
    results, images = read(out)
    assert [i["file_name"] for i in images["images"]] == ["nested/a.png", "nested/b.png", "single.png"]
    assert [i["id"] for i in images["images"]] == [1, 2, 3] and {c["id"] for c in images["categories"]} == {3, 7, 20}
    found = COCO(str(out / "images.json")).loadRes(str(out / "predictions.json"))
    assert len(found.anns) == len(results) > 0
    for result in results:
        x, y, w, h = result["bbox"]
        assert 0 <= x <= x + w <= 64.01 and 0 <= y <= y + h <= 48.01 and 0 <= result["score"] <= 1
        assert found.annToMask({**result, "iscrowd": 0}).shape == (48, 64)
    assert (out / "pictures" / "nested" / "b.png").is_file() and len(predicted.found) == 3
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # nothing half-written is left


def test_pictures_show_what_is_above_the_score_alone(run, detection_root, tmp_path, capsys):
    image = detection_root / "val" / "000.png"
    predict(run, [image], tmp_path / "all", score=0)
    predict(run, [image], tmp_path / "none", score=1)
    said = capsys.readouterr().out
    assert "000: nothing" in said and "no object has a score of 1 or more, the best has 0." in said
    drawn, plain = (np.asarray(Image.open(tmp_path / n / "pictures" / "000.png")) for n in ("all", "none"))
    half = plain.shape[1] // 2 + 4
    body = slice(26, None)  # below the titles
    assert np.array_equal(plain[body, : half - 8], plain[body, half:])  # the image, twice
    assert np.array_equal(plain[body, : half - 8], drawn[body, : half - 8])
    assert not np.array_equal(drawn[body, half:], plain[body, half:])
    assert read(tmp_path / "all")[0] == read(tmp_path / "none")[0]  # the json does not depend on it


def test_other_kinds_of_images(run, detection_root, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    picture = Image.open(detection_root / "val" / "000.png")
    picture.convert("L").save(given / "grey.png")
    picture.convert("RGBA").save(given / "alpha.png")
    picture.convert("P").save(given / "palette.gif.png")
    np.save(given / "array.npy", np.asarray(picture))
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(given / "sixteen.tif")
    picture.resize((7, 200)).save(given / "narrow.jpg")
    found = predict(run, [given], tmp_path / "out").found
    assert len(found) == 6 and len(list((tmp_path / "out" / "pictures").iterdir())) == 6


def test_five_channels_from_the_pretraining_to_the_pictures(
    tmp_path, write_coco, to_bands, configure_detection, pretrain_options
):
    root = write_coco(tmp_path / "bands")
    to_bands(root)
    encoder = tmp_path / "encoder"
    bands = ("data.channels=5", "data.mean=[0.1,0.1,0.1,0.1,0.1]", "data.std=[0.2,0.2,0.2,0.2,0.2]")
    options = (*pretrain_options, *bands, f"data.path={root / 'train'}", f"output={encoder}", "optim.epochs=1")
    pretrain(load_config(PretrainConfig, None, options))
    train_detector(
        configure_detection(f"weights={encoder}", f"data.path={root}", "optim.epochs=1", *SCORES, scratch=False)
    )
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (root / "val" / "000.npy").rename(pictures / "000.npy")
    Image.new("RGB", (64, 48)).save(pictures / "001.png")
    said = []
    found = predict(tmp_path / "run", [pictures], tmp_path / "out", say=said.append)
    assert [d.image_index for d in found.found] == [0] and (tmp_path / "out" / "pictures" / "000.png").is_file()
    (skipped,) = (line for line in said if line.startswith("skipped"))
    assert "001.png: it has 3 channels, data.channels is 5" in skipped
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 3


def test_an_unreadable_image_is_named_and_skipped_or_stops_everything(run, detection_root, tmp_path, capsys):
    given = tmp_path / "given"
    given.mkdir()
    whole = (detection_root / "val" / "000.png").read_bytes()
    (given / "whole.png").write_bytes(whole)
    (given / "cut.png").write_bytes(whole[: len(whole) // 2])
    (given / "text.png").write_text("no image")
    predicted = predict(run, [given], tmp_path / "out")
    said = capsys.readouterr().out
    assert len(predicted.found) == 1 and len(predicted.unreadable) == 2
    assert "text.png: not an image" in said and "cut.png: " in said
    for extra in (["--on-error", "raise"], []):
        wanted = [given] if extra else [given / "cut.png"]
        refuse([*extra, "--weights", run, *wanted, "--out", tmp_path / "no"], r"(cut|text)\.png", capsys)
    assert not (tmp_path / "no").exists()


def refuse(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error), error
    assert error.count("\n") == 1 and error.startswith("error: "), error


def test_wrong_input_is_one_sentence_and_leaves_nothing(
    run, pretrained, detection_root, tmp_path, capsys, write_coco, monkeypatch
):
    image, out = detection_root / "val" / "000.png", tmp_path / "out"
    weights = run / "detector.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    other = write_coco(tmp_path / "other", 1, 1) / "annotations" / "instances_val.json"
    content = json.loads(other.read_text())
    content["categories"][0]["name"] = "ball"
    other.write_text(json.dumps(content))
    renamed = tmp_path / "renamed.png"
    Image.open(image).save(renamed)
    truth = detection_root / "annotations" / "instances_val.json"
    for arguments, message in (
        ([image, "--weights", tmp_path / "no.safetensors"], r"weights file .*no\.safetensors does not exist"),
        ([image, "--weights", tmp_path / "empty"], "holds no detector.safetensors; give the folder of a finished"),
        ([image, "--weights", pretrained / "encoder.safetensors"], "is not a detector that train_net.py wrote"),
        ([image, "--weights", cut], r"cut\.safetensors is truncated"),
        ([image, "--weights", image], "."),
        ([tmp_path / "no.png", "--weights", run], r"image .*no\.png does not exist"),
        ([tmp_path / "empty", "--weights", run], r"no images below .*empty .*; give image files or folders of them"),
        ([truth, "--weights", run], "instances_val.json cannot be read .not an image."),
        ([image, image, "--weights", run], r"would both be written as 000\.png"),
        ([image, "--weights", run, "--score", 2], r"--score is 2\.0; give a number from 0 to 1"),
        ([image, "--weights", run, "--truth", other], r"differ in 1 categories \(id 20 is 'ball'"),
        ([renamed, "--weights", run, "--truth", truth], r"instances_val\.json has no such image as .*renamed\.png"),
        ([image, "--weights", run, "--truth", tmp_path / "no.json"], r"no\.json does not exist"),
        ([image, "--weights", run, "test.detectoins=5"], "did you mean"),
        (
            [image, "--weights", run, "model.size=base"],
            r"model\.size=base has no effect on the predictions of .*detector\.safetensors",
        ),
        ([image, "--weights", run, "ema=0.9"], r"ema=0\.9 has no effect"),
        ([image, "--weights", run, "data.channels=1"], r"data\.channels=1 has no effect on the predictions"),
        ([image, "--weights", run, "--truth", image], "is not JSON"),
    ):
        refuse([*arguments, "--out", out], message, capsys)
    refuse([image, "--weights", run, "--out", full], "is not empty; give another --out", capsys)
    refuse([image, "--weights", run, "--out", full / "file" / "out"], "cannot write to .*file", capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse([image, "--weights", run, "--out", out], "runs in one process; start it without torchrun", capsys)
    assert not out.exists() and [p.name for p in full.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "section, prefix, option, value",
    [("detector", "model", "neck", "bifpn"), ("detector", "model", "norm", "rms"), ("test", "test", "soft", 1)],
)
def test_a_detector_of_a_newer_version_is_refused(
    run, detection_root, tmp_path, capsys, section, prefix, option, value
):
    tensors, metadata = read_weights(run / "detector.safetensors")
    newer = tmp_path / "newer.safetensors"
    write_weights(newer, tensors, {**metadata, section: {**metadata[section], option: value}})
    message = rf"newer\.safetensors was trained with {prefix}\.{option}={value}, which this version"
    refuse([detection_root / "val" / "000.png", "--weights", newer, "--out", tmp_path / "out"], message, capsys)


@pytest.mark.detectron2
@pytest.mark.skipif(not installed("detectron2"), reason="detectron2 is not installed; its page says how")
def test_a_detector_of_detectron2_predicts_by_the_same_command(configure_detection, detection_root, tmp_path):
    metrics = train_detector(configure_detection("engine=detectron2", "optim.epochs=4", *SCORES))
    truth = detection_root / "annotations" / "instances_val.json"
    predict(tmp_path / "run", [detection_root / "val"], tmp_path / "out", truth=truth)
    scores = average_precision(read_coco(Part(detection_root / "val", truth)), read(tmp_path / "out")[0], detections=20)
    assert scores["bbox"]["AP"] == pytest.approx(metrics["bbox"]["AP"])
