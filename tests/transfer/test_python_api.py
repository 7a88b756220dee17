"""``transfer.load_detector``: files, pictures and arrays in, what predict.py writes out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import transfer
from mae_core.errors import UserError
from transfer.detection.predict import predict
from transfer.detection.results import coco_results
from transfer.detection.run import train_detector

pytest.importorskip("pycocotools", reason="pip install mae-transfer[detection]")
SCORES = ("test.score_threshold=0.001", "test.detections=20", "test.picture_score=0")
HEADS = ("mask_rcnn", "faster_rcnn")


@pytest.fixture(scope="module", params=HEADS)
def run(request, tmp_path_factory, detection_root, tiny_detector):
    from mae_core.config.load import load_config
    from transfer.detection.config import DetectionConfig

    folder = tmp_path_factory.mktemp(request.param) / "run"
    own = (f"data.path={detection_root}", f"output={folder}", "optim.epochs=2", f"model.head={request.param}", *SCORES)
    train_detector(load_config(DetectionConfig, None, [*tiny_detector, *own]))
    return folder


def test_the_objects_are_those_that_predict_writes(run, detection_root, write_images, tmp_path):
    (other,) = write_images(tmp_path / "photos", 1, size=(30, 90))
    other = other.rename(tmp_path / "other.png")
    paths = [*sorted((detection_root / "val").glob("*.png")), other]  # of two sizes
    predict(run, paths, tmp_path / "out", overrides=["device=cpu"])
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    detector = transfer.load_detector(run, device="cpu")
    found = detector.predict(paths)
    coco = detector.set_of(detector.records(paths))
    again = [result for one in found for result in coco_results(coco, [one.detections])]
    assert again == written and len(written) > 20
    assert [one.size for one in found] == [(48, 64)] * 3 + [(90, 30)]


def test_the_parts_of_an_answer(run, detection_root):
    detector = transfer.load_detector(run, device="cpu")
    path = detection_root / "val" / "000.png"
    found = detector.predict(path, score=0.0)
    number = len(found)
    assert number and found.boxes.shape == (number, 4) and found.scores.shape == (number,)
    assert detector.classes == ["bar", "frame", "disc"] and set(found.names) <= set(detector.classes)
    assert found.names[0] == detector.classes[found.labels[0] - 1]
    if found.codes is None:
        assert found.masks is None and not detector.head.learns_masks
    else:
        assert found.masks.shape == (number, 48, 64) and found.masks.dtype == bool
    best = found.above(float(found.scores[0]))
    assert len(best) == 1 and len(detector.predict(path, score=1.0)) == 0
    plain, drawn = (np.asarray(found.draw(score)) for score in (1.1, 0.0))
    assert plain.shape == drawn.shape and not np.array_equal(plain, drawn)


def test_files_pictures_and_arrays_agree(run, detection_root):
    path = detection_root / "val" / "000.png"
    array = np.asarray(Image.open(path))
    deep = array.astype(np.uint16) * 257
    found = transfer.load_detector(run, device="cpu").predict([path, str(path), Image.open(path), array, deep])
    for other in found[1:]:
        np.testing.assert_allclose(other.boxes, found[0].boxes, atol=0.05)
        np.testing.assert_allclose(other.scores, found[0].scores, atol=1e-3)
    assert found[3].codes == found[0].codes
    single = transfer.load_detector(run, device="cpu").predict(array[..., 0])  # grey is read as RGB
    assert single.size == (48, 64)


def test_what_cannot_be_searched_is_said(run, pretrained, tmp_path):
    detector = transfer.load_detector(run, device="cpu")
    with pytest.raises(UserError, match=r"image number 0 \(ndarray\) cannot be read \(it has 5 channels"):
        detector.predict([np.zeros((9, 9, 5), np.float32)])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png cannot be read .not an image"):
        detector.predict(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"is not a detector that train_net\.py wrote"):
        transfer.load_detector(pretrained / "encoder.safetensors")
    with pytest.raises(UserError, match=r"optim.epochs=3 has no effect on the predictions"):
        transfer.load_detector(run, overrides=["optim.epochs=3"])
    with pytest.raises(AttributeError, match="no attribute 'load_nothing'"):
        transfer.load_nothing  # noqa: B018
